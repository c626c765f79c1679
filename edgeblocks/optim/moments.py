"""The 8-bit code that holds the optimizer's moments: fourth roots, in steps of a scale that 256 values share.

A *group* of 256 consecutive values shares one scale, its largest magnitude. A value x is stored as the number of steps

    k = round(steps * (|x| / scale)^(1/4)), with the sign of x        and comes back as        scale * (k / steps)^4

of 127 steps either side of zero (int8) or of 255 from zero (uint8, for what is never negative). Moments span decades,
and so do fourth powers: neighbours are 3 % apart near the scale, 6 % at a tenth of it and 17 % at a thousandth, and
step 1 stands for 4e-9 of the scale, or 2e-10. What it does to Adam's update, exp_avg / sqrt(exp_avg_sq), as root mean
square error after 300 steps with gradients whose sizes are spread log-normally (sigma), against the usual dynamic
8-bit code of Dettmers et al.:

    sigma             0       0.5     1       2       3
    fourth roots      1.1 %   1.4 %   2.3 %   13 %    41 %
    dynamic code      1.1 %   1.9 %   3.4 %   30 %    67 %

And it is quicker on a processor: each way is some operations that torch vectorizes, at 0.1 to 0.3 ns a value, where a
code without a formula is looked up, at 1.2 to 1.8 ns, or searched, at 7 (bitsandbytes).

Source: groups and their scales: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861,
section 2.1 (their block is our group); powers as a code: Yvinec et al. 2023, "PowerQuant", arXiv 2301.09858.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float32, Int8, UInt8
    from torch import Tensor

GROUP_SIZE = 256
SIGNED, UNSIGNED = torch.int8, torch.uint8
"""What codes are kept as: -127 to 127 steps, and 1 to 255."""
_NUM_STEPS = {SIGNED: 127, UNSIGNED: 255}
_FLOAT32_TINY = torch.finfo(torch.float32).tiny
_ROUNDING = 1.5 * 2**23
"""Added to a float32 below 2^22, leaves the nearest integer in the lowest bits of the sum."""


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Temporaries for (de)quantizing up to `numel` values at a time, a multiple of `GROUP_SIZE`."""

    magnitudes: Float32[Tensor, " numel"]
    factors: Float32[Tensor, " groups"]

    @classmethod
    def empty(cls, numel: int, device: torch.device | str = "cpu") -> Scratch:
        """A new one, of `scratch_bytes(numel)` bytes."""
        return cls(
            magnitudes=torch.empty(numel, device=device), factors=torch.empty(numel // GROUP_SIZE, device=device)
        )

    def first(self, numel: int) -> Scratch:
        """The part for `numel` values, sharing this one's memory."""
        return Scratch(magnitudes=self.magnitudes[:numel], factors=self.factors[: numel // GROUP_SIZE])


def scratch_bytes(numel: int) -> int:
    """Bytes of `Scratch.empty(numel)`.

    >>> scratch_bytes(256)
    1028
    """
    return (numel + numel // GROUP_SIZE) * 4


def dequantize_(
    out: Float32[Tensor, " numel"],
    codes: Int8[Tensor, " numel"] | UInt8[Tensor, " numel"],
    scales: Float32[Tensor, " groups"],
    *,
    scratch: Scratch,
) -> None:
    """Write to `out` the values that codes and scales stand for. `scratch` must be of the same numel.

    A group whose scale is NaN comes back as NaN throughout.
    """
    # The scale is multiplied in between the two squares, as its root: neither 255^4 nor scale / 255^4 appears, of which
    # the second would be subnormal where moments are small.
    factors = _roots_of_scales(scales, codes.dtype, scratch)
    out.copy_(codes)
    _square_(out, codes.dtype, scratch)
    out.view(-1, GROUP_SIZE).mul_(factors.unsqueeze(1))
    _square_(out, codes.dtype, scratch)


def _roots_of_scales(
    scales: Float32[Tensor, " groups"], kind: torch.dtype, scratch: Scratch
) -> Float32[Tensor, " groups"]:
    """sqrt(scale) / steps^2, in the scratch."""
    # As 1 / (1 / sqrt): torch leaves sqrt itself to MKL, which takes 20 times as long for zeros, of which gradients
    # have many, and once called on a second thread made the barriers of every later operation sleep (16 times the
    # context switches; a backward pass of the digits 81 ms instead of 61).
    return torch.rsqrt(scales, out=scratch.factors).mul_(_NUM_STEPS[kind] ** 2).reciprocal_()


def _square_(values: Float32[Tensor, " numel"], kind: torch.dtype, scratch: Scratch) -> None:
    """Square in place; a signed value keeps its sign."""
    values.mul_(torch.abs(values, out=scratch.magnitudes) if kind == SIGNED else values)


def quantize_(
    codes: Int8[Tensor, " numel"] | UInt8[Tensor, " numel"],
    scales: Float32[Tensor, " groups"],
    values: Float32[Tensor, " numel"],
    *,
    scratch: Scratch,
) -> None:
    """Write codes and scales of `values`, which are destroyed. `scratch` must be of the same numel.

    uint8 codes take no negative value and give 0 to none: a value below the smallest step, true zeros included, becomes
    that step. A group of zeros still comes back as zeros, because its scale is 0.

    A group that holds a NaN or an infinity gets the scale NaN, so that the next `dequantize_` gives NaN for all of it:
    a broken gradient reaches the loss instead of vanishing in a clipped code.
    """
    signed = codes.dtype == SIGNED
    # abs and amax: 0.11 ns a value; linalg.vector_norm(ord=inf) takes 3.1 and aminmax 2.2.
    roots = torch.abs(values, out=scratch.magnitudes) if signed else values
    torch.amax(roots.view(-1, GROUP_SIZE), 1, out=scales)
    # Adding 0 times itself leaves a finite number as it is and makes infinity NaN; fmod took 110 ns a scale for that.
    scales.add_(torch.mul(scales, 0.0, out=scratch.factors))
    # x^(1/4) as 1 / sqrt(1 / sqrt(x)), 0 for 0. The factor is more than 0, so that 0 * inf makes no NaN.
    factors = _roots_of_scales(scales, codes.dtype, scratch).clamp_(min=_FLOAT32_TINY)
    roots.rsqrt_().view(-1, GROUP_SIZE).mul_(factors.unsqueeze(1))
    roots.rsqrt_()
    if signed:
        roots.mul_(values.sign_())
    else:
        # The second moment is a denominator: exp_avg / (0 + eps) would take a parameter 1e8 times as far as its group's
        # others. Rounded up to the smallest step, the denominator is larger and the update smaller.
        roots.clamp_(min=1)
    # The integers' lowest bytes are the codes: 0.2 ns a value, where rounding and float32 to uint8 take 1.1.
    codes.copy_(roots.add_(_ROUNDING).view(torch.int32))
