"""What comes before training: the budget, the data, the machine, the network's costs, and the plan made of them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from edgeblocks import cost
from edgeblocks.config import Settings
from edgeblocks.data.cache import cache_folder
from edgeblocks.data.images import ImageSet, open_images
from edgeblocks.errors import ConfigError
from edgeblocks.families.base import ImageInfo
from edgeblocks.layer_costs import LayerCosts
from edgeblocks.listener import Listener
from edgeblocks.noise import NoisePartition, partition_noise
from edgeblocks.planner import Machine, Plan, Wishes, make_plan, micro_batches
from edgeblocks.registry import build_family, build_target, family_type
from edgeblocks.units import format_bytes, parse_size


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

    @property
    def partition(self) -> NoisePartition:
        run = self.settings.run
        noise = build_family(run.family, asdict(self.settings.family), asdict(self.data)).noise
        return partition_noise(noise, num_blocks=self.plan.chosen.blocks, kind=run.partition, overlap=run.overlap)


def prepare(settings: Settings, out: Path, listener: Listener) -> Prepared:
    """Open the data, measure the machine, trace the network's costs, and plan."""
    run = settings.run
    target = build_target(run.target)
    target.prepare()
    budget_bytes = budget_in_bytes(run.mem_budget, target)
    images = open_run_images(settings, listener)
    data = image_info(images, family_type(run.family).sigma_data)
    build_family(run.family, asdict(settings.family), asdict(data))  # reports impossible shapes at once
    listener.stage("planning")
    costs, machine = measure(settings, data, existing_folder(out), target, listener)
    fixed = {
        name: None if getattr(run, name) == "auto" else getattr(run, name)
        for name in ("blocks", "micro_batch", "checkpointing", "visit_steps", "tier")
    }
    wishes = Wishes(
        budget_bytes=budget_bytes,
        batch=run.batch,
        steps=run.steps,
        optimizer=run.optimizer,
        preferred_blocks=family_type(run.family).preferred_blocks,
        data_bytes=images.batch_resident_bytes(run.batch),
        **fixed,
    )
    return Prepared(
        settings=settings,
        budget_bytes=budget_bytes,
        images=images,
        data=data,
        costs=costs,
        machine=machine,
        plan=make_plan(costs, machine, wishes),
    )


def measure(
    settings: Settings,
    data: ImageInfo,
    folder: Path,
    target: Any,
    listener: Listener,
) -> tuple[LayerCosts, Machine]:
    """Trace the costs in a child process, then measure the machine when it is quiet again."""
    sizes = micro_batches(settings.run.batch)
    counts = {sizes[0], sizes[len(sizes) // 2], 1}
    if settings.run.micro_batch != "auto":
        counts.add(min(settings.run.micro_batch, settings.run.batch))
    costs = cost.trace_in_subprocess(settings.run.family, asdict(settings.family), asdict(data), sorted(counts))
    Image.init()  # what saving pictures will need belongs to the runtime's share
    return costs, target.measure(folder)


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
    total = target.total_bytes()
    try:
        budget_bytes = parse_size(text, whole_bytes=total)
    except ValueError as error:
        raise ConfigError(f"--mem-budget: {error}") from error
    if budget_bytes > total:
        raise ConfigError(
            f"--mem-budget {text} is {format_bytes(budget_bytes)}, but this machine has {format_bytes(total)}; "
            f"use at most --mem-budget {int(total * 0.9 / 1e6)}MB"
        )
    return budget_bytes


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    for folder in (path, *path.resolve().parents):
        if folder.is_dir():
            return folder
    return Path()
