"""What a step changes in a block: AdamW over its flat parameters, and the EMA that follows; and clipping.

Block-wise and end-to-end training make the same update.
"""

import math
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgeblocks.optim.adamw import Workspace, adamw_8bit_step_, adamw_step_
from edgeblocks.optim.rounded_update import rounded_update_

if TYPE_CHECKING:
    from edgeblocks.offload.block_buffer import BlockBuffer

BETA1, BETA2, EPS = 0.9, 0.99, 1e-8


def ema_exponent(length: float) -> float:
    """gamma of a power-function EMA whose profile has the relative width `length`.

    The averaged time grows with training, so one number serves short and long runs. It solves
    length^2 = (gamma+1) / ((gamma+2)^2 (gamma+3)). Source: Karras et al. 2024, arXiv 2312.02696, section 3.1.

    >>> round(ema_exponent(0.1), 2)
    6.94
    """
    # Not numpy.roots: it differs in the last bits, and so would the averages of runs that are resumed.
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > length**2
        low, high = (middle, high) if wide else (low, middle)
    return low


def update_(
    buffer: "BlockBuffer",
    gradients: Tensor,
    *,
    step: int,
    learning_rate: float,
    weight_decay: float,
    exponent: float,
    workspace: Workspace | None,
    position: tuple[int | str, ...],
) -> None:
    """A step of AdamW over a flat block, then its EMA; where the block is bfloat16, both are rounded stochastically.

    Args:
        gradients: float32 [num_parameters].
        step: counts from 0.
        exponent: of the EMA, see `ema_exponent`.
        workspace: for the 8-bit moments and for rounding; None where the block has neither.
        position: of the generators that rounding draws from, such as (seed, "round", block, step).
    """
    common = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    if not buffer.layout.is_rounded:
        adamw_(buffer, gradients, step=step, workspace=workspace, **common)
        if buffer.layout.keeps_ema:
            follow_(buffer, step=step, exponent=exponent)
        return
    assert workspace is not None
    rounded_update_(
        buffer,
        gradients,
        step=step + 1,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        ema_share=_ema_share(step, exponent),
        workspace=workspace,
        position=position,
        **common,
    )


def adamw_(
    buffer: "BlockBuffer",
    gradients: Tensor,
    *,
    step: int,
    learning_rate: float,
    weight_decay: float,
    workspace: Workspace | None,
) -> None:
    """A step of AdamW over a flat block of float32: 8-bit moments first, then fp32 ones.

    Vectors, the last of these, get no weight decay.

    Args:
        step: counts from 0.
        workspace: for the 8-bit moments; None where the block has none.
    """
    layout, weights = buffer.layout, buffer.flat("weights")
    state = dict(buffer.tensors("optimizer"))
    common = {"learning_rate": learning_rate, "beta1": BETA1, "beta2": BETA2, "eps": EPS}
    if layout.num_quantized:
        assert workspace is not None
        eight_bit = slice(0, layout.num_quantized)
        adamw_8bit_step_(
            weights[eight_bit],
            gradients[eight_bit],
            state["exp_avg_codes"],
            state["exp_avg_scales"],
            state["exp_avg_sq_codes"],
            state["exp_avg_sq_scales"],
            # Adam's bias correction divides by 1 - beta^t, which is 0 at t = 0.
            step=step + 1,
            weight_decay=weight_decay,
            workspace=workspace,
            **common,
        )
    # Behind the 8-bit stretch, tensor by tensor as torch.optim does, for equal bits (see `adamw_step_`).
    sizes = [math.prod(entry.shape) for entry in layout.of_part("weights")]
    starts = list(accumulate(sizes, initial=0))
    for first, last, decay in (
        (layout.num_quantized, layout.num_decayed, weight_decay),
        (layout.num_decayed, layout.num_parameters, 0.0),
    ):
        if last > first:
            moments = slice(first - layout.num_quantized, last - layout.num_quantized)
            adamw_step_(
                weights[first:last],
                gradients[first:last],
                state["exp_avg"][moments],
                state["exp_avg_sq"][moments],
                step=step + 1,
                weight_decay=decay,
                sizes=[size for start, size in zip(starts, sizes, strict=False) if first <= start < last],
                **common,
            )


def follow_(buffer: "BlockBuffer", *, step: int, exponent: float) -> None:
    """Move the EMA towards the weights that step `step`, counted from 0, has made; see `ema_exponent`."""
    buffer.flat("ema").lerp_(buffer.flat("weights"), _ema_share(step, exponent))


def _ema_share(step: int, exponent: float) -> float:
    """By which the EMA moves towards the weights that step `step`, counted from 0, has made."""
    # beta(t) = (1 - 1/t)^(gamma + 1) at t = step + 1 (arXiv 2312.02696, section 3.1).
    decay = (1 - 1 / (step + 1)) ** (exponent + 1)  # 0 after the first step: the EMA begins as the weights
    return float(1 - decay)


def clip_(gradients: Tensor, largest_norm: float) -> float:
    """Scale the flat gradient to at most `largest_norm` (2-norm over the block) and return the norm it had."""
    # In one call over the flat gradient: a sum in another order would be another number in its last bits.
    norm = float(torch.linalg.vector_norm(gradients))
    if norm > largest_norm:
        gradients.mul_(largest_norm / norm)
    return norm
