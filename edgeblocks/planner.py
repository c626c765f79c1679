"""From a budget to a plan: how many blocks, which micro-batch, what stays in memory, how long a visit lasts.

Plain arithmetic on `LayerCosts` and `Machine`; no torch. Quality comes first: the smallest number of blocks, at least
the family's preferred one, that fits. Within it, the plan that takes least time.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.layer_costs import LayerCosts, at_samples, heap_bytes_at
from edgeblocks.noise import NoisePartition
from edgeblocks.units import format_bytes

FEWEST_GOOD_LAYERS = 4
STREAMING_SHARE = 0.02
"""Loading and storing may take this share of a visit."""
USUAL_VISIT_S = 300.0
"""A visit is the most that a power cut can undo; shorter ones write more to the disk."""
FEWEST_ROUNDS = 4
UPDATE_S_PER_PARAMETER = 4e-9
"""Clipping, 8-bit AdamW and EMA, measured on two cores."""
GAPS_SHARE = {"plain": 0.28, "checkpointed": 0.85, "forward": 0.3}
"""Memory that the allocator keeps beyond live tensors, measured (tests/bench/predicted_peak.py): as a share of those on
the heap; with checkpointing, which takes and frees in another order and peaks at another time, as a share of all."""
SLACK_BYTES = 22_000_000
"""Code pages and library scratch touched after the runtime was measured."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What planning needs to know of a machine. Speeds are measured, see `targets`."""

    name: str
    runtime_bytes: int
    flops_per_s: float
    memory_bytes_per_s: float
    operator_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user fixed; None leaves the choice to the planner."""

    budget_bytes: int
    batch: int
    steps: int
    optimizer: Literal["adamw8bit", "adamw"]
    preferred_blocks: int
    blocks: int | None = None
    micro_batch: int | None = None
    checkpointing: bool | None = None
    visit_steps: int | None = None
    tier: Literal["ram", "disk"] | None = None
    data_bytes: int = 0
    """Resident bytes of the data set, beyond the batches."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train: sizes, predicted peak with its parts, predicted times."""

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
    bytes_written: int
    fits: bool

    @property
    def predicted_peak_bytes(self) -> int:
        return sum(self.breakdown.values())

    @property
    def tier(self) -> str:
        return "ram" if self.slots >= self.blocks else "disk"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tier": self.tier, "predicted_peak_bytes": self.predicted_peak_bytes}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the planner decided, and what it decided against."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    layers: tuple[int, ...]
    """Number of layers of each block, from high noise to low noise."""
    budget_bytes: int
    parameters: int
    optimizer: str
    machine: Machine
    warnings: tuple[str, ...] = field(default=())

    def to_json(self, partition: NoisePartition) -> dict[str, Any]:
        """The content of plan.json."""
        chosen = self.chosen
        return {
            "blocks": chosen.blocks,
            "layers_per_block": list(self.layers),
            "noise_ranges": [asdict(noise_range) for noise_range in partition.ranges],
            "micro_batch": chosen.micro_batch,
            "accumulation": chosen.accumulation,
            "checkpointing": chosen.checkpointing,
            "optimizer": self.optimizer,
            "precision": "fp32",
            "tiers": {"device": chosen.slots, "ram": 0, "disk": max(0, chosen.blocks - chosen.slots)},
            "slots": chosen.slots,
            "visit_steps": chosen.visit_steps,
            "budget_bytes": self.budget_bytes,
            "parameters": self.parameters,
            "predicted_peak_bytes": chosen.predicted_peak_bytes,
            "predicted_step_s": chosen.step_s,
            "breakdown": chosen.breakdown,
            "machine": asdict(self.machine),
            "warnings": list(self.warnings),
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }


def split_layers(num_layers: int, blocks: int) -> tuple[int, ...]:
    """Layers of each block: consecutive, as even as possible, the larger ones first.

    >>> split_layers(12, 3), split_layers(14, 4)
    ((4, 4, 4), (4, 4, 3, 3))
    """
    size, extra = divmod(num_layers, blocks)
    return tuple(size + (block < extra) for block in range(blocks))


def micro_batches(batch: int) -> tuple[int, ...]:
    """Micro-batches worth trying, largest first: the batch over 1, 2, 4, .. accumulated steps.

    >>> micro_batches(50)
    (50, 25, 13, 7, 4, 2, 1)
    """
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(math.ceil(batch / 2 ** len(sizes)))
    return tuple(sizes)


