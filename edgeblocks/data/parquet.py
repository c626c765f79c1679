"""Documents in the rows of a .parquet file, read by bytes: what a page unpacks to is known before it is unpacked.

A column's values lie in pages, each unpacked as a whole. A page of 1 MB is usual, but of long documents one page can
be all of them, and a few packed kilobytes can unpack to gigabytes. So the headers of the pages are read first, which
say both sizes; the library is then asked for few rows at a time, and their text is decoded from its buffers piece by
piece.

Source: the Parquet format, https://github.com/apache/parquet-format (`parquet.thrift`, its compact protocol).
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgeblocks.data.plain_text import PIECE_CHARACTERS, FoundText, Piece, Reading, without_mark
from edgeblocks.errors import ConfigError, DataError, NoRoomToReadError, did_you_mean
from edgeblocks.files.untrusted import MalformedFileError, open_regular, shown
from edgeblocks.units import format_bytes

LIBRARY_ROOM_BYTES = 90_000_000
"""Measured: 75 MB with pages of 1 MB, most of it the library's own."""
_USUAL_PAGE_BYTES = 2**21
_COPIES_OF_PAGE = 2.25
"""Measured: 2.1 to 2.2 of a page with the library's allocator, which keeps what is freed for a while."""
_COPIES_OF_DOCUMENT = 1.7
"""Of the longest document, beside its page. Measured: 1.6."""
_SKEW = 4
"""By how many times the longest document of a page is taken to exceed its mean."""
_BYTES_AT_ONCE = 2**24
_MOST_PAGE_BYTES = 2**26
"""Of what is read as rows."""
_MOST_ROWS_AT_ONCE = 64
_MOST_FOOTER_BYTES = 2**28
_SMALLER_PAGES = "save it in row groups of fewer rows (pyarrow.parquet.write_table(.., row_group_size=..))"
_TEXT_KINDS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


@dataclass(frozen=True, kw_only=True)
class PageSizes:
    """Bytes of the largest dictionary and of the largest page of values, unpacked, and how many values are in each."""

    dictionary_bytes: int = 0
    data_bytes: int = 0
    document_bytes: int = 0
    """About what the longest document may have."""

    @property
    def largest_bytes(self) -> int:
        return max(self.dictionary_bytes, self.data_bytes)

    @property
    def room_bytes(self) -> int:
        """Memory that reading takes beside the library's."""
        if self.largest_bytes <= _USUAL_PAGE_BYTES:
            return 0
        pages = _COPIES_OF_PAGE * (self.dictionary_bytes + self.data_bytes)
        return int(pages + _COPIES_OF_DOCUMENT * self.document_bytes)

    def __or__(self, other: "PageSizes") -> "PageSizes":
        return PageSizes(
            dictionary_bytes=max(self.dictionary_bytes, other.dictionary_bytes),
            data_bytes=max(self.data_bytes, other.data_bytes),
            document_bytes=max(self.document_bytes, other.document_bytes),
        )


