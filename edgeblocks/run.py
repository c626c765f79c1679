"""A run that exists on disk, in use: sampling, evaluation, export."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeblocks import metrics, pictures
from edgeblocks.chain import BlockRunner, EmaSource, class_labels, guided
from edgeblocks.checkpoint import RunDirectory
from edgeblocks.data.images import ImageSet
from edgeblocks.errors import OutOfBudgetError, RunError
from edgeblocks.guard import is_refusal
from edgeblocks.host_tier import HostTier
from edgeblocks.listener import Listener, Silent
from edgeblocks.noise import sampler_levels
from edgeblocks.planner import inference_micro_batch
from edgeblocks.preparation import device_budget_bytes, measure, open_run_images
from edgeblocks.randomness import start_noise
from edgeblocks.registry import build_exporter, build_target
from edgeblocks.run_files import read_summary
from edgeblocks.scheduler import EmaLoader
from edgeblocks.solver import Solver, check_request, class_number, integrate
from edgeblocks.store import BlockHeader
from edgeblocks.units import format_bytes


class Run:
    """A run that exists on disk, for sampling, evaluation and export with its EMA weights."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None while the run is not finished.

        Raises:
            RunError: it is damaged.
        """
        path = self.path / "summary.json"
        return read_summary(path) if path.exists() else None

    def runner(self, source: EmaSource, *, micro_batch: int) -> BlockRunner:
        return BlockRunner(
            self.directory.family(), self.directory.layers, self.directory.partition, source, micro_batch=micro_batch
        )

    @contextmanager
    def fitting_runner(self, *, samples: int, mem_budget: str | None = None) -> Iterator[BlockRunner]:
        """A runner whose micro-batch keeps the process inside the budget (the run's own, or another one), and a cap.

        Raises:
            DoesNotFitError: one sample at a time does not fit.
            OutOfBudgetError: memory was refused at the cap.
        """
        directory = self.directory
        target = build_target(directory.settings.run.target)
        target.prepare()
        budget_bytes = (
            device_budget_bytes(mem_budget, target) if mem_budget is not None else int(directory.plan["budget_bytes"])
        )
        costs, machine = measure(directory.settings, directory.data, directory.path, target, Silent())
        image_bytes = 4 * directory.data.channels * directory.data.height * directory.data.width
        micro_batch = inference_micro_batch(
            costs,
            machine,
            layers=directory.layers,
            samples=samples,
            budget_bytes=budget_bytes,
            held_bytes=8 * samples * image_bytes,
        )
        store = directory.store()
        host = None if target.host_bytes() is None else HostTier(store, target, parts=EmaLoader.PARTS)
        runner = self.runner(EmaLoader(store, host=host), micro_batch=micro_batch)
        try:
            with target.capped(budget_bytes):
                yield runner
        except (MemoryError, RuntimeError) as error:
            if not is_refusal(error):
                raise
            raise OutOfBudgetError(
                f"memory was refused at the budget of {format_bytes(budget_bytes)}, "
                f"{format_bytes(target.used_bytes())} are in use; give more with "
                f"--mem-budget {int(budget_bytes * 1.25 / 1e6)}MB, or ask for fewer samples"
            ) from error

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
            OutOfBudgetError: memory was refused at the cap.
        """
        directory = self.directory
        family = directory.family()
        check_request(n=n, steps=steps, guidance=guidance, conditional=family.conditional)
        levels = sampler_levels(directory.partition, num_steps=steps)
        labels = class_labels(
            n, num_classes=directory.data.num_classes, chosen=class_number(label, directory.class_names)
        )
        data = directory.data
        given = None if runner is None else nullcontext(runner)
        with given or self.fitting_runner(samples=n, mem_budget=mem_budget) as chosen:
            noise = torch.from_numpy(start_noise((data.channels, data.height, data.width), num_samples=n, seed=seed))
            denoise = guided(chosen.denoise, labels, guidance=guidance, no_class=data.num_classes)
            x = integrate(denoise, noise, levels, solver=solver, on_level=on_level)
            return pictures.to_uint8(x.numpy(), mean=data.mean, scale=data.scale)

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
        target = build_target(directory.settings.run.target)
        planned = directory.plan.get("ram_budget_bytes") or directory.plan["budget_bytes"]
        budget_bytes = planned if mem_budget is None else device_budget_bytes(mem_budget, target)
        images = open_run_images(directory.settings, listener, budget_bytes=budget_bytes, target=target)
        if images.fingerprint != directory.data_fingerprint:
            raise RunError(f"{directory.data_source} is not the data that {directory.path} was trained on")
        if len(images.held_out):
            samples = min(samples, len(images.held_out))
        with self.fitting_runner(samples=max(samples, metrics.MOST_IMAGES), mem_budget=mem_budget) as runner:
            return self._evaluate(runner, images, samples=samples, steps=steps, seed=seed, listener=listener)

    def _evaluate(
        self, runner: BlockRunner, images: ImageSet, *, samples: int, steps: int, seed: int, listener: Listener
    ) -> dict[str, Any]:
        directory = self.directory
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

    def _headers(self) -> list[BlockHeader]:
        store = self.directory.store()
        return [store.header(block) for block in range(len(self.directory.layers))]

    def export(self, out: Path | str, *, listener: Listener | None = None) -> dict[str, Any]:
        """Write the run as ONNX graphs with a manifest, verify it against torch, and return the manifest.

        Raises:
            EdgeblocksError: onnxruntime's numbers differ from torch's by more than is promised.
        """
        manifest: dict[str, Any] = build_exporter()(self.directory, Path(out), listener or Silent())
        return manifest
