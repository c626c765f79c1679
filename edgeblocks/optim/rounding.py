"""Stochastic rounding of float32 to bfloat16: to either neighbour, oftener to the nearer one, so that means are exact.

bfloat16 is the upper half of float32: neighbours are 0.4 to 0.8 % apart. An update of a hundredth of that, rounded to
the nearest, would be lost in every step; rounded at random it is made in one step of a hundred. Adding 16 random bits
below the bits that are kept, and cutting there, is such a rounding: it carries with the probability of what is cut.

Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", arXiv 1502.02551, section 3; for training
with weights of bfloat16: Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv 2010.06192, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeblocks.seeds import generator_at

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float32, Int32, Int64
    from torch import Tensor

SEGMENT = 32 * 1024
"""Values whose bits one generator draws: seeding it takes 10 us, drawing 50."""
_LOWER = 0xFFFF


def draw_bits_(
    memory: Int64[Tensor, " half"], numel: int, *, first: int, position: tuple[int | str, ...]
) -> Int32[Tensor, " numel"]:
    """32 random bits for each of `numel` values, as a view of `memory`, of at least half as many numbers.

    They depend on where a value is alone: `first` is the number of the first one, which begins a segment.

    Args:
        position: of the generators, before the number of a segment's first value.
    """
    for start in range(0, numel, SEGMENT):
        end = min(start + SEGMENT, numel)
        generator = generator_at(*position, first + start, device=memory.device)
        # 64 bits at a time take two thirds of the time that twice 32 do.
        memory[start // 2 : (end + 1) // 2].random_(-(2**63), None, generator=generator)
    return memory.view(torch.int32)[:numel]


def halves_(
    bits: Int32[Tensor, " numel"], *, lower: Int32[Tensor, " numel"]
) -> tuple[Int32[Tensor, " numel"], Int32[Tensor, " numel"]]:
    """16 of 32 bits each, from 0 to 65,535: the lower ones in `lower`, the upper ones in place."""
    torch.bitwise_and(bits, _LOWER, out=lower)
    return lower, bits.bitwise_right_shift_(16).bitwise_and_(_LOWER)  # a shift of a signed number repeats its sign


def round_(out: BFloat16[Tensor, " numel"], values: Float32[Tensor, " numel"], bits: Int32[Tensor, " numel"]) -> None:
    """Write `values` to `out`, rounded stochastically by 16 random bits each; `values` is destroyed.

    What bfloat16 can hold stays as it is; infinities and NaN do.
    """
    # As integers: sign, exponent and fraction in a row, so that a carry out of the fraction is the next power of two.
    values.view(torch.int32).add_(bits).bitwise_and_(~_LOWER)
    out.copy_(values)  # exact: nothing is left below
