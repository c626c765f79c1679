"""What this network costs, traced, and what this machine can do, measured: what a plan is made of."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from edgeblocks.data.cache import cache_folder
from edgeblocks.errors import MAY_BE_REFUSALS, ConfigError, DoesNotFitError, is_refusal
from edgeblocks.families.base import DataInfo
from edgeblocks.methods import METHODS, Precision
from edgeblocks.offload.device import Target
from edgeblocks.planning.corrections import corrected_by_block
from edgeblocks.planning.layer_costs import LayerCosts
from edgeblocks.planning.plans import Machine, micro_batches
from edgeblocks.profiling import trace
from edgeblocks.profiling.block_step import bytes_to_time, samples_to_time, time_block
from edgeblocks.profiling.budgets import TOGETHER_ABOVE_BYTES, room_beside
from edgeblocks.profiling.precisions import WORTH_IT, half_gain, warm_up
from edgeblocks.profiling.warmup_step import run_warmup_step
from edgeblocks.registry import build_family
from edgeblocks.settings.fields import Settings, precision_of
from edgeblocks.units import advised_budget, format_bytes, who_holds

MEASURING_BYTES = 28_000_000
"""More than the code of kernels that measuring the machine brings into this process, measured 20 MB."""


def measure(
    settings: Settings, data: DataInfo, folder: Path | None, target: Target, *, budget_bytes: int
) -> tuple[LayerCosts, Machine]:
    """Trace the costs in a child process, then measure the machine when it is quiet again.

    Args:
        folder: whose disk is measured; None where a run is only read, which may lie on a medium that cannot be written.
        budget_bytes: of the memory that this process is in.

    Raises:
        DoesNotFitError: the child was refused memory, under a budget that bounds both processes together.
    """
    run = settings.run
    target.give_back()  # what reading the data left behind would lie beside the child
    held_bytes = target.host_used_bytes()
    room_bytes = room_beside(budget_bytes, held_bytes) if budget_bytes > TOGETHER_ABOVE_BYTES else None
    try:
        traced = trace_costs(settings, data, device=target.torch_device, room_bytes=room_bytes)
    except trace.NoRoomToTraceError as error:
        needed_bytes = held_bytes + MEASURING_BYTES + trace.TRACING_BYTES
        if needed_bytes <= budget_bytes:  # it was started, and took more than others do
            needed_bytes += budget_bytes
        flag = "--mem-budget" if target.host_bytes() is None else "--ram-budget"
        raise planning_does_not_fit(needed_bytes, held_bytes, budget_bytes, flag) from error
    Image.init()  # what saving pictures will need belongs to the runtime's share
    if target.host_bytes() is not None:
        family = build_family(run.family, asdict(settings.family), asdict(data), run.method)
        # What is timed later loads its code now, before the runtime's share is measured.
        samples, _ = samples_to_time(family, traced.costs, run.batch)
        what = family, run.optimizer, target.torch_device
        try:
            run_warmup_step(*what, samples=samples, precision=precision_of(run), master=run.master)
        except MAY_BE_REFUSALS as error:
            # A network of which the device does not hold a block is refused below, by the plan, with the numbers.
            if not is_refusal(error):
                raise
    if precision_of(run) != "fp32":
        warm_up(target, precision_of(run))  # before the runtime's share is measured
    machine = measured_machine(target, folder)
    # A second plan, as of the other method, begins with the kernels' code that measuring brought in.
    held_bytes = max(held_bytes, target.host_used_bytes())
    return traced.costs, replace(
        machine,
        planning_bytes=max(machine.planning_bytes, traced.peak_bytes),
        planning_together_bytes=held_bytes + max(traced.own_bytes, trace.TRACING_BYTES),
    )


def planning_does_not_fit(needed_bytes: int, held_bytes: int, budget_bytes: int, flag: str) -> DoesNotFitError:
    """What says that planning's two processes take more than a budget, and which would do."""
    return DoesNotFitError(
        f"planning takes up to {format_bytes(needed_bytes)} in two processes, of which this one holds "
        f"{format_bytes(held_bytes)} ({who_holds(held_bytes)}), and the budget is {format_bytes(budget_bytes)}; use "
        f"{flag} {advised_budget(needed_bytes)} or more",
        needed_bytes,
        flag=flag,
    )


