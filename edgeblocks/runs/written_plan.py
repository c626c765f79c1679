"""plan.json: one model, which writes it and reads it back.

`WrittenPlan` has every key. Four of them every use of a run needs, and `TrainablePlan` those that training needs beside
them; the others are only shown. What is only written where it applies (a host's memory, frozen stages, boundaries on
disk) is not in the file elsewhere. Keys of a later edgeblocks are kept as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from edgeblocks.diffusion.noise import NoiseRange
from edgeblocks.errors import RunError
from edgeblocks.files.checked import Checked
from edgeblocks.limits import MOST_LAYERS
from edgeblocks.planning.plans import Candidate, Machine, Plan, StepShape
from edgeblocks.runs.schema import AGAIN, Count, Layers, Samples, Seconds, Steps, Text, checked

Block = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
Blocks = Annotated[list[Block], Field(max_length=MOST_LAYERS)]
Breakdown = Annotated[dict[str, Count], Field(max_length=64)]
"""Bytes of each part of a predicted peak."""


class WrittenShape(Checked):
    """One of `shapes`: how a training step may be cut, see `StepShape`."""

    micro_batch: Samples
    checkpointing: bool
    step_bytes: Count


Shapes = Annotated[list[WrittenShape], Field(min_length=1, max_length=256)]


class WrittenCandidate(Checked):
    """One of `candidates`, see `Candidate`. An earlier edgeblocks wrote fewer keys."""

    blocks: Layers | None = None
    layers_per_block: Layers | None = None
    micro_batch: Samples | None = None
    accumulation: Samples | None = None
    checkpointing: bool | None = None
    slots: Layers | None = None
    visit_steps: Steps | None = None
    breakdown: Breakdown | None = None
    step_s: Seconds | None = None
    streaming_s: Seconds | None = None
    block_bytes: Count | None = None
    disk_bytes: Count | None = None
    bytes_written: Count | None = None
    fits: bool | None = None
    host_breakdown: Breakdown = Field(default_factory=dict)
    ram_blocks: Annotated[int, Field(ge=0, le=MOST_LAYERS)] = 0
    tier: Text | None = None
    predicted_peak_bytes: Count | None = None


class WrittenPlan(Checked):
    """plan.json, in the order of its keys."""

    model_config = ConfigDict(extra="allow")

    blocks: Layers | None = None
    layers_per_block: Annotated[list[Layers], Field(min_length=1, max_length=MOST_LAYERS)]
    noise_ranges: Annotated[list[dict[str, float]], Field(max_length=MOST_LAYERS)] = Field(default_factory=list)
    """Each block's, from high noise to low noise."""
    micro_batch: Samples
    accumulation: Samples | None = None
    checkpointing: bool | None = None
    optimizer: Text | None = None
    precision: Text | None = None
    master: Text | None = None
    method: Text | None = None
    trained_blocks: Blocks | None = None
    """None: all."""
    boundary_disk_bytes: Count = 0
    """Of the activations at the stage boundaries, which every step writes where they wait on disk."""
    tiers: Annotated[dict[str, Blocks], Field(max_length=3)] = Field(default_factory=dict)
    slots: Layers
    shapes: Shapes | None = None
    look_micro_batch: Samples | None = None
    """`Plan.preview_micro_batch`, under the name that files have had; None, in a plan of an earlier edgeblocks:
    `micro_batch`."""
    visit_steps: Steps | None = None
    budget_bytes: Annotated[int, Field(ge=1, le=2**63)]
    parameters: Count | None = None
    predicted_peak_bytes: Count | None = None
    predicted_step_s: Seconds | None = None
    predicted_step_range_s: Annotated[list[Seconds], Field(min_length=2, max_length=2)] | None = None
    """The shortest and the longest to expect; None in a plan of an earlier edgeblocks."""
    measured_step_s: Seconds | None = None
    """What the first steps took, without waiting for blocks; None before they are made."""
    breakdown: Breakdown | None = None
    ram_budget_bytes: Count | None = None
    """None where the device is the host, as in the next three."""
    predicted_host_peak_bytes: Count | None = None
    host_breakdown: Breakdown = Field(default_factory=dict)
    ram_blocks: Annotated[int, Field(ge=0, le=MOST_LAYERS)] = 0
    machine: dict[str, JsonValue] = Field(default_factory=dict)
    warnings: Annotated[list[Text], Field(max_length=100)] = Field(default_factory=list)
    candidates: Annotated[list[WrittenCandidate], Field(max_length=10_000)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        num_blocks = len(self.layers_per_block)
        if self.blocks is not None and self.blocks != num_blocks:
            raise ValueError(f"blocks={self.blocks}, but layers_per_block lists {num_blocks}")
        if self.slots > num_blocks:
            raise ValueError(f"slots={self.slots} are more than the {num_blocks} blocks")
        if self.ram_blocks > num_blocks:
            raise ValueError(f"ram_blocks={self.ram_blocks} are more than the {num_blocks} blocks")
        return self

    @property
    def is_beside_a_host(self) -> bool:
        """Whether it is for a device with its own memory."""
        return self.ram_budget_bytes is not None

    @property
    def chosen(self) -> WrittenCandidate | None:
        """The candidate that was planned with; None where the plan has none like it."""
        wanted = (len(self.layers_per_block), self.micro_batch, self.slots)
        found = [one for one in self.candidates if (one.blocks, one.micro_batch, one.slots) == wanted]
        return found[0] if found else None

    def to_json(self) -> dict[str, object]:
        """The content of the file: what was given or read, and no defaults."""
        # What a later edgeblocks wrote comes back as it was read, so that this one takes nothing out of the file.
        return self.model_dump(exclude_unset=True)


class TrainablePlan(WrittenPlan):
    """plan.json with what training needs: a plan that was written by hand may do for sampling and lack it."""

    shapes: Shapes
    visit_steps: Steps
    predicted_peak_bytes: Count
    breakdown: Breakdown

    @property
    def step_shapes(self) -> list[StepShape]:
        """The step that was chosen first, then what a run may fall back to."""
        return [StepShape(**shape.model_dump()) for shape in self.shapes]


def written_plan(plan: Plan, noise_ranges: Sequence[NoiseRange]) -> TrainablePlan:
    """A plan as plan.json has it. Where the device has a host, its share is there too."""
    chosen = plan.chosen
    beside: dict[str, Any] = {}
    if plan.trained is not None:
        beside["trained_blocks"] = list(plan.trained)
    if plan.boundary_disk_bytes:
        beside["boundary_disk_bytes"] = plan.boundary_disk_bytes
    if plan.machine.host is not None:
        beside["ram_budget_bytes"] = plan.ram_budget_bytes
        beside["predicted_host_peak_bytes"] = chosen.predicted_host_peak_bytes
        beside["host_breakdown"] = chosen.host_breakdown
        beside["ram_blocks"] = chosen.ram_blocks
    return TrainablePlan(
        blocks=chosen.blocks,
        layers_per_block=list(plan.layers),
        noise_ranges=[asdict(noise_range) for noise_range in noise_ranges],
        micro_batch=chosen.micro_batch,
        accumulation=chosen.accumulation,
        checkpointing=chosen.checkpointing,
        optimizer=plan.optimizer,
        precision=plan.precision,
        master=plan.master,
        method=plan.method.name,
        tiers=chosen.tiers,
        slots=chosen.slots,
        shapes=[WrittenShape(**asdict(shape)) for shape in plan.shapes],
        look_micro_batch=plan.preview_micro_batch,
        visit_steps=chosen.visit_steps,
        budget_bytes=plan.budget_bytes,
        parameters=plan.parameters,
        predicted_peak_bytes=chosen.predicted_peak_bytes,
        predicted_step_s=chosen.step_s,
        predicted_step_range_s=list(plan.step_range_s),
        breakdown=chosen.breakdown,
        machine=_written_machine(plan.machine),
        warnings=list(plan.warnings),
        candidates=[_written_candidate(candidate) for candidate in plan.candidates],
        **beside,
    )


def _written_machine(machine: Machine) -> dict[str, JsonValue]:
    """Where the device has a host, that too."""
    content = asdict(machine)
    if machine.host is None:
        del content["host"]
    return content


def _written_candidate(candidate: Candidate) -> WrittenCandidate:
    content = asdict(candidate)
    if not candidate.host_breakdown:
        del content["host_breakdown"], content["ram_blocks"]
    return WrittenCandidate(**content, tier=candidate.tier, predicted_peak_bytes=candidate.predicted_peak_bytes)


def check_plan(path: Path, content: Mapping[str, object], *, num_layers: int) -> WrittenPlan:
    """The content of plan.json, its types and ranges checked.

    Args:
        num_layers: of the whole network.

    Raises:
        RunError: names the file and the values.
    """
    plan = checked(WrittenPlan, path, content)
    if sum(plan.layers_per_block) != num_layers:
        raise RunError(
            f"{path} is damaged: its blocks have {sum(plan.layers_per_block)} layers, the network {num_layers} "
            f"(config.yaml); {AGAIN}"
        )
    return plan
