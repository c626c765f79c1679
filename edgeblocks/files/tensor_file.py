"""A safetensors file that anyone may have written: its table is checked before use, its tensors are read in pieces.

safetensors' own reader maps the file, and every page of it that was touched counts as resident memory. Here a piece is
read, converted and forgotten: to check a file of 403 MB took 10 MB, to go through it with `safe_open` 320 MB.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json, shown

HEADER_LIMIT_BYTES = 16 * 2**20
PIECE_BYTES = 2**21
READABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that float32 holds without loss, by the name that the format gives them."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
"""What the format calls the types that are written."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies. `start` counts bytes from the beginning of the file, `dtype` is the format's name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class Shaped(Protocol):
    """What a tensor is known by before it is read. `dtype` is the format's name."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Weights(Protocol):
    """Tensors by their names, read in pieces as float32: of a file, or of several. See `TensorFile`."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, Shaped]: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def sha256(self) -> str: ...

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]: ...

    def read_(self, name: str, values: Tensor) -> None: ...


class TensorFile:
    """A file's table, and its tensors as float32. `metadata` is what texts were written beside them."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: it cannot be read.
            MalformedFileError: it is no safetensors file, or is cut short.
        """
        self.path = path
        with open_regular(path) as file:
            self.num_bytes = os.fstat(file.fileno()).st_size
            table, data_start = read_header(file)
        beside = table.pop("__metadata__", None)
        self.metadata: dict[str, str] = _texts(beside)
        self.tensors = {name: self._stored(name, entry, data_start) for name, entry in table.items()}

    def sha256(self) -> str:
        """Of the whole file.

        Raises:
            OSError: it cannot be read.
        """
        with open_regular(self.path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def pieces(self, name: str, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """A tensor's values in order: (number of the first one, float32 [values]).

        Args:
            first, count: those of a part of it, counted from there; None: to its end.

        Raises:
            OSError: it cannot be read.
        """
        stored = self.tensors[name]
        dtype, done = READABLE[stored.dtype], 0
        start = first * dtype.itemsize
        num_bytes = stored.num_bytes - start if count is None else count * dtype.itemsize
        piece = bytearray(min(PIECE_BYTES, num_bytes))
        with open_regular(self.path) as file:
            file.seek(stored.start + start)
            while done < num_bytes:
                size = min(len(piece), num_bytes - done)
                if file.readinto(memoryview(piece)[:size]) != size:
                    raise OSError(None, "it has become shorter", str(self.path))
                values = torch.frombuffer(piece, dtype=dtype, count=size // dtype.itemsize)
                yield done // dtype.itemsize, values.to(torch.float32)
                done += size

    def read_(self, name: str, values: Tensor) -> None:
        """Fill a contiguous float32 tensor of the same shape.

        Raises:
            OSError: the file cannot be read.
        """
        flat = values.view(-1)
        for start, piece in self.pieces(name):
            flat[start : start + len(piece)] = piece

    def _stored(self, name: str, entry: object, data_start: int) -> StoredTensor:
        damaged = MalformedFileError(f"it is no safetensors file, or is damaged, at the tensor {shown(name)}")
        if not isinstance(entry, dict):
            raise damaged
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged from error
        counts = [*shape, start, end] if isinstance(shape, list) else [None]
        if not isinstance(dtype, str) or not all(type(count) is int and count >= 0 for count in counts):
            raise damaged
        if not start <= end <= self.num_bytes - data_start:
            raise MalformedFileError(f"it is cut short: the tensor {shown(name)} ends behind the end of the file")
        if dtype in READABLE and math.prod(shape) * READABLE[dtype].itemsize != end - start:
            raise damaged
        return StoredTensor(dtype=dtype, shape=tuple(shape), start=data_start + start, num_bytes=end - start)


def _texts(told: object) -> dict[str, str]:
    return {name: text for name, text in told.items() if isinstance(text, str)} if isinstance(told, dict) else {}


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The table that an open safetensors file begins with, `__metadata__` in it, and where its data section begins.

    Raises:
        OSError: it cannot be read.
        MalformedFileError: it is no safetensors file, or is cut short.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little") if num_bytes >= 8 else 0
    # Checked before it is read: a damaged length must not make this process take gigabytes.
    if not 2 <= length <= min(HEADER_LIMIT_BYTES, num_bytes - 8):
        raise MalformedFileError(f"it is no safetensors file, or is cut short ({num_bytes} bytes)")
    try:
        table = parse_json(file.read(length).decode("utf-8", errors="replace"))
    except MalformedFileError as error:
        raise MalformedFileError(f"it is no safetensors file, or is damaged: {error}") from error
    if not isinstance(table, dict):
        raise MalformedFileError("it is no safetensors file: its header is no table")
    return table, 8 + length


def table_of(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> dict[str, object]:
    """The table of tensors that lie one behind the other: (name, type, shape) of each."""
    table: dict[str, object] = {}
    start = 0
    for name, dtype, shape in tensors:
        end = start + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    return table


def encode_header(table: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, before its data section."""
    text = json.dumps({"__metadata__": dict(metadata), **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def overwrite(file: BinaryIO, stored: StoredTensor, first: int, values: Tensor) -> None:
    """Put a row of values over those of a tensor from number `first` on, rounded to the tensor's type.

    Raises:
        OSError: the disk refused.
    """
    dtype = READABLE[stored.dtype]
    file.seek(stored.start + first * dtype.itemsize)
    for start in range(0, len(values), PIECE_BYTES // 4):
        piece = values[start : start + PIECE_BYTES // 4].to(dtype)
        file.write(memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]  # numpy's stubs