def parquet_documents(file: FoundText, begin: int, reading: Reading) -> Iterator[Iterator[Piece]]:
    """A row is a document, a missing text an empty one.

    Raises:
        ConfigError: the library `pyarrow` is missing.
        DataError: no parquet file, damaged, or without a column of text.
        NoRoomToReadError: a page takes more memory than is left.
    """
    table = _opened(file.path)
    import pyarrow

    try:
        _check_column(file.path, table.schema_arrow, reading.text_key)
        num_rows, done = max(1, table.metadata.num_rows), 0
        for group in range(table.metadata.num_row_groups):
            sizes = _sizes_of(file.path, table.metadata, group, reading)
            rows = max(1, min(_MOST_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, sizes.largest_bytes)))
            asked = {"batch_size": rows, "row_groups": [group], "columns": [reading.text_key], "use_threads": False}
            for batch in table.iter_batches(**asked):
                for scalar in batch.column(0):
                    start, end = (begin + file.size_bytes * min(row, num_rows) // num_rows for row in (done, done + 1))
                    done += 1
                    yield _pieces(file.path, done, scalar, start, end)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(file.path, error) from error


def columns_of(path: Path) -> list[str]:
    """Names of a file's columns.

    Raises:
        ConfigError, DataError: as `parquet_documents`.
    """
    return list(_opened(path).schema_arrow.names)


def parquet_rows(path: Path, columns: Sequence[str]) -> tuple[int, Iterator[dict[str, Any]]]:
    """How many rows there are, and each as what JSON would give, of those of these columns that there are.

    What is missing in a struct, which has all of its fields, is left out.

    Raises:
        ConfigError, DataError: as `parquet_documents`.
    """
    table = _opened(path)
    return table.metadata.num_rows, _rows(path, table, [name for name in columns if name in table.schema_arrow.names])


def _rows(path: Path, table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for group in range(table.metadata.num_row_groups):
            row_group = table.metadata.row_group(group)
            for column in map(row_group.column, range(row_group.num_columns)):
                if column.path_in_schema.split(".")[0] in columns:
                    unpacked_bytes = _page_sizes(path, column).largest_bytes
                    if unpacked_bytes > _MOST_PAGE_BYTES:
                        raise DataError(
                            f"{path}: one page of the column {column.path_in_schema!r} unpacks to "
                            f"{format_bytes(unpacked_bytes)}, at most {format_bytes(_MOST_PAGE_BYTES)} are read; "
                            f"{_SMALLER_PAGES}"
                        )
            asked = {"batch_size": 1, "row_groups": [group], "columns": columns, "use_threads": False}
            for batch in table.iter_batches(**asked):
                yield from (_without_missing(row) for row in batch.to_pylist())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _without_missing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_missing(part) for name, part in value.items() if part is not None}
    return [_without_missing(part) for part in value] if isinstance(value, list) else value


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is a damaged .parquet file: {' '.join(str(error).split())[:200]}; copy or save it again")


def _opened(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading .parquet needs the library `pyarrow`, which cannot be imported ({error}); "
            "pip install 'edgeblocks[parquet]', or save the text as .jsonl"
        ) from error
    try:
        with open_regular(path) as file:
            _check_footer(path, file)
        return pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=2**16)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} is not a .parquet file: {' '.join(str(error).split())[:200]}; copy or save it again"
        ) from error


def _check_footer(path: Path, file: BinaryIO) -> None:
    head = file.read(64)
    if not head.startswith(b"PAR1"):
        without_mark(path, head)  # what it is instead, where that is known
    file.seek(0, 2)
    if file.tell() < 12:
        raise MalformedFileError(f"it has {file.tell()} bytes")
    file.seek(-8, 2)
    footer_bytes = int.from_bytes(file.read(4), "little")
    if footer_bytes > _MOST_FOOTER_BYTES:
        raise MalformedFileError(
            f"its table of contents has {footer_bytes} bytes, at most {_MOST_FOOTER_BYTES} are read"
        )


def _check_column(path: Path, schema: Any, text_key: str) -> None:
    kinds = {field.name: field.type for field in schema}
    if text_key not in kinds:
        columns = ", ".join(f"{shown(name)} ({kind})" for name, kind in list(kinds.items())[:10]) or "none"
        raise DataError(
            f"{path} has no column {text_key!r}, but {columns}{did_you_mean(text_key, kinds)}; name the column of the "
            "text with --text-key"
        )
    kind = kinds[text_key]
    value = str(getattr(kind, "value_type", kind)) if str(kind).startswith("dictionary") else str(kind)
    if value == "null":
        raise DataError(f"{path}: the column {text_key!r} is of type null: all of its texts are missing; give another")
    if value not in _TEXT_KINDS:
        cast = '.map("\\n".join)' if "list<" in value and "string" in value else ".astype(str)"
        raise DataError(
            f"{path}: the column {text_key!r} is of type {shown(str(kind))}, not of strings; cast it, for example with "
            f"pandas: table[{text_key!r}]{cast}; or name another column with --text-key"
        )


