"""Filling in masked tokens: the chain against a slow one, against a known distribution, and what it never does."""

import itertools

import numpy as np
import pytest

from edgeblocks.diffusion.noise import MaskingSchedule, partition_noise, unmasking_steps
from edgeblocks.diffusion.unmasking import unmask
from edgeblocks.seeds import seed_at

VOCABULARY, LENGTH = 5, 7
MASK = VOCABULARY
PARTITION = partition_noise(MaskingSchedule(), num_blocks=3, kind="equal-probability", overlap=0.1)
STEPS = unmasking_steps(PARTITION, num_steps=8)


def logits_of(z, t):
    """Some function of the whole sequence, the place and the time, the same however sequences are grouped."""
    totals = (z * np.arange(1, z.shape[1] + 1)).sum(1)[:, None, None]
    places, answers = np.arange(z.shape[1])[:, None], np.arange(VOCABULARY)
    return (2 * np.sin(totals + 3 * places + 5 * answers + 7 * t)).astype(np.float32)


def partly_masked(count, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (count, LENGTH))
    return np.where(rng.random((count, LENGTH)) < 0.7, MASK, tokens)


def filled(tokens, *, steps=STEPS, temperature=1.0, seed=3, micro_batch=4, network=logits_of, on_step=None):
    return unmask(
        lambda z, t, wanted: network(z, t)[wanted],
        tokens,
        steps=steps,
        mask=MASK,
        temperature=temperature,
        seed=seed,
        micro_batch=micro_batch,
        on_step=on_step,
    )


def slow(tokens, temperature, seed):
    """One sample and one position at a time."""
    tokens = tokens.copy()
    for index, sample in enumerate(tokens):
        stream = np.random.default_rng(seed_at(seed, "unmask", index))
        for t_from, t_to in STEPS:
            whether, which = stream.random(LENGTH), stream.random(LENGTH)
            logits = logits_of(sample[None].copy(), (t_from + t_to) / 2)[0].astype(float)
            for place in range(LENGTH):
                if sample[place] == MASK and whether[place] < 1 - t_to / t_from:
                    shares = np.exp(logits[place] / temperature)
                    ends = np.cumsum(shares / shares.sum())
                    sample[place] = next(token for token, end in enumerate(ends) if which[place] < end)
    return tokens


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_unmasking_equals_a_slow_version(temperature):
    """Oracle: loops over samples and positions."""
    tokens = partly_masked(20)
    np.testing.assert_array_equal(filled(tokens, temperature=temperature), slow(tokens, temperature, 3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_given_tokens_stay_and_no_gap_is_left(temperature):
    """And what was passed in is not changed."""
    tokens = partly_masked(30)
    before = tokens.copy()
    done = filled(tokens, temperature=temperature)
    assert done.dtype == np.int64 and done.min() >= 0 and done.max() < VOCABULARY
    np.testing.assert_array_equal(done[tokens != MASK], tokens[tokens != MASK])
    np.testing.assert_array_equal(tokens, before)


def test_a_sample_does_not_depend_on_the_others():
    """Neither on how many there are nor on how many a network is given at a time; another seed gives another."""
    tokens = partly_masked(11)
    whole = filled(tokens, micro_batch=11)
    for count, micro_batch in ((11, 1), (11, 4), (5, 2), (1, 1)):
        np.testing.assert_array_equal(filled(tokens[:count], micro_batch=micro_batch), whole[:count])
    assert not np.array_equal(filled(tokens, seed=4), whole)


def test_temperature_zero_takes_the_likeliest_token():
    """In one step each gap gets the argmax of its logits; a low temperature comes to the same."""
    tokens = partly_masked(9)
    one_step = ((1.0, 0.0),)
    expected = np.where(tokens == MASK, logits_of(tokens, 0.5).argmax(-1), tokens)
    np.testing.assert_array_equal(filled(tokens, steps=one_step, temperature=0.0), expected)
    np.testing.assert_array_equal(filled(tokens, steps=one_step, temperature=1e-4), expected)


def test_networks_are_asked_in_order_inside_their_blocks():
    """Times are the middles of steps, so each lies strictly inside one block; groups keep to the micro-batch."""
    seen, steps_done = [], []

    def network(z, t):
        assert 1 <= len(z) <= 4 and (z == MASK).any(1).all()
        seen.append(t)
        return logits_of(z, t)

    filled(np.full((40, LENGTH), MASK), network=network, on_step=steps_done.append)
    assert list(dict.fromkeys(seen)) == [(t_from + t_to) / 2 for t_from, t_to in STEPS]
    assert [PARTITION.block_of(t) for t in dict.fromkeys(seen)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert steps_done == list(range(1, len(STEPS) + 1))


def test_nothing_is_computed_for_sequences_without_gaps():
    """A whole sequence comes back, and no network is asked."""
    tokens = np.arange(2 * LENGTH).reshape(2, LENGTH) % VOCABULARY
    np.testing.assert_array_equal(filled(tokens, network=None), tokens)


def test_as_many_tokens_are_unmasked_as_time_has_passed():
    """At each step the share of masked tokens is about the time, here in 10 sequences of 500."""
    masked = []

    def network(z, t):
        masked.append((z == MASK).mean())
        return logits_of(z, t)

    steps = unmasking_steps(PARTITION, num_steps=30)
    filled(np.full((10, 500), MASK), network=network, steps=steps, micro_batch=10)
    np.testing.assert_allclose(masked, [t_from for t_from, _ in steps], atol=0.03)


SEQUENCES = list(itertools.product(range(2), repeat=3))
PROBABILITIES = np.array([0.25, 0.02, 0.08, 0.15, 0.05, 0.2, 0.24, 0.01])


def perfect_logits(z, _):
    """log p(token | visible tokens) of the distribution over three bits, for each position; the mask is 2."""
    agree = np.array([[all(v in (2, w) for v, w in zip(row, s, strict=True)) for s in SEQUENCES] for row in z])
    joint = agree * PROBABILITIES
    bits = np.array(SEQUENCES)
    counts = np.stack([joint @ (bits == value) for value in range(2)], axis=-1)
    with np.errstate(divide="ignore"):
        return np.log(counts / joint.sum(1)[:, None, None]).astype(np.float32)


@pytest.mark.parametrize("num_steps", [1, 200])
def test_a_perfect_denoiser_gives_the_distribution(num_steps):
    """With many steps samples have the known distribution; in one step only its marginals (chi-square, 7 degrees)."""
    count = 2000
    steps = unmasking_steps(
        partition_noise(MaskingSchedule(), num_blocks=1, kind="uniform", overlap=0), num_steps=num_steps
    )
    found = unmask(
        lambda z, t, wanted: perfect_logits(z, t)[wanted],
        np.full((count, 3), 2),
        steps=steps,
        mask=2,
        temperature=1.0,
        seed=0,
        micro_batch=count,
    )
    counts = np.bincount(found @ [4, 2, 1], minlength=8)
    ones = PROBABILITIES @ np.array(SEQUENCES)
    marginal = np.array([np.prod(np.where(bits, ones, 1 - ones)) for bits in np.array(SEQUENCES)])
    expected = (marginal if num_steps == 1 else PROBABILITIES) * count
    other = (PROBABILITIES if num_steps == 1 else marginal) * count
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # exceeded once in a thousand seeds
    assert ((counts - other) ** 2 / other).sum() > 100
