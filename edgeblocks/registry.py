"""Families, targets and machines by name. The one place that knows which exist; each is imported when asked for."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeblocks.errors import ConfigError, did_you_mean
from edgeblocks.methods import METHODS, MethodName, imported
from edgeblocks.onnx_runtime import PROCESSOR, Hardware

if TYPE_CHECKING:
    from edgeblocks.families.ar import Ar, PlainAr
    from edgeblocks.families.dit import Dit
    from edgeblocks.families.family import (
        AnyFamily,
        Family,
        FamilyOfClasses,
        FamilyOfContinuations,
        FamilyOfImages,
        FamilyOfText,
        FamilyType,
    )
    from edgeblocks.families.looped import Looped, PlainLooped
    from edgeblocks.families.mdlm import Mdlm
    from edgeblocks.families.vit import PlainVit, Vit
    from edgeblocks.offload.device import Target
    from edgeblocks.pretrained.vision import Vision
    from edgeblocks.targets.profile import Profile

_FAMILIES = {
    "ar": "edgeblocks.families.ar:Ar",
    "dit": "edgeblocks.families.dit:Dit",
    "looped": "edgeblocks.families.looped:Looped",
    "mdlm": "edgeblocks.families.mdlm:Mdlm",
    "vit": "edgeblocks.families.vit:Vit",
}
_PRETRAINED = {
    "hf": "edgeblocks.pretrained.decoder:Decoder",
    "hf-lora": "edgeblocks.pretrained.lora:LoraDecoder",
    "hf-part": "edgeblocks.pretrained.part:PartDecoder",
    "hf-vision": "edgeblocks.pretrained.vision:Vision",
    "hf-vision-lora": "edgeblocks.pretrained.vision_lora:VisionLora",
}
"""Families of networks that others have trained; they are asked for by their own verb."""
_END_TO_END = {
    "ar": "edgeblocks.families.ar:PlainAr",
    "looped": "edgeblocks.families.looped:PlainLooped",
    "vit": "edgeblocks.families.vit:PlainVit",
}
"""Families that are another network where they are trained end to end."""
if TYPE_CHECKING:
    _images: type[FamilyOfImages] = Dit
    _classes: list[type[FamilyOfClasses]] = [Vit, PlainVit, Vision]
    _text: type[FamilyOfText] = Mdlm
    _continuations: list[type[FamilyOfContinuations]] = [Ar, Looped, PlainAr, PlainLooped]

_TARGETS = {"cpu": "edgeblocks.targets.cpu:CpuTarget", "cuda": "edgeblocks.targets.cuda:CudaTarget"}
_OWN_FAMILIES: set[str] = set()
_FAMILY = "edgeblocks.families.family"
_PROFILES = "edgeblocks.targets.profile"
_CHAINS = {"onnxruntime": "edgeblocks.export.open_export:open_graphs"}
_LANGUAGE_MODELS = "edgeblocks.export.language_model"
_EXPORTERS = {
    "blocks": "edgeblocks.export.export_run:export_run",
    "language model": "edgeblocks.export.export_model:export_model",
    "image classifier": "edgeblocks.export.export_vision:export_vision",
    "page": "edgeblocks.export.web_page:export_page",
}


def register_family(family: type["Family"]) -> None:
    """Make a family of your own known by its `name` in this process; see docs/own_family.md.

    It is known by its import path as well, because planning happens in a process of its own.

    Raises:
        ConfigError: the name is taken, or the class is not at the top of a module that can be imported.
    """
    name, module = family.name, family.__module__
    path = f"{module}:{family.__qualname__}"
    if not name or (name in _FAMILIES and _FAMILIES[name] != path):
        raise ConfigError(f"a family needs a name that is not taken, found {name!r}; taken are: {', '.join(_FAMILIES)}")
    lacking = sorted(getattr(family, "__abstractmethods__", ()))
    if lacking:
        raise ConfigError(f"the family '{name}' lacks {', '.join(lacking)}; see docs/own_family.md")
    if module == "__main__" or "<locals>" in family.__qualname__:
        raise ConfigError(
            f"the family '{name}' must be a class at the top of a module of its own (it is {path}), because planning "
            f"imports it in another process; move it to a file such as {name}.py and import it"
        )
    _FAMILIES[name] = path
    _OWN_FAMILIES.add(name)


def own_family(name: str) -> dict[str, str] | None:
    """How another process can import a family that was registered here; None for those that come with the package."""
    if name not in _OWN_FAMILIES:
        return None
    top = _FAMILIES[name].partition(":")[0]
    file = Path(str(importlib.import_module(top).__file__))
    return {
        "path": _FAMILIES[name],
        "folder": str(file.parents[top.count(".")]),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def import_own_family(found: dict[str, str]) -> None:
    """Register what `own_family` returned in another process."""
    # Last, so that no file beside the user's takes the place of a library.
    sys.path += [found["folder"], os.getcwd()]  # noqa: PTH109 - what the user's file imports in turn
    module, _, attribute = found["path"].partition(":")
    register_family(getattr(importlib.import_module(module), attribute))


def family_names() -> tuple[str, ...]:
    """Families that can be asked for, those of one's own behind the others."""
    return tuple(_FAMILIES)


