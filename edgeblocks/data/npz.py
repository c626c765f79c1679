"""An .npz file, a zip of .npy files, whose arrays are unpacked a piece at a time.

So the arrays may be larger than the memory. A header is compared with its array's size before anything is allocated.
Pickled objects are never loaded.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.npy import NpyHeader, Readable, read_npy_header
from edgeblocks.errors import DataError
from edgeblocks.files.untrusted import MalformedFileError, open_regular

_PIECE_BYTES = 2**20
_MOST_DEFLATED = 1032
"""Deflate, the only packing that numpy uses, makes nothing smaller than this many times."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """An array in the file, not yet read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def piece_values(self) -> int:
        """Values that are unpacked together."""
        return _PIECE_BYTES // max(1, self.dtype.itemsize)


class NpzFile:
    """The arrays of an open .npz file. What is raised where it is damaged, `open_npz` turns into an error of ours."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        self.names = frozenset(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))

    def member(self, name: str) -> Member:
        """An array's header, which agrees with the bytes that follow it.

        Raises:
            DataError: it does not, or the array is packed, ordered or of a type as none that can be read.
        """
        info = self._archive.getinfo(f"{name}.npy")
        self._check_packing(info, name)
        with self._archive.open(info) as stream:
            header = self._header(stream, name)
        shape, dtype = header.shape, header.dtype
        if dtype.hasobject:
            raise DataError(
                f"{self._path}: `{name}` holds Python objects (dtype {dtype}), which only pickle could load, and a "
                "pickle can run any code; make one array of it, for example with numpy.stack, or of names with "
                "numpy.array(.., str), and save it again"
            )
        if header.fortran_order:
            raise DataError(
                f"{self._path}: `{name}` is stored column by column (Fortran order) and cannot be read image by image; "
                f"save numpy.ascontiguousarray({name})"
            )
        if info.file_size != header.file_bytes:
            raise DataError(
                f"{self._path}: `{name}` of shape {shape} and dtype {dtype} needs {header.file_bytes} bytes and has "
                f"{info.file_size}; the file is damaged: copy or save it again"
            )
        return Member(name=name, shape=shape, dtype=dtype)

    def _check_packing(self, info: zipfile.ZipInfo, name: str) -> None:
        """That a member can have as many bytes as it claims. Other packings unpack whole blocks of any size at once."""
        present_bytes = self._path.stat().st_size
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self._path}: `{name}` is packed by the zip method {info.compress_type}; numpy packs by method 8 or "
                "not at all: save it again with numpy.savez or numpy.savez_compressed"
            )
        possible = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _MOST_DEFLATED)
        if info.file_size > possible or info.compress_size > present_bytes:
            raise DataError(
                f"{self._path}: `{name}` claims {info.file_size} bytes, packed in {info.compress_size} bytes of a file "
                f"of {present_bytes}; the file is damaged: copy or save it again"
            )

    def _header(self, stream: Readable, name: str) -> NpyHeader:
        try:
            return read_npy_header(stream)
        except MalformedFileError as error:
            raise DataError(
                f"{self._path}: `{name}` is not an array that numpy saved ({error}); save the file again"
            ) from error

    def pieces(self, member: Member) -> Iterator[tuple[int, NDArray[Any]]]:
        """An array's values, flat, a piece at a time, and the number of the first one of each."""
        num_values = member.shape[0]
        with self.unpacking(member) as take:
            for start in range(0, num_values, member.piece_values):
                yield start, take(min(member.piece_values, num_values - start))

    @contextmanager
    def unpacking(self, member: Member) -> Iterator[Callable[[int], NDArray[Any]]]:
        """A function that gives the array's next values, flat; nothing is allocated that has not been read."""
        with self._archive.open(f"{member.name}.npy") as stream:
            self._header(stream, member.name)

            def take(count: int) -> NDArray[Any]:
                wanted_bytes = count * member.dtype.itemsize
                data = stream.read(wanted_bytes)
                if len(data) != wanted_bytes:
                    raise EOFError(f"`{member.name}` ends {wanted_bytes - len(data)} bytes early")
                return np.frombuffer(data, dtype=member.dtype)

            yield take
            stream.read(1)  # at the end, zipfile compares the checksum


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """The file, open while it is read.

    Raises:
        DataError: it is damaged, in any of the ways in which a zip can be (encrypted included: RuntimeError).
    """
    try:
        with _BoundedReader(path) as file, zipfile.ZipFile(file) as archive:
            yield NpzFile(path, archive)
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        UnicodeDecodeError,
        EOFError,
        OSError,
        RuntimeError,
    ) as error:
        raise DataError(
            f"{path} cannot be read as an .npz file (a zip of arrays): {error}; it is damaged, cut short or "
            "of another kind: copy or save it again with numpy.savez"
        ) from error


class _BoundedReader(io.BufferedReader):
    """A file of which no more than a piece is read at once; zipfile would take a table of contents of any size."""

    def __init__(self, path: Path) -> None:
        file = open_regular(path)
        self._num_bytes = os.fstat(file.fileno()).st_size
        super().__init__(file.detach())

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._num_bytes - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > _PIECE_BYTES:
            raise zipfile.BadZipFile(f"its table of contents has {wanted} bytes, and at most {_PIECE_BYTES} are read")
        return super().read(size)
