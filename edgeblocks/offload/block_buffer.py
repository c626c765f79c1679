"""A block's bytes in memory: all tensors in one buffer, in the order of its file, and a network's parameters as views.

The memory of a `BlockBuffer` is exactly the data section of a block file (`offload.block_files`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgeblocks.methods import Master
from edgeblocks.optim.moments import GROUP_SIZE, SIGNED, UNSIGNED

SMALLEST_QUANTIZED = 4096
Optimizer = Literal["adamw8bit", "adamw"]
MASTERS: dict[Master, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Part = Literal["weights", "ema", "optimizer"]
NetworkPart = Literal["weights", "ema"]
"""What a network's parameters may be."""
PARTS: tuple[Part, ...] = ("weights", "ema", "optimizer")


def is_quantizable(shape: Sequence[int]) -> bool:
    """Whether a parameter's optimizer state may be kept in 8 bit: matrices that whole groups cover."""
    numel = math.prod(shape)
    return len(shape) >= 2 and numel % GROUP_SIZE == 0 and numel >= SMALLEST_QUANTIZED


def state_bytes(
    num_parameters: int, num_quantizable: int, optimizer: Optimizer, *, master: Master = "fp32"
) -> dict[Part, int]:
    """Bytes of each part of a block. AdamW keeps two moments: 8 bytes a parameter in fp32, 2.03 in 8 bit."""
    weights = MASTERS[master].itemsize * num_parameters
    quantized = num_quantizable if optimizer == "adamw8bit" else 0
    moments = 8 * (num_parameters - quantized) + 2 * quantized + 8 * (quantized // GROUP_SIZE)
    return {"weights": weights, "ema": weights, "optimizer": moments}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a block file. `start` counts bytes from the beginning of the data section."""

    name: str
    part: Part
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def own_name(self) -> str:
        """Without the part's prefix."""
        return self.name.removeprefix(f"{self.part}.")


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Where each tensor of a block lies.

    Parameters are ordered so that one optimizer call covers a stretch: first the `num_quantized` whose moments are kept
    in 8 bit, then up to `num_decayed` other matrices, then vectors, which get no weight decay.
    """

    entries: tuple[Entry, ...]
    num_parameters: int
    num_quantized: int
    num_decayed: int

    @property
    def num_bytes(self) -> int:
        return self.entries[-1].start + self.entries[-1].num_bytes

    @property
    def is_rounded(self) -> bool:
        """Whether weights and EMA are bfloat16."""
        return self.entries[0].dtype == MASTERS["bf16"]

    @property
    def keeps_ema(self) -> bool:
        """Whether there is an average of the weights beside them; else they stand for it wherever it is asked for."""
        return any(entry.part == "ema" for entry in self.entries)

    def stored(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Where these parts lie, each once."""
        if self.keeps_ema:
            return tuple(parts)
        return tuple(dict.fromkeys("weights" if part == "ema" else part for part in parts))

    def of_part(self, part: Part) -> list[Entry]:
        """A part's tensors, in the file's order."""
        (stored,) = self.stored([part])
        return [entry for entry in self.entries if entry.part == stored]

    def part_span(self, part: Part) -> tuple[int, int]:
        """First byte and number of bytes of a part in the data section."""
        inside = self.of_part(part)
        return inside[0].start, sum(entry.num_bytes for entry in inside)

    @classmethod
    def of(
        cls,
        block: nn.Module,
        optimizer: Optimizer,
        *,
        frozen: bool = False,
        master: Master = "fp32",
        keeps_ema: bool = True,
    ) -> "BlockLayout":
        """The layout of a block's parameters (which may be on the meta device); a frozen one has no moments.

        Args:
            master: in which numbers weights and EMA are kept.
            keeps_ema: whether there is one.
        """
        named = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]

        def region(shape: tuple[int, ...]) -> int:
            if optimizer == "adamw8bit" and is_quantizable(shape):
                return 0
            return 1 if len(shape) >= 2 else 2

        # By region, so that each region is one stretch of memory: a call of the optimizer takes a whole one.
        ordered = sorted(named, key=lambda item: region(item[1]))
        sizes = [sum(math.prod(shape) for _, shape in named if region(shape) == number) for number in range(3)]
        plain, quantized = (0, 0) if frozen else (sizes[1] + sizes[2], sizes[0])
        wanted: list[tuple[str, Part, torch.dtype, tuple[int, ...]]] = []
        wanted += [(f"weights.{name}", "weights", MASTERS[master], shape) for name, shape in ordered]
        wanted += [(f"ema.{name}", "ema", MASTERS[master], shape) for name, shape in ordered if keeps_ema]
        for moment in ("exp_avg", "exp_avg_sq"):
            wanted.append((f"optimizer.{moment}", "optimizer", torch.float32, (plain,)))
        for moment in ("exp_avg", "exp_avg_sq"):
            wanted.append((f"optimizer.{moment}_scales", "optimizer", torch.float32, (quantized // GROUP_SIZE,)))
        # Codes of one byte come last: a view as float32 must begin at a multiple of four.
        for moment, kind in (("exp_avg", SIGNED), ("exp_avg_sq", UNSIGNED)):
            wanted.append((f"optimizer.{moment}_codes", "optimizer", kind, (quantized,)))
        entries, start = [], 0
        for name, part, dtype, shape in wanted:
            entries.append(Entry(name=name, part=part, dtype=dtype, shape=shape, start=start))
            start += entries[-1].num_bytes
        return cls(
            entries=tuple(entries), num_parameters=sum(sizes), num_quantized=quantized, num_decayed=sizes[0] + sizes[1]
        )


def largest_of(layouts: Iterable[BlockLayout], parts: Sequence[Part] = PARTS) -> BlockLayout:
    """The layout that takes most room for these parts; a frozen block is small but for its weights."""
    return max(layouts, key=lambda layout: sum(layout.part_span(part)[1] for part in layout.stored(parts)))


class BlockBuffer:
    """Memory for the parts of a block, with typed views into it. One allocation for the life of a run."""

    def __init__(
        self, layout: BlockLayout, parts: Sequence[Part] = PARTS, *, allocate: Callable[[int], Tensor] | None = None
    ) -> None:
        """Memory for the parts of blocks that are not larger than `layout`.

        Args:
            allocate: gives uint8 [bytes]; None takes the processor's memory.
        """
        self.parts = layout.stored(parts)
        self._memory = (allocate or _in_memory)(sum(layout.part_span(part)[1] for part in self.parts))
        self.adopt_(layout)

    @property
    def num_bytes(self) -> int:
        return self._memory.numel()

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._memory.device

    def touched(self) -> "BlockBuffer":
        """The buffer, with every page resident from now on: what it will take is taken at the start."""
        # Untouched pages are not resident: they would be taken later, where memory may be short.
        self._memory.zero_()
        return self

    def adopt_(self, layout: BlockLayout) -> None:
        """Use the memory for another block, whose layout must not be larger."""
        self.layout = layout
        self._part_starts: dict[Part, int] = {}
        start = 0
        for part in self.parts:
            self._part_starts[part] = start
            start += layout.part_span(part)[1]
        assert start <= self.num_bytes, "a buffer is made for the largest block"
        self.content = self._memory[:start]
        """uint8 view of all parts, one after the other."""

    def part_bytes(self, part: Part) -> Tensor:
        """uint8 view of one part, in file order."""
        (stored,) = self.layout.stored([part])
        start = self._part_starts[stored]
        return self._memory[start : start + self.layout.part_span(stored)[1]]

    def tensors(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """(name without the part's prefix, view) of one part's tensors."""
        part_start = self.layout.part_span(part)[0]
        memory = self.part_bytes(part)
        for entry in self.layout.of_part(part):
            start = entry.start - part_start
            # A view: what is trained is changed where it lies, and a block moves as one stretch of bytes.
            yield entry.own_name, memory[start : start + entry.num_bytes].view(entry.dtype).view(entry.shape)

    def bind_(self, network: nn.Module) -> None:
        """Make a block's parameters views of the EMA weights."""
        bind_parameters_(network, self.tensors("ema"))

    def flat(self, part: NetworkPart) -> Tensor:
        """All parameters of a part as one vector [num_parameters], of the numbers that they are kept in."""
        return self.part_bytes(part).view(self.layout.entries[0].dtype)


def _in_memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def bind_parameters_(block: nn.Module, values: Iterable[tuple[str, Tensor]], gradients: Tensor | None = None) -> None:
    """Make the block's parameters views of a buffer, and their gradients views of one flat vector in the same order."""
    start = 0
    for name, value in values:
        owner_name, _, leaf = name.rpartition(".")
        owner = block.get_submodule(owner_name)
        parameter = nn.Parameter(value, requires_grad=gradients is not None)
        if gradients is not None:
            # There before the first backward pass, so that autograd adds to it in place and all gradients lie in one
            # row.
            parameter.grad = gradients[start : start + value.numel()].view_as(value)
            start += value.numel()
        setattr(owner, leaf, parameter)


def bytes_of(data: Tensor) -> memoryview:
    """A uint8 tensor's bytes, without a copy."""
    return memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's stubs promise no buffer before Python 3.12
