"""A block's bytes: their layout in one buffer, and the file that holds them.

A block lives in one safetensors file: weights, EMA and optimizer state, with plain names. The data section of the file
is exactly the memory of a `BlockBuffer`, so a block is read with one `readinto` and written with one `write`, without
a second copy (safetensors' own reader maps the file and doubles the resident bytes; its writer is several times slower
with fsync). Any safetensors reader opens the file.

Every part carries a SHA-256 of its bytes, and the header one of itself: a flipped byte is found before use. A write
goes to a temporary name, is synced, and then renamed: at any instant the file under the final name is whole.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgeblocks.durable import write_atomically
from edgeblocks.errors import RunError, StorageError
from edgeblocks.tensor_file import HEADER_LIMIT_BYTES, encode_header
from edgeblocks.units import format_bytes
from edgeblocks.untrusted import open_regular, parse_json, shown

FORMAT_VERSION = 1
GROUP_SIZE = 256
SMALLEST_QUANTIZED = 4096
Optimizer = Literal["adamw8bit", "adamw"]
Part = Literal["weights", "ema", "optimizer"]
PARTS: tuple[Part, ...] = ("weights", "ema", "optimizer")
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


def is_quantizable(shape: Sequence[int]) -> bool:
    """Whether a parameter's optimizer state may be kept in 8 bit: matrices that whole groups cover."""
    numel = math.prod(shape)
    return len(shape) >= 2 and numel % GROUP_SIZE == 0 and numel >= SMALLEST_QUANTIZED


