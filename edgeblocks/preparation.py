"""What comes before training: the budget, the data, the machine, the network's costs, and the plan made of them."""

import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from edgeblocks import cost
from edgeblocks.config import Settings
from edgeblocks.data.cache import cache_folder
from edgeblocks.data.images import ImageSet, open_images
from edgeblocks.errors import ConfigError, DoesNotFitError, StorageError
from edgeblocks.families.base import ImageInfo
from edgeblocks.layer_costs import LayerCosts
from edgeblocks.listener import Listener
from edgeblocks.noise import NoisePartition, partition_noise
from edgeblocks.planner import make_plan
from edgeblocks.plans import Machine, Plan, Wishes, micro_batches
from edgeblocks.registry import build_family, build_target, family_type
from edgeblocks.units import format_bytes, format_duration, parse_size

GRID_SAMPLES = 40
"""Images in a grid of samples made during training."""
LONGEST_MOVING_S = 600.0
"""A slow disk is refused when it takes longer than this, and longer than the computing."""
GPU_BUDGET = "90%"
"""Of a GPU's memory, where the user names no budget: little else needs it, while a processor's memory is everyone's."""
RAM_BUDGET = "50%"
NEVER_RUN_ON_A_GPU = "no GPU code yet: this plan was never run on a GPU, and training uses the processor"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known before training starts."""

    settings: Settings
    budget_bytes: int
    images: ImageSet
    data: ImageInfo
    costs: LayerCosts
    machine: Machine
    plan: Plan
    profile: Any = None
    """The machine that the plan is for (a `targets.profile.Profile`) where it is not this one."""

    @property
    def partition(self) -> NoisePartition:
        run = self.settings.run
        noise = build_family(run.family, asdict(self.settings.family), asdict(self.data)).noise
        return partition_noise(noise, num_blocks=self.plan.chosen.blocks, kind=run.partition, overlap=run.overlap)

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` prints: the content of plan.json, and what only a plan that is not carried out needs."""
        content = self.plan.to_json(self.partition)
        content["gb_written_a_day"] = self.plan.written_a_day_bytes / 1e9
        if self.profile is not None:
            content["target"] = asdict(self.profile)
            content["host_breakdown"] = self.plan.chosen.host_breakdown
        return content


def prepare(settings: Settings, out: Path, listener: Listener) -> Prepared:
    """Open the data, measure the machine, trace the network's costs, and plan."""
    run = settings.run
    check_work_dir(run.work_dir)
    target = build_target(run.target)
    target.prepare()
    budget_bytes = budget_in_bytes(run.mem_budget, target)
    images, data = _open_data(settings, listener)
    listener.stage("planning")
    costs, machine = measure(settings, data, existing_folder(Path(run.work_dir or out)), target, listener)
    return Prepared(
        settings=settings,
        budget_bytes=budget_bytes,
        images=images,
        data=data,
        costs=costs,
        machine=machine,
        plan=make_plan(costs, machine, _wishes(settings, images, budget_bytes)),
    )


def _open_data(settings: Settings, listener: Listener) -> tuple[ImageSet, ImageInfo]:
    """The images, and what a network must know of them; reports shapes that are impossible for it at once."""
    run = settings.run
    images = open_run_images(settings, listener)
    data = image_info(images, family_type(run.family).sigma_data)
    build_family(run.family, asdict(settings.family), asdict(data))
    return images, data


