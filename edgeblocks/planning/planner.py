"""From a budget to a plan: how many blocks, which micro-batch, what stays in memory, how long a visit lasts.

Plain arithmetic on `LayerCosts` and `Machine`; no torch. Quality comes first: the smallest number of blocks, at least
the family's preferred one, that fits. Within it, the plan that takes least time.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.methods import FROZEN_BYTES, Frozen, Master
from edgeblocks.planning.candidates import cuts, options_of
from edgeblocks.planning.layer_costs import LayerCosts
from edgeblocks.planning.memory import (
    SLACK_BYTES,
    SLACK_SHARE,
    batch_bytes,
    forward_bytes,
    host_budget_bytes,
    preview_bytes,
    step_memory,
)
from edgeblocks.planning.plans import Candidate, Machine, Plan, PlanRequest, StepShape, cut_like, micro_batches
from edgeblocks.planning.step_times import boundary_disk_bytes
from edgeblocks.planning.warnings import plan_warnings
from edgeblocks.planning.windows import layers_in_windows
from edgeblocks.units import BARE_PROCESS_BYTES, advised_budget, format_bytes

BARE_RUNTIME = "the interpreter and its libraries alone need"
MANY_MORE_BLOCKS = 2.0
"""Times as many blocks, and more, are too many, only that they are of equal depth and can begin as one."""
ABOUT_AS_FAST = 1.1
"""Of two ways to train end to end, one that takes up to this many times as long is preferred where it writes less."""


def make_plan(costs: LayerCosts, machine: Machine, request: PlanRequest) -> Plan:
    """The plan for a budget.

    Raises:
        ConfigError: the user fixed something impossible.
        DoesNotFitError: nothing fits; it carries the smallest budget that would work.
    """
    if request.blocks is not None and not 1 <= request.blocks <= costs.num_layers:
        raise ConfigError(
            f"--blocks {request.blocks} is impossible: the network has {costs.num_layers} layers and a block needs at "
            f"least one; use 1 to {costs.num_layers}"
        )
    if request.window is not None and request.window > costs.num_layers:
        raise ConfigError(
            f"window={request.window}: the network has {costs.num_layers} layers; use 1 to {costs.num_layers}, or "
            f"leave it out for as many as the budget holds"
        )
    if request.shared and request.blocks is not None and costs.num_layers % request.blocks:
        fair = [blocks for blocks in range(2, costs.num_layers + 1) if costs.num_layers % blocks == 0]
        raise ConfigError(
            f"--blocks {request.blocks}: blocks that begin as one are of equal depth, and {costs.num_layers} layers "
            f"cannot be cut so; use {' or '.join(map(str, fair))} blocks, or --set shared=0"
        )
    assert machine.host is not None or request.ram_budget_bytes is None, "a RAM budget needs a machine with a host"
    if request.method.trained_together and not request.method.grows and request.boundaries is None:
        # In memory if any plan fits so: on disk each boundary is written once and read twice in every step.
        with contextlib.suppress(DoesNotFitError):
            return make_plan(costs, machine, replace(request, boundaries="ram"))
        request = replace(request, boundaries="disk")
    if request.method.grows and request.window is not None:
        windows = len(layers_in_windows(costs.num_layers, request.window))
        if request.steps < windows:
            raise ConfigError(
                f"--steps {request.steps}: the network grows in {windows} windows of {request.window} layers, and each "
                f"is trained for a step at least; give more steps, or a larger window"
            )
    if request.shared is None:
        return _begun_as_one_or_not(costs, machine, request)
    cut_by_budget, request = request.blocks is None, _with_a_cut(costs, machine, request)
    rows = []
    for cut in cuts(costs.num_layers, request):
        options = options_of(costs, machine, request, cut)
        fitting = [option for option in options if option.fits]
        if fitting:
            rows.append(_best(fitting, request))
        else:
            # None fits: the nearest one stands in the table, to show how far off it is.
            rows.append(min(options, key=lambda option: option.predicted_peak_bytes))
    fitting_rows = [row for row in rows if row.fits]
    if not fitting_rows:
        raise _does_not_fit(costs, machine, request)
    # Rows ascend in blocks. Fewer blocks are the better network, whatever they cost in time; stages are one network,
    # however it is cut.
    chosen = fitting_rows[0] if request.method.cut_changes_result else _best(fitting_rows, request)
    layers = cut_like(chosen, costs.num_layers, request.method)
    return Plan(
        chosen=chosen,
        candidates=tuple(rows),
        layers=layers,
        shapes=_shapes(costs, machine, request, chosen),
        preview_micro_batch=_preview_micro_batch(costs, machine, request, chosen),
        steps=request.steps,
        budget_bytes=request.budget_bytes,
        # Blocks have a stem and a readout each; stages are cut from one network, which has one of both.
        parameters=sum(map(costs.parameters, request.method.denoisers(layers))),
        optimizer=request.optimizer,
        machine=machine,
        precision=request.precision,
        master=request.master,
        method=request.method,
        begins_as_one=bool(request.shared) and chosen.blocks > 1,
        trained=request.trained,
        boundary_disk_bytes=boundary_disk_bytes(costs, request, chosen.blocks),
        warnings=plan_warnings(costs, machine, request, chosen, fitting_rows, cut_by_budget=cut_by_budget),
        ram_budget_bytes=None if machine.host is None else host_budget_bytes(machine, request),
    )


def _begun_as_one_or_not(costs: LayerCosts, machine: Machine, request: PlanRequest) -> Plan:
    """Blocks that begin as one, where equal ones are not much smaller than others."""
    alone = make_plan(costs, machine, replace(request, shared=False))
    with contextlib.suppress(ConfigError, DoesNotFitError):
        as_one = make_plan(costs, machine, replace(request, shared=True))
        if as_one.chosen.blocks < MANY_MORE_BLOCKS * alone.chosen.blocks:
            return as_one
    return replace(alone, warnings=(*alone.warnings, _begin_alone(costs.num_layers, alone.chosen.blocks)))


def _begin_alone(layers: int, blocks: int) -> str:
    """Why blocks do not begin as one, for people."""
    more, fewer = math.ceil(layers / blocks) * blocks, layers // blocks * blocks
    return (
        f"each block begins with random weights, because {layers} layers cannot be cut into {blocks} of equal depth; "
        f"blocks that begin as one were better wherever both were measured (docs/shared.md): --set "
        f"depth={more} or {fewer} can"
    )


def _with_a_cut(costs: LayerCosts, machine: Machine, request: PlanRequest) -> PlanRequest:
    """The request, with the number of stages that numbers of trained ones are counted in.

    Where the user does not fix it, it is that of a plan that trains all of them: else the fastest plan would be the one
    that trains least.

    Raises:
        ConfigError: there are no stages of these numbers.
    """
    if request.trained is None:
        return request
    whole = request.blocks or make_plan(costs, machine, replace(request, trained=None)).chosen.blocks
    wrong = [stage for stage in request.trained if stage >= whole]
    if wrong:
        there = "1 stage, stage 0" if whole == 1 else f"{whole} stages, 0 to {whole - 1}"
        raise ConfigError(
            f"--train-blocks {','.join(map(str, request.trained))}: the network is cut into {there}; name these, or "
            f"cut it into more with --blocks {max(wrong) + 1}"
        )
    return replace(request, blocks=whole)


def _best(options: Sequence[Candidate], request: PlanRequest) -> Candidate:
    """The one that takes least time, of which streaming is a part; the largest micro-batch where times are equal.

    Parts that are trained together move in every step, which wears the disk: among ways that are about as fast as the
    fastest, the one that writes least.
    """

    def time(option: Candidate) -> tuple[float, int]:
        return option.step_s + option.streaming_s, -option.micro_batch

    if not request.method.trained_together:
        return min(options, key=time)
    longest_s = ABOUT_AS_FAST * min(time(option)[0] for option in options)
    fast = [option for option in options if time(option)[0] <= longest_s]
    return min(fast, key=lambda option: (option.bytes_written, *time(option)))


def _shapes(costs: LayerCosts, machine: Machine, request: PlanRequest, chosen: Candidate) -> tuple[StepShape, ...]:
    """The chosen step, then ever smaller ones: first the micro-batch is halved, then checkpointing comes on."""
    found: list[StepShape] = []
    drawn_bytes = batch_bytes(costs, request)
    for checkpointing in costs.checkpointing_choices:
        for micro_batch in micro_batches(request.batch):
            if micro_batch > chosen.micro_batch or (chosen.checkpointing and not checkpointing):
                continue
            memory = step_memory(costs, machine, chosen.layers_per_block, micro_batch, checkpointing)
            step_bytes = drawn_bytes + sum(memory)
            # A shape that is no smaller than the one before it would not help a step that was refused memory.
            if not found or step_bytes < found[-1].step_bytes:
                found.append(StepShape(micro_batch=micro_batch, checkpointing=checkpointing, step_bytes=step_bytes))
    return tuple(found)


def _preview_micro_batch(costs: LayerCosts, machine: Machine, request: PlanRequest, chosen: Candidate) -> int:
    """Samples that go through the network together when it is looked at.

    Stages come from the disk for every micro-batch, so of them there should be few: as many samples as take no more
    memory than a training step. A block stays for all micro-batches, and there the step's own will do.
    """
    found = chosen.micro_batch
    if not request.method.one_network:
        return found
    room = chosen.breakdown["activations"] + chosen.breakdown["evaluation"]
    for size in micro_batches(request.batch):
        if size <= found:
            continue
        gradient_bytes = chosen.breakdown["gradients"]
        needed = preview_bytes(costs, machine, request, chosen.layers_per_block, size, gradient_bytes=gradient_bytes)
        if needed <= room:
            return size
    return found


def _does_not_fit(costs: LayerCosts, machine: Machine, request: PlanRequest) -> DoesNotFitError:
    """The refusal: which of the two budgets is too small, for what, and which one would do."""
    # Numbers of trained stages are counted in one cut: another number of stages would not have them.
    blocks = None if request.trained is None else request.blocks
    free = replace(request, micro_batch=None, checkpointing=None, tier=None, blocks=blocks, window=None)
    options, free_options = (
        [option for cut in cuts(costs.num_layers, asked) for option in options_of(costs, machine, asked, cut)]
        for asked in (request, free)
    )
    forced = [
        f"--{name}" if name == "blocks" else f"{name}={getattr(request, name)}"
        for name in ("blocks", "window", "micro_batch", "checkpointing", "tier")
        if getattr(request, name) is not None and getattr(free, name) is None
    ]
    ram_budget_bytes = host_budget_bytes(machine, request)
    on_host, free_on_host = (
        [option for option in some if option.predicted_host_peak_bytes <= ram_budget_bytes]
        for some in (options, free_options)
    )
    if on_host:
        return _refusal(
            [option.breakdown for option in on_host],
            [option.breakdown for option in free_on_host],
            flag="--mem-budget",
            budget_bytes=request.budget_bytes,
            where="" if machine.host is None else " on the device",
            runtime="its context alone needs" if machine.host else BARE_RUNTIME,
            forced=forced,
        )
    # Of the options that fit the device, if any: what follows from the answer must not be the other refusal.
    on_device, free_on_device = (
        [option for option in some if option.predicted_peak_bytes <= request.budget_bytes]
        for some in (options, free_options)
    )
    device_bytes = min(option.predicted_peak_bytes for option in options)
    device_too = (
        f". The device's {format_bytes(request.budget_bytes)} are too little as well: --mem-budget "
        f"{advised_budget(device_bytes)} or more"
    )
    return _refusal(
        [option.host_breakdown for option in on_device or options],
        [option.host_breakdown for option in free_on_device or free_options],
        flag="--ram-budget",
        budget_bytes=ram_budget_bytes,
        where=" on the host",
        runtime=BARE_RUNTIME,
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
    if runtime == BARE_RUNTIME and closest["runtime"] > BARE_PROCESS_BYTES:
        advice += (
            f" (this process already holds {format_bytes(closest['runtime'])} of it, your program's data included)"
        )
    elif closest["runtime"] > needed_bytes / 2:
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
    stem_readout_bytes: int = 0,
    sample_bytes: int = 0,
    residents: int = 1,
    master: Master = "fp32",
    frozen: Frozen = "none",
) -> int:
    """The largest micro-batch for running the EMA weights of blocks inside the device's budget.

    Args:
        held_bytes: what the caller keeps besides the network (images, features); in the host's memory if there is one.
        stem_readout_bytes: of the copies of stem and readout, where a network's stages are loaded in turn.
        sample_bytes: as `held_bytes` for each sample of the micro-batch, such as its KV cache; a device has them for a
            moment.
        residents: blocks that are in memory at a time.
        master: in which numbers the blocks are kept; those of bfloat16 pass through memory of their own.
        frozen: as what they wait in memory; those that are quantized are expanded in turn.

    Raises:
        DoesNotFitError: one sample does not fit.
    """
    largest = max(layers)
    bytes_of_one: float = 4 * residents + (2 if master == "bf16" else 0)
    if frozen != "none":
        bytes_of_one = FROZEN_BYTES[frozen] * residents + 4
    weights_bytes = int(bytes_of_one * costs.parameters(largest))
    fixed = machine.runtime_bytes + weights_bytes + stem_readout_bytes + SLACK_BYTES
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
