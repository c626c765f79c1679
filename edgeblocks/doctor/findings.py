"""What `edgeblocks doctor` finds out, as values."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from edgeblocks.planning.plans import Machine

PATIENCE_S = 7 * 24 * 3600.0
"""A preset whose own number of steps takes longer is not called sensible."""
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """cores: logical ones of the machine; allowed: those this process may run on; quota: the container's, in cores,
    None without one. others_share: how busy the cores were before anything was measured, 0 to 1.
    """

    name: str
    cores: int
    physical_cores: int | None
    allowed_cores: int
    quota_cores: float | None
    load_1min: float | None
    others_share: float
    omp_num_threads: str | None
    """The environment variable OMP_NUM_THREADS."""

    @property
    def usable_cores(self) -> float:
        """What threads can really use at the same time."""
        return min(self.allowed_cores, self.quota_cores or math.inf)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """limit_bytes: a control group's limit below the machine's memory, None without one; limit_file: where it stands.
    data_limit_bytes, address_limit_bytes: `ulimit -d` and `ulimit -v`, None without one. available_bytes is within
    all control groups' limits.
    """

    total_bytes: int
    limit_bytes: int | None
    limit_file: str | None
    available_bytes: int
    swap_total_bytes: int
    swap_used_bytes: int
    data_limit_bytes: int | None
    address_limit_bytes: int | None

    @property
    def usable_bytes(self) -> int:
        """The real size of the memory: the machine's, or what its container or `ulimit -d` leaves of it."""
        limits = (self.total_bytes, self.limit_bytes, self.data_limit_bytes)
        return min(limit for limit in limits if limit is not None)


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The work directory's disk. Speeds are past this system's page cache and None where they could not be measured
    (`reason`). file_limit_bytes: `ulimit -f`, None without one. sync_s: until 4 KiB are safe.
    """

    folder: str
    mount_point: str
    file_system: str
    total_bytes: int
    free_bytes: int
    file_limit_bytes: int | None
    probe_bytes: int
    write_bytes_per_s: float | None
    read_bytes_per_s: float | None
    read_way: str | None
    sync_s: float | None
    reason: str | None

    @property
    def is_memory(self) -> bool:
        return self.file_system in MEMORY_FILE_SYSTEMS


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that torch can use; speeds of its link with pinned host memory, None when its memory is full."""

    name: str
    total_bytes: int
    free_bytes: int
    to_gpu_bytes_per_s: float | None
    from_gpu_bytes_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that was run here and compared with an exact one.

    works: None when that could not be found out. time_s: of one call; fp32_time_s: of the fp32 kernel on the same
    numbers, None where it is one itself. error: relative (Frobenius norm), at most `tolerance` when it works.
    """

    name: str
    what: str
    works: bool | None
    time_s: float | None = None
    fp32_time_s: float | None = None
    error: float | None = None
    tolerance: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingUse:
    """What a training on a device would use.

    precision: that `--precision auto` takes; None: it depends on the network. adamw8bit: what makes the 8-bit step,
    with the reason where a library could and does not. attention: the kernel that torch takes in that precision.
    half_product_gain: how many times as fast products are in half precision; None on a processor, where it is a kernel
    of its own (`torch_bf16_matmul`).
    """

    target: str
    precision: str | None
    reason: str
    adamw8bit: str
    adamw8bit_reason: str | None
    attention: str
    attention_with_mask: str
    half_product_gain: float | None = None


@dataclass(frozen=True, kw_only=True)
class PresetFit:
    """How a preset at its own settings would train on this machine in half of its memory.

    fits, sensible: None when it could not be found out (`reason`). A sensible one fits memory and disk and finishes its
    own steps within `PATIENCE_S`. From `blocks` on the fields are None when it does not fit. step_s: of one block.
    """

    preset: str
    example: str | None = None
    parameters: int | None = None
    smallest_bytes: int | None = None
    budget_bytes: int
    fits: bool | None = None
    sensible: bool | None = None
    blocks: int | None = None
    layers_per_block: int | None = None
    micro_batch: int | None = None
    checkpointing: bool | None = None
    tier: str | None = None
    predicted_peak_bytes: int | None = None
    disk_bytes: int | None = None
    step_s: float | None = None
    steps: int | None = None
    total_s: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Values for `--mem-budget`: the least that trains any preset, half of the memory, and nearly all that is free."""

    smallest_bytes: int | None
    half_bytes: int
    largest_bytes: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong, with numbers, and the command that mends it."""

    problem: str
    cure: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings. gpus, training: None when it could not be found out; machine: the planner's speeds, None likewise.

    unknown: fields that could not be found out, with the reason.
    """

    system: str
    processor: Processor
    memory: Memory
    disk: Disk
    gpus: tuple[Gpu, ...] | None
    gpu_note: str | None
    machine: Machine | None
    versions: Mapping[str, str | None]
    training: tuple[TrainingUse, ...] | None
    kernels: tuple[Kernel, ...]
    presets: tuple[PresetFit, ...]
    budgets: Budgets
    problems: tuple[Problem, ...]
    unknown: Mapping[str, str]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain values.

        null is "no such limit", "not installed" or unknown. For what is unknown the reason stands beside it (`reason`)
        or in `unknown`.
        """
        return asdict(self)
