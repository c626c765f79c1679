"""Text from files of several kinds, as one stream of pieces: nothing is ever read whole.

Each piece says up to which byte of the source it leads, so that a share of the text is known before its end is.
"""

import hashlib
import importlib.resources
import lzma
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeblocks.data.cache import cache_folder
from edgeblocks.data.file_identity import file_identity
from edgeblocks.data.parquet import LIBRARY_ROOM_BYTES, parquet_documents
from edgeblocks.data.plain_text import FoundText, Piece, Reading, composed, cut, on_disk, plain_text
from edgeblocks.data.python_data import is_python_data, stored_texts
from edgeblocks.data.records import csv_documents, json_documents, jsonl_documents
from edgeblocks.errors import DataError
from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json
from edgeblocks.units import format_bytes

BUILT_IN = "moby-dick"
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex"})
_RECORDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), jsonl_documents),
    ".json": json_documents,
    **dict.fromkeys((".csv", ".tsv"), csv_documents),
    ".parquet": parquet_documents,
}
_ALONE_SUFFIXES = frozenset({".json", ".csv", ".tsv"})
"""Read where they are named: beside the texts of a folder they are settings and lists more often than texts."""
_FOLDER_SUFFIXES = TEXT_SUFFIXES | (_RECORDS.keys() - _ALONE_SUFFIXES)
_ACCEPTED = (
    f'give "{BUILT_IN}" (built in), a text file in UTF-8, a .jsonl, .json, .csv, .tsv or .parquet file with a key or a '
    "column `text` (--text-key names another), or a folder of such files"
)
_MOST_LINE_BYTES = 2**16
_NUM_SHOWN = 6


