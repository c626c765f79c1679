"""The fields of a JSON object that may come from anywhere: each is taken with its type and range checked."""

import math
from collections.abc import Iterator
from typing import Any, NoReturn

from edgeblocks.files.untrusted import shown

_MOST_NAME_CHARACTERS = 255
_SHA256_DIGITS = 64


class MalformedError(ValueError):
    """What is wrong with a manifest's content."""


class Fields:
    """A JSON object whose fields are taken with their types checked; `where` names the object in messages."""

    def __init__(self, content: Any, where: str) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise MalformedError(f"{where or 'the manifest'} must be an object, found {shown(content)}")
        self._content = content

    def fail(self, name: str, expected: str) -> NoReturn:
        raise MalformedError(f"{self._path(name)} must be {expected}, found {shown(self._content.get(name))}")

    def _path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def _get(self, name: str) -> Any:
        if name not in self._content:
            raise MalformedError(f"{self._path(name)} is missing")
        return self._content[name]

    def integer(self, name: str, *, least: int, most: int) -> int:
        value = self._get(name)
        if type(value) is not int or value < least:
            self.fail(name, f"a whole number of at least {least}")
        if value > most:
            self.fail(name, f"a whole number of at most {most}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name)
        if not is_number(value):
            self.fail(name, "a finite number")
        return float(value)

    def positive(self, name: str) -> float:
        value = self.number(name)
        if value <= 0:
            self.fail(name, "larger than 0")
        return value

    def not_negative(self, name: str) -> float:
        value = self.number(name)
        if value < 0:
            self.fail(name, "at least 0")
        return value

    def truth(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self._get(name)
        if not is_text(value) or not value:
            self.fail(name, "a text")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._get(name)
        if not isinstance(values, list) or not all(map(is_text, values)):
            self.fail(name, "a list of texts")
        return tuple(values)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self._get(name)
        if not isinstance(values, list) or not all(is_number(value) for value in values):
            self.fail(name, "a list of finite numbers")
        return tuple(map(float, values))

    def integers(self, name: str, *, least: int, most: int) -> tuple[int, ...]:
        values = self._get(name)
        if not isinstance(values, list) or not all(type(value) is int and least <= value <= most for value in values):
            self.fail(name, f"a list of whole numbers from {least} to {most}")
        return tuple(values)

    def inner(self, name: str) -> "Fields":
        return Fields(self._get(name), self._path(name))

    def inners(self, name: str) -> "Iterator[Fields]":
        values = self._get(name)
        if not isinstance(values, list):
            self.fail(name, "a list")
        for index, value in enumerate(values):
            yield Fields(value, f"{self._path(name)}[{index}]")

    def file_name(self, name: str) -> str:
        """A name inside the directory: it can lead nowhere else, on any system."""
        value = self.text(name)
        if value.startswith(".") or any(bad in value for bad in "/\\:\0") or len(value) > _MOST_NAME_CHARACTERS:
            self.fail(name, "the plain name of a file in the directory")
        return value

    def sha256(self, name: str) -> str:
        value = self.text(name)
        if len(value) != _SHA256_DIGITS or not set(value) <= set("0123456789abcdef"):
            self.fail(name, f"a SHA-256 of {_SHA256_DIGITS} lower-case hexadecimal digits")
        return value

    def absent(self, name: str) -> bool:
        return self._get(name) is None


def is_number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_text(value: Any) -> bool:
    """Whether a value is text that can be printed and written: JSON can name halves of characters, too."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value
