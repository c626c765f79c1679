"""The Python interface: plan, train, load; and on a loaded run sample, evaluate, export.

Everything the command line does goes through here; `cli` only reads arguments and prints.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from edgeblocks import metrics, pictures
from edgeblocks.checkpoint import RunDirectory, create_run, open_run, seal_run
from edgeblocks.config import read_yaml, resolve_settings
from edgeblocks.data.images import ImageSet
from edgeblocks.errors import ConfigError, DoesNotFitError, InterruptedRunError, RunError
from edgeblocks.listener import Listener, Silent
from edgeblocks.preparation import Prepared, existing_folder, open_run_images, prepare
from edgeblocks.registry import build_target, family_type
from edgeblocks.run import Run
from edgeblocks.scheduler import Scheduler
from edgeblocks.trainer import Interruption, Progress, Trainer, create_blocks
from edgeblocks.units import format_bytes

__all__ = ["Prepared", "Run", "load", "plan", "resume", "train"]


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


def train(
    *,
    out: Path | str,
    config: Path | str | None = None,
    listener: Listener | None = None,
    **settings: Any,
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
    free = psutil.disk_usage(str(existing_folder(path))).free
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
    images = open_run_images(run.settings, listener)
    if images.fingerprint != run.data_fingerprint:
        raise RunError(
            f"the data of {run.path} have changed: {run.data_source} is not what the run was trained on; put the "
            f"former data back, or start a new run with --out"
        )
    budget_bytes = int(run.plan["budget_bytes"])
    predicted = run.plan["predicted_peak_bytes"] - run.plan["breakdown"]["runtime"] + target.used_bytes()
    if predicted > budget_bytes:
        raise DoesNotFitError(
            f"the plan of {run.path} needs {format_bytes(predicted)} on this machine, its budget is "
            f"{format_bytes(budget_bytes)}: the interpreter and libraries take {format_bytes(target.used_bytes())} "
            f"here; start a new run with a larger --mem-budget",
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
    target: Any,
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


def load(path: Path | str) -> Run:
    """A run that exists on disk.

    Raises:
        RunError: not a run, damaged, or of another version.
    """
    return Run(open_run(Path(path)))
