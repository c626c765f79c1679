"""The Python interface: plan, train, load; and on a loaded run sample, evaluate, export.

Everything the command line does goes through here; `cli` only reads arguments and prints.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from PIL import Image

from edgeblocks import cost, metrics, pictures
from edgeblocks.chain import BlockRunner, EmaSource, Solver, class_labels, guided, sample_chain
from edgeblocks.checkpoint import RunDirectory, create_run, open_run, seal_run
from edgeblocks.config import Settings, read_yaml, resolve_settings
from edgeblocks.data.images import ImageSet, open_images
from edgeblocks.errors import ConfigError, DoesNotFitError, InterruptedRunError, RunError
from edgeblocks.families.base import ImageInfo
from edgeblocks.layer_costs import LayerCosts
from edgeblocks.noise import partition_noise, sampler_levels
from edgeblocks.planner import Machine, Plan, Wishes, inference_micro_batch, make_plan, micro_batches
from edgeblocks.randomness import start_noise
from edgeblocks.registry import build_exporter, build_family, build_target, family_type
from edgeblocks.scheduler import EmaLoader, Scheduler
from edgeblocks.trainer import Interruption, Progress, Trainer, create_blocks
from edgeblocks.units import format_bytes, parse_size

Settable = dict[str, Any]


class Listener(Protocol):
    """Hears how a long call goes on. All methods are optional to act on; `Silent` ignores everything."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, text: str) -> None: ...

    def planned(self, prepared: "Prepared", run: RunDirectory) -> None: ...

    def step(self, progress: Progress, stall_s: float, used_bytes: int) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """A listener that hears nothing."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, text: str) -> None: ...

    def planned(self, prepared: "Prepared", run: RunDirectory) -> None: ...

    def step(self, progress: Progress, stall_s: float, used_bytes: int) -> None: ...

    def note(self, text: str) -> None: ...


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
    def partition(self) -> Any:  # noqa: ANN401 - noise.NoisePartition
        run = self.settings.run
        noise = build_family(run.family, asdict(self.settings.family), asdict(self.data)).noise
        return partition_noise(noise, num_blocks=self.plan.chosen.blocks, kind=run.partition, overlap=run.overlap)


def plan(
    *, config: Path | str | None = None, out: Path | str = ".", listener: Listener | None = None, **settings: Any
) -> Prepared:
    """What `train` would do with these settings, without doing it.

    Args:
        config: a YAML file of settings; keyword settings go over it.
        out: where a run would be written; its disk is measured.
        settings: any of `config.RunSettings` or of the family's settings, such as mem_budget="6GB".

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
        DoesNotFitError: nothing fits the budget; carries the smallest that would.
    """
    resolved = resolve_settings(
        settings,
        family_settings=lambda name: family_type(name).settings_type,
        config=read_yaml(Path(config)) if config is not None else None,
    )
    return prepare(resolved, Path(out), listener or Silent())


def prepare(settings: Settings, out: Path, listener: Listener) -> Prepared:
    """Open the data, measure the machine, trace the network's costs, and plan."""
    run = settings.run
    target = build_target(run.target)
    target.prepare()
    budget_bytes = _budget_bytes(run.mem_budget, target)
    images = _open_images(settings, listener)
    data = image_info(images)
    build_family(run.family, asdict(settings.family), asdict(data))  # reports impossible shapes at once
    listener.stage("planning")
    costs, machine = _measure(settings, data, _existing_folder(out), target, listener)
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


