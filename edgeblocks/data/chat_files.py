"""The files of conversations: .jsonl and .parquet, alone or as the parts of a folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeblocks.data.parquet import columns_of, parquet_rows
from edgeblocks.errors import ConfigError, DataError
from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json

KEYS = ("messages", "prompt", "completion", "conversations")
_ENDINGS = (".jsonl", ".json", ".parquet")
_TRAIN, _OTHERS = "train", ("valid", "validation", "test")
_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}")
_MOST_LINE_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record, the file's word for its place, and the share of the file that it ends at."""

    content: object
    place: str
    reached: float


def is_chat(source: str) -> bool:
    """Whether the records of a file, or of a folder's training part, are conversations, by the first of them."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = next(iter(_named(path, _TRAIN)), path)
    if path.suffix.lower() not in _ENDINGS or not path.is_file():
        return False
    try:
        if path.suffix.lower() == ".parquet":
            found = columns_of(path)
        else:
            first = next((record.content for record in records(path)), None)
            found = list(first) if isinstance(first, dict) else []
    except (ConfigError, DataError):
        return False
    return bool({"messages", "conversations"} & set(found)) or {"prompt", "completion"} <= set(found)


def parts_of(source: str) -> list[list[Path]]:
    """The files of the training part and, of a folder, those of the hold-out part."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return [[path]]
    held_out = next((found for name in _OTHERS if (found := _named(path, name))), None)
    return [_named(path, _TRAIN), *([held_out] if held_out else [])]


def _named(folder: Path, name: str) -> list[Path]:
    """A part's file, or its files as a hub numbers them: train-00000-of-00002.parquet."""
    for ending in _ENDINGS:
        if (folder / f"{name}{ending}").is_file():
            return [folder / f"{name}{ending}"]
        several = sorted(folder.glob(f"{name}-*{ending}"))
        found = [path for path in several if _OF_SEVERAL.fullmatch(path.stem.removeprefix(name)) and path.is_file()]
        if found:
            return found
    return []


def records(path: Path) -> Iterator[Record]:
    """Of a file, in their order.

    Raises:
        ConfigError: the library that reads it is missing.
        DataError: the file cannot be read, or a line is no JSON.
    """
    return _of_rows(path) if path.suffix.lower() == ".parquet" else _of_lines(path)


def _of_rows(path: Path) -> Iterator[Record]:
    count, rows = parquet_rows(path, KEYS)
    for number, content in enumerate(rows, start=1):
        yield Record(content=content, place=f"{path}, row {number}", reached=number / count)


def _of_lines(path: Path) -> Iterator[Record]:
    size = max(1, path.stat().st_size)
    with open_regular(path) as file:
        number = position = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number, position = number + 1, position + len(line)
            place = f"{path}, line {number}"
            if len(line) > _MOST_LINE_BYTES:
                raise DataError(f"{place} has more than {_MOST_LINE_BYTES} bytes; cut the record")
            if not line.strip():
                continue
            try:
                content = parse_json(line.decode("utf-8").removeprefix("\ufeff"), finite=False)
            except (MalformedFileError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{place} is not read: {error}; every line is one object, such as "
                    f'{{"messages": [{{"role": "user", "content": ".."}}, {{"role": "assistant", "content": ".."}}]}}'
                ) from error
            yield Record(content=content, place=place, reached=min(1.0, position / size))
