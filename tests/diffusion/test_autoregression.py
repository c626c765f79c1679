"""Writing token by token: against a slow chain that keeps nothing, and what a sample depends on."""

import math

import numpy as np
import pytest

from edgeblocks.diffusion import autoregression
from edgeblocks.diffusion.autoregression import (
    LEAST_READ_SIGMA,
    TokenChain,
    check_continuing,
    check_prompt,
    read_levels,
    write_texts,
)
from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise, sampler_levels
from edgeblocks.errors import ConfigError
from edgeblocks.seeds import seed_at

VOCABULARY, WIDTH, LENGTH, HEADS, HEAD_WIDTH = 7, 5, 12, 2, 3
NOISE = NoiseDistribution(sigma_min=0.1, sigma_max=10.0, p_mean=0.0, p_std=1.2)
PARTITION = partition_noise(NOISE, num_blocks=3, kind="equal-probability", overlap=0.1)
LEVELS = sampler_levels(PARTITION, num_steps=5)
BLOCKS = tuple(PARTITION.block_of(sigma) for sigma in LEVELS)
KINDS = {"ar": "block", "looped": "step"}
RANDOM = np.random.default_rng(0)
CODES = RANDOM.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
CODES /= np.linalg.norm(CODES, axis=1, keepdims=True)
READ, KEEP, TELL = (
    RANDOM.standard_normal(shape).astype(np.float32)
    for shape in ((WIDTH, HEADS * HEAD_WIDTH), (3, 2, HEADS, HEAD_WIDTH), (HEADS * HEAD_WIDTH, VOCABULARY))
)


def states(kind, block, z, sigma, inputs):
    """What a position keeps, [2, b, heads, n, head_width]: of its input, and for `looped` of its noised code."""
    found = np.sin(KEEP[block, :, None, :, None, :] * (1.0 + inputs[None, :, None, :, None]))
    if kind == "looped":
        found = found + np.tanh((z / sigma[:, None, None]) @ READ).reshape(*inputs.shape, HEADS, -1).swapaxes(1, 2)
    return found.astype(np.float32)


def network(kind):
    """A block whose answer depends on each earlier position's state, on where it is, and on its own z and sigma."""

    def run(block, z, sigma, inputs, past):
        present = states(kind, block, z, sigma, inputs)
        whole = np.concatenate([past, present], axis=3)
        places = np.arange(1, whole.shape[3] + 1)[:, None]
        seen = (whole[0] * np.cos(whole[1] * places)).sum(2).reshape(len(z), -1)
        own = np.tanh(z[:, -1] @ READ) / (1 + sigma[:, None])
        return ((seen + own + block) @ TELL).astype(np.float32), present

    return run


def chain_of(kind):
    return TokenChain(
        codes=CODES,
        length=LENGTH,
        levels=LEVELS,
        blocks=BLOCKS,
        caches_per=KINDS[kind],
        num_caches=(2, 2, 2),
        heads=HEADS,
        head_width=HEAD_WIDTH,
    )


def written(kind, *, count=6, prompt=(), together=6, temperature=1.0, top_p=1.0, seed=3, run=None, on_token=None):
    return write_texts(
        run or network(kind),
        chain_of(kind),
        prompt=np.array(prompt, dtype=np.int64),
        n=count,
        together=together,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_token=on_token,
    )


