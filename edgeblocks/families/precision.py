"""Half precision: products of matrices in bfloat16 or float16, everything that adds up in float32.

Weights, their gradients, moments and EMA stay float32; a weight is rounded where it is used. Activations are of half
precision from a network's stem to its readout, so that those which wait for the backward pass, and those between two
stages, take half of the room. Statistics of norms, softmax and losses are float32. float16 has 5 bits of exponent where
bfloat16 has 8, hence `optim.loss_scale`.

That is `torch.autocast`, which networks of one's own follow without a word of theirs; the families that come with
edgeblocks round at the same places by themselves, in `lowered`, because the trace of costs runs on torch's meta device,
where there is no autocast. On CUDA autocast computes norms, softmax and losses in float32 tensors, on a processor it
leaves them in the numbers they come in; the trace follows either (`computing_in`).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgeblocks.methods import Precision

_HALVES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROGRAMS = "64"
"""How many programs the library that multiplies matrices of half precision on a processor keeps, one for each shape of
two matrices, of some 700 KB each: a step has about 30, evaluation as many. Its own limit, 1024, would be a part of the
budget that no plan knows."""


@contextlib.contextmanager
def computing_in(
    precision: Precision, device: torch.device | str = "cpu", *, traced_for: str = "cpu"
) -> Iterator[None]:
    """Networks compute in a precision while this lasts, on a device.

    For the forward pass alone: the backward pass of each operator is in the numbers of its forward pass.

    Args:
        device: a processor, a GPU, or the meta device.
        traced_for: the kind of device that the meta device stands for.
    """
    kind, half = torch.device(device).type, _HALVES.get(precision)
    if kind == "meta":
        with contextlib.nullcontext() if half is None else _Lowering(half, norms_in_float32=traced_for == "cuda"):
            yield
        return
    if kind == "cuda":
        # Products that stay float32 (there are few) may round their factors to TF32, of 10 bits, where the rest rounds
        # to as many or fewer; those of fp32 stay IEEE. Not set back: the backward pass comes after this.
        torch.set_float32_matmul_precision("highest" if half is None else "high")
    elif half is not None:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PROGRAMS)
    # Without autocast's own cache: it keeps rounded weights for as long as the context lasts, a second copy of a block
    # that no plan has counted.
    with torch.autocast(kind, dtype=half or torch.bfloat16, enabled=half is not None, cache_enabled=False):
        yield


def precision_now(device: torch.device) -> Precision:
    """In what networks compute now on a device."""
    half = _half_now(device)
    return next((name for name, dtype in _HALVES.items() if dtype == half), "fp32")


def lowered(x: Tensor) -> Tensor:
    """A float32 tensor rounded to half precision where that is computed in; otherwise as it is."""
    half = _half_now(x.device) if x.dtype == torch.float32 else None
    return x if half is None else x.to(half)


def bf16_instructions() -> str:
    """The instructions that this processor has for bfloat16, as they are known; "none" where it is emulated."""
    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "none"


def _half_now(device: torch.device) -> torch.dtype | None:
    if device.type == "meta":
        return None if _Lowering.current is None else _Lowering.current.half
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _Lowering(TorchFunctionMode):
    """What `torch.autocast` does to the arguments of operators, on the meta device.

    Source: docs.pytorch.org, "Autocast Op Reference".
    """

    current: ClassVar[Self | None] = None
    """The innermost one that lasts."""
    _PRODUCTS = frozenset(
        {F.linear, F.scaled_dot_product_attention, F.bilinear, torch.matmul, torch.mm, torch.bmm, torch.addmm}
        | {torch.addbmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
        | {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
    )
    _IN_FLOAT32_ON_CUDA = frozenset(
        {F.layer_norm, F.group_norm, F.rms_norm, F.normalize, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss}
        | {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.kl_div, F.softplus, F.cosine_similarity, torch.softmax}
        | {torch.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.reciprocal, torch.sum, torch.prod}
        | {torch.cumsum, torch.norm, Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow}
        | {Tensor.__pow__, Tensor.rsqrt, Tensor.reciprocal, Tensor.sum, Tensor.prod, Tensor.cumsum, Tensor.norm}
    )

    def __init__(self, half: torch.dtype, *, norms_in_float32: bool) -> None:
        super().__init__()
        self.half = half
        self._raised = self._IN_FLOAT32_ON_CUDA if norms_in_float32 else frozenset()
        self._outer: _Lowering | None = None

    def __enter__(self) -> Any:
        self._outer, _Lowering.current = _Lowering.current, self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _Lowering.current = self._outer
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., object], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in self._PRODUCTS or func in self._raised:
            given, wanted = (torch.float32, self.half) if func in self._PRODUCTS else (self.half, torch.float32)
            args = tuple(_as_type(value, given, wanted) for value in args)
            kwargs = {name: _as_type(value, given, wanted) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _as_type(value: object, given: torch.dtype, wanted: torch.dtype) -> object:
    return value.to(wanted) if isinstance(value, Tensor) and value.dtype == given else value
