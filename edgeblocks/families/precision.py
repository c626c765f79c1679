"""Half precision: products of matrices in bfloat16, everything that adds up in float32.

Weights, their gradients, moments and EMA stay float32; a weight is rounded where it is used. Activations are bfloat16
from a network's stem to its readout, so that those which wait for the backward pass, and those between two stages, take
half of the room. Statistics of norms, softmax and losses are float32.

On a processor that is `torch.autocast`, which networks of one's own follow without a word of theirs; the families that
come with edgeblocks round at the same places by themselves, in `lowered`, because the trace of costs runs on torch's
meta device, where there is no autocast.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgeblocks.methods import Precision

HALF = torch.bfloat16
PROGRAMS = "64"
"""How many programs the library that multiplies bfloat16 matrices keeps, one for each shape of two matrices, of some
700 KB each: a step has about 30, evaluation as many. Its own limit, 1024, would be a part of the budget that no plan
knows."""


@contextlib.contextmanager
def computing_in(precision: Precision, *, device: str = "cpu") -> Iterator[None]:
    """Networks compute in a precision while this lasts: on a processor, or on the meta device.

    For the forward pass alone: the backward pass of each operator is in the numbers of its forward pass.
    """
    if device == "meta":
        with _Lowering() if precision == "bf16" else contextlib.nullcontext():
            yield
        return
    if precision == "bf16":
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PROGRAMS)
    # Without autocast's own cache: it keeps rounded weights for as long as the context lasts, a second copy of a block
    # that no plan has counted.
    with torch.autocast("cpu", dtype=HALF, enabled=precision == "bf16", cache_enabled=False):
        yield


def precision_now() -> Precision:
    """In what networks compute now."""
    return "bf16" if torch.is_autocast_enabled("cpu") or _Lowering.depth > 0 else "fp32"


def lowered(x: Tensor) -> Tensor:
    """A float32 tensor rounded to half precision where that is computed in; otherwise as it is."""
    return x.to(HALF) if x.dtype == torch.float32 and precision_now() == "bf16" else x


def bf16_instructions() -> str:
    """The instructions that this processor has for bfloat16, as they are known; "none" where it is emulated."""
    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "none"


class _Lowering(TorchFunctionMode):
    """What `torch.autocast` does to the arguments of matrix products and convolutions, on every device."""

    depth = 0
    _PRODUCTS = frozenset(
        {F.linear, F.scaled_dot_product_attention, F.bilinear, torch.matmul, torch.mm, torch.bmm, torch.addmm}
        | {torch.addbmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
        | {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
    )

    def __enter__(self) -> Any:
        _Lowering.depth += 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _Lowering.depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., object], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in self._PRODUCTS:
            args = tuple(_lowered_if_tensor(value) for value in args)
            kwargs = {name: _lowered_if_tensor(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _lowered_if_tensor(value: object) -> object:
    return value.to(HALF) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