def with_precision(
    settings: Settings, data: DataInfo, *, device: str, half: Precision | None, is_here: bool = True
) -> Settings:
    """The settings with a precision instead of `auto`.

    On a GPU that is the half precision that it has, on a processor bfloat16 where a measurement says that it pays.

    Args:
        device: where the network will be, as torch names it.
        half: the half precision of a GPU, as `Target.half_precision` has it.
        is_here: whether that is this machine, on which it can be measured.

    Raises:
        ConfigError: half precision on a device that has none.
    """
    check_precision(settings, half)
    if settings.run.precision != "auto":
        return settings
    if half is not None:
        return _in_precision(settings, half)
    chosen = _in_precision(settings, "fp32")
    if is_here and _gain(chosen, data, trace_costs(chosen, data, device=device).costs, device=device) >= WORTH_IT:
        return _in_precision(settings, "bf16")
    return chosen


def check_precision(settings: Settings, half: Precision | None) -> None:
    """Check that a network can compute in a precision on a device whose half precision is `half`.

    Raises:
        ConfigError: it cannot.
    """
    if settings.run.precision == "bf16" and half == "fp16":
        raise ConfigError(
            "--precision bf16: this GPU has no bfloat16, which begins with compute capability 8 (RTX 30); use "
            "--precision fp16"
        )


def _in_precision(settings: Settings, precision: Precision) -> Settings:
    return replace(settings, run=settings.run.model_copy(update={"precision": precision}))


def _gain(settings: Settings, data: DataInfo, costs: LayerCosts, *, device: str) -> float:
    """`half_gain` of a network."""
    run = settings.run
    family = build_family(run.family, asdict(settings.family), asdict(data), run.method)
    # Costs in half precision are half of those in float32, which is measured as well.
    samples = max(samples_to_time(family, costs, run.batch)[0]) // (1 if run.precision == "fp32" else 2)
    half: Precision = "fp16" if run.precision == "fp16" else "bf16"
    return half_gain(family, half, samples=max(1, samples), device=device)


def with_timed_block(
    settings: Settings, data: DataInfo, costs: LayerCosts, machine: Machine, target: Target, *, budget_bytes: int
) -> Machine:
    """The machine, with the model of a step's time corrected by what the network's smallest block takes on it now.

    Args:
        budget_bytes: of the device's memory. A block that does not fit it is not run: no plan will.
    """
    run = settings.run
    family = build_family(run.family, asdict(settings.family), asdict(data), run.method)
    samples, checkpointing = samples_to_time(family, costs, run.batch)
    what: dict[str, Any] = {"samples": samples, "checkpointing": checkpointing}
    what |= {"optimizer": run.optimizer, "master": run.master}
    if target.used_bytes() + bytes_to_time(family, costs, **what) > budget_bytes:
        return machine
    former_peak_bytes, former_bytes, device = target.host_peak_bytes(), target.host_used_bytes(), target.torch_device
    if precision_of(run) != "fp32":
        machine = replace(machine, half_gain=_gain(settings, data, costs, device=device))
    timed = time_block(family, device, precision=precision_of(run), **what)
    target.give_back()
    peak_bytes = target.host_peak_bytes()
    return replace(
        corrected_by_block(machine, costs, timed),
        planning_bytes=max(machine.planning_bytes, peak_bytes if peak_bytes > former_peak_bytes else 0),
        # A second plan, as of the other method, begins with the kernels' code that this brought in.
        planning_together_bytes=machine.planning_together_bytes + max(0, target.host_used_bytes() - former_bytes),
    )


def measured_machine(target: Target, folder: Path | None) -> Machine:
    """The machine; what measuring it took of the process's memory is the least that planning takes."""
    former_peak_bytes = target.host_peak_bytes()
    machine = target.measure(folder)
    peak_bytes = target.host_peak_bytes()
    return replace(machine, planning_bytes=peak_bytes if peak_bytes > former_peak_bytes else 0)


def trace_costs(settings: Settings, data: DataInfo, *, device: str, room_bytes: int | None = None) -> trace.Traced:
    """The costs of the network on a device at the micro-batches that matter.

    Args:
        device: as torch names it.
        room_bytes: as of `trace.trace_in_subprocess`.
    """
    sizes = micro_batches(settings.run.batch)
    # The ends and the middle: a peak is convex in the samples, so a line between two of them is never below it.
    counts = {sizes[0], sizes[len(sizes) // 2], 1}
    if settings.run.micro_batch != "auto":
        counts.add(min(settings.run.micro_batch, settings.run.batch))
    fields = (settings.run.family, asdict(settings.family), trace.shapes_of(data), sorted(counts))
    architecture = build_family(settings.run.family, fields[1], asdict(data), settings.run.method).architecture
    method, precision = METHODS[settings.run.method].form, precision_of(settings.run)
    return trace.trace_in_subprocess(
        *fields,
        method=method,
        precision=precision,
        device=torch.device(device).type,
        architecture=architecture,
        cache=cache_folder(),
        room_bytes=room_bytes,
    )
