"""Text in files of its own, read piece by piece; and what all readers of text share: pieces, decoding, encodings by
their marks, and the memory that a document may take.
"""

import codecs
import contextlib
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from edgeblocks.errors import DataError
from edgeblocks.files.untrusted import open_regular
from edgeblocks.terminal import quoted

PIECE_CHARACTERS = 2**16
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
    (b"\x84\x31\x95\x33", "GB18030"),
)
_PACKED = (
    (b"\x1f\x8b", "packed with gzip", "gunzip -k {name}"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "unzstd {name}"),
    (b"\xfd7zXZ\0", "packed with xz", "unxz -k {name}"),
    (b"BZh", "packed with bzip2", "bunzip2 -k {name}"),
    (
        b"PK\x03\x04",
        "a zip archive (or a document of an office program, which is one)",
        "unzip {name}, or save as text",
    ),
    (b"%PDF-", "a PDF", "pdftotext {name} {new}"),
    (b"PAR1", "a .parquet file of another name", "mv {name} {name}.parquet"),
    (b"{\\rtf", "a document in RTF", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an office program", "save it as plain text"),
    (b"version https://git-lfs.", "a pointer of Git LFS in the place of a file", "fetch the file itself: git lfs pull"),
)
_NUL_SHARE = 0.2
"""Of the bytes of one place in two or in four, from which on text is taken for UTF-16 or UTF-32 without a mark."""


class Piece(NamedTuple):
    """Some text, at most PIECE_CHARACTERS long, and the byte of the source up to which it leads."""

    text: str
    position: int


class FoundText(NamedTuple):
    """A file, its name relative to the source, its size, and what changes when it is replaced."""

    path: Path
    name: str
    size_bytes: int
    identity: str


def _any_room(_what: str, _needed_bytes: int, _cure: str) -> None:
    """Where nothing bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read.

    text_key: the key or the column of records that holds the text.
    check_room: called with what takes memory, how many bytes, and what else would do, before they are taken.

        Raises:
            NoRoomToReadError: there are not so many.
    """

    text_key: str = "text"
    check_room: Callable[[str, int, str], None] = field(default=_any_room)


def plain_text(file: FoundText, begin: int) -> Iterator[Piece]:
    """The text of a file that begins at byte `begin` of the source.

    Raises:
        DataError: it is not text in UTF-8.
    """
    with open_regular(file.path) as stream:
        reached, undecoded = 0, b""
        while True:
            read = stream.read(PIECE_CHARACTERS) or b""  # None: some files of /proc would have to be waited for
            content = undecoded + read
            if reached == 0:
                content = without_mark(file.path, content)
                reached = len(undecoded) + len(read) - len(content)
            text, num_decoded = decode(file.path, content, reached, final=not read)
            reached += num_decoded
            undecoded = content[num_decoded:]
            yield Piece(text, begin + min(reached, file.size_bytes))
            if not read:
                return


def without_mark(path: Path, content: bytes) -> bytes:
    """The first bytes of a file without the mark of UTF-8.

    Raises:
        DataError: they have the mark of another encoding, or of another kind of file.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            raise _other_encoding(path, encoding)
    for mark, what, cure in _PACKED:
        if content.startswith(mark):
            raise DataError(
                f"{path} is {what}, not text; {'first: ' if '{name}' in cure else ''}"
                f"{cure.format(name=typed(path), new=_converted(path, '.txt'))}"
            )
    return content.removeprefix(codecs.BOM_UTF8)


def decode(path: Path, content: bytes, reached: int, *, final: bool) -> tuple[str, int]:
    """Text in UTF-8 that begins at byte `reached` of a file, and of how many bytes.

    Args:
        final: whether nothing follows, so that half a character at the end is an error.

    Raises:
        DataError: it is none.
    """
    nul = content.find(b"\0")
    if nul >= 0:
        encoding = _unmarked_encoding(content) if reached == 0 else None
        if encoding is not None:
            raise _other_encoding(path, encoding)
        raise DataError(
            f"{path} is not text: byte {reached + nul} is NUL, as in a binary file; give text in UTF-8, or remove the "
            f"NULs: tr -d '\\000' < {typed(path)} > {_converted(path)}"
        )
    try:
        return codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8: {error.reason} at byte {reached + error.start} "
            f"(0x{content[error.start]:02x}); convert it from the encoding it has, for example: "
            f"iconv -f ISO-8859-1 -t UTF-8 {typed(path)} > {_converted(path)}"
        ) from error


def _unmarked_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32 by where its NULs are; None where they are strewn about."""
    shares = [content[place::4].count(0) / max(1, len(content[place::4])) for place in range(4)]
    where = "".join("0" if share > _NUL_SHARE else "x" for share in shares)
    return {"x000": "UTF-32LE", "000x": "UTF-32BE", "x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}.get(where)


def _other_encoding(path: Path, encoding: str) -> DataError:
    return DataError(
        f"{path} is text in {encoding}, and UTF-8 is read; convert it: "
        f"iconv -f {encoding} -t UTF-8 {typed(path)} > {_converted(path)}"
    )


def typed(path: Path) -> str:
    """A file as it is typed in the folder where this command is."""
    with contextlib.suppress(OSError, ValueError):  # a folder that is gone; a file outside of it
        path = path.relative_to(Path.cwd())
    return quoted(path)


def _converted(path: Path, ending: str | None = None) -> str:
    """A name for what is made of a file: another one, of the same kind unless it has an ending of its own."""
    ending = ending or path.suffix or ".txt"
    return quoted(f"newer{ending}" if path.name == f"new{ending}" else f"new{ending}")


def cut(text: str, start: int, end: int) -> Iterator[Piece]:
    """Pieces of a text that lies between two bytes of the source."""
    for first in range(0, len(text), PIECE_CHARACTERS):
        last = min(first + PIECE_CHARACTERS, len(text))
        yield Piece(text[first:last], start + (end - start) * last // len(text))


def on_disk(path: Path) -> Path:
    """The path; where there is none, the one whose name has the same letters, composed otherwise (é, as on a Mac)."""
    if path.exists() or not path.parent.is_dir():
        return path
    wanted = unicodedata.normalize("NFC", path.name)
    same = [name for name in os.listdir(path.parent) if unicodedata.normalize("NFC", name) == wanted]  # noqa: PTH208
    return path.with_name(same[0]) if same else path


def composed(name: str) -> tuple[str, str]:
    """By which names are sorted: the same wherever a folder was unpacked."""
    return unicodedata.normalize("NFC", name), name
