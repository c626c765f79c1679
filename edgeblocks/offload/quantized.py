"""Weights that are not trained, in 8 bits: what a forward pass needs of a block, in little more than a quarter.

Of a block's EMA, matrices are cut into groups of 64 consecutive values; each group has a scale, its largest magnitude
over 127, and each value is the nearest number of steps of it, int8. That errs by 0.6 % of normally distributed weights
(root mean square), and takes 1.0625 bytes a parameter; vectors stay float32. A network computes with float32: the
codes of one block at a time are expanded into memory that all such blocks share (`float32_copy`).

A quantized block is a block file as any other, with another table and nothing to train.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, Entry, Part

WEIGHT_GROUP = 64
"""Values that share a scale. With 256 SmolLM2 lost 0.001 nats a token and with 64 0.0003, for 5 % more bytes."""
_STEPS = 127
_CHUNK_GROUPS = 2**12
"""That are quantized at a time, with some megabytes of temporaries."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLayout(BlockLayout):
    """Where the codes, scales and vectors of a block's EMA lie."""

    full: BlockLayout
    """Of the block itself, whose names and shapes a network is bound to."""


def quantized_layout(full: BlockLayout) -> QuantizedLayout:
    """The layout of a block's EMA in 8 bits."""
    groups = full.num_decayed // WEIGHT_GROUP  # matrices come first; what is left of them is kept with the vectors
    wanted: list[tuple[str, Part, torch.dtype, int]] = [
        ("weights.none", "weights", torch.float32, 0),
        ("ema.scales", "ema", torch.float32, groups),
        ("ema.vectors", "ema", torch.float32, full.num_parameters - groups * WEIGHT_GROUP),
        ("ema.codes", "ema", torch.int8, groups * WEIGHT_GROUP),
        ("optimizer.none", "optimizer", torch.float32, 0),
    ]
    entries, start = [], 0
    for name, part, dtype, count in wanted:
        entries.append(Entry(name=name, part=part, dtype=dtype, shape=(count,), start=start))
        start += entries[-1].num_bytes
    return QuantizedLayout(
        entries=tuple(entries),
        num_parameters=full.num_parameters,
        num_quantized=0,
        num_decayed=full.num_decayed,
        full=full,
    )


def quantize_(buffer: BlockBuffer, values: Tensor) -> None:
    """Fill a buffer of a quantized layout from a block's flat EMA, [num_parameters] of any float type."""
    told = dict(buffer.tensors("ema"))
    codes, scales = told["codes"].view(-1, WEIGHT_GROUP), told["scales"]
    matrices = values[: codes.numel()].view(-1, WEIGHT_GROUP)
    for start in range(0, len(codes), _CHUNK_GROUPS):
        rows = slice(start, start + _CHUNK_GROUPS)
        part = matrices[rows].float()
        scale = part.abs().amax(dim=1).div_(_STEPS)
        scales[rows] = scale
        # Of a group of zeros the scale is 0, and so are all codes.
        codes[rows] = part.div(scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8)
    told["vectors"].copy_(values[codes.numel() :])


def expand_(flat: Tensor, buffer: BlockBuffer) -> None:
    """Fill a block's flat EMA, float32 [num_parameters], from a buffer of its quantized layout."""
    told = dict(buffer.tensors("ema"))
    codes = told["codes"].view(-1, WEIGHT_GROUP)
    # In two passes over memory: one product of both types would first make a float32 copy of all codes.
    flat[: codes.numel()].view(-1, WEIGHT_GROUP).copy_(codes).mul_(told["scales"][:, None])
    flat[codes.numel() :] = told["vectors"]


def quantized_layouts(layouts: Sequence[BlockLayout]) -> list[QuantizedLayout]:
    """Of several blocks; one object for all that are alike."""
    made = {id(layout): quantized_layout(layout) for layout in layouts}
    return [made[id(layout)] for layout in layouts]
