"""Values that anyone may have written, checked by a pydantic model before anything is made from them."""

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from edgeblocks.files.untrusted import shown

_PROBLEMS_SHOWN = 5
_Item = TypeVar("_Item")


def is_text(text: str) -> bool:
    """Whether it is text: bytes of a path that are none, Python keeps as halves of characters."""
    return text.encode(errors="replace").decode() == text


def whole_text(text: str) -> str:
    """The text, if it can be printed and written: JSON and YAML can name halves of characters, too.

    Raises:
        ValueError: it cannot.
    """
    if not is_text(text):
        raise ValueError("it holds halves of characters")
    return text


AnyText = Annotated[str, AfterValidator(whole_text)]
Text = Annotated[str, Field(min_length=1), AfterValidator(whole_text)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
ListOf = Annotated[tuple[_Item, ...], Field(strict=False)]
"""A list in the file, which cannot be changed once it is read."""

_DeepGrey = Annotated[int, Field(ge=-(2**31), le=2**32, strict=True)]
DeepRange = Annotated[tuple[_DeepGrey, _DeepGrey], Field(strict=False)]
"""Values of grey of more than 8 bits that become 0 and 255."""


class Checked(BaseModel):
    """Values as JSON gives them, none converted: "1" and true are not 1, and NaN is no number."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class _Fields(BaseModel):
    """The fields of a dataclass, which may be of any class."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


@functools.cache
def fields_model(kind: type) -> type[BaseModel]:
    """A dataclass's fields with what their annotations say of them."""
    hints = get_type_hints(kind, include_extras=True)
    found: Any = {field.name: (hints[field.name], ...) for field in fields(kind)}
    return create_model(kind.__name__, __base__=_Fields, **found)


def field_problems(kind: type, values: Mapping[str, object]) -> list[str]:
    """What is wrong with the values of a dataclass, all its fields given, by its annotations alone.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Shape:
    ...     width: Annotated[int, Field(ge=1)]
    >>> field_problems(Shape, {"width": 0})
    ['width=0: input should be greater than or equal to 1']
    """
    try:
        fields_model(kind).model_validate(values)
    except ValidationError as error:
        return problems(error)
    return []


def problems(error: ValidationError) -> list[str]:
    """What is wrong, one text a place: the place, its value, and what it may be."""
    return [problem(item, item["loc"]) for item in error.errors(include_url=False)]


def problem(item: ErrorDetails, place: tuple[int | str, ...]) -> str:
    """One of pydantic's errors as text."""
    where = ".".join(shown(part).strip("'") for part in place)
    if item["type"] == "missing":
        return f"{where} is missing"
    message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")  # JSON has no tuples
    for limit in item.get("ctx", {}).values():
        if isinstance(limit, float):  # pydantic writes 1e-30 with all its zeros
            message = f"{message.rpartition(' ')[0]} {limit:g}"
    if not where:
        return str(message)
    if item["type"] == "value_error" and isinstance(item["input"], dict):  # the message names what is wrong in it
        return f"{where}: {message}"
    return f"{where}={shown(item['input'])}: {message[0].lower()}{message[1:]}"


def in_short(error: ValidationError) -> str:
    """The first problems in one sentence, and how many more there are."""
    found = problems(error)
    hidden = len(found) - _PROBLEMS_SHOWN
    return "; ".join(found[:_PROBLEMS_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
