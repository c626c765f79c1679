"""Tokens from probabilities: how often each is drawn, and which ones may be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.diffusion.token_choice import choose_tokens, nucleus

RANDOM = np.random.default_rng(0)


def test_temperature_zero_takes_the_likeliest():
    """Whatever the random number; a low temperature comes to the same."""
    shares = RANDOM.dirichlet(np.ones(9), size=20)
    for uniform in (0.01, 0.99):
        drawn = choose_tokens(shares, np.full(20, uniform), temperature=0.0, top_p=1.0)
        np.testing.assert_array_equal(drawn, shares.argmax(1))
        np.testing.assert_array_equal(choose_tokens(shares, np.full(20, uniform), temperature=1e-3, top_p=1.0), drawn)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """At temperature 1 in proportion to p, at 2 to its root."""
    shares = np.array([0.5, 0.3, 0.15, 0.05, 0.0])
    uniform = (np.arange(10_000) + 0.5) / 10_000
    for temperature in (1.0, 2.0):
        drawn = choose_tokens(np.tile(shares, (10_000, 1)), uniform, temperature=temperature, top_p=1.0)
        expected = shares ** (1 / temperature)
        np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 10_000, expected / expected.sum(), atol=2e-4)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any),
    st.floats(0.01, 1.0),
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(counts, top_p):
    """What is kept reaches p, is likelier than what is not, and without its least likely token would not reach p."""
    weights = np.array([counts], dtype=float)
    kept = nucleus(weights, top_p)[0]
    chosen = kept > 0
    np.testing.assert_array_equal(kept[chosen], weights[0][chosen])
    target = top_p * weights.sum()
    assert kept.sum() >= target * (1 - 1e-12)
    if not chosen.all():
        assert kept[chosen].min() >= weights[0][~chosen].max() or top_p == 1
    if top_p < 1:
        assert kept.sum() - kept[chosen].min() < target * (1 + 1e-12)