def make_plan(costs: LayerCosts, machine: Machine, wishes: Wishes) -> Plan:
    """The plan for a budget.

    Raises:
        ConfigError: the user fixed something impossible.
        DoesNotFitError: nothing fits; it carries the smallest budget that would work.
    """
    if wishes.blocks is not None and not 1 <= wishes.blocks <= costs.num_layers:
        raise ConfigError(
            f"--blocks {wishes.blocks} is impossible: the network has {costs.num_layers} layers and a block needs at "
            f"least one; use 1 to {costs.num_layers}"
        )
    rows = []
    for blocks in _block_counts(costs.num_layers, wishes):
        options = _options(costs, machine, wishes, blocks)
        fitting = [option for option in options if option.fits]
        if fitting:
            # Streaming is part of the time; the largest micro-batch wins where times are equal.
            rows.append(min(fitting, key=lambda option: (option.step_s + option.streaming_s, -option.micro_batch)))
        else:
            rows.append(min(options, key=lambda option: option.predicted_peak_bytes))
    chosen = next((row for row in rows if row.fits), None)
    if chosen is None:
        raise _does_not_fit(costs, machine, wishes, rows)
    layers = split_layers(costs.num_layers, chosen.blocks)
    return Plan(
        chosen=chosen,
        candidates=tuple(rows),
        layers=layers,
        budget_bytes=wishes.budget_bytes,
        parameters=sum(costs.parameters(count) for count in layers),
        optimizer=wishes.optimizer,
        machine=machine,
        warnings=_warnings(costs.num_layers, chosen, wishes),
    )


def _block_counts(num_layers: int, wishes: Wishes) -> list[int]:
    """Numbers of blocks worth comparing: the forced one, or the smallest for each size of the largest block."""
    if wishes.blocks is not None:
        return [wishes.blocks]
    start = min(wishes.preferred_blocks, num_layers)
    counts: dict[int, int] = {}
    for blocks in range(start, num_layers + 1):
        counts.setdefault(math.ceil(num_layers / blocks), blocks)
    return list(counts.values())


def _options(costs: LayerCosts, machine: Machine, wishes: Wishes, blocks: int) -> list[Candidate]:
    sizes = micro_batches(wishes.batch) if wishes.micro_batch is None else (min(wishes.micro_batch, wishes.batch),)
    checkpointing = (False, True) if wishes.checkpointing is None else (wishes.checkpointing,)
    all_slots = {"ram": [blocks], "disk": [2, 1], None: [blocks, 2, 1]}[wishes.tier]
    slots = sorted({min(count, blocks) for count in all_slots}, reverse=True)
    return [
        _candidate(costs, machine, wishes, blocks, micro_batch, keep, count)
        for micro_batch in sizes
        for keep in checkpointing
        for count in slots
    ]


def _candidate(
    costs: LayerCosts, machine: Machine, wishes: Wishes, blocks: int, micro_batch: int, checkpointing: bool, slots: int
) -> Candidate:
    num_layers = math.ceil(costs.num_layers / blocks)
    parameters = costs.parameters(num_layers)
    moments = costs.moment_bytes(num_layers, wishes.optimizer)
    block_bytes = 8 * parameters + moments
    accumulation = math.ceil(wishes.batch / micro_batch)
    traces = costs.checkpointed if checkpointing else costs.plain
    breakdown = {
        "runtime": machine.runtime_bytes,
        "weights": 4 * parameters * slots,
        "gradients": 4 * parameters,
        "optimizer": moments * slots + costs.workspace_bytes[wishes.optimizer],
        "ema": 4 * parameters * slots,
        "activations": at_samples(traces, micro_batch, lambda cost: cost.peak_bytes.at(num_layers)),
        "data": wishes.data_bytes + 3 * wishes.batch * costs.batch_bytes_per_sample,
    }
    if checkpointing:
        gaps = GAPS_SHARE["checkpointed"] * breakdown["activations"]
    else:
        gaps = GAPS_SHARE["plain"] * heap_bytes_at(traces, micro_batch, num_layers)
    breakdown["slack"] = int(gaps) + SLACK_BYTES
    step_s = predicted_step_s(costs, machine, num_layers, wishes.batch, micro_batch, checkpointing)
    load_s = block_bytes / machine.disk_read_bytes_per_s if slots < blocks else 0.0
    store_s = block_bytes / machine.disk_write_bytes_per_s
    visit_steps = wishes.visit_steps or _visit_steps(wishes.steps, step_s, load_s + store_s)
    rounds = math.ceil(wishes.steps / visit_steps)
    hidden = 0.25 if slots > 1 else 1.0  # beside compute, streaming still takes a share of the processor
    return Candidate(
        blocks=blocks,
        layers_per_block=num_layers,
        micro_batch=micro_batch,
        accumulation=accumulation,
        checkpointing=checkpointing,
        slots=slots,
        visit_steps=visit_steps,
        breakdown=breakdown,
        step_s=step_s,
        streaming_s=hidden * (load_s + store_s) / visit_steps,
        block_bytes=block_bytes,
        bytes_written=blocks * block_bytes * (rounds + 1),
        fits=sum(breakdown.values()) <= wishes.budget_bytes,
    )


