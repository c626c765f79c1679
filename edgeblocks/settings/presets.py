"""Settings that come with the package under a name."""

from importlib import resources
from typing import Any

import yaml

from edgeblocks.errors import ConfigError, did_you_mean

DEFAULT_PRESETS = {
    "ar": "ar-tiny",
    "dit": "dit-tiny",
    "looped": "looped-tiny",
    "mdlm": "mdlm-tiny",
    "vit": "vit-tiny",
}
"""By family."""


def preset_names() -> tuple[str, ...]:
    """The presets that come with the package."""
    folder = resources.files("edgeblocks.recipes")
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_preset(name: str) -> dict[str, object]:
    """A preset's settings.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in preset_names():
        raise ConfigError(
            f"there is no preset '{name}'; there are: {', '.join(preset_names())}{did_you_mean(name, preset_names())}"
        )
    text = (resources.files("edgeblocks.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    preset: dict[str, Any] = yaml.safe_load(text)
    return preset
