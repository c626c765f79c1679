"""What planning takes and gives, as values: a machine, the user's request, the candidates, the plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from edgeblocks.methods import (
    DIFFUSION,
    FROZEN_BYTES,
    BoundaryDtype,
    BoundaryTier,
    Clipping,
    Frozen,
    Master,
    Method,
    Precision,
)
from edgeblocks.planning.layer_costs import Ends, LayerCosts
from edgeblocks.planning.windows import layers_in_windows

DAY_S = 86_400.0
UPDATE_S_PER_PARAMETER = 8e-9
"""Clipping, 8-bit AdamW and EMA on two cores: 8 to 12 ns measured on a shared Xeon, 3 on an AMD Zen 5."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """The host's memory where a device has its own, and the link between the two."""

    runtime_bytes: int
    """Resident set of the process before any block."""
    memory_bytes: int
    link_bytes_per_s: float
    """Copies in one direction, from page-locked memory."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """By what the model of a step's time (`step_times`) is multiplied, and how far a real time may be from it.

    Found by running a part of the network here, or from a run that was made here; see `step_times`.
    """

    samples: float = 1.0
    """On what grows with the samples: arithmetic, and activations that are written and read."""
    passes: float = 1.0
    """On what a micro-batch of any size takes: starts of kernels, and reading the weights."""
    steps: float = 1.0
    """On all of a step."""
    least: float = 0.5
    most: float = 3.0
    """The shortest and the longest time to expect, as shares of the predicted one."""
    origin: Literal["model", "block", "run"] = "model"
    """What was run: nothing of this network, its smallest block, or whole steps."""
    waited: float = 0.0
    """The share of that time in which other programs had the processor, which makes the range wide."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What planning needs to know of a machine. Speeds are measured, or come from a profile, see `targets`."""

    name: str
    runtime_bytes: int
    flops_per_s: float
    memory_bytes_per_s: float
    operator_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    checksum_s_per_byte: float = 0.0
    """Of the SHA-256 of a block's file, which is hashed as it is written and after it was read; 0 where the disk's
    speeds allow for that, as a profile's do. Scratch files have no checksum."""
    planning_bytes: int = 0
    """What a run occupies at least: the peak of the child process that traced the costs, or of this one while it
    measured the machine."""
    planning_together_bytes: int = 0
    """Of the child process and this one at a time, code that both use counted once; 0 where nothing was traced."""
    update_s_per_parameter: float = UPDATE_S_PER_PARAMETER
    half_gain: float | None = None
    """How many times as fast as in float32 the network's smallest block is in half precision, where it computes so."""
    host: Host | None = None
    """None where the device's memory is the process's own."""
    correction: Correction = Correction()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """From `asdict` of a machine without a host, as JSON has it."""
        return cls(**{**fields, "correction": Correction(**fields["correction"])})

    def at_speeds_of(self, other: "Machine") -> "Machine":
        """The same with another measurement's speeds: those of one moment differ from those of the next."""
        host = self.host
        if host is not None and other.host is not None:
            host = replace(host, link_bytes_per_s=other.host.link_bytes_per_s)
        return replace(
            self,
            flops_per_s=other.flops_per_s,
            memory_bytes_per_s=other.memory_bytes_per_s,
            operator_s=other.operator_s,
            disk_read_bytes_per_s=other.disk_read_bytes_per_s,
            disk_write_bytes_per_s=other.disk_write_bytes_per_s,
            checksum_s_per_byte=other.checksum_s_per_byte,
            update_s_per_parameter=other.update_s_per_parameter,
            host=host,
            correction=other.correction,
        )


