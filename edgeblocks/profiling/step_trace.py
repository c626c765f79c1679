"""One step on torch's meta device: operators run on shapes alone while a dispatch mode follows which storages live."""

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Precision
from edgeblocks.planning.layer_costs import LARGEST_HEAP_BYTES


class LiveStorages:
    """The storages that tensors of traced operators own: bytes that live now and at most, bytes written, operators."""

    def __init__(self, largest_heap_bytes: int = LARGEST_HEAP_BYTES) -> None:
        self._largest_heap_bytes = largest_heap_bytes
        self.live_bytes = self.peak_bytes = self.touched_bytes = self.operators = 0
        self.heap_live_bytes = self.heap_bytes = 0
        self._known: set[int] = set()

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        # The storage's address: its name as long as it lives, given away again afterwards, hence `_forget`.
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.live_bytes += size
        # Once for each storage: what is later written into it again is not counted.
        self.touched_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if size < self._largest_heap_bytes:
            self.heap_live_bytes += size
            self.heap_bytes = max(self.heap_bytes, self.heap_live_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def ignore(self, tensor: torch.Tensor) -> None:
        self._known.add(tensor.untyped_storage()._cdata)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size
        if size < self._largest_heap_bytes:
            self.heap_live_bytes -= size


class _KnownResults:
    """Gives what an operator gave before for tensors of the same shapes: new tensors, or the one that it wrote into.

    torch works out many shapes in Python, at up to 4 ms an operator, and layers and iterations repeat the same ones: a
    recurrent network, unrolled, is traced in a quarter of the time. Views are always made by their operators.
    """

    def __init__(self) -> None:
        self._made: dict[object, _Result | Literal["first", "out"] | None] = {}
        """By operator and arguments: how its result is made, or which argument it is; None: it must be run."""

    def of(self, operator: "OpOverload[..., object]", args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        # Values of numbers are part of it, contents of tensors are not: on the meta device they have none.
        key = operator, _described(args), _described(tuple(kwargs.items()))
        try:
            known = self._made.get(key, "unknown")
        except TypeError:  # an argument that cannot be looked up
            return operator(*args, **kwargs)
        if known == "first":
            return args[0]
        if known == "out":
            return kwargs["out"]
        if isinstance(known, _Result):
            return known.again()
        result = operator(*args, **kwargs)
        if known == "unknown" and operator._schema.is_mutable:
            # It may also have given what it wrote into another shape.
            is_as_before = (_described(args), _described(tuple(kwargs.items()))) == key[1:]
            is_first, is_out = args and result is args[0], "out" in kwargs and result is kwargs["out"]
            self._made[key] = None if not is_as_before else "first" if is_first else "out" if is_out else None
        elif known == "unknown":
            self._made[key] = _how_made(result, (args, kwargs))
        return result


@dataclass(frozen=True, kw_only=True)
class _Result:
    """Shape, stride and dtype of each tensor that an operator gave; None for one that was not asked for."""

    tensors: tuple[tuple[Any, ...] | None, ...]
    is_tuple: bool

    def again(self) -> object:
        made = (None if one is None else _made_again(*one) for one in self.tensors)
        return tuple(made) if self.is_tuple else next(made)


def _made_again(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _described(value: object) -> object:
    """All of an argument that a result's shape can depend on, to be looked up."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type, value.is_conj(), value.is_neg()
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value


def _how_made(result: object, given: object) -> _Result | None:
    """How to make an operator's result; None where it is not of meta tensors with memory of their own."""
    results = result if isinstance(result, tuple) else (result,)
    tensors = _tensors(results)
    if not tensors or not all(one is None or isinstance(one, torch.Tensor) for one in results):
        return None
    if any(tensor.device.type != "meta" for tensor in tensors):
        return None
    own, others = _sizes(tensors), _sizes(_tensors(given))
    if len(own) < len(tensors) or own.keys() & others.keys():
        return None
    found = _Result(
        tensors=tuple(None if one is None else (one.shape, one.stride(), one.dtype) for one in results),
        is_tuple=isinstance(result, tuple),
    )
    again = _tensors(found.again())
    return found if [*own.values()] == [*_sizes(again).values()] else None


def _sizes(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage that the tensors have, in their order."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


_results = _KnownResults()
_ATTENTION_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, storages: LiveStorages, *, accumulates_apart: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages, self._accumulates_apart = storages, accumulates_apart

    def __torch_dispatch__(
        self,
        func: "OpOverload[..., object]",
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = _results.of(func, args, kwargs or {})
        self._storages.operators += 1
        for tensor in _tensors(result):
            self._storages.see(tensor)
        if (
            self._accumulates_apart
            and func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        ):
            queries = args[1]
            assert isinstance(queries, torch.Tensor)
            for tensor in _query_gradient_sums(queries):
                self._storages.see(tensor)
        return result


def _query_gradient_sums(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What CUDA's backward pass of attention adds up in, besides its results, in half precision: float32 sums of the
    queries' gradients, in whole tiles of 128 tokens, and a sum for each token.

    Source: mha_bwd of torch, aten/.../cuda/flash_attn/flash_api.cpp; the memory-efficient kernel has as much.
    """
    batch, heads, tokens, head_width = queries.shape
    rows, tile = math.ceil(tokens / 128) * 128, 32 if head_width <= 128 else 64
    sums = torch.empty(batch, rows, heads, math.ceil(head_width / tile) * tile, device="meta")
    return sums, torch.empty(batch, heads, rows, device="meta")


@contextlib.contextmanager
def _cpu_attention() -> Iterator[None]:
    """Attention as a CPU runs it, fused; meta tensors would take the form that keeps the attention matrix.

    The function itself is replaced, because a TorchFunctionMode is off while it handles `Tensor.backward`: layers that
    are run again in the backward pass would escape it.
    """
    usual = F.scaled_dot_product_attention

    def fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: object,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if enable_gqa:  # groups of heads that share keys and values: as if each had its own
            key, value = (one.repeat_interleave(query.size(-3) // one.size(-3), -3) for one in (key, value))
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            kwargs["attn_mask"] = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 1.0)
        found: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, *args, **kwargs
        )[0]
        return found

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def traced_step(
    family: Family, num_layers: int, samples: int, kind: str, *, precision: Precision = "fp32", device: str = "cpu"
) -> LiveStorages:
    """Run one step on the meta device and follow its storages; weights, gradients and the batch are not counted.

    A block's fixed tables are: of 50,000 tokens the codes take 13 MB.

    Args:
        kind: "plain", "checkpointed" or "forward", see `layer_costs.LayerCosts`.
        device: the kind of device that such steps will be made on.
    """
    storages = LiveStorages(family.largest_heap_bytes)
    with torch.device("meta"):
        block = family.block(num_layers=num_layers, checkpointing=kind == "checkpointed")
        block.reset_tables_()
        for parameter in block.parameters():
            # There before the step, as in training, where gradients are added to in place.
            parameter.grad = torch.empty_like(parameter)
            storages.ignore(parameter)
            storages.ignore(parameter.grad)
        for tensor in block.held_elsewhere():
            storages.ignore(tensor)
        batch = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in family.batch_spec(samples).items()}
    for tensor in batch.values():
        storages.ignore(tensor)
    for table in block.buffers():
        storages.see(table)
    # In float32 there is the same, within the margin by which plans were above what was measured (docs/gpu.md).
    follow = _Follow(storages, accumulates_apart=device == "cuda" and precision != "fp32")
    with _cpu_attention(), follow:
        with torch.set_grad_enabled(kind != "forward"), computing_in(precision, "meta", traced_for=device):
            loss = family.loss(block, batch)
        if kind != "forward":
            loss.sum().backward()  # type: ignore[no-untyped-call]
    return storages


def traced_forward(network: nn.Module, *shapes: tuple[int, ...]) -> LiveStorages:
    """Run a network on the meta device once, on tensors of these shapes, and follow its storages; the weights and these
    tensors are not counted."""
    storages = LiveStorages()
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    for tensor in (*network.parameters(), *network.buffers(), *inputs):
        storages.ignore(tensor)
    with torch.no_grad(), _cpu_attention(), _Follow(storages):
        network(*inputs)
    return storages
