import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from edgeblocks.seeds import generator_at, seed_at, start_noise


def test_start_noise_is_the_same_for_more_samples():
    """Sample i's noise is decided by (seed, i): the same among 3 and among 10, another for another seed or sample."""
    few, many = (start_noise((2, 3, 3), samples=range(count), seed=1) for count in (3, 10))
    assert few.dtype == np.float32
    np.testing.assert_array_equal(few, many[:3])
    assert len({noise.tobytes() for noise in many}) == 10
    assert not np.array_equal(few, start_noise((2, 3, 3), samples=range(3), seed=2))


def test_start_noise_is_standard_normal():
    """Mean 0 and variance 1 over samples and components."""
    noise = start_noise((3, 8, 8), samples=range(100), seed=0)
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert noise.var() == pytest.approx(1, abs=0.05)


PARTS = st.one_of(st.integers(-20, 200), st.text("/01a-", max_size=4))


@given(st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=4))
@example([1], ["1"])
@example([1, "a/b"], [1, "a", "b"])
@example([1, "//2f"], [1, "/"])
@example([1, ""], [1])
@example([""], [])
@example([1, 23], [12, 3])
def test_different_positions_have_different_seeds(one, other):
    """A number is not the text of its digits, and a text with a slash is one part; every seed suits numpy and torch."""
    alike = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (seed_at(*one) == seed_at(*other)) == alike
    assert all(0 <= seed_at(*position) < 2**63 for position in (one, other))


def test_a_generator_is_decided_by_its_position():
    """The same position draws the same numbers, another one others, and the global generator is not touched."""
    before = torch.get_rng_state()
    one, same, other = (torch.randn(4, generator=generator_at(0, "train", block, 3)) for block in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("position", "seed"),
    [
        ((0,), 2033344993903900207),
        ((0, "init", 0), 1391976149099393129),
        ((0, "train", 1, 2), 7862477292193677372),
        ((-3, "train", 0, 1), 8491869179483291011),
        ((7, "order", 2, 5), 1034158381368431933),
        ((0, "eval", 3), 1073349005583079152),
        ((0, "bound", 1, 9), 6406239083384485124),
        ((0, "unmask", 4), 5786511980534205767),
        ((0, "continue", 4), 6298818252911891013),
        ((0, "verify", 1, 2), 8449673720725000249),
        (("export", 3), 8584289085864632450),
        ((0, "chain", 1), 8295900662994219420),
        ((0, "start", 0), 6646111252240885661),
        ((0, "start", 16 * "0f9a"), 4718866867264564018),
        ((0, "start", "photo 1.png"), 6408938030643180720),
        ((0, "start", "007"), 9147807793842989528),
    ],
)
def test_seeds_are_for_ever(position, seed):
    """A seed is a fixed function of its position: runs of former versions can be resumed, samples drawn again."""
    assert seed_at(*position) == seed


def test_start_noise_is_for_ever():
    """As the seeds are."""
    assert start_noise((1,), samples=range(1), seed=0)[0, 0] == pytest.approx(-1.3040189, abs=1e-6)