def prepare_elsewhere(settings: Settings, profile: Any, ram_budget: str | None, listener: Listener) -> Prepared:
    """The same for a machine that is not this one: memory and speeds are its profile's, nothing is measured.

    Args:
        profile: a `targets.profile.Profile`.
        ram_budget: bound of the host's memory beside a GPU; None is half of it.
    """
    run, machine = settings.run, profile.machine()
    if machine.host is None:
        if ram_budget is not None:
            raise no_host_error(ram_budget, profile.name)
        budget_bytes = _size_within("--mem-budget", run.mem_budget, profile.memory_bytes, profile.name)
        ram_budget_bytes = None
    else:
        text = run.mem_budget if "mem_budget" in run.model_fields_set else GPU_BUDGET
        budget_bytes = _size_within("--mem-budget", text, profile.memory_bytes, f"the GPU of {profile.name}")
        host = f"the host of {profile.name}"
        text = RAM_BUDGET if ram_budget is None else ram_budget
        ram_budget_bytes = _size_within("--ram-budget", text, machine.host.memory_bytes, host)
    images, data = _open_data(settings, listener)
    listener.stage("planning")
    costs, planning_bytes = trace_costs(settings, data)
    machine = replace(machine, planning_bytes=planning_bytes)
    wishes = replace(_wishes(settings, images, budget_bytes), ram_budget_bytes=ram_budget_bytes)
    plan = make_plan(costs, machine, wishes)
    if machine.host is not None:
        plan = replace(plan, warnings=(NEVER_RUN_ON_A_GPU, *plan.warnings))
    return Prepared(
        settings=settings,
        budget_bytes=budget_bytes,
        images=images,
        data=data,
        costs=costs,
        machine=machine,
        plan=plan,
        profile=profile,
    )


def no_host_error(ram_budget: str, machine: str) -> ConfigError:
    return ConfigError(
        f"--ram-budget {ram_budget} bounds the host's memory beside a GPU; on {machine} training has one memory, and "
        f"--mem-budget bounds it"
    )


def replan(
    settings: Settings,
    data: ImageInfo,
    images: ImageSet,
    former: dict[str, Any],
    out: Path,
    target: Any,
    listener: Listener,
) -> Plan:
    """Another plan for a run's budget on this machine, with the blocks that the run has.

    The former plan's micro-batch is kept where it fits, because then not one bit of the result changes.

    Raises:
        DoesNotFitError: the blocks do not fit.
    """
    listener.stage("planning again")
    budget_bytes = budget_in_bytes(settings.run.mem_budget, target)
    costs, machine = measure(settings, data, existing_folder(Path(settings.run.work_dir or out)), target, listener)
    wishes = replace(_wishes(settings, images, budget_bytes), blocks=int(former["blocks"]))
    try:
        return make_plan(costs, machine, replace(wishes, micro_batch=int(former["micro_batch"]), checkpointing=None))
    except DoesNotFitError:
        pass
    try:
        return make_plan(costs, machine, replace(wishes, micro_batch=None, checkpointing=None, tier=None))
    except DoesNotFitError as error:
        raise DoesNotFitError(
            f"the run has {former['blocks']} blocks, which were fixed when it was created, and they do not fit "
            f"{format_bytes(budget_bytes)} here: {format_bytes(error.as_fixed_bytes)} are needed; go on with "
            f"--mem-budget {math.ceil(error.as_fixed_bytes / 1e6)}MB or more",
            error.as_fixed_bytes,
        ) from error


def _wishes(settings: Settings, images: ImageSet, budget_bytes: int) -> Wishes:
    run = settings.run
    fixed = {
        name: None if getattr(run, name) == "auto" else getattr(run, name)
        for name in ("blocks", "micro_batch", "checkpointing", "visit_steps", "tier")
    }
    return Wishes(
        budget_bytes=budget_bytes,
        batch=run.batch,
        steps=run.steps,
        optimizer=run.optimizer,
        preferred_blocks=family_type(run.family).preferred_blocks,
        data_bytes=images.batch_resident_bytes(run.batch),
        grid_samples=GRID_SAMPLES,
        max_disk_writes=None if run.max_disk_writes is None else parse_size(run.max_disk_writes),
        **fixed,
    )