def _pieces(path: Path, row: int, scalar: Any, start: int, end: int) -> Iterator[Piece]:
    """A row's text, decoded from the library's buffer piece by piece, so that a long one is not there twice."""
    value = getattr(scalar, "value", scalar) if type(scalar).__name__ == "DictionaryScalar" else scalar
    if value is None or not value.is_valid:
        return
    content = memoryview(value.as_buffer())
    reached = 0
    while reached < len(content):
        last = reached + PIECE_CHARACTERS >= len(content)
        try:
            text, num_decoded = codecs.utf_8_decode(content[reached : reached + PIECE_CHARACTERS], "strict", last)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, row {row} is not text in UTF-8: {error.reason} at its byte {reached + error.start}; mend or "
                "remove it, or name another column with --text-key"
            ) from error
        reached += num_decoded
        yield Piece(text, start + (end - start) * reached // len(content))


def _sizes_of(path: Path, metadata: Any, group: int, reading: Reading) -> PageSizes:
    """The pages of a row group, for which there is room.

    Raises:
        NoRoomToReadError: with what the largest pages of the file need.
    """
    sizes = _page_sizes(path, _column(metadata, group, reading.text_key))
    if sizes.room_bytes:
        try:
            reading.check_room(_described(path, sizes), sizes.room_bytes, _SMALLER_PAGES)
        except NoRoomToReadError:  # told once, with the room that the largest pages need
            for later in range(group + 1, metadata.num_row_groups):
                sizes |= _page_sizes(path, _column(metadata, later, reading.text_key))
            reading.check_room(_described(path, sizes), sizes.room_bytes, _SMALLER_PAGES)
    return sizes


def _described(path: Path, sizes: PageSizes) -> str:
    return f"{path}, in which one page of texts unpacks to {format_bytes(sizes.largest_bytes)},"


def _column(metadata: Any, group: int, text_key: str) -> Any:
    row_group = metadata.row_group(group)
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        if column.path_in_schema == text_key:
            return column
    raise MalformedFileError(f"row group {group} lacks the column {text_key!r}")


def _page_sizes(path: Path, column: Any) -> PageSizes:
    """From the headers of a column's pages; the values between them are passed over."""
    offset = column.data_page_offset
    if column.dictionary_page_offset is not None and 0 < column.dictionary_page_offset < offset:
        offset = column.dictionary_page_offset
    end, found = offset + column.total_compressed_size, PageSizes()
    num_values = 0
    with open_regular(path) as file:
        while offset < end and num_values < column.num_values:
            file.seek(offset)
            header = _struct(file)
            unpacked, packed = header.get(2), header.get(3)
            if not (isinstance(unpacked, int) and isinstance(packed, int) and unpacked >= 0 and packed >= 0):
                raise MalformedFileError("the header of a page has no sizes")
            inner = next((header[key] for key in (5, 7, 8) if isinstance(header.get(key), dict)), {})
            count = inner.get(1) if isinstance(inner, dict) else None
            count = count if isinstance(count, int) and count > 0 else 1
            is_dictionary = 7 in header
            num_values += 0 if is_dictionary else count
            found |= PageSizes(
                dictionary_bytes=unpacked if is_dictionary else 0,
                data_bytes=0 if is_dictionary else unpacked,
                document_bytes=min(unpacked, _SKEW * unpacked // count),
            )
            offset = file.tell() + packed
    return found


def _struct(file: BinaryIO, depth: int = 0) -> dict[int, object]:
    """A struct of thrift's compact protocol: its whole numbers and structs by their ids; the rest is passed over."""
    if depth > 8:
        raise MalformedFileError("the header of a page is nested too deeply")
    fields: dict[int, object] = {}
    number = 0
    while kind_byte := _byte(file):
        delta, kind = kind_byte >> 4, kind_byte & 15
        number = number + delta if delta else _zigzag(file)
        fields[number] = _value(file, kind, depth)
        if len(fields) > 100:
            raise MalformedFileError("the header of a page has too many fields")
    return fields


def _value(file: BinaryIO, kind: int, depth: int) -> object:
    if kind in (1, 2):  # true, false
        return kind == 1
    if kind == 3:
        return _byte(file)
    if kind in (4, 5, 6):
        return _zigzag(file)
    if kind in (7, 8):  # a double; bytes
        file.seek(8 if kind == 7 else _varint(file), 1)
        return None
    if kind in (9, 10):  # a list, a set
        size_byte = _byte(file)
        count, inner = size_byte >> 4, size_byte & 15
        count = _varint(file) if count == 15 else count
        if count > 1000:
            raise MalformedFileError("the header of a page has a list that is too long")
        for _ in range(count):
            _byte(file) if inner in (1, 2) else _value(file, inner, depth + 1)
        return None
    if kind == 12:
        return _struct(file, depth + 1)
    raise MalformedFileError(f"the header of a page has a value of kind {kind}")


def _byte(file: BinaryIO) -> int:
    read = file.read(1)
    if not read:
        raise MalformedFileError("it ends inside the header of a page")
    return read[0]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise MalformedFileError("the header of a page has a number that is too long")


def _zigzag(file: BinaryIO) -> int:
    value = _varint(file)
    return (value >> 1) ^ -(value & 1)