@dataclass(kw_only=True)
class Account:
    """What `TextSource.pieces` has read: documents with text in them, and those that are empty and left out."""

    documents: int = 0
    empty: int = 0


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from.

    source: as the user wrote it.
    path: None for the built-in sample.
    identity: changes with the path, and when any file is changed, renamed or replaced.
    total_bytes: of all files.
    num_files: that are read.
    left_out: files of a folder that are not read, by the endings of their names.
    given: the texts of a program, which are counted where they were; None: files are counted while they are read.
    reading_bytes: memory that reading takes, a library's own included.
    """

    source: str
    path: Path | None
    identity: str
    total_bytes: int
    num_files: int = 1
    left_out: Mapping[str, int] = field(default_factory=dict)
    reading_bytes: int = 0
    given: Account | None = None

    def pieces(self, reading: Reading | None = None, account_: Account | None = None) -> Iterator[Piece]:
        """The documents in the order of their names, with a newline between two.

        Args:
            reading: how records are read, and what memory there is.
            account_: counts the documents.

        Raises:
            DataError: a file is not what its name says, or cannot be read.
            ConfigError: a library is missing.
            NoRoomToReadError: a document takes more memory than there is.
        """
        account = Account() if account_ is None else account_
        if self.path is None:
            account.documents += 1
            yield from cut(_sample(), 0, self.total_bytes)
            return
        position, any_text = 0, False
        for file in _files(self.path, Counter()):
            try:
                for document in _documents(file, position, reading or Reading()):
                    between, is_empty = "\n" if any_text else "", True
                    for text, reached in document:
                        if text:
                            yield Piece(between + text, reached)
                            between, any_text, is_empty = "", True, False
                    account.documents += not is_empty
                    account.empty += is_empty
            except OSError as error:
                raise DataError(f"{file.path} cannot be read: {error.strerror or error}; check the file") from error
            position += file.size_bytes

    def files_told(self) -> str:
        """The files that are read, in words."""
        if self.path is None:
            return f"{self.source} (built in, {format_bytes(self.total_bytes)})"
        if self.given is not None:
            return f"{format_bytes(self.total_bytes)} from Python"
        return f"{self.num_files:,} file{'s' * (self.num_files != 1)} of {format_bytes(self.total_bytes)}"

    def left_out_told(self) -> str:
        """The files of the folder that are not read, by their endings; empty where all are."""
        often = sorted(self.left_out.items(), key=lambda found: (-found[1], found[0]))
        told = [f"{count:,} {ending}" for ending, count in often[:_NUM_SHOWN]]
        others = sum(count for _, count in often[_NUM_SHOWN:])
        return ", ".join([*told, *([f"{others:,} others"] if others else [])])


def find_text(source: str, cache_dir: Path | None = None) -> TextSource:
    """The text that the user means: "moby-dick", a file, or a folder that is searched with its sub-folders.

    Args:
        cache_dir: where texts are that a program gave.

    Raises:
        DataError: there is none.
    """
    if source == BUILT_IN:
        text = _sample().encode()
        return TextSource(source=source, path=None, identity=hashlib.sha256(text).hexdigest(), total_bytes=len(text))
    if is_python_data(source):
        path, texts, empty = stored_texts(source, cache_folder() if cache_dir is None else cache_dir)
        given = Account(documents=texts, empty=empty)
        return TextSource(source=source, path=path, identity=source, total_bytes=path.stat().st_size, given=given)
    try:
        path = on_disk(Path(source).expanduser())
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
    left_out: Counter[str] = Counter()
    for file in _files(path, left_out):
        digest.update(os.fsencode(f"\0{file.name}\0{file.identity}"))
        num_files += 1
        total_bytes += file.size_bytes
        if file.path.suffix.lower() == ".parquet":
            reading_bytes = LIBRARY_ROOM_BYTES
    if not num_files:
        alone = sorted(_ALONE_SUFFIXES & left_out.keys())
        hint = f"; its {' and '.join(alone)} files are read one at a time: give one by name" if alone else ""
        raise DataError(
            f"data folder {path} holds no text: looked for {', '.join(sorted(_FOLDER_SUFFIXES))} in it and in its "
            f"sub-folders; give a folder with such files, or one file of any name in UTF-8{hint}"
        )
    if not total_bytes:
        raise DataError(f"data '{source}' is empty: 0 bytes in {num_files} file(s); give a file with text in it")
    return TextSource(
        source=source,
        path=path,
        identity=digest.hexdigest(),
        total_bytes=total_bytes,
        num_files=num_files,
        left_out=left_out,
        reading_bytes=reading_bytes,
    )


def _files(path: Path, left_out_: Counter[str]) -> Iterator[FoundText]:
    """The files of a source: in each folder first its own, then those of its sub-folders, sorted by name.

    Hidden ones are left out, and links to folders are not followed, so that the walk ends. What else is left out is
    counted by its ending.
    """
    if not path.is_dir():
        yield _found(path, path.name)
        return
    for folder, folders, names in os.walk(path, onerror=_refuse_folder):
        visible = sorted((name for name in folders if not name.startswith(".")), key=composed)
        left_out_["links to folders"] += sum(os.path.islink(os.path.join(folder, name)) for name in visible)  # noqa: PTH114, PTH118
        folders[:] = visible
        for name in sorted(names, key=composed):
            if name.startswith("."):
                continue
            ending = os.path.splitext(name)[1].lower()  # noqa: PTH122
            if ending in _FOLDER_SUFFIXES:
                file = Path(folder, name)
                yield _found(file, str(file.relative_to(path)))
            else:
                left_out_[ending or "without an ending"] += 1
    left_out_ += Counter()  # without what was not found


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


def _documents(file: FoundText, begin: int, reading: Reading) -> Iterator[Iterator[Piece]]:
    """The documents of a file that begins at byte `begin` of the source."""
    ending = file.path.suffix.lower()
    if ending in _RECORDS:
        yield from _RECORDS[ending](file, begin, reading)
        return
    if ending not in TEXT_SUFFIXES and _is_record(file.path):
        raise DataError(
            f"{file.path} holds lines of JSON under a name that does not say so, and would be read as prose; name it "
            f"{file.path.name}.jsonl, or .txt if the brackets are meant"
        )
    yield plain_text(file, begin)


def _is_record(path: Path) -> bool:
    """Whether a file begins with a line that is a JSON object."""
    with open_regular(path) as file:
        line = file.readline(_MOST_LINE_BYTES) or b""
    try:
        return line.lstrip()[:1] == b"{" and isinstance(parse_json(line.decode(), finite=False), dict)
    except (UnicodeDecodeError, MalformedFileError):
        return False


def _sample() -> str:
    packed = importlib.resources.files("edgeblocks.data").joinpath("moby_dick.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")
