"""Whether half precision pays on this processor: decided by a measurement, as processors differ by a factor of ten.

Forward and backward of a linear map, bfloat16 against float32, one thread: 0.24 of the time on a Xeon with AMX, 0.25 on
an EPYC with avx512_bf16, 1.7 to 1.9 times on a Xeon without such instructions.
"""

import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from edgeblocks.errors import ConfigError
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Precision
from edgeblocks.offload.device import Target
from edgeblocks.settings.fields import Settings
from edgeblocks.targets.cpu import run_every_kernel

WORTH_IT = 1.1
"""How many times as fast products must be for `auto` to choose half precision."""
_ROWS, _LARGEST_WIDTH, _USUAL_WIDTH = 512, 512, 256
"""Small enough to stay below what any plan needs: 5 MB."""


def with_precision(settings: Settings, *, device: str, is_here: bool = True) -> Settings:
    """The settings with a precision instead of `auto`.

    Args:
        device: where the network will be, as torch names it.
        is_here: whether that is this machine, on which it can be measured.

    Raises:
        ConfigError: half precision on a device that has none.
    """
    asked, on_processor = settings.run.precision, torch.device(device).type == "cpu"
    if asked == "bf16" and not on_processor:
        raise ConfigError("--precision bf16 is for processors so far, and a GPU computes in float32; leave it out")
    if asked != "auto":
        return settings
    chosen = "bf16" if on_processor and is_here and bf16_gain(settings) >= WORTH_IT else "fp32"
    return replace(settings, run=settings.run.model_copy(update={"precision": chosen}))


def bf16_gain(settings: Settings) -> float:
    """How many times as fast forward and backward of a product as wide as the network are in bfloat16, here and now."""
    width = min(getattr(settings.family, "width", _USUAL_WIDTH), _LARGEST_WIDTH)
    x, weight = torch.randn(_ROWS, width, requires_grad=True), torch.randn(4 * width, width, requires_grad=True)

    def seconds(precision: Precision) -> float:
        started = time.perf_counter()
        with computing_in(precision):
            product = F.linear(x, weight)
        product.sum().backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - started

    # In turn, so that another program that holds the processor for a while slows both down.
    rounds = [(seconds("fp32"), seconds("bf16")) for _ in range(12)]
    return min(fp32 for fp32, _ in rounds) / min(bf16 for _, bf16 in rounds)


def untouched_bytes(precision: Precision) -> int:
    """Memory that is mapped and not touched when half precision meets matrices of new shapes, as of a last micro-batch.

    See `warmup_step`: these are the products of two or three of them.
    """
    return 48_000_000 if precision == "bf16" else 0


def warm_up(target: Target, precision: Precision) -> None:
    """`Target.warm_up`, and of the kernels of half precision where that is computed in."""
    target.warm_up()
    if precision == "bf16":
        with computing_in(precision):
            run_every_kernel()
        target.give_back()
