"""Files that anyone may have written, read so that nothing in them can crash, hang or fill the memory.

Only regular files are opened: a pipe would be waited for without end, a device has none. A file's size is compared with
a limit before it is read, and JSON is limited in the number of its values, each of which takes some 100 bytes once it
is parsed, whatever its length in the file.
"""

import json
import math
import os
import re
import reprlib
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

MOST_JSON_BYTES = 16 * 2**20
MOST_JSON_VALUES = 500_000
"""The manifest of 100,000 classes has 100,000 values, the plan of 4,096 blocks 20,000."""
MOST_JSON_DEPTH = 64
"""Writing and showing values recurse; what lies deeper could be read here and then end somewhere else."""
_SHOWN_CHARACTERS = 80
_PIECE_BYTES = 2**18
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.?)*+"?|[\[\]{}]', re.DOTALL)
"""A string may lack its end, so that a match never fails late and the search takes linear time."""


class MalformedFileError(ValueError):
    """What is wrong with a file's content. Whoever asked for the file says which it is and what to do."""


def open_regular(path: Path) -> BufferedReader:
    """The file, open for reading, if it is a regular one.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device, a socket or a folder.
    """
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - closed by the caller; no opener there
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "it is a pipe or a device, not a regular file", str(path))
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither the flag nor such pipes


def read_text(path: Path, *, most_bytes: int) -> str:
    """A text file of at most `most_bytes` bytes.

    Raises:
        OSError: see `open_regular`.
        MalformedFileError: larger, or not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most_bytes:
            pieces, size = [], 0  # not at once: room is taken for all that is asked for, whatever there is
            while size <= most_bytes and (piece := file.read(min(most_bytes + 1 - size, _PIECE_BYTES))):
                pieces.append(piece)
                size += len(piece)
    if size > most_bytes:
        raise MalformedFileError(f"it has {size} bytes, and at most {most_bytes} are read")
    try:
        return b"".join(pieces).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFileError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_object(path: Path, *, most_bytes: int = MOST_JSON_BYTES, finite: bool = True) -> dict[str, object]:
    """The JSON object in a file. Of a key that is there twice, the last counts.

    Args:
        finite: whether NaN and infinite numbers are refused.

    Raises:
        OSError: see `open_regular`.
        MalformedFileError: too large, not JSON, not an object, or NaN in it.
    """
    content = parse_json(read_text(path, most_bytes=most_bytes), finite=finite)
    if not isinstance(content, dict):
        raise MalformedFileError(f"an object is expected, found {type(content).__name__}")
    return content


def parse_json(text: str, *, finite: bool = True) -> object:
    """The value of a JSON text.

    Raises:
        MalformedFileError: not JSON, too many values, nested too deeply, or NaN in it while `finite`.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    num_inner = text.count("[") + text.count("{")
    num_values = num_inner + text.count(",")
    if num_values > MOST_JSON_VALUES:
        raise MalformedFileError(f"it holds up to {num_values} values, and at most {MOST_JSON_VALUES} are read")
    if num_inner > MOST_JSON_DEPTH and _is_deeper_than(text, MOST_JSON_DEPTH):
        raise MalformedFileError(f"it is nested more than {MOST_JSON_DEPTH} levels deep")
    hooks: dict[str, Any] = {"parse_float": _finite_number, "parse_constant": _no_number} if finite else {}
    try:
        return json.loads(text, **hooks)
    except ValueError as error:
        raise MalformedFileError(f"it is not JSON ({error})") from error


def _is_deeper_than(text: str, most: int) -> bool:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        mark = match[0]
        depth += (mark in ("[", "{")) - (mark in ("]", "}"))
        if depth > most:
            return True
        if depth < 0:  # not JSON, and closing brackets are not counted beforehand
            return False
    return False


def _finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:_SHOWN_CHARACTERS]} is not a finite number")


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _SHOWN_CHARACTERS, _SHOWN_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out numbers of more than 4,300 digits."""
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 256 else repr(x)


def shown(value: object) -> str:
    """A value as it appears in a message: short, however long, deep or large it is.

    >>> shown("a"), shown(10**5000)
    ("'a'", 'a number of 16610 bits')
    """
    text = _Shown().repr(value)
    return text if len(text) <= 2 * _SHOWN_CHARACTERS else text[: 2 * _SHOWN_CHARACTERS - 3] + "..."