def state_bytes(num_parameters: int, num_quantizable: int, optimizer: Optimizer) -> dict[Part, int]:
    """Bytes of each part of a block. AdamW keeps two moments: 8 bytes a parameter in fp32, 2.03 in 8 bit."""
    quantized = num_quantizable if optimizer == "adamw8bit" else 0
    moments = 8 * (num_parameters - quantized) + 2 * quantized + 8 * (quantized // GROUP_SIZE)
    return {"weights": 4 * num_parameters, "ema": 4 * num_parameters, "optimizer": moments}


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

    def of_part(self, part: Part) -> list[Entry]:
        """A part's tensors, in the file's order."""
        return [entry for entry in self.entries if entry.part == part]

    def part_span(self, part: Part) -> tuple[int, int]:
        """First byte and number of bytes of a part in the data section."""
        inside = self.of_part(part)
        return inside[0].start, sum(entry.num_bytes for entry in inside)

    @classmethod
    def of(cls, block: nn.Module, optimizer: Optimizer, *, frozen: bool = False) -> "BlockLayout":
        """The layout of a block's parameters (which may be on the meta device); a frozen one has no moments."""
        named = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]

        def region(shape: tuple[int, ...]) -> int:
            if optimizer == "adamw8bit" and is_quantizable(shape):
                return 0
            return 1 if len(shape) >= 2 else 2

        ordered = sorted(named, key=lambda item: region(item[1]))
        sizes = [sum(math.prod(shape) for _, shape in named if region(shape) == number) for number in range(3)]
        plain, quantized = (0, 0) if frozen else (sizes[1] + sizes[2], sizes[0])
        wanted: list[tuple[str, Part, torch.dtype, tuple[int, ...]]] = []
        wanted += [(f"weights.{name}", "weights", torch.float32, shape) for name, shape in ordered]
        wanted += [(f"ema.{name}", "ema", torch.float32, shape) for name, shape in ordered]
        for moment in ("exp_avg", "exp_avg_sq"):
            wanted.append((f"optimizer.{moment}", "optimizer", torch.float32, (plain,)))
        for moment in ("exp_avg", "exp_avg_sq"):
            wanted.append((f"optimizer.{moment}_scales", "optimizer", torch.float32, (quantized // GROUP_SIZE,)))
        for moment in ("exp_avg", "exp_avg_sq"):
            wanted.append((f"optimizer.{moment}_codes", "optimizer", torch.uint8, (quantized,)))
        entries, start = [], 0
        for name, part, dtype, shape in wanted:
            entries.append(Entry(name=name, part=part, dtype=dtype, shape=shape, start=start))
            start += entries[-1].num_bytes
        return cls(
            entries=tuple(entries), num_parameters=sum(sizes), num_quantized=quantized, num_decayed=sizes[0] + sizes[1]
        )


class BlockBuffer:
    """Memory for the parts of a block, with typed views into it. One allocation for the life of a run."""

    def __init__(
        self, layout: BlockLayout, parts: Sequence[Part] = PARTS, *, allocate: Callable[[int], Tensor] | None = None
    ) -> None:
        """Memory for the parts of blocks that are not larger than `layout`.

        Args:
            allocate: gives uint8 [bytes]; None takes the processor's memory.
        """
        self.parts = tuple(parts)
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
        start = self._part_starts[part]
        return self._memory[start : start + self.layout.part_span(part)[1]]

    def tensors(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """(name without the part's prefix, view) of one part's tensors."""
        part_start = self.layout.part_span(part)[0]
        memory = self.part_bytes(part)
        for entry in self.layout.entries:
            if entry.part == part:
                start = entry.start - part_start
                view = memory[start : start + entry.num_bytes].view(entry.dtype).view(entry.shape)
                yield entry.name.removeprefix(f"{part}."), view

    def bind_(self, network: nn.Module) -> None:
        """Make a block's parameters views of the EMA weights."""
        bind_parameters_(network, self.tensors("ema"))

    def flat(self, part: Literal["weights", "ema"]) -> Tensor:
        """All parameters of a part as one fp32 vector [num_parameters]."""
        return self.part_bytes(part).view(torch.float32)


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
            parameter.grad = gradients[start : start + value.numel()].view_as(value)
            start += value.numel()
        setattr(owner, leaf, parameter)


@dataclass(frozen=True, kw_only=True)
class BlockHeader:
    """What a block file says of itself."""

    run_id: str
    block: int
    step: int
    digests: dict[Part, str]
    run_bytes_written: int
    """Bytes of blocks that the run had written when this file was complete."""


class BlockStore:
    """The files of a run's blocks, in one folder."""

    def __init__(
        self, folder: Path, layouts: Sequence[BlockLayout], run_id: str, *, trained_together: bool = False
    ) -> None:
        """
        Args:
            trained_together: as stages of one network, of which none can be trained again alone.
        """
        self.folder, self._together = folder, trained_together
        self.layouts = tuple(layouts)
        self.run_id = run_id
        self.bytes_written = 0
        self.bytes_read = 0
        self._former_bytes_written = 0
        self._held_folder: int | None = None

    def buffer(self, parts: Sequence[Part] = PARTS) -> BlockBuffer:
        """Memory for these parts of any of the blocks."""
        return BlockBuffer(max(self.layouts, key=lambda one: sum(one.part_span(part)[1] for part in parts)), parts)

    def _kept(self, block: int) -> str:
        """What is not lost with a damaged file, and what to do."""
        if self._together:
            return (
                "the others are not touched, but all were trained together. Put the file back from a copy, or train "
                "again from the beginning, with another --out"
            )
        return (
            f"the other blocks are not touched. Put the file back from a copy, or train this block alone again with "
            f"edgeblocks train --resume RUN --reinit-block {block}"
        )

    def path(self, block: int) -> Path:
        return self.folder / f"block_{block:03d}.safetensors"

    def file_bytes(self, block: int) -> int:
        """The most bytes that a block's file has on disk."""
        most, digests = 10**18, dict.fromkeys(PARTS, "0" * 64)
        header = BlockHeader(run_id=self.run_id, block=block, step=most, digests=digests, run_bytes_written=most)
        return len(_encode_header(self.layouts[block], header)) + self.layouts[block].num_bytes

    @property
    def run_bytes_written(self) -> int:
        """Bytes of blocks written in the run's whole life, earlier processes included."""
        return self._former_bytes_written + self.bytes_written

    def continue_meter(self, headers: Iterable["BlockHeader"]) -> None:
        """Count on from what earlier processes wrote, as the newest of the block files has it."""
        self._former_bytes_written = max((header.run_bytes_written for header in headers), default=0)

    def write(self, block: int, buffer: BlockBuffer, step: int) -> None:
        """Replace a block's file by the buffer's content, atomically.

        Raises:
            StorageError: the disk refused, or the folder is not the one that was written before; the former file is
                untouched.
        """
        self.check_folder()
        layout = self.layouts[block]
        digests = {part: _digest(buffer.part_bytes(part)) for part in PARTS}
        meter = self.run_bytes_written + self.file_bytes(block)
        header = _encode_header(
            layout,
            BlockHeader(run_id=self.run_id, block=block, step=step, digests=digests, run_bytes_written=meter),
        )
        payload: list[bytes | memoryview] = [header, *(bytes_of(buffer.part_bytes(part)) for part in PARTS)]
        total = sum(len(piece) for piece in payload)
        path = self.path(block)
        try:
            write_atomically(path, payload)
        except OSError as error:
            raise storage_error(f"cannot write block {block} ({format_bytes(total)})", path, error) from error
        self.bytes_written += total

    def hold_folder(self) -> None:
        """Write into this very folder only from now on; while it is open no other folder is given its inode number."""
        self._held_folder = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, self._held_folder)

    def check_folder(self) -> None:
        """A folder that was deleted and made anew belongs to another run, whose lock this process does not hold."""
        if self._held_folder is None:
            return
        with contextlib.suppress(OSError):  # the write that follows says it better
            if not os.path.samestat(self.folder.stat(), os.fstat(self._held_folder)):
                raise StorageError(
                    f"{self.folder} was deleted and made anew while this run was trained; nothing is written there. "
                    f"Put this run back from a copy, or leave the new one alone"
                )

    def header(self, block: int) -> BlockHeader:
        """A block file's header, checked against this run and layout.

        Raises:
            RunError: missing, damaged, of another run, of another format version.
        """
        path = self.path(block)
        try:
            with open_regular(path) as file:
                return self._read_header(block, file)[0]
        except FileNotFoundError as error:
            raise RunError(f"block {block} is missing: there is no file {path}; {self._kept(block)}") from error
        except OSError as error:
            raise storage_error(f"cannot read block {block}", path, error) from error

    def read(self, block: int, buffer: BlockBuffer, parts: Sequence[Part] | None = None) -> int:
        """Fill the buffer with the parts it holds, or with some of them, and return the block's step.

        Raises:
            RunError: as `header`, or the bytes do not match their checksum.
            StorageError: the disk refused, or the whole folder is gone.
        """
        layout, path = self.layouts[block], self.path(block)
        buffer.adopt_(layout)
        wanted = buffer.parts if parts is None else parts
        try:
            with open_regular(path) as file:
                header, data_start = self._read_header(block, file)
                for part in wanted:
                    start, num_bytes = layout.part_span(part)
                    file.seek(data_start + start)
                    _read_exactly(file, bytes_of(buffer.part_bytes(part)))
                    self.bytes_read += num_bytes
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.folder.is_dir():
                raise RunError(f"block {block} is missing: there is no file {path}; {self._kept(block)}") from error
            raise storage_error(f"cannot read block {block}", path, error) from error
        for part in wanted:
            if _digest(buffer.part_bytes(part)) != header.digests[part]:
                raise RunError(
                    f"block {block} is damaged: the {part} in {path} do not match their checksum; {self._kept(block)}"
                )
        return header.step

    def _read_header(self, block: int, file: Any) -> tuple[BlockHeader, int]:
        path = self.path(block)
        damaged = f"block {block} is damaged: {path}"
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
            raise RunError(f"{damaged} is not a safetensors file or is cut short ({size} bytes); {self._kept(block)}")
        try:
            table = parse_json(file.read(length).decode("utf-8"))
            metadata = table.pop("__metadata__")
            version = int(metadata["format_version"])
            if version != FORMAT_VERSION:
                raise RunError(
                    f"{path} has block format version {version}; this edgeblocks reads version {FORMAT_VERSION}. "
                    f"Use the edgeblocks that wrote it"
                )
            claimed = metadata.pop("header_sha256")
            if claimed != _header_digest(table, metadata):
                raise RunError(f"{damaged} has a header that does not match its checksum; {self._kept(block)}")
            header = BlockHeader(
                run_id=metadata["run_id"],
                block=_count(metadata["block"]),
                step=_count(metadata["step"]),
                digests={part: metadata[f"{part}_sha256"] for part in PARTS},
                run_bytes_written=_count(metadata.get("run_bytes_written", "0")),
            )
            if not isinstance(header.run_id, str):
                raise TypeError(f"run_id={shown(header.run_id)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{damaged} has an unreadable header; {self._kept(block)}") from error
        if header.run_id != self.run_id or header.block != block:
            raise RunError(
                f"{path} is block {header.block} of run {header.run_id[:8]}, but block {block} of run "
                f"{self.run_id[:8]} belongs here; put this run's own file back"
            )
        layout = self.layouts[block]
        expected = 8 + length + layout.num_bytes
        if table != _table(layout):
            raise RunError(f"{path} holds tensors of another network than config.yaml describes; {self._kept(block)}")
        if size != expected:
            raise RunError(f"{damaged} has {size} bytes where {expected} belong: it was cut short; {self._kept(block)}")
        return header, 8 + length


def _count(text: str) -> int:
    """A number as the header has it: digits, no more than any count of steps or bytes needs."""
    if not isinstance(text, str) or not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ValueError(f"{shown(text)} is no count")
    return int(text)


def _table(layout: BlockLayout) -> dict[str, Any]:
    return {
        entry.name: {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.start + entry.num_bytes],
        }
        for entry in layout.entries
    }


def _header_digest(table: dict[str, Any], metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([table, metadata], sort_keys=True).encode()).hexdigest()


def _encode_header(layout: BlockLayout, header: BlockHeader) -> bytes:
    table = _table(layout)
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "run_id": header.run_id,
        "block": str(header.block),
        "step": str(header.step),
        "run_bytes_written": str(header.run_bytes_written),
        **{f"{part}_sha256": digest for part, digest in header.digests.items()},
    }
    metadata["header_sha256"] = _header_digest(table, metadata)
    return encode_header(table, metadata)


def bytes_of(data: Tensor) -> memoryview:
    """A uint8 tensor's bytes, without a copy."""
    return memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's stubs promise no buffer before Python 3.12


def _digest(data: Tensor) -> str:
    return hashlib.sha256(bytes_of(data)).hexdigest()


def _read_exactly(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise OSError(f"the file ended {len(view) - done} bytes early")
        done += count


def storage_error(what: str, path: Path, error: OSError) -> StorageError:
    """An OSError in the user's words, with the free space of the disk concerned."""
    try:
        free = f"; {format_bytes(shutil.disk_usage(path.parent).free)} are free there"
    except OSError:
        free = ""
    ending = "The last saved state is intact; make room or repair the folder, then go on with --resume"
    if not path.parent.is_dir():
        ending = f"{path.parent} was deleted or its disk is gone; put it back from a copy, or start a new run"
    return StorageError(f"{what}: {path}: {error.strerror or error}{free}. {ending}")