FEWEST_GOOD_LAYERS = 4
"""Of a block: with fewer quality suffered where it was measured, on images."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What the user fixed; None leaves the choice to the planner."""

    budget_bytes: int
    batch: int
    steps: int
    optimizer: Literal["adamw8bit", "adamw"]
    preferred_blocks: int
    method: Method = DIFFUSION
    blocks: int | None = None
    window: int | None = None
    """Layers of a window of a network that grows; None: as many as the budget holds."""
    good_layers: int = FEWEST_GOOD_LAYERS
    """Of a block, below which a plan warns of its quality: no more than the family has in its usual cut."""
    shared: bool | None = False
    """Whether blocks begin as one: they are of equal depth then, and its file is on disk beside theirs. None: where
    that does not make them much smaller."""
    trained: tuple[int, ...] | None = None
    """Numbers of the stages that are trained end to end, the others being frozen; None: all."""
    clip_by: Clipping = "stage"
    boundaries: BoundaryTier | None = None
    """None: in memory where that fits."""
    boundary_dtype: BoundaryDtype = "float32"
    precision: Precision = "fp32"
    """In which the costs were traced, and the network computes."""
    master: Master = "fp32"
    """In which weights and EMA are kept."""
    keeps_ema: bool = True
    """Whether there is an average of the weights beside them."""
    grow: Literal["auto", "equal"] = "equal"
    """When a network that grows does: when its loss has flattened, or after equal shares of the steps."""
    frozen: Frozen = "none"
    """As what frozen parts below a window are in memory."""
    micro_batch: int | None = None
    checkpointing: bool | None = None
    visit_steps: int | None = None
    tier: Literal["ram", "disk"] | None = None
    resident_bytes: int = 0
    """Of what the network keeps in memory beside its parameters, such as one frozen layer at a time."""
    tied_bytes: int = 0
    """Of a parameter of the readout that is equal to one of the stem."""
    gap_bytes: int = 0
    """That the allocator keeps in a step beyond the share that is counted."""
    data_bytes: int = 0
    """Resident bytes of the data set, beyond the batches."""
    grid_samples: int = 0
    """Samples that are made together during training."""
    sample_bytes: int = 0
    """What one that is written token by token keeps: its KV cache."""
    decoding_bytes: int = 0
    """What makes pictures of samples that are latents, for as many as are made during training."""
    quality_bytes: int = 0
    """What measuring the quality during training keeps beside the network."""
    previews: int = 0
    """Previews and evaluations during training; blocks are saved before each."""
    max_disk_writes: int | None = None
    """Bytes that the run may write to disk."""
    ram_budget_bytes: int | None = None
    """Bound of the host's memory; None leaves all of it. Only for a machine with a host."""


