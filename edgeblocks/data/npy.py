"""The header of an .npy array, checked before anything is made from it.

numpy's own reader takes as many bytes as the header claims to have, and lets through what Python's parser raises.
"""

import ast
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgeblocks.files.untrusted import MalformedFileError, shown

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4}
_MOST_HEADER_BYTES = 10_000
_PLAIN_DTYPE = re.compile(r"[<>=|]?[?A-Za-z]\d{0,6}", re.ASCII)


class Readable(Protocol):
    """What is asked of a file."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class NpyHeader:
    """An array in a file. `num_bytes` counts the header's own bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    num_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes of the header and the values that it promises."""
        return self.num_bytes + math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(file: Readable) -> NpyHeader:
    """The header at the beginning of a file, which is left standing before the first value.

    Raises:
        MalformedFileError: not what numpy writes for an array of one type.
    """
    start = file.read(8)
    length_bytes = _LENGTH_BYTES.get((start[6], start[7])) if len(start) == 8 and start.startswith(_MAGIC) else None
    if length_bytes is None:
        raise MalformedFileError(f"it begins with {start!r}, where a known version of the .npy format belongs")
    length = int.from_bytes(file.read(length_bytes), "little")
    if length > _MOST_HEADER_BYTES:
        raise MalformedFileError(f"its header claims {length} bytes, and at most {_MOST_HEADER_BYTES} are read")
    text = file.read(length)
    if len(text) != length:
        raise MalformedFileError(f"its header has {len(text)} of {length} bytes")
    fields = _literal(text.decode("latin1"))
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise MalformedFileError(f"its header says {shown(fields)}")
    shape, fortran_order = fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise MalformedFileError(f"its shape is {shown(shape)}")
    if not isinstance(fortran_order, bool):
        raise MalformedFileError(f"its fortran_order is {shown(fortran_order)}")
    return NpyHeader(
        shape=shape,
        dtype=_dtype(fields["descr"]),
        fortran_order=fortran_order,
        num_bytes=8 + length_bytes + length,
    )


def _literal(text: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's parser warns of odd escapes
            return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:  # all of them are documented
        raise MalformedFileError(f"its header cannot be read ({type(error).__name__})") from error


def _dtype(described: object) -> np.dtype[np.generic]:
    if not isinstance(described, str) or not _PLAIN_DTYPE.fullmatch(described):
        raise MalformedFileError(f"its values are {shown(described)}, not numbers of one type")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of old names of types
            return np.dtype(described)
    except (TypeError, ValueError) as error:
        raise MalformedFileError(f"its values are {shown(described)}, which numpy does not know") from error
