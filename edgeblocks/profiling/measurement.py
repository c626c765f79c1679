"""What this network costs, traced, and what this machine can do, measured: what a plan is made of."""

from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from edgeblocks.data.cache import cache_folder
from edgeblocks.families.base import DataInfo
from edgeblocks.offload.device import Target
from edgeblocks.planning.layer_costs import LayerCosts
from edgeblocks.planning.plans import Machine, micro_batches
from edgeblocks.profiling import trace
from edgeblocks.profiling.precisions import bf16_gain, warm_up
from edgeblocks.profiling.warmup_step import run_warmup_step
from edgeblocks.registry import build_family
from edgeblocks.settings.fields import Settings, precision_of


def measure(settings: Settings, data: DataInfo, folder: Path | None, target: Target) -> tuple[LayerCosts, Machine]:
    """Trace the costs in a child process, then measure the machine when it is quiet again.

    Args:
        folder: whose disk is measured; None where a run is only read, which may lie on a medium that cannot be written.
    """
    run = settings.run
    costs, planning_bytes = trace_costs(settings, data)
    Image.init()  # what saving pictures will need belongs to the runtime's share
    if target.host_bytes() is not None:
        family = build_family(run.family, asdict(settings.family), asdict(data), run.method)
        run_warmup_step(family, run.optimizer, target.torch_device)
    machine = measured_machine(target, folder, settings)
    return costs, replace(machine, planning_bytes=max(machine.planning_bytes, planning_bytes))


def measured_machine(target: Target, folder: Path | None, settings: Settings | None = None) -> Machine:
    """The machine; what measuring it took of the process's memory is the least that planning takes.

    Args:
        settings: of a network that may compute in half precision.
    """
    former_peak_bytes = target.host_peak_bytes()
    half = settings is not None and precision_of(settings.run) == "bf16"
    if half:
        warm_up(target, "bf16")
    machine = target.measure(folder)
    if settings is not None and half:
        machine = replace(machine, flops_per_s=machine.flops_per_s * bf16_gain(settings))
    peak_bytes = target.host_peak_bytes()
    return replace(machine, planning_bytes=peak_bytes if peak_bytes > former_peak_bytes else 0)


def trace_costs(settings: Settings, data: DataInfo) -> tuple[LayerCosts, int]:
    """The costs of the network at the micro-batches that matter, and the peak of the child process that traced them."""
    sizes = micro_batches(settings.run.batch)
    # The ends and the middle: a peak is convex in the samples, so a line between two of them is never below it.
    counts = {sizes[0], sizes[len(sizes) // 2], 1}
    if settings.run.micro_batch != "auto":
        counts.add(min(settings.run.micro_batch, settings.run.batch))
    # An image set's mean and scale shape no tensor: sets that differ in nothing else share an answer.
    shapes = {name: 1.0 if isinstance(value, float) else value for name, value in asdict(data).items()}
    fields = (settings.run.family, asdict(settings.family), shapes, sorted(counts))
    method, precision = settings.run.method, precision_of(settings.run)
    return trace.trace_in_subprocess(*fields, method=method, precision=precision, cache=cache_folder())
