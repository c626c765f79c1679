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

from importlib import resources
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from edgeblocks.errors import ConfigError, did_you_mean
from edgeblocks.files.checked import Checked, ListOf, Positive, problems
from edgeblocks.planning.plans import UPDATE_S_PER_PARAMETER, Host, Machine

Count = Annotated[int, Field(gt=0)]
Words = Annotated[str, Field(pattern=r"\S")]

WRITTEN_BYTES_PER_UPDATE = 100
"""What an update on a GPU writes for a parameter, and reads as much. Its time is that of this traffic: an H100 that
writes 1.37 TB/s takes 65 ps a parameter for the 8-bit step in long chunks, and 10 ps for clipping and EMA."""


class Profile(Checked):
    """What a plan needs to know of a machine that is not here.

    On `cpu` the compute device is the host: both memories and both runtimes are the same, and there is no link.
    """

    name: str
    """Of the file, no key in it."""
    description: Words
    device: Literal["cpu", "cuda"]
    half_precision: Literal["bf16", "fp16"] | None
    """The numbers of 16 bits that a GPU computes fast in: bfloat16 from compute capability 8 on. None on `cpu`, where
    only a measurement tells."""
    memory_bytes: Count
    """Memory of the compute device, as PyTorch or the system reports it."""
    host_memory_bytes: Count
    runtime_bytes: Count
    """What the process occupies on the device before any block: interpreter and torch, or the CUDA context."""
    host_runtime_bytes: Count
    """Resident set of the interpreter with torch before any block."""
    cores: Count
    """Physical processor cores."""
    flops_per_s: Positive
    memory_bytes_per_s: Positive
    operator_s: Positive
    """Start of a kernel."""
    link_bytes_per_s: Positive | None
    """Copies between host and device in one direction, from pinned memory; None on `cpu`."""
    disk_read_bytes_per_s: Positive
    disk_write_bytes_per_s: Positive
    """Sustained: what remains when the disk's own fast cache is full."""
    sources: Annotated[ListOf[Words], Field(min_length=1)]

    @model_validator(mode="after")
    def _does_not_contradict_itself(self) -> Self:
        found = []
        if self.device == "cuda" and self.link_bytes_per_s is None:
            found.append("link_bytes_per_s=None: a cuda machine copies over a link, so its speed is needed")
        if (self.device == "cuda") != (self.half_precision is not None):
            found.append(f"half_precision={self.half_precision}: bf16 or fp16 on cuda, null on cpu")
        if self.device == "cpu":
            if self.link_bytes_per_s is not None:
                found.append(f"link_bytes_per_s={self.link_bytes_per_s:g}: a cpu machine has no link, write null")
            if self.host_memory_bytes != self.memory_bytes:
                found.append(f"host_memory_bytes={self.host_memory_bytes}: on cpu it must equal memory_bytes")
            if self.host_runtime_bytes != self.runtime_bytes:
                found.append(f"host_runtime_bytes={self.host_runtime_bytes}: on cpu it must equal runtime_bytes")
        if self.runtime_bytes >= self.memory_bytes:
            found.append(f"runtime_bytes={self.runtime_bytes} leaves nothing of memory_bytes={self.memory_bytes}")
        if self.host_runtime_bytes >= self.host_memory_bytes:
            found.append(
                f"host_runtime_bytes={self.host_runtime_bytes} leaves nothing of "
                f"host_memory_bytes={self.host_memory_bytes}"
            )
        if found:
            raise ValueError("; ".join(found))
        return self

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
            f"there is no machine profile '{name}'; there are: {', '.join(names)}{did_you_mean(name, names)}"
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
    keys = set(Profile.model_fields) - {"name"}
    found = [f"unknown key '{key}'{did_you_mean(key, keys)}" for key in content if key not in keys]
    try:
        profile = Profile.model_validate({**content, "name": name})
    except ValidationError as error:
        found += problems(error)
    if found:
        raise ConfigError(*(f"machine profile {name}: {problem}" for problem in found))
    return profile