def stages_with_ends(layers: Sequence[int]) -> list[tuple[int, Ends]]:
    """Stages of one network by their layers and what they have beside: of those between the first and the last one,
    which have neither stem nor readout, the largest alone.

    >>> stages_with_ends((3, 2, 2, 1)), stages_with_ends((4,))
    ([(3, 'first'), (2, 'middle'), (1, 'last')], [(4, 'whole')])
    """
    if len(layers) == 1:
        return [(layers[0], "whole")]
    between: list[tuple[int, Ends]] = [(max(layers[1:-1]), "middle")] if len(layers) > 2 else []
    return [(layers[0], "first"), *between, (layers[-1], "last")]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A network that is cut into blocks or stages, and how a step of it is made on a machine: one way to train, before
    its memory and time are known. `slots` blocks are on the device at a time."""

    costs: LayerCosts
    machine: Machine
    request: PlanRequest
    layers: tuple[int, ...]
    """Of each block, stage or part."""
    micro_batch: int
    checkpointing: bool
    slots: int

    @property
    def blocks(self) -> int:
        return len(self.layers)

    @property
    def num_layers(self) -> int:
        """Of the largest block."""
        return max(self.layers)

    @property
    def frozen_slots(self) -> int:
        """Of a network that grows, the slots that frozen parts take turns in, beside the one of the window."""
        return self.slots - 1 if self.request.method.grows else 0

    @property
    def frozen_parameters(self) -> int:
        """Of the largest frozen part below a window."""
        if not self.request.method.grows or self.blocks == 1:
            return 0
        return max(self.costs.parameters(count, ends) for count, ends in stages_with_ends(self.layers)[:-1])

    @property
    def frozen_bytes(self) -> int:
        """Of its weights, as they are in memory while they wait."""
        if self.request.frozen != "none":
            return int(FROZEN_BYTES[self.request.frozen] * self.frozen_parameters)
        return (2 if self.is_rounded else 4) * self.frozen_parameters

    @property
    def frozen_file_bytes(self) -> int:
        """Of its files: weights and EMA, and what is in memory where that is another file."""
        files = (1 + self.request.keeps_ema) * (2 if self.is_rounded else 4) * self.frozen_parameters
        return files + (self.frozen_bytes if self.request.frozen != "none" else 0)

    @property
    def _trained_parts(self) -> list[tuple[int, Ends]]:
        """Layers of those parts that may be the largest, and what they have beside."""
        if self.request.method.trained_together and not self.request.method.grows:
            return stages_with_ends(self.layers)
        return [(self.num_layers, "whole")]  # also of a window, whose first one is a network of its own

    @property
    def parameters(self) -> int:
        """Of the largest block."""
        return max(self.costs.parameters(count, ends) for count, ends in self._trained_parts)

    @property
    def moment_bytes(self) -> int:
        """Of the largest block's optimizer state."""
        return max(self.costs.moment_bytes(count, self.request.optimizer, ends) for count, ends in self._trained_parts)

    @property
    def is_rounded(self) -> bool:
        """Whether weights and EMA are bfloat16."""
        return self.request.master == "bf16"

    @property
    def weights_bytes(self) -> int:
        """Of the largest block's weights as they are kept."""
        return (2 if self.is_rounded else 4) * self.parameters

    @property
    def ema_bytes(self) -> int:
        """Of the average of them, where one is kept."""
        return self.weights_bytes if self.request.keeps_ema else 0

    @property
    def block_bytes(self) -> int:
        """Of the largest block: weights, their average, optimizer state."""
        return self.weights_bytes + self.ema_bytes + self.moment_bytes


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How a training step is cut, and the bytes it takes for a moment: batch, activations, the allocator's gaps."""

    micro_batch: int
    checkpointing: bool
    step_bytes: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train: sizes, predicted peak with its parts, predicted times.

    `breakdown` is of the device's memory, `host_breakdown` of the host's; `ram_blocks` counts the blocks, from the
    first one on, that wait for their visits in the host's memory. Where the device is the host they are empty and 0.
    """

    blocks: int
    layers_per_block: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    slots: int
    visit_steps: int
    breakdown: dict[str, int]
    step_s: float
    streaming_s: float
    block_bytes: int
    disk_bytes: int
    """The files of all blocks, wherever these live, and the copies that exist while some are written."""
    bytes_written: int
    fits: bool
    host_breakdown: dict[str, int] = field(default_factory=dict)
    ram_blocks: int = 0

    @property
    def predicted_peak_bytes(self) -> int:
        return sum(self.breakdown.values())

    @property
    def predicted_host_peak_bytes(self) -> int:
        return sum(self.host_breakdown.values())

    @property
    def tiers(self) -> dict[str, list[int]]:
        return tiers(self.blocks, self.slots, ram_blocks=self.ram_blocks if self.host_breakdown else None)

    @property
    def tier(self) -> str:
        """The slowest place that a block is loaded from."""
        if self.slots >= self.blocks:
            return "device" if self.host_breakdown else "ram"
        return "ram" if self.ram_blocks >= self.blocks else "disk"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the planner decided, and what it decided against."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    layers: tuple[int, ...]
    """Number of layers of each block, from high noise to low noise."""
    shapes: tuple[StepShape, ...]
    """The chosen step first, then what a run may fall back to while it is running, each smaller than the one before."""
    preview_micro_batch: int
    """Samples that go through the network together when it is evaluated or sampled."""
    steps: int
    budget_bytes: int
    parameters: int
    optimizer: str
    machine: Machine
    precision: Precision = "fp32"
    master: Master = "fp32"
    method: Method = DIFFUSION
    begins_as_one: bool = False
    """Whether the blocks are copies of one denoiser that is trained before them."""
    trained: tuple[int, ...] | None = None
    """Stages that are trained, where others are frozen."""
    boundary_disk_bytes: int = 0
    """Of the activations at the stage boundaries, which every step writes to disk; 0 where they stay in memory."""
    warnings: tuple[str, ...] = field(default=())
    ram_budget_bytes: int | None = None
    """None where the device is the host."""

    @property
    def computing_s(self) -> float:
        """Of all steps, those of each block or those of the whole network."""
        return self.method.trained_apart(self.chosen.blocks) * self.steps * self.chosen.step_s

    @property
    def predicted_s(self) -> float:
        """Of all steps, with loading and storing."""
        return self.computing_s / (1 - self.stall_share)

    @property
    def stall_share(self) -> float:
        """The part of the time that loading and storing are expected to take."""
        return self.chosen.streaming_s / (self.chosen.step_s + self.chosen.streaming_s)

    @property
    def step_range_s(self) -> tuple[float, float]:
        """The shortest and the longest time to expect of a step's computing."""
        correction = self.machine.correction
        return correction.least * self.chosen.step_s, correction.most * self.chosen.step_s

    @property
    def written_a_day_bytes(self) -> float:
        """Bytes written to disk in 24 hours of training, or in all where the run ends sooner."""
        return self.chosen.bytes_written / max(1.0, self.predicted_s / DAY_S)