def predicted_step_s(
    costs: LayerCosts, machine: Machine, num_layers: int, batch: int, micro_batch: int, checkpointing: bool
) -> float:
    """Seconds of one optimizer step of a block: arithmetic, memory traffic and kernel starts.

    A backward pass costs twice a forward pass; activation checkpointing adds one more forward pass through the layers.
    A kernel reads about twice what it writes; clipping, optimizer and EMA pass over the parameters. No speed is known
    better than to a factor of 1.5 on a machine that others use too.
    """
    traces = costs.checkpointed if checkpointing else costs.plain
    flops = 3 * costs.forward_flops_per_sample(num_layers)
    flops += num_layers * costs.layer_flops_per_sample if checkpointing else 0
    accumulation = math.ceil(batch / micro_batch)
    touched = accumulation * at_samples(traces, micro_batch, lambda cost: cost.touched_bytes.at(num_layers))
    operators = accumulation * at_samples(traces, micro_batch, lambda cost: cost.operators.at(num_layers))
    arithmetic_s = batch * flops / machine.flops_per_s
    traffic_s = 3 * touched / machine.memory_bytes_per_s
    update_s = costs.parameters(num_layers) * UPDATE_S_PER_PARAMETER
    return arithmetic_s + traffic_s + operators * machine.operator_s + update_s


def _visit_steps(steps: int, step_s: float, streaming_s: float) -> int:
    """Long enough that streaming stays below its share; else some minutes, but several rounds over all blocks."""
    needed = math.ceil(streaming_s / (STREAMING_SHARE * step_s))
    pleasant = min(math.ceil(USUAL_VISIT_S / step_s), math.ceil(steps / FEWEST_ROUNDS))
    return max(1, min(max(needed, pleasant), steps))


def _warnings(num_layers: int, chosen: Candidate, wishes: Wishes) -> tuple[str, ...]:
    found = []
    if chosen.layers_per_block < min(FEWEST_GOOD_LAYERS, num_layers):
        found.append(
            f"{chosen.layers_per_block} layer(s) a block: fewer than {FEWEST_GOOD_LAYERS} cost quality, because a "
            f"block denoises alone with the layers it has (ImageNet FID in the paper: 3 blocks 11.1, 6 blocks 14.4). "
            f"A larger --mem-budget or a smaller width gives deeper blocks"
        )
    if wishes.blocks is None and chosen.blocks > wishes.preferred_blocks:
        found.append(f"{chosen.blocks} blocks instead of the preferred {wishes.preferred_blocks}: fewer do not fit")
    return tuple(found)


def _does_not_fit(costs: LayerCosts, machine: Machine, wishes: Wishes, rows: Sequence[Candidate]) -> DoesNotFitError:
    free = replace(wishes, micro_batch=None, checkpointing=None, tier=None, blocks=None)
    counts = _block_counts(costs.num_layers, free)
    smallest = min(
        (option for blocks in counts for option in _options(costs, machine, free, blocks)),
        key=lambda option: option.predicted_peak_bytes,
    )
    smallest_bytes = math.ceil(smallest.predicted_peak_bytes / 1e6) * 1_000_000
    forced = [
        f"--{name}" if name == "blocks" else f"{name}={getattr(wishes, name)}"
        for name in ("blocks", "micro_batch", "checkpointing", "tier")
        if getattr(wishes, name) is not None
    ]
    closest = min(rows, key=lambda row: row.predicted_peak_bytes)
    largest_item = max(closest.breakdown, key=lambda item: closest.breakdown[item])
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in closest.breakdown.items())
    advice = f"use --mem-budget {math.ceil(closest.predicted_peak_bytes / 1e6)}MB or more"
    if largest_item == "runtime":
        advice += " (the interpreter and its libraries alone need most of it)"
    else:
        advice += ", or a smaller network (--set width=.., --set patch=.., --set image_size=..)"
    if forced:
        advice += f"; without {', '.join(forced)}, which you fixed, {smallest_bytes // 1_000_000}MB would do"
    return DoesNotFitError(
        f"no plan fits {format_bytes(wishes.budget_bytes)}: the smallest needs "
        f"{format_bytes(closest.predicted_peak_bytes)} ({parts}); {advice}",
        smallest_bytes,
        closest.predicted_peak_bytes,
    )


def inference_micro_batch(
    costs: LayerCosts, machine: Machine, *, layers: Sequence[int], samples: int, budget_bytes: int, held_bytes: int
) -> int:
    """The largest micro-batch for running the EMA weights of one block at a time inside a budget.

    Args:
        held_bytes: what the caller keeps beside the network (images, features).

    Raises:
        DoesNotFitError: one sample does not fit.
    """
    largest = max(layers)
    fixed = machine.runtime_bytes + 4 * costs.parameters(largest) + held_bytes + SLACK_BYTES
    for size in micro_batches(samples):
        peak = at_samples(costs.forward, size, lambda cost: cost.peak_bytes.at(largest))
        needed = fixed + peak + int(GAPS_SHARE["forward"] * heap_bytes_at(costs.forward, size, largest))
        if needed <= budget_bytes:
            return size
    smallest_bytes = math.ceil(needed / 1e6) * 1_000_000
    raise DoesNotFitError(
        f"the chain needs {format_bytes(needed)} even for one sample at a time, the budget is "
        f"{format_bytes(budget_bytes)}; use --mem-budget {smallest_bytes // 1_000_000}MB or more, or a smaller --n",
        smallest_bytes,
    )
