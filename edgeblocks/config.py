"""A run's settings: where they come from, what they may be, and every mistake at once.

Precedence: command line (flags and `--set key=value`) over `--config FILE.yaml` over the preset over the defaults. The
resolved settings are written to the run directory as config.yaml.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from edgeblocks.errors import ConfigError
from edgeblocks.units import parse_size

DEFAULT_PRESETS = {"dit": "dit-tiny"}


class RunSettings(BaseModel):
    """Settings that every family has. `auto` leaves the choice to the planner."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    family: str = "dit"
    preset: str = "dit-tiny"
    data: str = "digits"
    image_size: int | None = Field(default=None, ge=1, le=4096)
    hold_out: float = Field(default=0.1, ge=0, le=0.5)
    mem_budget: str = "50%"
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)
    blocks: int | Literal["auto"] = "auto"
    partition: Literal["equal-probability", "uniform"] = "equal-probability"
    overlap: float = Field(default=0.05, ge=0, le=1)
    target: Literal["auto", "cpu"] = "auto"
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema_length: float = Field(default=0.1, gt=0, lt=0.28)
    micro_batch: int | Literal["auto"] = "auto"
    checkpointing: bool | Literal["auto"] = "auto"
    visit_steps: int | Literal["auto"] = "auto"
    tier: Literal["auto", "ram", "disk"] = "auto"
    sample_grids: int = Field(default=4, ge=0)
    sample_steps: int = Field(default=18, ge=1)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name != "checkpointing":
            raise ValueError("true or false is no answer here")
        return value

    @field_validator("mem_budget")
    @classmethod
    def _is_size(cls, text: str) -> str:
        parse_size(text, whole_bytes=1_000_000)
        return text

    @field_validator("blocks", "micro_batch", "visit_steps", mode="before")
    @classmethod
    def _is_count_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError("a whole number of at least 1, or auto, is needed")
        return value

    @field_validator("data", "family", "preset")
    @classmethod
    def _is_not_empty(cls, text: str) -> str:
        if not text:
            raise ValueError("it must not be empty")
        return text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings and its family's, resolved and checked one by one."""

    run: RunSettings
    family: Any
    """The family's own frozen settings dataclass."""

    def to_yaml(self) -> str:
        """Flat YAML that `resolve_settings` reads back to the same settings."""
        return yaml.safe_dump({**self.run.model_dump(), **asdict(self.family)}, sort_keys=False)


def preset_names() -> tuple[str, ...]:
    """The presets that come with the package."""
    folder = resources.files("edgeblocks.recipes")
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def read_yaml(path: Path) -> dict[str, Any]:
    """A settings file.

    Raises:
        ConfigError: not readable, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, found {type(content).__name__}")
    return content


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`key=value` texts as settings; dashes in keys become underscores, and a value is read as YAML.

    >>> parse_assignments(["patch=1", "flip=true", "learning_rate=3e-4", "data=my.npz"])
    {'patch': 1, 'flip': True, 'learning_rate': 0.0003, 'data': 'my.npz'}
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: write key=value, for example --set patch=2")
        settings[key.strip().replace("-", "_")] = _parse_value(text)
    return settings


def _parse_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return _number(value) if isinstance(value, str) else value  # YAML 1.1 takes 3e-4, without a dot, for text


def resolve_settings(
    given: Mapping[str, Any],
    *,
    family_settings: Any,
    config: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from what the user gave over a config file over a preset over the defaults.

    Args:
        given: the command line's settings, flat; None means not given.
        family_settings: a function from a family's name to its settings dataclass.
        config: a config file's settings, flat.

    Raises:
        ConfigError: with all problems found.
    """
    user = {**(config or {}), **{key: value for key, value in given.items() if value is not None}}
    names = [
        f"{name}={user[name]!r}: a name is needed" for name in ("family", "preset") if not _is_name(user.get(name))
    ]
    if names:
        raise ConfigError(*names)
    family = user.get("family") or _preset_family(user.get("preset"))
    family_type = family_settings(family)
    preset_name = user.get("preset") or DEFAULT_PRESETS.get(family, "")
    preset = load_preset(preset_name) if preset_name else {}
    if preset.get("family", family) != family:
        raise ConfigError(f"--preset {preset_name} belongs to the family '{preset['family']}', not to '{family}'")
    merged = {**preset, **user, "family": family, "preset": preset_name}

    family_keys = {field.name for field in fields(family_type)}
    run_keys = set(RunSettings.model_fields)
    problems = [_unknown(key, family, run_keys | family_keys) for key in merged if key not in run_keys | family_keys]
    run: RunSettings | None = None
    try:
        run = RunSettings(**{key: value for key, value in merged.items() if key in run_keys})
    except ValidationError as error:
        problems += _validation_problems(error)
    family_values = _with_numbers(family_type, {key: value for key, value in merged.items() if key in family_keys})
    type_problems = _type_problems(family_type, family_values)
    checked = family_type(**({} if type_problems else family_values))
    problems += type_problems or checked.problems()
    if problems:
        raise ConfigError(*problems)
    assert run is not None
    return Settings(run=run, family=checked)


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _with_numbers(family_type: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with texts such as 3e-4, which YAML 1.1 takes for text, as the numbers they are."""
    numbers = {field.name for field in fields(family_type) if isinstance(field.default, float)}
    return {
        key: _number(value) if key in numbers and isinstance(value, str) else value for key, value in values.items()
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _preset_family(preset: str | None) -> str:
    return str(load_preset(preset).get("family", "dit")) if preset else "dit"


def load_preset(name: str) -> dict[str, Any]:
    """A preset's settings.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in preset_names():
        raise ConfigError(
            f"there is no preset '{name}'; there are: {', '.join(preset_names())}{_did_you_mean(name, preset_names())}"
        )
    text = (resources.files("edgeblocks.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    preset: dict[str, Any] = yaml.safe_load(text)
    return preset


def _unknown(key: str, family: str, known: set[str]) -> str:
    return f"unknown setting '{key}' for the family '{family}'{_did_you_mean(key, known)}"


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def _validation_problems(error: ValidationError) -> list[str]:
    found: dict[str, str] = {}
    for item in error.errors():
        key = str(item["loc"][0])
        message = item["msg"].removeprefix("Value error, ")
        found.setdefault(key, f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}")
    return list(found.values())


def _type_problems(family_type: Any, values: Mapping[str, Any]) -> list[str]:
    defaults = {field.name: field.default for field in fields(family_type)}
    found = []
    for key, value in values.items():
        wanted = type(defaults[key])
        fits = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
        if not fits and not (wanted is float and isinstance(value, int) and not isinstance(value, bool)):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            found.append(f"{key}={value!r}: {names[wanted]} is needed")
    return found
