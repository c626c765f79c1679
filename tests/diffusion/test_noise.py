import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.diffusion.noise import (
    MaskingSchedule,
    NoiseDistribution,
    loss_weight,
    partition_noise,
    sampler_levels,
    unmasking_steps,
)
from edgeblocks.errors import ConfigError

KINDS = ("equal-probability", "uniform")
DISTRIBUTIONS = st.builds(
    NoiseDistribution,
    sigma_min=st.floats(1e-3, 0.1),
    sigma_max=st.floats(5.0, 200.0),
    p_mean=st.floats(-2.0, 0.5),
    p_std=st.floats(0.7, 2.0),
)
PARTITIONS = st.builds(
    partition_noise,
    DISTRIBUTIONS,
    num_blocks=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    overlap=st.floats(0.0, 0.5),
)
SHARES = st.floats(0.0, 1.0)


def paper_partition(num_blocks, kind="equal-probability", overlap=0.05):
    return partition_noise(NoiseDistribution(), num_blocks=num_blocks, kind=kind, overlap=overlap)


def level_at(partition, share):
    """A level at a share of the whole range in log sigma, 0 at sigma_max."""
    top, bottom = (math.log(partition.boundaries[i]) for i in (0, -1))
    return min(max(math.exp(top + share * (bottom - top)), partition.boundaries[-1]), partition.boundaries[0])


