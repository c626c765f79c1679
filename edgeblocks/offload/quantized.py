"""Weights that are not trained, in 8 or 4 bits: what a forward pass needs of a block, in a quarter or a seventh.

Of a block's EMA, matrices are cut into groups of 64 consecutive values, and each group has a scale; vectors stay
float32. There are two kinds. Errors are root mean squares, of normally distributed weights.

- int8: the scale is the group's largest magnitude over 127, and each value the nearest number of steps of it. 1.0625
  bytes a parameter, an error of 0.6 %.
- nf4: the scale is the largest magnitude, and each value the nearest of 16 shares of it, which are as likely as one
  another where weights are normally distributed. 0.5625 bytes a parameter, an error of 9 %. (QLoRA, Dettmers et al.
  2023, arXiv 2305.14314, section 3 and appendix E. Their library, bitsandbytes, gives the same bits; it is not used for
  this, because to import it takes 125 MB, which is more than what 4 bits save of 200 million parameters.)

A network computes with float32: the codes of one block at a time are expanded into memory that all such blocks share
(`float32_copy`). A quantized block is a block file as any other, with another table and nothing to train.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeblocks.methods import Frozen
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, Entry, Part

WEIGHT_GROUP = 64
"""Values that share a scale. With 256 SmolLM2 lost 0.001 nats a token and with 64 0.0003, for 5 % more bytes."""
_STEPS = 127
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Shares of the largest magnitude that 4 bits stand for."""
_CHUNK_GROUPS = 2**12
"""That are quantized or expanded at a time, with some megabytes of temporaries."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLayout(BlockLayout):
    """Where the codes, scales and vectors of a block's EMA lie."""

    kind: Frozen
    full: BlockLayout
    """Of the block itself, whose names and shapes a network is bound to."""


def quantized_layout(full: BlockLayout, kind: Frozen) -> QuantizedLayout:
    """The layout of a block's EMA as int8 or nf4."""
    groups = full.num_decayed // WEIGHT_GROUP  # matrices come first; what is left of them is kept with the vectors
    wanted: list[tuple[str, Part, torch.dtype, int]] = [
        ("weights.none", "weights", torch.float32, 0),
        ("ema.scales", "ema", torch.float32, groups),
        ("ema.vectors", "ema", torch.float32, full.num_parameters - groups * WEIGHT_GROUP),
        ("ema.codes", "ema", _CODES[kind].dtype, groups * _CODES[kind].bytes_of_group),
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
        kind=kind,
        full=full,
    )


def quantize_(buffer: BlockBuffer, values: Tensor) -> None:
    """Fill a buffer of a quantized layout from a block's flat EMA, [num_parameters] of any float type."""
    (scales, codes, vectors), how = _parts_of(buffer)
    grouped = len(scales) * WEIGHT_GROUP
    matrices = values[:grouped].view(-1, WEIGHT_GROUP)
    for rows in _chunks(len(scales)):
        part = matrices[rows].float()
        codes[rows], scales[rows] = how.rounded(part, part.abs().amax(dim=1))
    vectors.copy_(values[grouped:])


def expand_(flat: Tensor, buffer: BlockBuffer) -> None:
    """Fill a block's flat EMA, float32 [num_parameters], from a buffer of its quantized layout."""
    (scales, codes, vectors), how = _parts_of(buffer)
    grouped = len(scales) * WEIGHT_GROUP
    how.expand_(flat[:grouped].view(-1, WEIGHT_GROUP), codes, scales)
    flat[grouped:] = vectors


def quantized_layouts(layouts: Sequence[BlockLayout], kind: Frozen) -> list[QuantizedLayout]:
    """Of several blocks; one object for all that are alike."""
    made = {id(layout): quantized_layout(layout, kind) for layout in layouts}
    return [made[id(layout)] for layout in layouts]


def _parts_of(buffer: BlockBuffer) -> tuple[tuple[Tensor, Tensor, Tensor], "_Codes"]:
    """Scales [groups], codes [groups, bytes] and vectors of a buffer, and how they are made."""
    assert isinstance(buffer.layout, QuantizedLayout)
    told, how = dict(buffer.tensors("ema")), _CODES[buffer.layout.kind]
    return (told["scales"], told["codes"].view(-1, how.bytes_of_group), told["vectors"]), how


def _chunks(groups: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK_GROUPS) for start in range(0, groups, _CHUNK_GROUPS))


def _as_int8(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups [some, 64], given their largest magnitudes."""
    scale = largest.div_(_STEPS)
    # Of a group of zeros the scale is 0, and so are all codes.
    return values.div(scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8), scale


def _from_int8_(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    # In two passes over memory: one product of both types would first make a float32 copy of all codes.
    values.copy_(codes).mul_(scales[:, None])


def _as_nf4(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The first of two values is in the upper half of a byte, as bitsandbytes has it."""
    table = torch.tensor(NF4, device=values.device)
    shares = values.div(largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    nearest = torch.bucketize(shares, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return nearest[:, 0::2] * 16 + nearest[:, 1::2], largest


def _from_nf4_(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    table = torch.tensor(NF4, device=values.device)
    # By byte, [256, 2]: a look-up gives two values.
    pairs = torch.cartesian_prod(table, table)
    for rows in _chunks(len(scales)):
        index = codes[rows].reshape(-1).to(torch.int32)
        torch.index_select(pairs, 0, index, out=values[rows].view(-1, 2))
    values.mul_(scales[:, None])


@dataclass(frozen=True, kw_only=True)
class _Codes:
    """One way to write groups of values as codes and scales."""

    dtype: torch.dtype
    bytes_of_group: int
    rounded: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    expand_: Callable[[Tensor, Tensor, Tensor], None]
    """Fills values [groups, 64], given codes and scales."""


_CODES = {
    "int8": _Codes(dtype=torch.int8, bytes_of_group=WEIGHT_GROUP, rounded=_as_int8, expand_=_from_int8_),
    "nf4": _Codes(dtype=torch.uint8, bytes_of_group=WEIGHT_GROUP // 2, rounded=_as_nf4, expand_=_from_nf4_),
}
