"""Where settings come from, and every mistake at once.

Precedence: command line (flags and `--set key=value`) over `--config FILE.yaml` over the preset over the defaults.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, SupportsFloat

from pydantic import ValidationError

from edgeblocks.errors import ConfigError, did_you_mean
from edgeblocks.files.checked import field_problems, problem
from edgeblocks.files.untrusted import MalformedFileError, read_text, shown
from edgeblocks.settings.fields import FamilySettings, RunSettings, Settings
from edgeblocks.settings.limited_yaml import MOST_YAML_BYTES, load_yaml
from edgeblocks.settings.presets import DEFAULT_PRESETS, load_preset

_MOST_KEYS = 200


def read_yaml(path: Path) -> dict[str, object]:
    """A settings file.

    Raises:
        ConfigError: not readable, too large, not YAML, or not a mapping.
    """
    try:
        content = load_yaml(read_text(path, most_bytes=MOST_YAML_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except MalformedFileError as error:
        raise ConfigError(f"{path} is no settings file: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, found {type(content).__name__}")
    if len(content) > _MOST_KEYS:
        raise ConfigError(f"{path} holds {len(content)} settings; there are fewer than {_MOST_KEYS}")
    return content


def parse_assignments(assignments: list[str]) -> dict[str, object]:
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


def _parse_value(text: str) -> object:
    try:
        value = load_yaml(text)
    except ValueError:
        return text
    return _number(value) if isinstance(value, str) else value  # YAML 1.1 takes 3e-4, without a dot, for text


def resolve_settings(
    given: Mapping[str, object],
    *,
    family_settings: Callable[[str], type[FamilySettings]],
    config: Mapping[str, object] | None = None,
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
    given_family, given_preset = user.get("family"), user.get("preset")
    if not isinstance(given_family, str | None) or not isinstance(given_preset, str | None):
        given_names = (("family", given_family), ("preset", given_preset))
        raise ConfigError(
            *(f"{key}={shown(name)}: a name is needed" for key, name in given_names if not isinstance(name, str | None))
        )
    family = given_family or _preset_family(given_preset)
    family_type = family_settings(family)
    preset_name = given_preset or DEFAULT_PRESETS.get(family, family)  # a family of one's own has no presets
    preset = load_preset(preset_name) if preset_name != family else {}
    if preset.get("family", family) != family:
        raise ConfigError(f"--preset {preset_name} belongs to the family '{preset['family']}', not to '{family}'")
    merged = {**preset, **user, "family": family, "preset": preset_name}

    family_keys = {field.name for field in fields(family_type)}
    run_keys = set(RunSettings.model_fields)
    problems = [_unknown(key, family, run_keys | family_keys) for key in merged if key not in run_keys | family_keys]
    run: RunSettings | None = None
    try:
        run = RunSettings.model_validate({key: value for key, value in merged.items() if key in run_keys})
    except ValidationError as error:
        problems += _validation_problems(error)
    family_values = {key: value for key, value in merged.items() if key in family_keys}
    family_values = {**vars(family_type()), **_with_numbers(family_type, family_values)}
    # Here, not in `problems` alone: settings of a family of one's own may derive from nothing of ours.
    wrong = field_problems(family_type, family_values)
    checked = family_type(**({} if wrong else family_values))
    problems += wrong or checked.problems()
    if problems:
        raise ConfigError(*problems)
    assert run is not None
    return Settings(run=run, family=checked)


def _with_numbers(family_type: type[FamilySettings], values: Mapping[str, object]) -> dict[str, object]:
    """The values with texts such as 3e-4, which YAML 1.1 takes for text, and whole numbers, as the floats they are."""
    numbers = {field.name for field in fields(family_type) if isinstance(field.default, float)}
    return {key: _number(value) if key in numbers else value for key, value in values.items()}


def _number(value: object) -> object:
    try:
        return float(value) if isinstance(value, str | SupportsFloat) and not isinstance(value, bool) else value
    except (ValueError, TypeError, OverflowError):
        return value


def _preset_family(preset: str | None) -> str:
    return str(load_preset(preset).get("family", "dit")) if preset else "dit"


def _unknown(key: str, family: str, known: set[str]) -> str:
    hint = did_you_mean(key, known) or f"; known: {', '.join(sorted(known))}"
    return f"unknown setting '{key}' for the family '{family}'{hint}"


def _validation_problems(error: ValidationError) -> list[str]:
    """One a setting: where it may be of two types, what is wrong for the first."""
    found: dict[str, str] = {}
    for item in error.errors():
        key = str(item["loc"][0])
        found.setdefault(key, problem(item, (key,)))
    return list(found.values())
