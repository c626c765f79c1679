"""Text from files of several kinds, as one stream of pieces: nothing is ever read whole.

Each piece says up to which byte of the source it leads, so that a share of the text is known before its end is.
"""

import codecs
import hashlib
import importlib.resources
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgeblocks.data.file_identity import file_identity
from edgeblocks.errors import ConfigError, DataError
from edgeblocks.files.untrusted import MOST_JSON_BYTES, MalformedFileError, open_regular, parse_json, shown

BUILT_IN = "moby-dick"
PIECE_CHARACTERS = 2**16
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex"})
_ALL_SUFFIXES = TEXT_SUFFIXES | {".jsonl", ".parquet"}
_ACCEPTED = f'give "{BUILT_IN}" (built in), a text file in UTF-8, a .jsonl or .parquet file, or a folder of such files'
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ROWS_AT_ONCE = 64
_PARQUET_ROOM_BYTES = 90_000_000
"""Measured: 75 MB with 87 MB of rows of 3 kB each, most of it the library's own."""


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


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from.

    source: as the user wrote it.
    path: None for the built-in sample.
    identity: changes with the path and with any file's name, size, times or place on the disk.
    total_bytes: of all files.
    reading_bytes: memory that reading takes, a library's own included.
    """

    source: str
    path: Path | None
    identity: str
    total_bytes: int
    reading_bytes: int = 0

    def pieces(self) -> Iterator[Piece]:
        """The documents in the order of their names, with a newline between two.

        Raises:
            DataError: a file is not what its name says, or cannot be read.
            ConfigError: a library is missing.
        """
        if self.path is None:
            yield from _cut(_sample(), 0, self.total_bytes)
            return
        position, any_text = 0, False
        for file in _files(self.path):
            try:
                for document in _documents(file, position):
                    between = "\n" if any_text else ""
                    for text, reached in document:
                        if text:
                            yield Piece(between + text, reached)
                            between, any_text = "", True
            except OSError as error:
                raise DataError(f"{file.path} cannot be read: {error.strerror or error}; check the file") from error
            position += file.size_bytes


def find_text(source: str) -> TextSource:
    """The text that the user means: "moby-dick", a file, or a folder that is searched with its sub-folders.

    Raises:
        DataError: there is none.
    """
    if source == BUILT_IN:
        text = _sample().encode()
        return TextSource(source=source, path=None, identity=hashlib.sha256(text).hexdigest(), total_bytes=len(text))
    try:
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(f"data '{source}' does not exist; {_ACCEPTED}")
        path = path.resolve()
        return _source_at(path, source)
    except OSError as error:
        raise DataError(f"data '{source}' cannot be looked at: {error.strerror}; {_ACCEPTED}") from error
    except (RuntimeError, ValueError) as error:  # nobody's home folder; a name that no file can have
        raise DataError(f"data '{source}' cannot be looked at: {error}; {_ACCEPTED}") from error


def _source_at(path: Path, source: str) -> TextSource:
    digest, num_files, total_bytes, reading_bytes = hashlib.sha256(os.fsencode(path)), 0, 0, 0
    for file in _files(path):
        digest.update(os.fsencode(f"\0{file.name}\0{file.identity}"))
        num_files += 1
        total_bytes += file.size_bytes
        if file.path.suffix.lower() == ".parquet":
            reading_bytes = _PARQUET_ROOM_BYTES
    if not num_files:
        raise DataError(
            f"data folder {path} holds no text: looked for {', '.join(sorted(_ALL_SUFFIXES))} in it and in its "
            "sub-folders; give a folder with such files, or one file of any name in UTF-8"
        )
    if not total_bytes:
        raise DataError(f"data '{source}' is empty: 0 bytes in {num_files} file(s); give a file with text in it")
    return TextSource(
        source=source,
        path=path,
        identity=digest.hexdigest(),
        total_bytes=total_bytes,
        reading_bytes=reading_bytes,
    )


def _files(path: Path) -> Iterator[FoundText]:
    """The files of a source: in each folder first its own, then those of its sub-folders, sorted by name.

    Hidden ones are left out, and links to folders are not followed, so that the walk ends.
    """
    if not path.is_dir():
        yield _found(path, path.name)
        return
    for folder, folders, names in os.walk(path, onerror=_refuse_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in _ALL_SUFFIXES:  # noqa: PTH122
                file = Path(folder, name)
                yield _found(file, str(file.relative_to(path)))


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"data folder {error.filename} cannot be read: {error.strerror}; mend its permissions or remove it"
    ) from error


def _found(path: Path, name: str) -> FoundText:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; mend or remove it") from error
    return FoundText(path, name, status.st_size, file_identity(status))


def _documents(file: FoundText, begin: int) -> Iterator[Iterator[Piece]]:
    """The documents of a file that begins at byte `begin` of the source."""
    suffix = file.path.suffix.lower()
    if suffix == ".jsonl":
        yield from _jsonl_documents(file, begin)
    elif suffix == ".parquet":
        yield from _parquet_documents(file, begin)
    else:
        yield _plain_text(file, begin)


def _plain_text(file: FoundText, begin: int) -> Iterator[Piece]:
    with open_regular(file.path) as stream:
        reached, undecoded = 0, b""
        while True:
            read = stream.read(PIECE_CHARACTERS) or b""  # None: some files of /proc would have to be waited for
            content = undecoded + read
            if reached == 0:
                _check_mark(file.path, content)
                if content.startswith(codecs.BOM_UTF8):
                    content, reached = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
            text, num_decoded = _decode(file.path, content, reached, final=not read)
            reached += num_decoded
            undecoded = content[num_decoded:]
            yield Piece(text, begin + min(reached, file.size_bytes))
            if not read:
                return


def _check_mark(path: Path, content: bytes) -> None:
    if content.startswith(_UTF_16):
        raise DataError(
            f"{path} is text in UTF-16, and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new.txt"
        )


def _decode(path: Path, content: bytes, reached: int, *, final: bool) -> tuple[str, int]:
    nul = content.find(b"\0")
    if nul >= 0:
        raise DataError(f"{path} is not text: byte {reached + nul} is NUL, as in a binary file; {_ACCEPTED}")
    try:
        return codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8: {error.reason} at byte {reached + error.start} "
            f"(0x{content[error.start]:02x}); convert it from the encoding it has, for example: "
            f"iconv -f ISO-8859-1 -t UTF-8 {path.name} > new.txt"
        ) from error


def _jsonl_documents(file: FoundText, begin: int) -> Iterator[Iterator[Piece]]:
    with open_regular(file.path) as stream:
        reached, number = 0, 0
        while line := stream.readline(MOST_JSON_BYTES + 1):
            number += 1
            start, reached = reached, min(reached + len(line), file.size_bytes)
            if line.strip():
                yield _cut(_text_in(file.path, number, start, line), begin + start, begin + reached)


def _text_in(path: Path, number: int, start: int, line: bytes) -> str:
    where = f"{path}, line {number}"
    if len(line) > MOST_JSON_BYTES:
        raise DataError(
            f"{where} is longer than {MOST_JSON_BYTES} bytes, the most that one document may have; divide it"
        )
    text, _ = _decode(path, line, start, final=True)
    try:
        document = parse_json(text.removeprefix("\ufeff"), finite=False)
    except MalformedFileError as error:
        raise DataError(
            f'{where} is not read: {error}; every line of a .jsonl file is one object, such as {{"text": "a document"}}'
        ) from error
    if not isinstance(document, dict):
        raise DataError(f'{where} is {shown(document)}, not an object with the key "text"; mend or remove the line')
    if "text" not in document:
        keys = ", ".join(shown(key) for key in list(document)[:10]) or "none"
        raise DataError(f'{where} has no key "text", but {keys}; rename the key that holds the text')
    if not isinstance(document["text"], str):
        raise DataError(f'{where}: "text" is {shown(document["text"])}, not a string; mend or remove the line')
    return _whole(document["text"])


def _parquet_documents(file: FoundText, begin: int) -> Iterator[Iterator[Piece]]:
    """A row is a document, a missing text an empty one. A page of the column, 1 MB as a rule, is unpacked at once."""
    table = _parquet(file.path)
    import pyarrow

    try:
        kinds = {field.name: str(field.type) for field in table.schema_arrow}
        if kinds.get("text") not in ("string", "large_string"):
            columns = ", ".join(f"{name} ({kind})" for name, kind in list(kinds.items())[:10]) or "none"
            raise DataError(
                f"{file.path} has no column `text` of strings, but {columns}; rename the column of the text"
            )
        num_rows, done = max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=["text"], use_threads=False):
            for text in batch.column(0).to_pylist():
                start, end = (begin + file.size_bytes * min(row, num_rows) // num_rows for row in (done, done + 1))
                done += 1
                yield _cut(text or "", start, end)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file.path} is a damaged .parquet file: {' '.join(str(error).split())[:200]}; copy or save it again"
        ) from error


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading .parquet needs the library `pyarrow`, which cannot be imported ({error}); "
            "pip install 'edgeblocks[parquet]', or save the text as .jsonl"
        ) from error
    try:
        open_regular(path).close()
        return pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=2**16)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} is not a .parquet file: {' '.join(str(error).split())[:200]}; copy or save it again"
        ) from error


def _cut(text: str, start: int, end: int) -> Iterator[Piece]:
    """Pieces of a text that lies between two bytes of the source."""
    for first in range(0, len(text), PIECE_CHARACTERS):
        last = min(first + PIECE_CHARACTERS, len(text))
        yield Piece(text[first:last], start + (end - start) * last // len(text))


def _whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sample() -> str:
    packed = importlib.resources.files("edgeblocks.data").joinpath("moby_dick.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")
