"""From a budget to a plan: how many blocks, which micro-batch, what stays in memory, how long a visit lasts.

Plain arithmetic on `LayerCosts` and `Machine`; no torch. Quality comes first: the smallest number of blocks, at least
the family's preferred one, that fits. Within it, the plan that takes least time.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.footprint import (
    SLACK_BYTES,
    SLACK_SHARE,
    batch_bytes,
    device_memory,
    forward_bytes,
    host_budget_bytes,
    host_memory,
    look_bytes,
    step_memory,
)
from edgeblocks.layer_costs import LayerCosts
from edgeblocks.pace import pace_of_blocks, pace_of_stages
from edgeblocks.plans import (
    Candidate,
    Machine,
    Plan,
    StepShape,
    Wishes,
    micro_batches,
    split_layers,
)
from edgeblocks.step_times import boundary_disk_bytes
from edgeblocks.units import advised_budget, format_bytes

FEWEST_GOOD_LAYERS = 4
ABOUT_AS_FAST = 1.1
"""Of two ways to train end to end, one that takes so many times as long is still preferred where it writes less."""
MUCH_FASTER = 0.75
"""The share of the time of the preferred blocks from which on the plan names a cut into more of them."""
TOLD_STALL = 0.25
"""Waiting for stages, as a share of the computation, from which on the plan says what hides it."""


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
    assert machine.host is not None or wishes.ram_budget_bytes is None, "a RAM budget needs a machine with a host"
    if wishes.method == "exact" and wishes.boundaries is None:
        with contextlib.suppress(DoesNotFitError):
            return make_plan(costs, machine, replace(wishes, boundaries="ram"))
        wishes = replace(wishes, boundaries="disk")
    cut_by_budget, wishes = wishes.blocks is None, _with_a_cut(costs, machine, wishes)
    rows = []
    for blocks in _block_counts(costs.num_layers, wishes):
        options = _options(costs, machine, wishes, blocks)
        fitting = [option for option in options if option.fits]
        if fitting:
            rows.append(_best(fitting, wishes))
        else:
            rows.append(min(options, key=lambda option: option.predicted_peak_bytes))
    fitting_rows = [row for row in rows if row.fits]
    if not fitting_rows:
        raise _does_not_fit(costs, machine, wishes)
    chosen = _best(fitting_rows, wishes) if wishes.method == "exact" else fitting_rows[0]
    layers = split_layers(costs.num_layers, chosen.blocks)
    return Plan(
        chosen=chosen,
        candidates=tuple(rows),
        layers=layers,
        shapes=_shapes(costs, machine, wishes, chosen),
        look_micro_batch=_look_micro_batch(costs, machine, wishes, chosen),
        steps=wishes.steps,
        budget_bytes=wishes.budget_bytes,
        parameters=_parameters(costs, wishes, layers),
        optimizer=wishes.optimizer,
        machine=machine,
        method=wishes.method,
        trained=wishes.trained,
        boundary_disk_bytes=boundary_disk_bytes(costs, wishes, chosen.blocks),
        warnings=_warnings(costs, machine, wishes, chosen, cut_by_budget=cut_by_budget)
        + _much_faster_cuts(fitting_rows, chosen, wishes),
        ram_budget_bytes=None if machine.host is None else host_budget_bytes(machine, wishes),
    )


def _with_a_cut(costs: LayerCosts, machine: Machine, wishes: Wishes) -> Wishes:
    """The wishes, with the number of stages that numbers of trained ones are counted in.

    Where the user does not fix it, it is that of a plan that trains all of them: else the fastest plan would be the one
    that trains least.

    Raises:
        ConfigError: there are no stages of these numbers.
    """
    if wishes.trained is None:
        return wishes
    whole = wishes.blocks or make_plan(costs, machine, replace(wishes, trained=None)).chosen.blocks
    wrong = [stage for stage in wishes.trained if stage >= whole]
    if wrong:
        there = "1 stage, stage 0" if whole == 1 else f"{whole} stages, 0 to {whole - 1}"
        raise ConfigError(
            f"--train-blocks {','.join(map(str, wishes.trained))}: the network is cut into {there}; name these, or cut "
            f"it into more with --blocks {max(wrong) + 1}"
        )
    return replace(wishes, blocks=whole)


def _best(options: Sequence[Candidate], wishes: Wishes) -> Candidate:
    """The one that takes least time, of which streaming is a part; the largest micro-batch where times are equal.

    A cut into stages changes no number, and moving stages wears the disk: among ways that are about as fast as the
    fastest, the one that writes least.
    """

    def time(option: Candidate) -> tuple[float, int]:
        return option.step_s + option.streaming_s, -option.micro_batch

    if wishes.method == "diffusion":
        return min(options, key=time)
    longest_s = ABOUT_AS_FAST * min(time(option)[0] for option in options)
    fast = [option for option in options if time(option)[0] <= longest_s]
    return min(fast, key=lambda option: (option.bytes_written, *time(option)))


def _parameters(costs: LayerCosts, wishes: Wishes, layers: Sequence[int]) -> int:
    """Of all blocks, each with a stem and a readout of its own; or of the one network that is cut into stages."""
    return sum(map(costs.parameters, layers)) if wishes.method == "diffusion" else costs.parameters(costs.num_layers)


def _block_counts(num_layers: int, wishes: Wishes) -> list[int]:
    """Numbers of blocks worth comparing: the forced one, or the smallest for each size of the largest block."""
    if wishes.blocks is not None:
        return [wishes.blocks]
    start = 1 if wishes.method == "exact" else min(wishes.preferred_blocks, num_layers)
    counts: dict[int, int] = {}
    for blocks in range(start, num_layers + 1):
        counts.setdefault(math.ceil(num_layers / blocks), blocks)
    return list(counts.values())


def _options(costs: LayerCosts, machine: Machine, wishes: Wishes, blocks: int) -> list[Candidate]:
    sizes = micro_batches(wishes.batch) if wishes.micro_batch is None else (min(wishes.micro_batch, wishes.batch),)
    checkpointing = (False, True) if wishes.checkpointing is None else (wishes.checkpointing,)
    return [
        _candidate(costs, machine, wishes, blocks, micro_batch, keep, count)
        for micro_batch in sizes
        for keep in checkpointing
        for count in _slot_counts(machine, wishes, blocks)
    ]


def _slot_counts(machine: Machine, wishes: Wishes, blocks: int) -> Sequence[int]:
    """Numbers of blocks on the device at once that are worth trying, largest first.

    Beside a host, blocks are kept in its memory rather than some of them on the device: all, two or one are tried.
    """
    if machine.host is not None:
        few = range(min(2, blocks), 0, -1)
        return few if wishes.tier == "disk" or blocks <= 2 else (blocks, *few)
    most, fewest = {"ram": (blocks, blocks), "disk": (min(2, blocks), 1), None: (blocks, 1)}[wishes.tier]
    return range(most, fewest - 1, -1)


def _candidate(
    costs: LayerCosts, machine: Machine, wishes: Wishes, blocks: int, micro_batch: int, checkpointing: bool, slots: int
) -> Candidate:
    num_layers = math.ceil(costs.num_layers / blocks)
    parameters = costs.parameters(num_layers)
    moments = costs.moment_bytes(num_layers, wishes.optimizer)
    block_bytes = 8 * parameters + moments
    accumulation = math.ceil(wishes.batch / micro_batch)
    breakdown = device_memory(
        costs,
        machine,
        wishes,
        num_layers,
        blocks=blocks,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        slots=slots,
    )
    host_breakdown, ram_blocks = host_memory(costs, machine, wishes, blocks, slots, block_bytes, micro_batch)
    pace = (pace_of_stages if wishes.method == "exact" else pace_of_blocks)(
        costs, machine, wishes, blocks, micro_batch, checkpointing, slots, ram_blocks, block_bytes
    )
    return Candidate(
        blocks=blocks,
        layers_per_block=num_layers,
        micro_batch=micro_batch,
        accumulation=accumulation,
        checkpointing=checkpointing,
        slots=slots,
        breakdown=breakdown,
        block_bytes=block_bytes,
        **asdict(pace),
        fits=sum(breakdown.values()) <= wishes.budget_bytes
        and sum(host_breakdown.values()) <= host_budget_bytes(machine, wishes),
        host_breakdown=host_breakdown,
        ram_blocks=ram_blocks,
    )


def _shapes(costs: LayerCosts, machine: Machine, wishes: Wishes, chosen: Candidate) -> tuple[StepShape, ...]:
    """The chosen step, then ever smaller ones: first the micro-batch is halved, then checkpointing comes on."""
    found: list[StepShape] = []
    drawn_bytes = batch_bytes(costs, wishes)
    for checkpointing in (False, True):
        for micro_batch in micro_batches(wishes.batch):
            if micro_batch > chosen.micro_batch or (chosen.checkpointing and not checkpointing):
                continue
            memory = step_memory(costs, machine, chosen.layers_per_block, micro_batch, checkpointing)
            step_bytes = drawn_bytes + sum(memory)
            if not found or step_bytes < found[-1].step_bytes:
                found.append(StepShape(micro_batch=micro_batch, checkpointing=checkpointing, step_bytes=step_bytes))
    return tuple(found)


def _look_micro_batch(costs: LayerCosts, machine: Machine, wishes: Wishes, chosen: Candidate) -> int:
    """Samples that go through the network together when it is looked at.

    Stages come from the disk for every micro-batch, so of them there should be few: as many samples as take no more
    memory than a training step. A block stays for all micro-batches, and there the step's own will do.
    """
    found = chosen.micro_batch
    if wishes.method == "diffusion":
        return found
    room = chosen.breakdown["activations"] + chosen.breakdown["evaluation"]
    for size in micro_batches(wishes.batch):
        if size > found and look_bytes(costs, machine, wishes, chosen.layers_per_block, size) <= room:
            return size
    return found


def _warnings(
    costs: LayerCosts, machine: Machine, wishes: Wishes, chosen: Candidate, *, cut_by_budget: bool
) -> tuple[str, ...]:
    found, num_layers, exact = [], costs.num_layers, wishes.method == "exact"
    holds_stages = "--mem-budget" if machine.host is None or chosen.tier == "ram" else "--mem-budget or --ram-budget"
    if not exact and chosen.layers_per_block < min(FEWEST_GOOD_LAYERS, num_layers):
        found.append(
            f"{chosen.layers_per_block} layer(s) a block: fewer than {FEWEST_GOOD_LAYERS} cost quality, because a "
            f"block denoises alone with the layers it has (ImageNet FID in the paper: 3 blocks 11.1, 6 blocks 14.4). "
            + (
                "A larger --mem-budget or a smaller width gives deeper blocks"
                if wishes.blocks is None and chosen.blocks > wishes.preferred_blocks
                else "More layers (--set depth=..) or fewer --blocks give deeper ones"
            )
        )
    if not exact and wishes.blocks is None and chosen.blocks > wishes.preferred_blocks:
        found.append(f"{chosen.blocks} blocks instead of the preferred {wishes.preferred_blocks}: fewer do not fit")
    if wishes.clip_by == "network":
        found.append(
            "clip_by=network: every step writes the gradients of all trained stages to disk and reads them, 4 bytes a "
            "parameter, because the norm of all is known at its end; clip_by=stage does not"
        )
    if wishes.boundaries == "disk" and chosen.blocks > 1:
        found.append(
            "what enters each stage waits on disk: it is written once and read twice in every step; a larger "
            "--mem-budget keeps it in memory, --set boundary_dtype=bfloat16 halves it"
        )
    if exact and chosen.slots < chosen.blocks and _stall(chosen) > TOLD_STALL:
        hiding = _hiding_batch(costs, machine, wishes, chosen)
        waited_for = "the disk" if chosen.tier == "disk" else "the link to the host"
        found.append(
            f"waiting for {waited_for} takes {_stall(chosen):.0%} of the time of computing with {wishes.batch} samples "
            f"a step; "
            + (f"--batch {hiding} hides most of it behind the computation, and " if hiding else "")
            + f"a {holds_stages} that holds more stages leaves less of it"
        )
    if wishes.trained is not None and cut_by_budget:
        found.append(
            f"--train-blocks counts the {chosen.blocks} stages that the budget chose, and another budget may cut the "
            f"network elsewhere; --blocks {chosen.blocks} fixes the cut"
        )
    if wishes.max_disk_writes is not None and chosen.bytes_written > wishes.max_disk_writes:
        swaps = exact and chosen.tier == "disk"
        larger = f"{holds_stages} that holds more stages" if swaps else "visit_steps"
        found.append(
            f"the run would write {format_bytes(chosen.bytes_written)} to disk and will end, saved, before it has "
            f"written {format_bytes(wishes.max_disk_writes)}, as --max-disk-writes asks; fewer --steps, or a larger "
            f"{larger}, write less"
        )
    return tuple(found)


def _much_faster_cuts(rows: Sequence[Candidate], chosen: Candidate, wishes: Wishes) -> tuple[str, ...]:
    """A word on the fewest blocks that save much time, where the chosen ones barely fit, and are deep enough."""
    if wishes.method == "exact" or wishes.blocks is not None:
        return ()
    deep = [row for row in rows if row.layers_per_block >= FEWEST_GOOD_LAYERS and row.blocks <= 2 * chosen.blocks]
    for row in deep:
        share = row.blocks * (row.step_s + row.streaming_s) / (chosen.blocks * (chosen.step_s + chosen.streaming_s))
        if share <= MUCH_FASTER:
            return (
                f"{row.blocks} blocks (--blocks {row.blocks}) would take {1 - share:.0%} less time: the layers of each "
                f"of {chosen.blocks} leave little memory for a batch. Fewer are preferred all the same, for quality",
            )
    return ()


def _stall(option: Candidate) -> float:
    """Seconds of waiting for each second of computing."""
    return option.streaming_s / option.step_s


def _hiding_batch(costs: LayerCosts, machine: Machine, wishes: Wishes, chosen: Candidate) -> int | None:
    """The batch, some doublings larger, that fits and hides most of the waiting; None: there is none."""
    for doublings in range(1, 10):
        batch = wishes.batch << doublings
        option = _candidate(
            costs,
            machine,
            replace(wishes, batch=batch),
            chosen.blocks,
            chosen.micro_batch,
            chosen.checkpointing,
            chosen.slots,
        )
        if option.fits and _stall(option) <= TOLD_STALL / 2:
            return batch
    return None


def _does_not_fit(costs: LayerCosts, machine: Machine, wishes: Wishes) -> DoesNotFitError:
    """The refusal: which of the two budgets is too small, for what, and which one would do."""
    free = replace(wishes, micro_batch=None, checkpointing=None, tier=None, blocks=None)
    options, free_options = (
        [
            option
            for blocks in _block_counts(costs.num_layers, asked)
            for option in _options(costs, machine, asked, blocks)
        ]
        for asked in (wishes, free)
    )
    forced = [
        f"--{name}" if name == "blocks" else f"{name}={getattr(wishes, name)}"
        for name in ("blocks", "micro_batch", "checkpointing", "tier")
        if getattr(wishes, name) is not None
    ]
    ram_budget_bytes = host_budget_bytes(machine, wishes)
    on_host, free_on_host = (
        [option for option in some if option.predicted_host_peak_bytes <= ram_budget_bytes]
        for some in (options, free_options)
    )
    if on_host:
        return _refusal(
            [option.breakdown for option in on_host],
            [option.breakdown for option in free_on_host],
            flag="--mem-budget",
            budget_bytes=wishes.budget_bytes,
            where="" if machine.host is None else " on the device",
            runtime="its context alone needs" if machine.host else "the interpreter and its libraries alone need",
            forced=forced,
        )
    # Of the options that fit the device, if any: what follows from the answer must not be the other refusal.
    on_device, free_on_device = (
        [option for option in some if option.predicted_peak_bytes <= wishes.budget_bytes]
        for some in (options, free_options)
    )
    device_bytes = min(option.predicted_peak_bytes for option in options)
    device_too = (
        f". The device's {format_bytes(wishes.budget_bytes)} are too little as well: --mem-budget "
        f"{advised_budget(device_bytes)} or more"
    )
    return _refusal(
        [option.host_breakdown for option in on_device or options],
        [option.host_breakdown for option in free_on_device or free_options],
        flag="--ram-budget",
        budget_bytes=ram_budget_bytes,
        where=" on the host",
        runtime="the interpreter and its libraries alone need",
        forced=forced,
        too="" if on_device else device_too,
    )


def _refusal(
    breakdowns: Sequence[dict[str, int]],
    free_breakdowns: Sequence[dict[str, int]],
    *,
    flag: str,
    budget_bytes: int,
    where: str,
    runtime: str,
    forced: Sequence[str],
    too: str = "",
) -> DoesNotFitError:
    """The smallest of the breakdowns against its budget.

    Args:
        free_breakdowns: what would be possible if the user had fixed nothing (`forced` is what is fixed).
        runtime: who needs the part `runtime`, in words.
        too: what else is wrong.
    """
    closest = min(breakdowns, key=lambda breakdown: sum(breakdown.values()))
    needed_bytes = sum(closest.values())
    smallest_bytes = math.ceil(min(sum(breakdown.values()) for breakdown in free_breakdowns) / 1e6) * 1_000_000
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in closest.items() if size)
    advice = f"use {flag} {advised_budget(needed_bytes)} or more"
    if closest["runtime"] > needed_bytes / 2:
        advice += f" ({runtime} {format_bytes(closest['runtime'])} of it)"
    else:
        advice += ", or a smaller network (--set width=.., --set patch=.., --set image_size=..)"
    if forced:
        advice += f"; without {', '.join(forced)}, which you fixed, {advised_budget(smallest_bytes)} would do"
    return DoesNotFitError(
        f"no plan fits {format_bytes(budget_bytes)}{where}: the smallest needs {format_bytes(needed_bytes)} ({parts}); "
        f"{advice}{too}",
        smallest_bytes,
        needed_bytes,
        flag,
    )


def inference_micro_batch(
    costs: LayerCosts,
    machine: Machine,
    *,
    layers: Sequence[int],
    samples: int,
    budget_bytes: int,
    held_bytes: int,
    ends_bytes: int = 0,
    sample_bytes: int = 0,
    residents: int = 1,
) -> int:
    """The largest micro-batch for running the EMA weights of blocks inside the device's budget.

    Args:
        held_bytes: what the caller keeps beside the network (images, features); in the host's memory if there is one.
        ends_bytes: of what is kept of a network whose stages come and go: its stem and readout.
        sample_bytes: as `held_bytes` for each sample of the micro-batch, as keys and values; a device has them for a
            moment.
        residents: blocks that are in memory at a time.

    Raises:
        DoesNotFitError: one sample does not fit.
    """
    largest = max(layers)
    fixed = machine.runtime_bytes + 4 * residents * costs.parameters(largest) + ends_bytes + SLACK_BYTES
    for size in micro_batches(samples):
        here = size * sample_bytes + (held_bytes if machine.host is None else size * costs.batch_bytes_per_sample)
        needed = fixed + here + forward_bytes(costs, machine, largest, size)
        needed += int(SLACK_SHARE * (needed - machine.runtime_bytes))
        if machine.host is None:
            needed = max(needed, machine.planning_bytes)
        if needed <= budget_bytes:
            return size
    smallest_bytes = math.ceil(needed / 1e6) * 1_000_000
    raise DoesNotFitError(
        f"the chain needs {format_bytes(needed)} even for one sample at a time, the budget is "
        f"{format_bytes(budget_bytes)}; use --mem-budget {advised_budget(needed)} or more"
        f"{', or ask for fewer samples' if held_bytes > SLACK_BYTES else ''}",
        smallest_bytes,
    )