def check_disk(prepared: Prepared, out: Path) -> None:
    """Refuse a run for which the disk has no room, or is so slow that moving blocks would be most of the work.

    Raises:
        StorageError: with the bytes that are needed.
    """
    chosen, machine, work_dir = prepared.plan.chosen, prepared.plan.machine, prepared.settings.run.work_dir
    blocks_bytes = chosen.blocks * chosen.block_bytes
    wanted = {Path(work_dir) if work_dir else out: blocks_bytes + chosen.block_bytes}
    if work_dir:
        wanted[out] = blocks_bytes
    for path, needed in wanted.items():
        free = shutil.disk_usage(existing_folder(path)).free
        if needed > free:
            raise StorageError(
                f"{path} needs {format_bytes(needed)} of disk for {chosen.blocks} blocks of "
                f"{format_bytes(chosen.block_bytes)} and one being written, {format_bytes(free)} are free there; "
                f"choose another disk with {'--work-dir' if path != out else '--out'}, or a smaller network"
            )
    steps = chosen.blocks * prepared.settings.run.steps
    moving_s, computing_s = steps * chosen.streaming_s, steps * chosen.step_s
    if moving_s > max(computing_s, LONGEST_MOVING_S):
        raise StorageError(
            f"{Path(work_dir) if work_dir else out} reads {format_bytes(machine.disk_read_bytes_per_s)} and writes "
            f"{format_bytes(machine.disk_write_bytes_per_s)} a second: moving {chosen.blocks} blocks of "
            f"{format_bytes(chosen.block_bytes)} would take {format_duration(moving_s)} beside "
            f"{format_duration(computing_s)} of computing; choose a faster disk with --work-dir, longer visits with "
            f"--set visit_steps={4 * chosen.visit_steps}, or a larger --mem-budget"
        )


def check_work_dir(work_dir: str | None) -> None:
    """That the blocks can lie in the work directory.

    Raises:
        StorageError: it is missing, no folder, or not writable.
    """
    if work_dir is None:
        return
    path = Path(work_dir).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise StorageError(
            f"--work-dir {path} {what}; mount its disk, make it (mkdir -p {path}), or name another place"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"--work-dir {path} cannot be written; mend its permissions, or name another place")


def measure(
    settings: Settings,
    data: ImageInfo,
    folder: Path,
    target: Any,
    listener: Listener,
) -> tuple[LayerCosts, Machine]:
    """Trace the costs in a child process, then measure the machine when it is quiet again."""
    costs, planning_bytes = trace_costs(settings, data)
    Image.init()  # what saving pictures will need belongs to the runtime's share
    return costs, replace(target.measure(folder), planning_bytes=planning_bytes)


def trace_costs(settings: Settings, data: ImageInfo) -> tuple[LayerCosts, int]:
    """The costs of the network at the micro-batches that matter, and the peak of the child process that traced them."""
    sizes = micro_batches(settings.run.batch)
    counts = {sizes[0], sizes[len(sizes) // 2], 1}
    if settings.run.micro_batch != "auto":
        counts.add(min(settings.run.micro_batch, settings.run.batch))
    fields = (settings.run.family, asdict(settings.family), asdict(data), sorted(counts))
    return cost.trace_in_subprocess(*fields, cache=cache_folder())


def image_info(images: ImageSet, sigma_data: float) -> ImageInfo:
    """What a network must know of an image set; scaled to the standard deviation `sigma_data`."""
    _, height, width, channels = images.images.shape
    return ImageInfo(
        channels=channels,
        height=height,
        width=width,
        num_classes=len(images.class_names),
        mean=images.mean,
        scale=sigma_data / images.std,
    )


def open_run_images(settings: Settings, listener: Listener) -> ImageSet:
    run = settings.run
    images = open_images(
        run.data,
        image_size=run.image_size,
        hold_out=run.hold_out,
        seed=run.seed,
        cache_dir=cache_folder(),
        progress=listener.advance,
    )
    if images.unreadable:
        shown = ", ".join(images.unreadable[:5]) + (", .." if len(images.unreadable) > 5 else "")
        listener.note(f"skipped {len(images.unreadable)} unreadable files: {shown}")
    return images


def budget_in_bytes(text: str, target: Any) -> int:
    return _size_within("--mem-budget", text, target.total_bytes(), "this machine")


def _size_within(flag: str, text: str, total: int, machine: str) -> int:
    try:
        budget_bytes = parse_size(str(text), whole_bytes=total)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{flag}: {error}") from error
    if budget_bytes > total:
        raise ConfigError(
            f"{flag} {text} is {format_bytes(budget_bytes)}, but {machine} has {format_bytes(total)}; "
            f"use at most {flag} {int(total * 0.9 / 1e6)}MB"
        )
    return budget_bytes


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    for folder in (path, *path.resolve().parents):
        if folder.is_dir():
            return folder
    return Path()