def target_names() -> tuple[str, ...]:
    return tuple(_TARGETS)


def family_type(name: str, method: MethodName = "diffusion") -> "FamilyType":
    """The class of a family, for a method of training.

    Raises:
        ConfigError: there is no such family, or it has no end-to-end form.
    """
    cls: FamilyType
    if not METHODS[method].trained_together:
        cls = _load(_FAMILIES if name not in _PRETRAINED else _PRETRAINED, name, "family")
        return cls
    cls = _load(next((one for one in (_END_TO_END, _PRETRAINED) if name in one), _FAMILIES), name, "family")
    if not issubclass(cls, importlib.import_module(_FAMILY).EndToEnd):
        raise ConfigError(
            f"--method {method}: the family '{name}' has no end-to-end form in stages (it does not derive from "
            f"edgeblocks.families.family.EndToEnd); use --method diffusion"
        )
    return cls


def build_family(
    name: str, settings: Mapping[str, object], data: Mapping[str, object], method: MethodName = "diffusion"
) -> "AnyFamily":
    """A family from plain values: the fields of its settings, and those of what it knows of the data.

    Raises:
        ConfigError: with everything that is impossible.
    """
    cls = family_type(name, method)
    make: Callable[[object, object], AnyFamily] = cls
    return make(cls.settings_type(**settings), cls.data_type(**data))


def build_target(name: str) -> "Target":
    """A target by name. `auto` is the processor, for the other one was run on one kind of GPU only."""
    target: Target = _load(_TARGETS, "cpu" if name == "auto" else name, "target")()
    return target


def profile_names() -> tuple[str, ...]:
    """Machines that a plan can be made for without being there."""
    names: tuple[str, ...] = importlib.import_module(_PROFILES).profile_names()
    return names


def build_profile(name: str) -> "Profile":
    """A machine by name: its memory and speeds, and where these are from.

    Raises:
        ConfigError: there is no such machine.
    """
    profile: Profile = importlib.import_module(_PROFILES).load_profile(name)
    return profile


def build_exporter(kind: str) -> Any:
    """The function that writes a run for deployment: its `blocks`, a fine-tuned `language model` or `image
    classifier`, or a `page`."""
    return _load(_EXPORTERS, kind, "exporter")


def open_exported(directory: Path | str, hardware: Hardware = PROCESSOR) -> Any:
    """An exported directory, ready to run: a `Sampler`, `Classifier`, `Writer`, `Continuer` or `VisionModel`. Without
    torch."""
    return _load(_CHAINS, "onnxruntime", "chain")(directory, hardware=hardware)


def open_language_model(directory: Path, hardware: Hardware = PROCESSOR) -> Any:
    """An exported `LanguageModel`; None where a directory holds none. Imports no torch."""
    module = importlib.import_module(_LANGUAGE_MODELS)
    return module.LanguageModel(directory, hardware=hardware) if module.is_language_model(directory) else None


def exports() -> Any:
    """The module of `edgeblocks.open_export`. Imports no torch."""
    return importlib.import_module("edgeblocks.export.exported")


def _load(table: dict[str, str], name: str, kind: str) -> Any:
    if name not in table:
        own = "; one of your own is made known with edgeblocks.register_family" if kind == "family" else ""
        meant = did_you_mean(name.lower(), table)
        raise ConfigError(f"there is no {kind} '{name}'; there are: {', '.join(table)}{own}{meant}")
    return imported(table[name])