def slowly(kind, *, count, prompt, seed, temperature=1.0):
    """One sample after the other; everything before is computed again at each level of each token."""
    texts = []
    for index in range(count):
        stream = np.random.default_rng(seed_at(seed, "continue", index))
        noise, uniform = stream.standard_normal((LENGTH, WIDTH), dtype=np.float32), stream.random(LENGTH)
        tokens = list(prompt)
        while len(tokens) < LENGTH:
            place = len(tokens)
            z, shares = noise[place] * np.float32(LEVELS[0]), []
            for sigma, below in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
                before = CODES[np.array(tokens, dtype=np.int64)] + np.float32(sigma) * noise[:place]
                whole = np.concatenate([before, z[None]])[None].astype(np.float32)
                inputs = np.array([[VOCABULARY, *tokens]])
                nothing = np.zeros((2, 1, HEADS, 0, HEAD_WIDTH), np.float32)
                logits, _ = network(kind)(
                    PARTITION.block_of(sigma), whole, np.array([sigma], np.float32), inputs, nothing
                )
                likely = np.exp(logits[0].astype(float)) / np.exp(logits[0].astype(float)).sum()
                if sigma >= LEAST_READ_SIGMA:
                    shares.append(likely)
                z = z + (below - sigma) * (z - (likely @ CODES)) / sigma
            mean = np.mean(shares, axis=0) ** (1 / temperature)
            tokens.append(int((np.cumsum(mean / mean.sum()) <= uniform[place]).sum()))
        texts.append(tokens)
    return np.array(texts)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("prompt", [(), (3,), (1, 4, 2, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_keys_and_values_give_what_computing_everything_again_gives(kind, prompt, temperature):
    """Oracle: nothing is kept, one sample after the other. Token for token."""
    expected = slowly(kind, count=5, prompt=prompt, seed=3, temperature=temperature)
    found = written(kind, count=5, prompt=prompt, temperature=temperature)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_several_segments_is_one_prompt(kind, monkeypatch):
    """A prompt that goes through a network in parts of 3 positions gives the texts of the whole."""
    prompt = (1, 4, 2, 6, 0, 0, 5, 3)
    whole = written(kind, prompt=prompt)
    monkeypatch.setattr(autoregression, "PROMPT_SEGMENT", 3)
    np.testing.assert_array_equal(written(kind, prompt=prompt), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_the_others(kind):
    """Neither on how many there are nor on how many are written together; another seed gives another."""
    whole = written(kind, count=6)
    for count, together in ((6, 1), (6, 4), (2, 2)):
        np.testing.assert_array_equal(written(kind, count=count, together=together), whole[:count])
    assert len({tuple(row) for row in whole.tolist()}) == 6
    assert not np.array_equal(written(kind, seed=4), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_stays_and_matters(kind):
    """It is where each text begins, and another one leads to other texts."""
    found = written(kind, prompt=(1, 2, 3))
    assert (found[:, :3] == [1, 2, 3]).all() and found.min() >= 0 and found.max() < VOCABULARY
    assert not np.array_equal(found[:, 3:], written(kind, prompt=(1, 5, 3))[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_runs_for_every_token(kind):
    """In the order of the levels; a token's positions are its own, and for `looped` the one before it."""
    seen = []

    def run(block, z, sigma, inputs, past):
        seen.append((block, past.shape[3], inputs.shape[1]))
        return network(kind)(block, z, sigma, inputs, past)

    written(kind, count=2, run=run)
    by_token = [seen[start : start + len(LEVELS)] for start in range(0, len(seen), len(LEVELS))]
    assert len(by_token) == LENGTH
    for position, calls in enumerate(by_token):
        segment = 2 if kind == "looped" and position else 1
        assert tuple(block for block, _, _ in calls) == BLOCKS and set(BLOCKS) == {0, 1, 2}
        assert {(upto, count) for _, upto, count in calls} == {(position + 1 - segment, segment)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_goes_through_a_network_once_for_each_set_of_keys_and_values(kind):
    """`ar` reads it once a block, `looped` once a level."""
    seen = []

    def run(block, z, sigma, inputs, past):
        seen.append(inputs.shape[1])
        return network(kind)(block, z, sigma, inputs, past)

    written(kind, count=1, prompt=(1,) * 9, run=run)
    assert sum(count > 2 for count in seen) == {"ar": 3, "looped": len(LEVELS)}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_text_counts_its_keys_and_values(kind):
    """For three blocks of one layer: one set a block, or one a level; and the rest is less than they are here."""
    caches = {"ar": 3, "looped": len(LEVELS)}[kind] * 2 * HEADS * LENGTH * HEAD_WIDTH * 4
    assert caches < chain_of(kind).sample_bytes < 3 * caches


def test_progress_is_told_over_all_groups():
    """Each position of each group, and how many there will be."""
    heard = []
    written("ar", count=5, together=3, prompt=(1, 2), on_token=lambda done, total: heard.append((done, total)))
    assert heard == [(done, 20) for done in range(1, 21)]


def test_noise_levels_are_read_from_the_top_down_to_where_it_is_decided():
    """The first level counts in any case."""
    assert read_levels(LEVELS) == tuple(i for i, sigma in enumerate(LEVELS) if sigma >= LEAST_READ_SIGMA)
    assert read_levels((0.3, 0.2)) == (0,)


def test_what_cannot_be_written_is_refused_with_all_that_is_wrong():
    """In one message, with the flags; and a prompt that leaves no room."""
    with pytest.raises(ConfigError) as refused:
        check_continuing(n=0, steps=0, temperature=math.nan, top_p=0.0, length=13, trained_length=12)
    for flag in ("--n 0", "--steps 0", "--temperature nan", "--top-p 0.0", "--length 13"):
        assert flag in str(refused.value)
    with pytest.raises(ConfigError, match=r"--prompt has 12 tokens .* give at most 11"):
        check_prompt(np.zeros(12, np.int64), length=12, trained_length=12)
    check_prompt(np.zeros(11, np.int64), length=12, trained_length=12)
