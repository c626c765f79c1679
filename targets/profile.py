"""Machines by name, for a plan on a machine that is not this one: `edgeblocks plan --target rtx3060-12gb`.

One YAML file a machine in `profiles/`, with its sources. Nobody measured them for this project: vendors publish peaks,
users publish what PyTorch reached, and what neither says is assumed. So three rules hold for all of them:

- Arithmetic is fp32 as PyTorch does it unless told otherwise: TF32 does not count. Its matrix products of 1024 to 8192
  reach 0.45 to 0.85 of the published peak on Ampere and Ada cards, where half of the fp32 units also serve integers,
  and 0.6 to 1 on Turing. A step also has narrow products and fp32 attention, which reach less: 0.4 of the peak is
  assumed, on Turing 0.55.
- `memory_bytes_per_s` is what `Machine` means by it: bytes written by a kernel that reads as many. Copies reach 0.8 to
  0.9 of a card's published bandwidth, read and written bytes together: half of 0.8 is assumed.
- Where a range is known, the slow and large end is taken. A predicted time is an estimate of a slow day, not a promise;
  each comment says in which direction its figure errs.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Literal, NamedTuple

import yaml

from edgeblocks.errors import ConfigError
from edgeblocks.planning.plans import UPDATE_S_PER_PARAMETER, Host, Machine

Device = Literal["cpu", "cuda"]

WRITTEN_BYTES_PER_UPDATE = 100
"""What an update on a GPU writes for a parameter, and reads as much. Its time is that of this traffic: an H100 that
writes 1.37 TB/s takes 65 ps a parameter for the 8-bit step in long chunks, and 10 ps for clipping and EMA."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a plan needs to know of a machine that is not here.

    On `cpu` the compute device is the host: both memories and both runtimes are the same, and there is no link.
    """

    name: str
    description: str
    device: Device
    memory_bytes: int
    """Memory of the compute device, as PyTorch or the system reports it."""
    host_memory_bytes: int
    runtime_bytes: int
    """What the process occupies on the device before any block: interpreter and torch, or the CUDA context."""
    host_runtime_bytes: int
    """Resident set of the interpreter with torch before any block."""
    cores: int
    """Physical processor cores."""
    flops_per_s: float
    memory_bytes_per_s: float
    operator_s: float
    """Start of a kernel."""
    link_bytes_per_s: float | None
    """Copies between host and device in one direction, from pinned memory; None on `cpu`."""
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    """Sustained: what remains when the disk's own fast cache is full."""
    sources: tuple[str, ...]

    def machine(self) -> Machine:
        """The machine as the planner sees it."""
        if self.link_bytes_per_s is None:
            host, update_s = None, UPDATE_S_PER_PARAMETER
        else:
            update_s = WRITTEN_BYTES_PER_UPDATE / self.memory_bytes_per_s
            host = Host(
                runtime_bytes=self.host_runtime_bytes,
                memory_bytes=self.host_memory_bytes,
                link_bytes_per_s=self.link_bytes_per_s,
            )
        return Machine(
            name=self.name,
            runtime_bytes=self.runtime_bytes,
            flops_per_s=self.flops_per_s,
            memory_bytes_per_s=self.memory_bytes_per_s,
            operator_s=self.operator_s,
            disk_read_bytes_per_s=self.disk_read_bytes_per_s,
            disk_write_bytes_per_s=self.disk_write_bytes_per_s,
            update_s_per_parameter=update_s,
            host=host,
        )


def profile_names() -> tuple[str, ...]:
    """The machines that come with the package."""
    folder = resources.files("edgeblocks.targets") / "profiles"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_profile(name: str) -> Profile:
    """A machine by name.

    Raises:
        ConfigError: there is no such machine, or its file is damaged.
    """
    names = profile_names()
    if name not in names:
        raise ConfigError(
            f"there is no machine profile '{name}'; there are: {', '.join(names)}{_did_you_mean(name, names)}"
        )
    file = resources.files("edgeblocks.targets") / "profiles" / f"{name}.yaml"
    return parse_profile(name, file.read_text(encoding="utf-8"))


def parse_profile(name: str, text: str) -> Profile:
    """A machine from the text of its file; `name` is the file's name, not a key.

    Raises:
        ConfigError: not YAML, or with every key that is missing, unknown, wrong or contradicts another.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"machine profile {name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"machine profile {name} must hold 'key: value' lines, found {type(content).__name__}")
    kinds = {field.name: _KINDS[field.type] for field in fields(Profile) if field.name != "name"}
    problems = [f"unknown key '{key}'{_did_you_mean(key, kinds)}" for key in content if key not in kinds]
    problems += [f"{key} is missing: {kind.words} is needed" for key, kind in kinds.items() if key not in content]
    problems += [
        f"{key}={content[key]!r}: {kind.words} is needed"
        for key, kind in kinds.items()
        if key in content and not kind.accepts(content[key])
    ]
    if not problems:
        profile = Profile(name=name, **{key: kind.convert(content[key]) for key, kind in kinds.items()})
        problems = _contradictions(profile)
    if problems:
        raise ConfigError(*(f"machine profile {name}: {problem}" for problem in problems))
    return profile


def _contradictions(profile: Profile) -> list[str]:
    found = []
    if profile.device == "cuda" and profile.link_bytes_per_s is None:
        found.append("link_bytes_per_s=None: a cuda machine copies over a link, so its speed is needed")
    if profile.device == "cpu":
        if profile.link_bytes_per_s is not None:
            found.append(f"link_bytes_per_s={profile.link_bytes_per_s:g}: a cpu machine has no link, write null")
        for key in ("memory_bytes", "runtime_bytes"):
            if getattr(profile, f"host_{key}") != getattr(profile, key):
                found.append(f"host_{key}={getattr(profile, f'host_{key}')}: on cpu it must equal {key}")
    for key in ("runtime_bytes", "host_runtime_bytes"):
        whole = key.replace("runtime", "memory")
        if getattr(profile, key) >= getattr(profile, whole):
            found.append(f"{key}={getattr(profile, key)} leaves nothing of {whole}={getattr(profile, whole)}")
    return found


class _Kind(NamedTuple):
    """What a key's value may be."""

    words: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_KINDS: dict[Any, _Kind] = {
    str: _Kind("text", _is_text, str),
    Device: _Kind("cpu or cuda", lambda value: value in ("cpu", "cuda"), str),
    int: _Kind("a whole number above zero", lambda value: isinstance(value, int) and _is_number(value), int),
    float: _Kind("a number above zero", _is_number, float),
    float | None: _Kind(
        "a number above zero, or null,",
        lambda value: value is None or _is_number(value),
        lambda value: None if value is None else float(value),
    ),
    tuple[str, ...]: _Kind(
        "a list of texts",
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
        tuple,
    ),
}
"""By the type that the field of `Profile` is annotated with."""


def _did_you_mean(word: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
