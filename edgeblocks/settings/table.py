"""A table of all settings, made from the fields that check them: what each means, what it may be, and its default."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from edgeblocks.files.checked import fields_model
from edgeblocks.settings.fields import FamilySettings, RunSettings

HEADINGS = ("setting", "default", "range", "what it is")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One of them, in words for people; names and values are in backticks."""

    name: str
    default: str
    allowed: str
    meaning: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """In the order of `HEADINGS`."""
        return f"`{self.name}`", self.default, self.allowed, self.meaning


def run_settings() -> list[Setting]:
    """Those of every run."""
    return [_setting(name, field, _value(field.default)) for name, field in RunSettings.model_fields.items()]


def family_settings(types: Mapping[str, type[FamilySettings]]) -> list[Setting]:
    """Those of families, by their names; where these are several the default names them."""
    fields: dict[str, FieldInfo] = {}
    defaults: dict[str, dict[str, object]] = {}
    for family, kind in types.items():
        for name, field in fields_model(kind).model_fields.items():
            fields.setdefault(name, field)
            defaults.setdefault(name, {})[family] = vars(kind())[name]
    return [_setting(name, field, _defaults(defaults[name], alone=len(types) == 1)) for name, field in fields.items()]


def _setting(name: str, field: FieldInfo, default: str) -> Setting:
    extra = field.json_schema_extra
    told = str(extra["allowed"]) if isinstance(extra, dict) and "allowed" in extra else _range(field)
    return Setting(name=name, default=default, allowed=told, meaning=field.description or "")


def _defaults(of_families: Mapping[str, object], *, alone: bool) -> str:
    if alone:
        return _value(*of_families.values())
    return ", ".join(f"`{family}` {_value(value)}" for family, value in of_families.items())


def _value(value: object) -> str:
    """
    >>> _value(None), _value(True), _value("auto"), _value(0.001), _value(1e-5), _value(20000)
    ('none', 'true', '`auto`', '0.001', '1e-05', '20,000')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`" if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else str(value)


def _range(field: FieldInfo) -> str:
    """What a field's type and limits say that it may be."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) not in (None, Literal) else (field.annotation,)
    said: list[str] = []
    for kind in kinds:
        if kind is NoneType:
            said.insert(0, "none")
        elif get_origin(kind) is Literal:
            said += [f"`{choice}`" for choice in get_args(kind)]
        elif kind is bool:
            said += ["true", "false"]
        else:
            said.append(_limits(field.metadata))
    *first, last = said
    return f"{', '.join(first)} or {last}" if first else last


def _limits(metadata: Iterable[Any]) -> str:
    """
    >>> _limits([annotated_types.Ge(0), annotated_types.Lt(0.28)]), _limits([annotated_types.Gt(0)])
    ('0 to below 0.28', 'above 0')
    """
    low = high = multiple = ""
    for limit in metadata:
        if isinstance(limit, annotated_types.Ge):
            low = _number(limit.ge)
        elif isinstance(limit, annotated_types.Gt):
            low = f"above {_number(limit.gt)}"
        elif isinstance(limit, annotated_types.Le):
            high = _number(limit.le)
        elif isinstance(limit, annotated_types.Lt):
            high = f"below {_number(limit.lt)}"
        elif isinstance(limit, annotated_types.MultipleOf):
            multiple = f", a multiple of {limit.multiple_of}"
    if low and high:
        return f"{low} to {high}{multiple}"
    return (low if low.startswith("above") else f"at least {low}") + multiple


def _number(limit: Any) -> str:
    """
    >>> _number(2**63), _number(4096), _number(1e-30), _number(0.5)
    ('2^63', '4,096', '1e-30', '0.5')
    """
    if isinstance(limit, int):
        return "2^63" if limit == 2**63 else f"{limit:,}"
    return f"{limit:g}"


def as_markdown(settings: Sequence[Setting]) -> str:
    """The table as docs/settings.md has it."""
    rows = [HEADINGS, ("---",) * 4, *(setting.cells for setting in settings)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
