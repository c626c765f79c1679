"""The block-wise dynamic 8-bit code that holds the optimizer's moments.

A *group* of 256 consecutive values shares one scale, its largest magnitude. A value over its scale lies in [-1, 1]
(the signed code) or [0, 1] (the unsigned one) and is stored as the number of the nearest of 256 code values. These
are dense near 1 and sparse near 0 but span seven decades, because moments do.

Finding the nearest of 256 is what makes 8-bit optimizers slow on a CPU (one thread of an AMD Zen 5, scales included:
bitsandbytes 7.2 ns a value). Here the value is rounded to float16, and its 16 bits index a table of all 65,536 answers:
0.8 ns. Why float16 and not bfloat16, which spends three of these bits on exponents that no value in [-1, 1] above the
smallest code needs: on normal values float16 gives the exact nearest code 99.6 % of the time and otherwise its
neighbour, bfloat16 96.8 % (squares of normal values, unsigned: 99.5 and 95.8 %; bitsandbytes' own CPU kernel 99.8 and
96.9 %).

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, sections 2.1 and 2.2
(their block is our group).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float16, Float32, Int64, UInt8
    from torch import Tensor

GROUP_SIZE = 256
_NUM_DECADES = 7
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Code:
    """256 ascending code values, and for each float16 bit pattern the number of the code that stands for it."""

    values: Float32[Tensor, "codes=256"]
    nearest: UInt8[Tensor, "patterns=65536"]
    signed: bool

    def to(self, device: torch.device | str) -> Code:
        """The same on a device."""
        return Code(values=self.values.to(device), nearest=self.nearest.to(device), signed=self.signed)


CODE_BYTES = 256 * 4 + 65_536
"""Bytes of one `Code`."""


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Temporaries for (de)quantizing up to `numel` values at a time, a multiple of `GROUP_SIZE`."""

    index: Int64[Tensor, " numel"]
    half: Float16[Tensor, " numel"]
    inverse: Float32[Tensor, " groups"]

    @classmethod
    def empty(cls, numel: int, device: torch.device | str = "cpu") -> Scratch:
        """A new one, of `scratch_bytes(numel)` bytes."""
        return cls(
            index=torch.empty(numel, dtype=torch.int64, device=device),
            half=torch.empty(numel, dtype=torch.float16, device=device),
            inverse=torch.empty(numel // GROUP_SIZE, device=device),
        )

    def first(self, numel: int) -> Scratch:
        """The part for `numel` values, sharing this one's memory."""
        return Scratch(index=self.index[:numel], half=self.half[:numel], inverse=self.inverse[: numel // GROUP_SIZE])


def scratch_bytes(numel: int) -> int:
    """Bytes of `Scratch.empty(numel)`.

    >>> scratch_bytes(256)
    2564
    """
    return numel * (8 + 2) + numel // GROUP_SIZE * 4


def dynamic_map(*, signed: bool) -> Float32[Tensor, "codes=256"]:
    """The 256 values of the dynamic 8-bit code, ascending, with 0 and 1 among them.

    Decade d = 0..6, (10^(d-7), 10^(d-6)], is cut into 2^d equal parts for each sign (signed) or 2^(d+1) (unsigned),
    and the middle of each part is a code value.

    Source: arXiv 2110.02861, sections 1.3 and 2.2; equal to bitsandbytes.functional.create_dynamic_map.
    """
    values = [0.0, 1.0]
    for decade in range(_NUM_DECADES):
        num_parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, num_parts + 1, dtype=torch.float32)
        middles = 10 ** (decade - _NUM_DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def dynamic_code(*, signed: bool) -> Code:
    """The code for `exp_avg` (signed) or `exp_avg_sq` (unsigned), built once a process.

    The unsigned code gives its zero to no value: the second moment stands under a fraction bar, and exp_avg / (0 + eps)
    would throw a parameter out of its group's company by a factor of 1e8. A value below the smallest code, true zeros
    included (float16 cannot tell them apart), becomes the smallest code: a larger denominator, so a smaller update.
    A group of zeros still comes back as zeros, because its scale is 0.
    """
    values = dynamic_map(signed=signed)
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    # NaN stands for nothing (its group's scale is NaN already) but must have an entry; the nearest to 0 will do.
    reals = patterns.to(torch.float32).nan_to_num(nan=0.0)
    midpoints = (values[:-1].double() + values[1:].double()) / 2
    nearest = torch.bucketize(reals.double(), midpoints, out_int32=True)
    if not signed:
        nearest.clamp_(min=1)
    return Code(values=values, nearest=nearest.to(torch.uint8), signed=signed)


def dequantize_(
    out: Float32[Tensor, " numel"],
    codes: UInt8[Tensor, " numel"],
    scales: Float32[Tensor, " groups"],
    *,
    code: Code,
    scratch: Scratch,
) -> None:
    """Write to `out` the code values times their group's scale. `scratch` must be of the same numel.

    A group whose scale is NaN comes back as NaN throughout.
    """
    # ns a value for copy and gather: index_select 0.10 + 0.33 with int64, 0.05 + 0.52 with int32; the gather by np.take
    # 0.5, torch.take 1.0, values[index] 1.5. Looking up pairs of codes, 0.27 in all, would make the step 4 % faster for
    # 1 MB of tables.
    scratch.index.copy_(codes)
    torch.index_select(code.values, 0, scratch.index, out=out)
    out.view(-1, GROUP_SIZE).mul_(scales.unsqueeze(1))


def quantize_(
    codes: UInt8[Tensor, " numel"],
    scales: Float32[Tensor, " groups"],
    values: Float32[Tensor, " numel"],
    *,
    code: Code,
    scratch: Scratch,
) -> None:
    """Write codes and scales of `values`, which are destroyed. `scratch` must be of the same numel.

    No negative value comes back as -scale, for -1 is not in the signed code (-0.993 is): a property of the paper's map.
    A group that holds a NaN or an infinity gets the scale NaN, so that the next `dequantize_` gives NaN for all of it:
    a broken gradient reaches the loss instead of vanishing in a clipped code.
    """
    groups = values.view(-1, GROUP_SIZE)
    if code.signed:
        # abs and amax: 0.11 ns a value; linalg.vector_norm(ord=inf) takes 3.1 and aminmax 2.2. The magnitudes borrow
        # the memory of the index, which is filled only later.
        magnitudes = scratch.index.view(torch.float32)[: values.numel()]
        torch.abs(values, out=magnitudes)
        torch.amax(magnitudes.view(-1, GROUP_SIZE), 1, out=scales)
    else:
        torch.amax(groups, 1, out=scales)
    # Adding 0 times itself leaves a finite number as it is and makes infinity NaN; fmod took 110 ns a scale for that.
    scales.add_(torch.mul(scales, 0.0, out=scratch.inverse))
    # 1/0 is clamped to a finite number, so that a group of zeros stays zeros instead of 0 * inf = NaN.
    torch.reciprocal(scales, out=scratch.inverse).clamp_(max=_FLOAT32_MAX)
    groups.mul_(scratch.inverse.unsqueeze(1))
    scratch.half.copy_(values)
    scratch.index.copy_(scratch.half.view(torch.uint16))
    torch.index_select(code.nearest, 0, scratch.index, out=codes)
