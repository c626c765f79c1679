"""The update of a block whose weights and EMA are bfloat16: 6 bytes a parameter with 8-bit moments instead of 10.

A chunk of the weights is made float32, stepped as float32 weights are, followed by its EMA, and both are rounded
stochastically (`optim.rounding`), so that updates and averages smaller than the distance of two neighbours are not
lost. The random bits depend on the seed, the block, the step and the parameter's place in the block: neither the size
of chunks nor the number of threads changes a bit, and a resumed run draws what it would have drawn.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from edgeblocks.optim.adamw import ChunkBuffers, Workspace, adamw_8bit_chunk_, for_each_chunk, fused_adamw_
from edgeblocks.optim.moments import GROUP_SIZE
from edgeblocks.optim.rounding import draw_bits_, halves_, round_

if TYPE_CHECKING:
    from edgeblocks.offload.block_buffer import BlockBuffer


def rounded_update_(
    buffer: "BlockBuffer",
    gradients: Tensor,
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_share: float,
    workspace: Workspace,
    position: tuple[int | str, ...],
) -> None:
    """A step of AdamW over a flat block of bfloat16, and its EMA: 8-bit moments first, then fp32 ones.

    Args:
        gradients: float32 [num_parameters].
        step: counts from 1.
        weight_decay: of matrices; vectors get none.
        ema_share: by which the EMA moves towards the weights, before these are rounded.
        workspace: one that `rounds`.
        position: of the generators of random bits, such as (seed, "round", block, step).
    """
    layout, weights = buffer.layout, buffer.flat("weights")
    ema = buffer.flat("ema") if layout.keeps_ema else None
    state = dict(buffer.tensors("optimizer"))
    quantized = layout.num_quantized
    regions = (
        (0, quantized, weight_decay),
        (quantized, layout.num_decayed, weight_decay),
        (layout.num_decayed, layout.num_parameters, 0.0),
    )
    for first, last, decay in regions:

        def step_chunk(chunk: slice, own: ChunkBuffers, first: int = first, decay: float = decay) -> None:
            place = slice(first + chunk.start, first + chunk.stop)
            own.weights.copy_(weights[place])
            common = {"learning_rate": learning_rate, "beta1": beta1, "beta2": beta2, "eps": eps}
            if first < quantized:
                groups = slice(chunk.start // GROUP_SIZE, chunk.stop // GROUP_SIZE)
                adamw_8bit_chunk_(
                    own.weights,
                    gradients[place],
                    state["exp_avg_codes"][chunk],
                    state["exp_avg_scales"][groups],
                    state["exp_avg_sq_codes"][chunk],
                    state["exp_avg_sq_scales"][groups],
                    buffers=own,
                    step=workspace.step,
                    weight_decay=decay,
                    **common,
                )
            else:
                moments = slice(place.start - quantized, place.stop - quantized)
                exp_avg, exp_avg_sq = state["exp_avg"][moments], state["exp_avg_sq"][moments]
                fused_adamw_(
                    [own.weights],
                    [gradients[place]],
                    [exp_avg],
                    [exp_avg_sq],
                    workspace.step,
                    weight_decay=decay,
                    **common,
                )
            # The moments of the chunk are back in their codes, so the room that they had is the EMA's and the bits'.
            bits = draw_bits_(own.bits, len(own.weights), first=place.start, position=position)
            lower, upper = halves_(bits, lower=own.exp_avg_sq.view(bits.dtype))
            if ema is not None:
                followed = own.exp_avg.copy_(ema[place]).lerp_(own.weights, ema_share)
                round_(ema[place], followed, upper)
            round_(weights[place], own.weights, lower)

        for_each_chunk(step_chunk, last - first, workspace, step=step)