def split_layers(num_layers: int, blocks: int) -> tuple[int, ...]:
    """Layers of each block: consecutive, as even as possible, the larger ones first.

    >>> split_layers(12, 3), split_layers(14, 4)
    ((4, 4, 4), (4, 4, 3, 3))
    """
    size, extra = divmod(num_layers, blocks)
    return tuple(size + (block < extra) for block in range(blocks))


def cut_like(chosen: Candidate, num_layers: int, method: Method) -> tuple[int, ...]:
    """Layers of each part of a network of `num_layers`, cut as in a candidate of a plan for it."""
    if method.grows:
        return layers_in_windows(num_layers, chosen.layers_per_block)
    return split_layers(num_layers, chosen.blocks)


def shared_steps(share: float, *, steps: int, blocks: int) -> int:
    """Of each block's steps, those that one denoiser makes for all of them, where blocks begin as one.

    >>> shared_steps(0.8, steps=1000, blocks=3), shared_steps(0.8, steps=1000, blocks=1)
    (800, 0)
    """
    return 0 if blocks == 1 or not share else min(math.ceil(share * steps), steps - 1)


def trained_stages(trained: Sequence[int] | None, stages: int) -> tuple[bool, ...]:
    """Of each stage whether it is trained, given their numbers or None for all.

    >>> trained_stages((2, 3), 4), trained_stages(None, 2)
    ((False, False, True, True), (True, True))
    """
    return tuple(trained is None or stage in trained for stage in range(stages))


def kept_blocks(blocks: int, slots: int) -> int:
    """How many blocks, from the first one on, stay in memory; the others share the last two slots.

    >>> [kept_blocks(8, slots) for slots in (1, 2, 3, 5, 8)]
    [0, 0, 1, 3, 8]
    """
    # One of the two for the block that is trained, one for that on its way.
    return blocks if slots >= blocks else max(0, slots - 2)


def streaming_share(slots: int) -> float:
    """The part of moving that is waited for: even behind the computing it takes a share of the processor."""
    # With one slot the next block is loaded into the memory that the former one has just left: nothing hides it.
    return 0.25 if slots > 1 else 1.0


def tiers(blocks: int, slots: int, *, ram_blocks: int | None = None) -> dict[str, list[int]]:
    """Which blocks live where: kept in memory, or on disk between their visits.

    Args:
        ram_blocks: blocks that live in the memory of the device's host; None where the device is the host.

    >>> tiers(4, 3), tiers(4, 2, ram_blocks=3)
    ({'ram': [0], 'disk': [1, 2, 3]}, {'device': [], 'ram': [0, 1, 2], 'disk': [3]})
    """
    if ram_blocks is None:
        kept = kept_blocks(blocks, slots)
        return {"ram": list(range(kept)), "disk": list(range(kept, blocks))}
    on_device = blocks if slots >= blocks else 0
    in_memory = max(on_device, ram_blocks)
    return {
        "device": list(range(on_device)),
        "ram": list(range(on_device, in_memory)),
        "disk": list(range(in_memory, blocks)),
    }


def micro_batches(batch: int) -> tuple[int, ...]:
    """Micro-batches worth trying, largest first: the batch over 1, 2, 4, .. accumulated steps.

    >>> micro_batches(50)
    (50, 25, 13, 7, 4, 2, 1)
    """
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(math.ceil(batch / 2 ** len(sizes)))
    return tuple(sizes)
