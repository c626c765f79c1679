"""Families, targets and machines by name. The one place that knows which exist; each is imported when asked for."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from edgeblocks.errors import ConfigError

_FAMILIES = {"dit": "edgeblocks.families.dit:Dit", "vit": "edgeblocks.families.vit:Vit"}
_TARGETS = {"cpu": "edgeblocks.targets.cpu:CpuTarget", "cuda": "edgeblocks.targets.cuda:CudaTarget"}
_PROFILES = "edgeblocks.targets.profile"
_CHAINS = {"onnxruntime": "edgeblocks.export.opening:open_chain"}
_EXPORTERS = {"onnx": "edgeblocks.export.graph:export_run"}


def family_names() -> tuple[str, ...]:
    return tuple(_FAMILIES)


def target_names() -> tuple[str, ...]:
    return tuple(_TARGETS)


def family_type(name: str) -> Any:
    """The class of a family.

    Raises:
        ConfigError: there is no such family.
    """
    return _load(_FAMILIES, name, "family")


def build_family(name: str, settings: dict[str, Any], data: dict[str, Any]) -> Any:
    """A family from plain values: the fields of its settings, and those of `ImageInfo`."""
    from edgeblocks.families.base import ImageInfo

    cls = family_type(name)
    return cls(cls.settings_type(**settings), ImageInfo(**data))


def family_fields(name: str) -> dict[str, Any]:
    """Names and defaults of a family's settings."""
    return {field.name: field.default for field in dataclasses.fields(family_type(name).settings_type)}


def build_target(name: str) -> Any:
    """A target by name. `auto` is the processor, for the other one was not yet run."""
    return _load(_TARGETS, "cpu" if name == "auto" else name, "target")()


def profile_names() -> tuple[str, ...]:
    """Machines that a plan can be made for without being there."""
    names: tuple[str, ...] = importlib.import_module(_PROFILES).profile_names()
    return names


def build_profile(name: str) -> Any:
    """A machine by name: its memory and speeds, and where these are from.

    Raises:
        ConfigError: there is no such machine.
    """
    return importlib.import_module(_PROFILES).load_profile(name)


def build_exporter() -> Any:
    """The function that turns a run directory into an exported directory."""
    return _load(_EXPORTERS, "onnx", "exporter")


def open_exported(directory: Path) -> Any:
    """An exported directory, ready to run: `Sampler` or `Classifier`. Imports no torch."""
    return _load(_CHAINS, "onnxruntime", "chain")(directory)


def _load(table: dict[str, str], name: str, kind: str) -> Any:
    if name not in table:
        raise ConfigError(f"there is no {kind} '{name}'; there are: {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
