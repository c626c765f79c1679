"""Noise levels: their distribution, their partition into blocks, and the levels of a sampler.

Plain arithmetic without torch: training, evaluation, sampling, export and the deployed chain all find the block of a
noise level with `NoisePartition.block_of` and with nothing else.

There are two kinds of noise: Gaussian noise, whose level is sigma, and masking, whose level is the time t.

Layer order runs from high noise to low noise: block 0 owns the highest range.
Source: Karras et al. 2022, arXiv 2206.00364 (EDM); Shing et al., arXiv 2506.14202, section 3 (partition).
"""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, Protocol

from edgeblocks.errors import ConfigError

PartitionKind = Literal["equal-probability", "uniform"]
_STANDARD_NORMAL = NormalDist()


class LevelDistribution(Protocol):
    """A kind of noise, for a partition: its highest and lowest level, and how levels are distributed."""

    @property
    def top(self) -> float: ...

    @property
    def bottom(self) -> float: ...

    def quantile(self, level: float, /) -> float: ...

    def level_at(self, quantile: float, /) -> float: ...

    def along(self, share: float, /) -> float:
        """The level at a share of the way from `top` to `bottom`, in the scale in which levels are evenly spaced."""
        ...

    def widened(self, low: float, high: float, overlap: float, /) -> tuple[float, float]:
        """What a block that owns [low, high) is trained on."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoiseDistribution:
    """log sigma ~ N(p_mean, p_std^2), truncated to [sigma_min, sigma_max] (EDM, table 1)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    p_mean: float = -1.2
    p_std: float = 1.2

    @property
    def top(self) -> float:
        return self.sigma_max

    @property
    def bottom(self) -> float:
        return self.sigma_min

    def quantile(self, sigma: float) -> float:
        """q(sigma) = Phi((ln sigma - p_mean) / p_std)."""
        return _STANDARD_NORMAL.cdf((math.log(sigma) - self.p_mean) / self.p_std)

    def level_at(self, quantile: float) -> float:
        """The inverse of `quantile`."""
        return math.exp(self.p_mean + self.p_std * _STANDARD_NORMAL.inv_cdf(quantile))

    sigma_at = level_at

    def along(self, share: float) -> float:
        """The level at a share of the way from sigma_max to sigma_min in log sigma."""
        level: float = self.sigma_max * (self.sigma_min / self.sigma_max) ** share
        return level

    def widened(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """[low/a, high*a] with a = (high/low)^overlap, clipped to the whole range."""
        # A factor in sigma, so that both sides grow by the same share of the range in log sigma.
        widening = (high / low) ** overlap
        return max(low / widening, self.sigma_min), min(high * widening, self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class MaskingSchedule:
    """The linear schedule of masking: at time t a token is still visible with probability alpha(t) = 1 - t.

    Time is uniform over [t_min, t_max] in training. Equal shares of time are equal decrements of alpha, that is, equal
    shares of the tokens to be unmasked. Source: arXiv 2406.04329 (MD4), 2406.07524 (MDLM).
    """

    t_min: float = 0.0
    t_max: float = 1.0

    @property
    def top(self) -> float:
        return self.t_max

    @property
    def bottom(self) -> float:
        return self.t_min

    def quantile(self, t: float) -> float:
        """1 - alpha(t) = t, the expected share of masked tokens."""
        return t

    def level_at(self, quantile: float) -> float:
        """The inverse of `quantile`."""
        return quantile

    def along(self, share: float) -> float:
        """The time at a share of the way from t_max to t_min."""
        return self.t_max + share * (self.t_min - self.t_max)

    def widened(self, low: float, high: float, overlap: float) -> tuple[float, float]:
        """The range and `overlap` of its width on each side, clipped to the whole range."""
        extra = overlap * (high - low)
        return max(low - extra, self.t_min), min(high + extra, self.t_max)


@dataclass(frozen=True, kw_only=True)
class NoiseRange:
    """One block's noise levels: it owns [low, high) and is trained on the slightly wider [train_low, train_high]."""

    low: float
    high: float
    train_low: float
    train_high: float


@dataclass(frozen=True, kw_only=True)
class NoisePartition:
    """The noise ranges of all blocks; `boundaries` has one more entry than blocks and descends from the top level."""

    distribution: LevelDistribution
    boundaries: tuple[float, ...]
    ranges: tuple[NoiseRange, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.ranges)

    def block_of(self, sigma: float) -> int:
        """The block that owns a noise level: block b owns [boundaries[b+1], boundaries[b]), block 0 also the top level.

        Raises:
            ValueError: the level, sigma or t, lies outside the whole range.

        >>> partition = partition_noise(NoiseDistribution(), num_blocks=3, kind="equal-probability", overlap=0.05)
        >>> [partition.block_of(sigma) for sigma in (80.0, 1.0, 0.3, 0.002)]
        [0, 0, 1, 2]
        """
        # Compared with the boundaries themselves and never computed back from sigma: rounding could name a neighbour.
        if not self.boundaries[-1] <= sigma <= self.boundaries[0]:
            raise ValueError(f"noise level {sigma} lies outside [{self.boundaries[-1]}, {self.boundaries[0]}]")
        return sum(sigma < boundary for boundary in self.boundaries[1:-1])


def partition_noise(
    distribution: LevelDistribution, *, num_blocks: int, kind: PartitionKind, overlap: float
) -> NoisePartition:
    """Noise ranges for `num_blocks` blocks.

    `equal-probability` gives every block the same mass of the training distribution,
    sigma_b = exp(p_mean + p_std * Phi^-1(q_max + (b/B) (q_min - q_max))) for Gaussian noise and t_b = 1 - b/B for
    masking; `uniform` gives equal widths in log sigma (the ablation of arXiv 2506.14202) or in t. `overlap` (gamma)
    widens what a block is trained on, see `widened`.
    """
    top, bottom = distribution.top, distribution.bottom
    if kind == "equal-probability":
        q_top, q_bottom = distribution.quantile(top), distribution.quantile(bottom)
        # Equal steps of q from the top down (arXiv 2506.14202, section 3): blocks are in the order of the layers.
        inner = [distribution.level_at(q_top + b / num_blocks * (q_bottom - q_top)) for b in range(1, num_blocks)]
    else:
        inner = [distribution.along(b / num_blocks) for b in range(1, num_blocks)]
    boundaries = (top, *inner, bottom)
    ranges = []
    for high, low in itertools.pairwise(boundaries):
        train_low, train_high = distribution.widened(low, high, overlap)
        ranges.append(NoiseRange(low=low, high=high, train_low=train_low, train_high=train_high))
    return NoisePartition(distribution=distribution, boundaries=boundaries, ranges=tuple(ranges))


def sampler_levels(partition: NoisePartition, *, num_steps: int, rho: float = 7.0) -> tuple[float, ...]:
    """Noise levels of a sampler, descending from sigma_max; after the last one the sampler goes to 0.

    These are EDM's levels, evenly spaced in sigma^(1/rho) (EDM, equation 5), with two guarantees that plain EDM levels
    do not give: no level lies on a boundary between blocks, and every block has at least one. A block that the plain
    grid skips takes a level from the block with the most; the levels of the blocks concerned are then spaced evenly,
    in the same warped scale, inside their own ranges.

    Raises:
        ConfigError: fewer steps than blocks.
    """
    num_blocks = partition.num_blocks
    _check_steps(num_steps, num_blocks)
    top, bottom = (sigma ** (1 / rho) for sigma in (partition.boundaries[0], partition.boundaries[-1]))
    # EDM, equation 5, with both ends taken as they are and not through the power.
    levels = [partition.boundaries[0]]
    levels += [(top + i / (num_steps - 1) * (bottom - top)) ** rho for i in range(1, num_steps - 1)]
    levels += [partition.boundaries[-1]] if num_steps > 1 else []
    # The power can carry a level past the ends by a rounding error, and then no block owns it.
    levels = [min(max(level, partition.boundaries[-1]), partition.boundaries[0]) for level in levels]
    by_block: list[list[float]] = [[] for _ in range(num_blocks)]
    for level in levels:
        by_block[partition.block_of(level)].append(level)
    counts = [len(block_levels) for block_levels in by_block]
    respaced = {b for b, count in enumerate(counts) if _on_boundary(by_block[b], partition)}
    while 0 in counts:
        # From where one level less weighs least. There are as many levels as blocks at least, so the giver keeps one.
        taker, giver = counts.index(0), counts.index(max(counts))
        counts[taker] += 1
        counts[giver] -= 1
        respaced |= {taker, giver}
    for block in respaced:
        by_block[block] = _levels_inside(partition, block, counts[block], rho)
    return tuple(level for block_levels in by_block for level in block_levels)


def _check_steps(num_steps: int, num_blocks: int) -> None:
    if num_steps < num_blocks:
        raise ConfigError(
            f"{num_steps} sampling steps cannot visit {num_blocks} blocks: each block must run at least once; "
            f"use --steps {num_blocks} or more"
        )


def _on_boundary(levels: list[float], partition: NoisePartition) -> bool:
    # Wider than float32 rounds (6e-8): a network sees the level as float32, and both must lie on the same side.
    return any(
        math.isclose(level, boundary, rel_tol=1e-5) for level in levels for boundary in partition.boundaries[1:-1]
    )


def _levels_inside(partition: NoisePartition, block: int, count: int, rho: float) -> list[float]:
    """`count` levels inside one block, evenly spaced in sigma^(1/rho); the outer ends of the chain are kept."""
    high, low = (boundary ** (1 / rho) for boundary in partition.boundaries[block : block + 2])
    first, last = block == 0, block == partition.num_blocks - 1
    # Half a gap is left towards each neighbouring block, none at sigma_max and sigma_min.
    parts = (count - 1) + (0.0 if first else 0.5) + (0.0 if last else 0.5)
    gap = (high - low) / parts if parts else 0.0
    start = high if first else high - gap / 2
    levels = [(start - i * gap) ** rho for i in range(count)]
    # The power's rounding would miss sigma_max and sigma_min by a last bit.
    if first:
        levels[0] = partition.boundaries[0]
    elif last:
        levels[-1] = partition.boundaries[-1]
    return levels


def unmasking_steps(partition: NoisePartition, *, num_steps: int) -> tuple[tuple[float, float], ...]:
    """Intervals (t_from, t_to) of time that follow each other from the top level down to the bottom.

    No interval crosses a boundary between blocks, so its middle lies inside one block's range and names that block
    whatever the rounding. Every block has at least one; where they cannot be shared evenly the first blocks have one
    more. Within a block all are equally long.

    Raises:
        ConfigError: fewer steps than blocks.

    >>> partition = partition_noise(MaskingSchedule(), num_blocks=2, kind="equal-probability", overlap=0.0)
    >>> unmasking_steps(partition, num_steps=3)
    ((1.0, 0.75), (0.75, 0.5), (0.5, 0.0))
    """
    num_blocks = partition.num_blocks
    _check_steps(num_steps, num_blocks)
    intervals: list[tuple[float, float]] = []
    for block, (high, low) in enumerate(itertools.pairwise(partition.boundaries)):
        count = num_steps // num_blocks + (block < num_steps % num_blocks)
        inner = [high + i / count * (low - high) for i in range(1, count)]
        intervals += itertools.pairwise((high, *inner, low))
    return tuple(intervals)


def loss_weight(sigma: Any, sigma_data: float) -> Any:
    """w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, of sigma's type and shape (EDM, table 1).

    It belongs to the L2 loss of a denoiser and to nothing else; its shape must be that of the per-sample loss.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