def _measure(
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


def train(
    *,
    out: Path | str,
    config: Path | str | None = None,
    listener: Listener | None = None,
    **settings: Any,  # noqa: ANN401
) -> "Run":
    """Train a new run in the directory `out` and return it; see `plan` for settings and errors.

    Raises:
        InterruptedRunError: stopped by a signal; everything is saved.
    """
    listener = listener or Silent()
    path = Path(out)
    if (path / "manifest.json").exists():
        raise ConfigError(f"{path} holds a run already; go on with --resume {path}, or choose another --out")
    prepared = plan(config=config, out=path, listener=listener, **settings)
    needed = (prepared.plan.chosen.blocks + 1) * prepared.plan.chosen.block_bytes
    free = psutil.disk_usage(str(_existing_folder(path))).free
    if needed > free:
        raise ConfigError(
            f"{path} needs {format_bytes(needed)} of disk for {prepared.plan.chosen.blocks} blocks and one being "
            f"written, {format_bytes(free)} are free there; choose another disk with --out, or a smaller network"
        )
    run = create_run(
        path,
        prepared.settings,
        prepared.plan.to_json(prepared.partition),
        prepared.data,
        data_source=prepared.images.source,
        data_fingerprint=prepared.images.fingerprint,
        class_names=prepared.images.class_names,
    )
    listener.planned(prepared, run)
    listener.stage("creating blocks")
    create_blocks(
        run.family(),
        run.store(),
        run.layers,
        prepared.settings.run.seed,
        on_block=lambda block: listener.advance(block + 1, len(run.layers), "creating blocks"),
    )
    seal_run(run)
    return _train(run, prepared.images, prepared.budget_bytes, listener, resumed_from=None)


def resume(path: Path | str, *, listener: Listener | None = None) -> "Run":
    """Go on with a run from each block's last saved step, and return it when it is finished.

    Raises:
        RunError: the run is damaged or its data have changed.
        DoesNotFitError: this machine's libraries take more than those of the machine that planned the run.
    """
    listener = listener or Silent()
    run = open_run(Path(path))
    target = build_target(run.settings.run.target)
    target.prepare()
    images = _open_images(run.settings, listener)
    if images.fingerprint != run.data_fingerprint:
        raise RunError(
            f"the data of {run.path} have changed: {run.data_source} is not what the run was trained on; put the former "
            f"data back, or start a new run with --out"
        )
    budget_bytes = int(run.plan["budget_bytes"])
    predicted = run.plan["predicted_peak_bytes"] - run.plan["breakdown"]["runtime"] + target.used_bytes()
    if predicted > budget_bytes:
        raise DoesNotFitError(
            f"the plan of {run.path} needs {format_bytes(predicted)} on this machine, its budget is "
            f"{format_bytes(budget_bytes)}: the interpreter and libraries take {format_bytes(target.used_bytes())} here; "
            f"start a new run with a larger --mem-budget",
            predicted,
        )
    saved = [run.store().header(block).step for block in range(len(run.layers))]
    run.drop_metrics_after(saved)
    listener.note(f"resuming {run.path}: blocks at steps {', '.join(map(str, saved))} of {run.settings.run.steps}")
    return _train(run, images, budget_bytes, listener, resumed_from=saved)


def _train(
    run: RunDirectory, images: ImageSet, budget_bytes: int, listener: Listener, resumed_from: list[int] | None
) -> "Run":
    target = build_target(run.settings.run.target)
    scheduler = Scheduler(run.store(), slots=run.plan["slots"])
    watch = _PeakWatch(target.used_bytes)
    finished = Run(run)
    try:
        trainer = Trainer(run, images, scheduler)
        grids = _SampleGrids(run, scheduler, trainer.progress)
        listener.stage("training")
        with Interruption().listening() as interruption, watch:
            steps = trainer.train(
                interruption,
                on_step=lambda progress: listener.step(progress, scheduler.times.stall_s, watch.used_bytes),
                between_visits=grids.after_visit,
            )
            if interruption.signal_name is None:
                listener.stage("evaluating")
                runner = finished.runner(scheduler, micro_batch=run.plan["micro_batch"])
                evaluation = metrics.validation_loss(
                    run.family(),
                    runner,
                    images,
                    seed=run.settings.run.seed,
                    on_level=lambda done: listener.advance(done, metrics.NUM_LEVELS, "evaluating"),
                )
    finally:
        scheduler.close()
    if interruption.signal_name is not None:
        raise InterruptedRunError(
            f"stopped by {interruption.signal_name}; saved at steps {', '.join(map(str, steps))} of "
            f"{run.settings.run.steps}. Go on with: edgeblocks train --resume {run.path}"
        )
    summary = _summary(run, trainer.progress, scheduler, grids, evaluation, target, budget_bytes, resumed_from)
    run.write_json("summary.json", summary)
    return finished


class _PeakWatch:
    """Looks at the resident set a few times a second, so that the progress line costs nothing a step."""

    def __init__(self, used_bytes: Callable[[], int]) -> None:
        self.used_bytes = used_bytes()
        self._read = used_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edgeblocks-watch", daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.used_bytes = self._read()

    def __enter__(self) -> "_PeakWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


class _SampleGrids:
    """Saves a grid of samples now and then between visits, with the same noise each time."""

    NUM_SAMPLES = 40

    def __init__(self, run: RunDirectory, scheduler: Scheduler, progress: Progress) -> None:
        self._run, self._scheduler, self._progress = run, scheduler, progress
        self._grids = run.settings.run.sample_grids
        self._total = run.settings.run.steps
        self._next = self._due(min(run.store().header(b).step for b in range(len(run.layers))))
        self.seconds = 0.0

    def _due(self, done: int) -> int | None:
        """The next number of steps, the same for all blocks, at which a grid is wanted."""
        marks = [math.ceil(self._total * (i + 1) / self._grids) for i in range(self._grids)]
        return next((mark for mark in marks if mark > done), None)

    def after_visit(self, steps: Sequence[int]) -> None:
        done = min(steps)
        if self._next is None or done < self._next:
            return
        started = time.perf_counter()
        run = Run(self._run)
        images = run.sample(
            n=self.NUM_SAMPLES,
            steps=max(self._run.settings.run.sample_steps, len(self._run.layers)),
            runner=run.runner(self._scheduler, micro_batch=self._run.plan["micro_batch"]),
        )
        pictures.save_png(self._run.path / "samples" / f"step_{done:07d}.png", pictures.image_grid(images, columns=10))
        self._next = self._due(done)
        self.seconds += time.perf_counter() - started


def _summary(
    run: RunDirectory,
    progress: Progress,
    scheduler: Scheduler,
    grids: _SampleGrids,
    evaluation: dict[str, Any],
    target: Any,  # noqa: ANN401 - targets
    budget_bytes: int,
    resumed_from: list[int] | None,
) -> dict[str, Any]:
    seconds = time.perf_counter() - progress.started
    done_here = progress.steps_done - (sum(resumed_from) if resumed_from else 0)
    split = {
        "compute": progress.compute_s,
        "load": scheduler.times.load_s,
        "store": scheduler.times.store_s,
        "stall": scheduler.times.stall_s,
        "data": progress.data_s,
    }
    split["other"] = max(0.0, seconds - split["compute"] - split["data"] - split["stall"])
    return {
        "family": run.settings.run.family,
        "method": "diffusion",
        "blocks": len(run.layers),
        "layers_per_block": list(run.layers),
        "parameters": run.plan["parameters"],
        "steps": run.settings.run.steps,
        "budget_bytes": budget_bytes,
        "predicted_peak_bytes": run.plan["predicted_peak_bytes"],
        "peak_bytes": target.peak_bytes(),
        "ram_peak_bytes": target.peak_bytes(),
        "disk_bytes": sum(path.stat().st_size for path in (run.path / "blocks").glob("*.safetensors")),
        "disk_bytes_written": scheduler.store.bytes_written,
        "seconds": seconds,
        "images_or_tokens_per_s": done_here * run.settings.run.batch / max(progress.compute_s + progress.data_s, 1e-9),
        "step_s": (progress.compute_s + progress.data_s) / max(done_here, 1),
        "predicted_step_s": run.plan["predicted_step_s"],
        "time_split": {name: round(value, 3) for name, value in split.items()},
        "sampling_s": round(grids.seconds, 3),
        "metrics": {
            "train_loss_by_block": [progress.losses.get(block) for block in range(len(run.layers))],
            "validation_loss": evaluation["total"],
            "validation_loss_by_block": metrics.loss_by_block(evaluation["levels"], run.partition),
            "validation": evaluation,
        },
        "resumed_from": resumed_from,
    }


class Run:
    """A run that exists on disk, for sampling, evaluation and export with its EMA weights."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None while the run is not finished."""
        from edgeblocks.checkpoint import read_json

        path = self.path / "summary.json"
        return read_json(path) if path.exists() else None

    def runner(self, source: EmaSource, *, micro_batch: int) -> BlockRunner:
        return BlockRunner(
            self.directory.family(), self.directory.layers, self.directory.partition, source, micro_batch=micro_batch
        )

    def fitting_runner(self, *, samples: int, mem_budget: str | None = None) -> BlockRunner:
        """A runner whose micro-batch keeps the process inside the budget (the run's own, or another one).

        Raises:
            DoesNotFitError: one sample at a time does not fit.
        """
        directory = self.directory
        target = build_target(directory.settings.run.target)
        target.prepare()
        budget_bytes = (
            _budget_bytes(mem_budget, target) if mem_budget is not None else int(directory.plan["budget_bytes"])
        )
        costs, machine = _measure(directory.settings, directory.data, directory.path, target, Silent())
        image_bytes = 4 * directory.data.channels * directory.data.height * directory.data.width
        micro_batch = inference_micro_batch(
            costs,
            machine,
            layers=directory.layers,
            samples=samples,
            budget_bytes=budget_bytes,
            held_bytes=8 * samples * image_bytes,
        )
        return self.runner(EmaLoader(directory.store()), micro_batch=micro_batch)

    def sample(
        self,
        *,
        n: int = 64,
        steps: int = 18,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        mem_budget: str | None = None,
        runner: BlockRunner | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Samples, uint8 [n, H, W, C]. The classes take turns unless one is chosen by number or name.

        Raises:
            ConfigError: an impossible argument.
            DoesNotFitError: not even one sample at a time fits the budget.
        """
        directory = self.directory
        family = directory.family()
        _check_sampling(n, steps, guidance, family.conditional)
        levels = sampler_levels(directory.partition, num_steps=steps)
        labels = class_labels(n, num_classes=directory.data.num_classes, chosen=self.class_number(label))
        runner = runner or self.fitting_runner(samples=n, mem_budget=mem_budget)
        data = directory.data
        noise = torch.from_numpy(start_noise((data.channels, data.height, data.width), num_samples=n, seed=seed))
        denoise = guided(runner.denoise, labels, guidance=guidance, no_class=data.num_classes)
        x = sample_chain(denoise, noise, levels, solver=solver, on_level=on_level)
        return pictures.to_uint8(x.numpy(), mean=data.mean, scale=data.scale)

    def class_number(self, label: int | str | None) -> int | None:
        """A class by number or name.

        Raises:
            ConfigError: there is no such class.
        """
        names = self.directory.class_names
        if label is None:
            return None
        if not names:
            raise ConfigError(f"--class {label}: this run was trained without classes")
        if str(label) in names:
            return names.index(str(label))
        if str(label).isdigit() and int(label) < len(names):
            return int(label)
        shown = ", ".join(names[:20]) + (", .." if len(names) > 20 else "")
        raise ConfigError(f"--class {label}: there is no such class; the {len(names)} classes are {shown}")

    def evaluate(
        self,
        *,
        samples: int = 256,
        steps: int = 18,
        seed: int = 0,
        mem_budget: str | None = None,
        listener: Listener | None = None,
    ) -> dict[str, Any]:
        """Validation loss per noise level and in total, and the Frechet distance of fresh samples (0 samples: none).

        Raises:
            RunError: the data are not those of the run.
        """
        listener = listener or Silent()
        directory = self.directory
        images = _open_images(directory.settings, listener)
        if images.fingerprint != directory.data_fingerprint:
            raise RunError(f"{directory.data_source} is not the data that {directory.path} was trained on")
        if len(images.held_out):
            samples = min(samples, len(images.held_out))
        runner = self.fitting_runner(samples=max(samples, metrics.MOST_IMAGES), mem_budget=mem_budget)
        loss = metrics.validation_loss(
            directory.family(),
            runner,
            images,
            seed=directory.settings.run.seed,
            on_level=lambda done: listener.advance(done, metrics.NUM_LEVELS, "validation loss"),
        )
        result: dict[str, Any] = {
            "run": str(directory.path),
            "blocks": len(directory.layers),
            "steps": [runner_step.step for runner_step in self._headers()],
            "validation_loss": loss["total"],
            "validation_loss_by_block": metrics.loss_by_block(loss["levels"], directory.partition),
            "validation": loss,
        }
        if samples >= 2:
            made = self.sample(
                n=samples,
                steps=max(steps, len(directory.layers)),
                seed=seed,
                runner=runner,
                on_level=lambda done: listener.advance(done, steps, "sampling"),
            )
            result["frechet"] = metrics.sample_distance(made, images)
        return result

    def _headers(self) -> list[Any]:
        store = self.directory.store()
        return [store.header(block) for block in range(len(self.directory.layers))]

    def export(self, out: Path | str, *, listener: Listener | None = None) -> dict[str, Any]:
        """Write the run as ONNX graphs with a manifest, verify it against torch, and return the manifest.

        Raises:
            EdgeblocksError: onnxruntime's numbers differ from torch's by more than is promised.
        """
        manifest: dict[str, Any] = build_exporter()(self.directory, Path(out), listener or Silent())
        return manifest


def load(path: Path | str) -> Run:
    """A run that exists on disk.

    Raises:
        RunError: not a run, damaged, or of another version.
    """
    return Run(open_run(Path(path)))


def image_info(images: ImageSet) -> ImageInfo:
    """What a network must know of an image set; scaled so that the standard deviation is 0.5 (sigma_data)."""
    _, height, width, channels = images.images.shape
    return ImageInfo(
        channels=channels,
        height=height,
        width=width,
        num_classes=len(images.class_names),
        mean=images.mean,
        scale=0.5 / images.std,
    )


def cache_folder() -> Path:
    """Where decoded images are kept: $EDGEBLOCKS_CACHE, or edgeblocks/ in the user's cache folder."""
    given = os.environ.get("EDGEBLOCKS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeblocks"


def _open_images(settings: Settings, listener: Listener) -> ImageSet:
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


def _budget_bytes(text: str, target: Any) -> int:  # noqa: ANN401 - targets
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


def _check_sampling(n: int, steps: int, guidance: float, conditional: bool) -> None:
    problems = []
    if n < 1:
        problems.append(f"--n {n}: at least one sample is needed")
    if steps < 1:
        problems.append(f"--steps {steps}: at least one step is needed")
    if not math.isfinite(guidance) or guidance < 0:
        problems.append(f"--guidance {guidance} must be a number of at least 0")
    if guidance != 1.0 and not conditional:
        problems.append("--guidance needs classes, and this run was trained without")
    if problems:
        raise ConfigError(*problems)


def _existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    for folder in (path, *path.resolve().parents):
        if folder.is_dir():
            return folder
    return Path()