def karras_levels(sigma_max, sigma_min, num_steps, rho=7.0):
    """EDM's equation 5, in numpy."""
    steps = np.arange(num_steps) / (num_steps - 1)
    return (sigma_max ** (1 / rho) + steps * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


@given(PARTITIONS)
def test_a_partition_covers_the_whole_range_once(partition):
    """Ranges run from sigma_max down to sigma_min, each beginning exactly where the former ends."""
    ranges, distribution = partition.ranges, partition.distribution
    assert ranges[0].high == distribution.sigma_max
    assert ranges[-1].low == distribution.sigma_min
    assert all(upper.low == lower.high for upper, lower in itertools.pairwise(ranges))
    assert all(0 < block_range.low < block_range.high for block_range in ranges)
    assert partition.num_blocks == len(ranges) == len(partition.boundaries) - 1


@given(DISTRIBUTIONS, st.integers(1, 9))
def test_equal_probability_gives_every_block_the_same_mass(distribution, num_blocks):
    """Each block has 1/B of the truncated log-normal's mass (the normal CDF by erfc, not by our own quantile)."""

    def cdf(sigma):
        return 0.5 * math.erfc(-(math.log(sigma) - distribution.p_mean) / (distribution.p_std * math.sqrt(2)))

    partition = partition_noise(distribution, num_blocks=num_blocks, kind="equal-probability", overlap=0.0)
    whole = cdf(distribution.sigma_max) - cdf(distribution.sigma_min)
    for block_range in partition.ranges:
        assert cdf(block_range.high) - cdf(block_range.low) == pytest.approx(whole / num_blocks, rel=1e-6)


@given(DISTRIBUTIONS, st.integers(1, 9))
def test_uniform_gives_every_block_the_same_width_in_log_sigma(distribution, num_blocks):
    """Each block has 1/B of ln(sigma_max / sigma_min)."""
    partition = partition_noise(distribution, num_blocks=num_blocks, kind="uniform", overlap=0.0)
    whole = math.log(distribution.sigma_max / distribution.sigma_min)
    for block_range in partition.ranges:
        assert math.log(block_range.high / block_range.low) == pytest.approx(whole / num_blocks, rel=1e-9)


def test_the_papers_three_blocks():
    """With EDM's constants and B=3 the boundaries are where the normal quantiles 2/3 and 1/3 put them."""
    third = 0.4307272992954576  # Phi^-1(2/3)
    boundaries = paper_partition(3).boundaries
    assert boundaries[0] == 80.0
    assert boundaries[1] == pytest.approx(math.exp(-1.2 + 1.2 * third), rel=1e-4)
    assert boundaries[2] == pytest.approx(math.exp(-1.2 - 1.2 * third), rel=1e-4)
    assert boundaries[3] == 0.002


@given(PARTITIONS, SHARES)
def test_block_of_agrees_with_the_ranges(partition, share):
    """A level lies in the half-open range of its block, sigma_max in block 0."""
    sigma = level_at(partition, share)
    block_range = partition.ranges[partition.block_of(sigma)]
    assert block_range.low <= sigma < block_range.high or sigma == partition.boundaries[0]


@given(PARTITIONS)
def test_a_boundary_belongs_to_the_block_above_it(partition):
    """At an interior boundary the block of higher noise owns the level; the smallest step below, the next block."""
    for block, boundary in enumerate(partition.boundaries[1:-1]):
        assert partition.block_of(boundary) == block
        assert partition.block_of(math.nextafter(boundary, 0)) == block + 1
    assert partition.block_of(partition.boundaries[0]) == 0
    assert partition.block_of(partition.boundaries[-1]) == partition.num_blocks - 1


@given(PARTITIONS, SHARES, SHARES)
def test_less_noise_never_goes_back_to_an_earlier_block(partition, one, other):
    """block_of is monotone: of two levels, the lower belongs to the same or a later block."""
    higher, lower = sorted((level_at(partition, one), level_at(partition, other)), reverse=True)
    assert partition.block_of(higher) <= partition.block_of(lower)


@given(PARTITIONS, st.sampled_from([0.999, 1.001]))
def test_a_level_outside_the_range_is_refused(partition, factor):
    """Below sigma_min and above sigma_max no block is guessed."""
    outside = partition.boundaries[-1] * factor if factor < 1 else partition.boundaries[0] * factor
    with pytest.raises(ValueError, match="outside"):
        partition.block_of(outside)
    with pytest.raises(ValueError, match="outside"):
        partition.block_of(math.nan)


@given(DISTRIBUTIONS, st.integers(1, 9), st.sampled_from(KINDS), st.floats(0.0, 0.5))
def test_overlap_widens_a_range_by_its_own_width_and_is_clipped(distribution, num_blocks, kind, overlap):
    """A block is trained on [low/a, high*a], a = (high/low)^gamma, within [sigma_min, sigma_max]."""
    partition = partition_noise(distribution, num_blocks=num_blocks, kind=kind, overlap=overlap)
    for block_range in partition.ranges:
        extra = overlap * (math.log(block_range.high) - math.log(block_range.low))
        low = max(math.log(block_range.low) - extra, math.log(distribution.sigma_min))
        high = min(math.log(block_range.high) + extra, math.log(distribution.sigma_max))
        assert math.log(block_range.train_low) == pytest.approx(low, abs=1e-9)
        assert math.log(block_range.train_high) == pytest.approx(high, abs=1e-9)
        assert distribution.sigma_min <= block_range.train_low <= block_range.low
        assert block_range.high <= block_range.train_high <= distribution.sigma_max


@given(DISTRIBUTIONS, SHARES)
def test_quantile_and_level_are_inverse(distribution, share):
    """sigma_at undoes quantile within the range."""
    log_sigma = math.log(distribution.sigma_min) * (1 - share) + math.log(distribution.sigma_max) * share
    quantile = distribution.quantile(math.exp(log_sigma))
    if 1e-9 < quantile < 1 - 1e-9:
        assert math.log(distribution.sigma_at(quantile)) == pytest.approx(log_sigma, abs=1e-4)


@given(PARTITIONS, st.data())
def test_a_chain_visits_every_block_and_touches_no_boundary(partition, data):
    """Trap 1: for any B <= steps, levels descend from sigma_max to sigma_min, and each block owns at least one.

    No level lies within 1e-6 of an interior boundary, so that rounding a level to float32 changes no block.
    """
    num_steps = data.draw(st.integers(max(2, partition.num_blocks), 60), label="steps")
    levels = sampler_levels(partition, num_steps=num_steps)
    assert len(levels) == num_steps
    assert levels[0] == partition.boundaries[0]
    assert levels[-1] == partition.boundaries[-1]
    assert all(higher > lower for higher, lower in itertools.pairwise(levels))
    assert {partition.block_of(level) for level in levels} == set(range(partition.num_blocks))
    for boundary in partition.boundaries[1:-1]:
        assert min(abs(level / boundary - 1) for level in levels) > 1e-6
    inner = [float(np.float32(level)) for level in levels[1:-1]]
    assert [partition.block_of(level) for level in inner] == [partition.block_of(level) for level in levels[1:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_four_steps_at_three_blocks_run_the_middle_block(kind):
    """Trap 1, as published: with 4 steps at B=3 the published code never runs the middle block; ours does."""
    partition = paper_partition(3, kind)
    visited = [partition.block_of(level) for level in sampler_levels(partition, num_steps=4)]
    assert visited == sorted(visited)
    assert set(visited) == {0, 1, 2}


def test_a_block_that_the_plain_grid_skips_is_run():
    """EDM's grid of 5 levels skips the middle of three blocks (so the guarantee is not idle); ours does not."""
    partition = paper_partition(3)
    plain = [min(max(level, 0.002), 80.0) for level in karras_levels(80.0, 0.002, 5)]
    assert 1 not in map(partition.block_of, plain)
    assert [partition.block_of(level) for level in sampler_levels(partition, num_steps=5)] == [0, 0, 1, 2, 2]


def test_levels_that_fall_on_a_boundary_move_inside():
    """With rho -> infinity levels are even in log sigma and hit the boundaries of a uniform partition: none stays."""
    partition = paper_partition(3, "uniform")
    grid = [80.0 * (0.002 / 80.0) ** (i / 3) for i in range(4)]
    assert grid[1:3] == pytest.approx(partition.boundaries[1:3])
    levels = sampler_levels(partition, num_steps=4, rho=1e9)
    for boundary in partition.boundaries[1:3]:
        assert min(abs(math.log(level / boundary)) for level in levels) > 0.1
    assert {partition.block_of(level) for level in levels} == {0, 1, 2}


@pytest.mark.parametrize(("num_blocks", "num_steps"), [(1, 2), (1, 18), (3, 18), (3, 50), (4, 32)])
def test_plain_karras_levels_are_kept_where_nothing_forces_a_change(num_blocks, num_steps):
    """Where EDM's grid visits every block and touches no boundary, the levels are EDM's."""
    levels = sampler_levels(paper_partition(num_blocks), num_steps=num_steps)
    np.testing.assert_allclose(levels, karras_levels(80.0, 0.002, num_steps), rtol=1e-9)


def test_one_step_starts_at_the_highest_noise():
    """A single step is one denoising from sigma_max."""
    assert sampler_levels(paper_partition(1), num_steps=1) == (80.0,)


@pytest.mark.parametrize(("num_blocks", "num_steps"), [(3, 2), (2, 1), (9, 8)])
def test_fewer_steps_than_blocks_are_refused(num_blocks, num_steps):
    """The error states both numbers and the flag that mends it."""
    with pytest.raises(ConfigError, match=f"{num_steps} .*{num_blocks} blocks.*--steps {num_blocks}"):
        sampler_levels(paper_partition(num_blocks), num_steps=num_steps)


@given(sigma=st.floats(1e-3, 100.0), sigma_data=st.floats(0.1, 2.0))
def test_the_loss_weight_is_one_over_c_out_squared(sigma, sigma_data):
    """w(sigma) undoes c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2): the raw network's error has weight 1."""
    c_out = sigma * sigma_data / math.hypot(sigma, sigma_data)
    assert loss_weight(sigma, sigma_data) == pytest.approx(1 / c_out**2)


def test_the_loss_weight_keeps_its_arguments_shape():
    """Trap 2: a vector of levels gives a vector of weights, value by value, for arrays and tensors."""
    sigmas = torch.tensor([0.002, 0.5, 80.0])
    weights = loss_weight(sigmas, 0.5)
    assert weights.shape == (3,)
    torch.testing.assert_close(weights, torch.tensor([loss_weight(sigma, 0.5) for sigma in sigmas.tolist()]))
    assert loss_weight(sigmas.numpy(), 0.5).shape == (3,)
    assert loss_weight(0.5, 0.5) == 8.0


def masking_partition(num_blocks, kind="equal-probability", overlap=0.0):
    return partition_noise(MaskingSchedule(), num_blocks=num_blocks, kind=kind, overlap=overlap)


@given(DISTRIBUTIONS, st.integers(1, 9), st.floats(0.0, 0.5))
def test_a_partition_of_sigma_is_the_papers_formula_to_the_last_bit(distribution, num_blocks, overlap):
    """Another kind of noise beside it changed no number: boundaries and widened ends, written out."""
    top, bottom = distribution.sigma_max, distribution.sigma_min
    q_top, q_bottom = distribution.quantile(top), distribution.quantile(bottom)
    inner = [distribution.sigma_at(q_top + b / num_blocks * (q_bottom - q_top)) for b in range(1, num_blocks)]
    partition = partition_noise(distribution, num_blocks=num_blocks, kind="equal-probability", overlap=overlap)
    assert partition.boundaries == (top, *inner, bottom)
    uniform = partition_noise(distribution, num_blocks=num_blocks, kind="uniform", overlap=overlap).boundaries
    assert uniform[1:-1] == tuple(top * (bottom / top) ** (b / num_blocks) for b in range(1, num_blocks))
    for found in partition.ranges:
        widening = (found.high / found.low) ** overlap
        assert found.train_low == max(found.low / widening, bottom)
        assert found.train_high == min(found.high * widening, top)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_blocks", range(1, 13))
def test_blocks_share_the_unmasking_evenly(num_blocks, kind):
    """Equal decrements of alpha: t_b = 1 - b/B exactly, descending from 1 to 0."""
    expected = [1 - b / num_blocks for b in range(num_blocks + 1)]
    assert masking_partition(num_blocks, kind).boundaries == tuple(expected)


@given(st.integers(1, 12), st.floats(0.0, 0.5))
def test_overlap_widens_a_range_of_t_by_a_share_of_its_width(num_blocks, overlap):
    """Added on both sides, clipped to [0, 1]."""
    for found in masking_partition(num_blocks, overlap=overlap).ranges:
        extra = overlap / num_blocks
        assert found.train_low == pytest.approx(max(found.low - extra, 0.0), abs=1e-12)
        assert found.train_high == pytest.approx(min(found.high + extra, 1.0), abs=1e-12)
        assert 0 <= found.train_low <= found.low < found.high <= found.train_high <= 1


@pytest.mark.parametrize("num_blocks", range(1, 13))
def test_an_unmasking_chain_visits_every_block(num_blocks):
    """Trap 1: for many step counts the middles of the intervals route to all blocks, in order and as evenly as can be.

    The intervals follow each other from 1 to 0, and each lies in the range of the block that its middle names, also
    when the middle is rounded to float32.
    """
    partition = masking_partition(num_blocks)
    for num_steps in [*range(num_blocks, 40), 64, 97, 128, 256, 1000]:
        steps = unmasking_steps(partition, num_steps=num_steps)
        assert len(steps) == num_steps and steps[0][0] == 1.0 and steps[-1][1] == 0.0
        assert all(earlier[1] == later[0] for earlier, later in itertools.pairwise(steps))
        middles = [(t_from + t_to) / 2 for t_from, t_to in steps]
        blocks = [partition.block_of(middle) for middle in middles]
        assert blocks == [partition.block_of(float(np.float32(middle))) for middle in middles]
        assert blocks == sorted(blocks)
        counts = [blocks.count(block) for block in range(num_blocks)]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
        for block, (t_from, t_to) in zip(blocks, steps, strict=True):
            assert partition.ranges[block].low <= t_to < t_from <= partition.ranges[block].high


def test_fewer_unmasking_steps_than_blocks_are_refused():
    """As for sampler levels, with the flag that mends it."""
    with pytest.raises(ConfigError, match=r"2 sampling steps cannot visit 3 blocks.*--steps 3"):
        unmasking_steps(masking_partition(3), num_steps=2)
