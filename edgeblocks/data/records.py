"""Documents in records: lines of JSON, an array of JSON objects, and tables of text (.csv, .tsv). Each record has its
text under one key.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgeblocks.data.plain_text import FoundText, Piece, Reading, cut, decode, typed, without_mark
from edgeblocks.errors import DataError, NoRoomToReadError, did_you_mean
from edgeblocks.files.untrusted import MOST_JSON_BYTES, MalformedFileError, open_regular, parse_json, shown

_SHORT_BYTES = 2**20
"""A record so long is read without a question: it is part of what tokenising takes."""
_COPIES = 4
"""Of a record while it is read: its text, its values, and strings on their way. Measured: 3.2 with one long value."""
_MOST_CELL_CHARACTERS = 2**22
"""Of a table: a quotation mark that is never closed would take the rest of the file."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def jsonl_documents(file: FoundText, begin: int, reading: Reading) -> Iterator[Iterator[Piece]]:
    """The documents of a file of lines, each of which is a JSON object.

    Raises:
        DataError: a line is none, or has no text.
        NoRoomToReadError: a line is too long for the memory that is left.
    """
    for number, start, end, line in _lines(file, reading):
        if line.strip():
            where = f"{file.path}, line {number}"
            text, _ = decode(file.path, line, start, final=True)
            try:
                document = parse_json(text.removeprefix("\ufeff"), finite=False)
            except MalformedFileError as error:
                ending = file.path.suffix.lower()
                or_an_array = f", or the file is one array of them: jq -s . {typed(file.path)} > new.json"
                raise DataError(
                    f"{where} is not read: {error}; every line of a {ending} file is one object, "
                    f'such as {{"{reading.text_key}": "a document"}}{or_an_array if ending == ".json" else ""}'
                ) from error
            yield cut(_text_of(file.path, document, where, reading.text_key), begin + start, begin + end)


def json_documents(file: FoundText, begin: int, reading: Reading) -> Iterator[Iterator[Piece]]:
    """The documents of a .json: an array of objects or of strings, else lines of objects.

    Raises:
        DataError: it is neither, or an array of more than MOST_JSON_BYTES.
        NoRoomToReadError: the array is too long for the memory that is left.
    """
    with open_regular(file.path) as stream:
        head = without_mark(file.path, stream.read(_SHORT_BYTES) or b"")
        if not head.lstrip().startswith(b"["):
            yield from jsonl_documents(file, begin, reading)
            return
        if file.size_bytes > MOST_JSON_BYTES:
            raise DataError(
                f"{file.path} is one array of {file.size_bytes} bytes, and at most {MOST_JSON_BYTES} are read at once; "
                f"write an object a line, which is read piece by piece: jq -c '.[]' {typed(file.path)} > new.jsonl"
            )
        reading.check_room(
            f"the array in {file.path}",
            (1 + _COPIES * _width(head)) * file.size_bytes,
            f"write an object a line: jq -c '.[]' {typed(file.path)} > new.jsonl",
        )
        content = head + stream.read(MOST_JSON_BYTES)
    text, _ = decode(file.path, content, 0, final=True)
    del content
    try:
        array = parse_json(text, finite=False)
    except MalformedFileError as error:
        raise DataError(
            f"{file.path} is not read: {error}; a .json file is one array of objects, or one object a line"
        ) from error
    del text
    assert isinstance(array, list)
    for number, document in enumerate(array):
        where = f"{file.path}, item {number + 1}"
        found = whole(document) if isinstance(document, str) else _text_of(file.path, document, where, reading.text_key)
        places = (begin + file.size_bytes * done // len(array) for done in (number, number + 1))
        yield cut(found, *places)


def csv_documents(file: FoundText, begin: int, reading: Reading) -> Iterator[Iterator[Piece]]:
    """The documents of a .csv or .tsv whose first line names its columns.

    Raises:
        DataError: no such column, or a row without it.
        NoRoomToReadError: a line is too long for the memory that is left.
    """
    reached = [0]

    def decoded() -> Iterator[str]:
        for _, start, end, line in _lines(file, reading):
            reached[0] = end
            yield decode(file.path, line, start, final=True)[0]

    lines = decoded()
    first = next(lines, "")
    delimiter = _DELIMITERS[file.path.suffix.lower()]
    if delimiter == "," and first.count(";") > first.count(","):  # as spreadsheets write where the comma is decimal
        delimiter = ";"
    former = csv.field_size_limit(_MOST_CELL_CHARACTERS)
    try:
        names = next(csv.reader([first], delimiter=delimiter), [])
        column = _column(file.path, names, reading.text_key)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)  # strict: a quotation mark has to be closed
        start = reached[0]
        for number, row in enumerate(rows, start=1):
            if row and len(row) <= column:
                raise DataError(
                    f"{file.path}, row {number} has {len(row)} columns, and `{reading.text_key}` is column "
                    f"{column + 1}; mend or remove the row"
                )
            if any(row[len(names) :]):  # or the text would end at the first comma in it
                raise DataError(
                    f"{file.path}, row {number} has {len(row)} columns, and the first line names {len(names)}; a text "
                    f"with {shown(delimiter)} in it stands in quotation marks: write the table again with them, or as "
                    ".jsonl"
                )
            yield cut(row[column] if row else "", begin + start, begin + reached[0])
            start = reached[0]
    except csv.Error as error:
        raise DataError(
            f"{file.path} is not read after byte {reached[0]}: {error}; mend the row, or write long texts as .jsonl"
        ) from error
    finally:
        csv.field_size_limit(former)


def _column(path: Path, names: list[str], text_key: str) -> int:
    if names.count(text_key) > 1:
        raise DataError(
            f"{path} has {names.count(text_key)} columns {text_key!r} in its first line; rename all but one"
        )
    if text_key in names:
        return names.index(text_key)
    listed = ", ".join(shown(name) for name in names[:10]) or "none"
    raise DataError(
        f"{path} has no column {text_key!r} in its first line, but {listed}{did_you_mean(text_key, names)}; "
        "name the column of the text with --text-key"
    )


def _text_of(path: Path, document: object, where: str, text_key: str) -> str:
    if not isinstance(document, dict):
        raise DataError(f'{where} is {shown(document)}, not an object with the key "{text_key}"; mend or remove it')
    if text_key not in document:
        keys = ", ".join(shown(key) for key in list(document)[:10]) or "none"
        arrays = [key for key, value in document.items() if isinstance(value, list)]
        if len(arrays) == 1:
            raise DataError(
                f'{where} has no key "{text_key}", and an array under {shown(arrays[0])}; give that one: '
                f"jq -c '.[\"{arrays[0]}\"][]' {typed(path)} > new.jsonl"
            )
        raise DataError(
            f'{where} has no key "{text_key}", but {keys}{did_you_mean(text_key, document)}; name the key that holds '
            f"the text with --text-key"
        )
    text = document[text_key]
    if not isinstance(text, str):
        cure = "mend or remove it"
        if isinstance(text, dict | list):
            cure = f"write the text itself there: jq -c '{{text: .{text_key}...}}'"
        raise DataError(f'{where}: "{text_key}" is {shown(text)}, not a string; {cure}')
    return whole(text)


def whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    if _SURROGATES.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lines(file: FoundText, reading: Reading) -> Iterator[tuple[int, int, int, bytes]]:
    """The lines of a file, each with its number, from 1, and the bytes from which to which it goes."""
    with open_regular(file.path) as stream:
        reached = number = 0
        while line := stream.readline(_SHORT_BYTES):
            number += 1
            if len(line) == _SHORT_BYTES and not line.endswith(b"\n"):
                line += _rest(file, stream, number, line, reading)
            start, reached = reached, min(reached + len(line), file.size_bytes)
            yield number, start, reached, without_mark(file.path, line) if number == 1 else line


def _rest(file: FoundText, stream: BinaryIO, number: int, line: bytes, reading: Reading) -> bytes:
    """What follows the first part of a long line, if there is room for the longest line of the file."""
    where, start = f"{file.path}, line {number}", stream.tell()
    width, length = _width(line), len(line)
    longest = length = length + _skip_line(stream)
    if length <= MOST_JSON_BYTES:
        needed_bytes = (1 + _COPIES * width) * length
        try:
            reading.check_room(where, needed_bytes, "divide it")
        except NoRoomToReadError:  # told once, with the room that the longest line needs
            while step := _skip_line(stream):
                longest = max(longest, step)
            longest = min(longest, MOST_JSON_BYTES)
            reading.check_room(f"{where}, or a later one,", (1 + _COPIES * width) * longest, "divide it")
        stream.seek(start)
        return stream.readline(MOST_JSON_BYTES)
    raise DataError(f"{where} is longer than {MOST_JSON_BYTES} bytes, the most that one document may have; divide it")


def _skip_line(stream: BinaryIO) -> int:
    """Bytes to the end of the line, which are passed over a piece at a time."""
    passed = 0
    while piece := stream.readline(_SHORT_BYTES):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _width(content: bytes) -> int:
    """Bytes a character that the text of these may take in memory."""
    if content.isascii():
        return 4 if b"\\ud" in content.lower() else 2 if b"\\u" in content else 1
    return 4 if re.search(rb"[\xf0-\xff]", content) else 2
