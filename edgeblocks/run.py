"""A run that exists on disk, in use: sampling, evaluation, export."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeblocks import classification, drawing, generation, likelihood, metrics, pictures, unmasking
from edgeblocks.chain import BlockRunner, EmaSource, class_labels, guided, token_chain
from edgeblocks.checkpoint import RunDirectory
from edgeblocks.data.dataset import DataSet
from edgeblocks.data.images import ImageSet
from edgeblocks.data.text import TextSet
from edgeblocks.drawing import TEXT_TASKS
from edgeblocks.errors import ConfigError, DoesNotFitError, OutOfBudgetError, RunError
from edgeblocks.generation import TokenChain
from edgeblocks.guard import is_refusal
from edgeblocks.host_tier import HostTier
from edgeblocks.listener import Listener, Silent
from edgeblocks.noise import sampler_levels, unmasking_steps
from edgeblocks.planner import inference_micro_batch
from edgeblocks.preparation import device_budget_bytes, measure, open_run_data
from edgeblocks.randomness import start_noise
from edgeblocks.registry import build_exporter, build_target
from edgeblocks.run_files import read_summary
from edgeblocks.scheduler import EmaLoader
from edgeblocks.solver import Solver, check_request, class_number, integrate
from edgeblocks.store import BlockHeader
from edgeblocks.text_quality import variety
from edgeblocks.units import format_bytes

DEFAULT_SAMPLES = {"images": 256, "classes": 1024, "text": 256, "continuation": 64}
"""Of an evaluation, by the family's task: images made, images classified, sequences of the bound."""
DEFAULT_STEPS = {
    "images": 18,
    "classes": classification.DEFAULT_STEPS,
    "text": unmasking.DEFAULT_STEPS,
    "continuation": generation.DEFAULT_STEPS,
}
VARIETY_TEXTS = 16
CURVE_STEPS = (1, 2, 4, 8, 16, 32)
CURVE_TEXTS = 16


def _fitting(micro_batch_of: Callable[..., int], *, most_residents: int) -> tuple[int, int]:
    """The largest micro-batch that fits with the largest number of blocks in memory that fits, and that number."""
    for residents in range(most_residents, 1, -1):
        try:
            return micro_batch_of(residents=residents), residents
        except DoesNotFitError:
            continue
    return micro_batch_of(residents=1), 1


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

    def runner(self, source: EmaSource, *, micro_batch: int, residents: int = 1) -> BlockRunner:
        return BlockRunner(
            self.directory.family(),
            self.directory.layers,
            self.directory.partition,
            source,
            micro_batch=micro_batch,
            residents=residents,
        )

    @contextmanager
    def fitting_runner(
        self, *, samples: int, mem_budget: str | None = None, chain: TokenChain | None = None
    ) -> Iterator[BlockRunner]:
        """A runner whose micro-batch keeps the process inside the budget (the run's own, or another one), and a cap.

        Args:
            chain: of text that is written token by token: its keys and values are counted, and because every token runs
                all blocks, as many of these stay in memory as there is room for.

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
        micro_batch, residents = _fitting(
            partial(
                inference_micro_batch,
                costs,
                machine,
                layers=directory.layers,
                samples=samples,
                budget_bytes=budget_bytes,
                held_bytes=8 * samples * directory.data.example_bytes,
                sample_bytes=0 if chain is None else chain.sample_bytes,
            ),
            most_residents=1 if chain is None else len(directory.layers),
        )
        store = directory.store()
        host = None if target.host_bytes() is None else HostTier(store, target, parts=EmaLoader.PARTS)
        loader = EmaLoader(store, host=host, slots=residents)
        runner = self.runner(loader, micro_batch=micro_batch, residents=residents)
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
        if family.task != "images":
            does = "tells images apart" if family.task == "classes" else "writes text (sample_text)"
            raise ConfigError(
                f"{directory.path} is a {family.name}, which {does} and makes no images; see how well with: "
                f"edgeblocks eval {directory.path}"
            )
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

    def sample_text(
        self,
        *,
        n: int = 4,
        steps: int | None = None,
        temperature: float = 1.0,
        fill: str | None = None,
        prompt: str | None = None,
        top_p: float | None = None,
        length: int | None = None,
        seed: int = 0,
        mem_budget: str | None = None,
        runner: BlockRunner | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Texts as long as those that the run was trained on: that begin with `prompt`, or `fill` with its gaps filled.

        Args:
            steps: at least one a block. Of unmasking (None: 64), or noise levels of each token's chain (None: 8).
            temperature: 1 draws as the network was trained, 0 takes the likeliest token.
            fill: for mdlm, a text in which each missing token is written `_` or `[MASK]`.
            prompt: for ar and looped, how each text begins.
            top_p: for ar and looped, draw from the smallest set of the likeliest tokens with this probability; None: 1.
            length: for ar and looped, tokens of a text with its prompt; None: as many as the run was trained on.
            on_step: called with the steps done, or the tokens written, and how many there will be.

        Raises:
            ConfigError: an impossible argument, or the run makes no text.
            DoesNotFitError: not even one text at a time fits the budget.
            OutOfBudgetError: memory was refused at the cap.
        """
        directory, family = self.directory, self.directory.family()
        if family.task not in TEXT_TASKS:
            raise ConfigError(f"{directory.path} is a {family.name}, which makes no text")
        drawing.check_options(family.task, fill=fill, prompt=prompt, top_p=top_p)
        steps = max(DEFAULT_STEPS[family.task], len(directory.layers)) if steps is None else steps
        common: dict[str, Any] = {
            "n": n,
            "steps": steps,
            "temperature": temperature,
            "seed": seed,
            "on_step": on_step,
        }
        if family.task == "text":
            return self._unmasked(runner, mem_budget, fill=fill, **common)
        top_p = 1.0 if top_p is None else top_p
        return self._continued(runner, mem_budget, prompt=prompt or "", top_p=top_p, length=length, **common)

    def _unmasked(
        self,
        runner: BlockRunner | None,
        mem_budget: str | None,
        *,
        n: int,
        steps: int,
        temperature: float,
        fill: str | None,
        seed: int,
        on_step: Callable[[int, int], None] | None,
    ) -> list[str]:
        """Texts from masked diffusion; see `sample_text`."""
        directory, family = self.directory, self.directory.family()
        unmasking.check_writing(n=n, steps=steps, temperature=temperature)
        intervals = unmasking_steps(directory.partition, num_steps=steps)
        tokenizer = directory.tokenizer
        assert tokenizer is not None
        start, given = unmasking.with_gaps(fill, tokenizer, length=directory.data.length, mask=family.mask)
        with (
            nullcontext(runner)
            if runner is not None
            else self.fitting_runner(samples=n, mem_budget=mem_budget) as chosen
        ):
            tokens = unmasking.unmask(
                chosen.logits,
                np.tile(start, (n, 1)),
                steps=intervals,
                mask=family.mask,
                temperature=temperature,
                seed=seed,
                micro_batch=chosen.micro_batch,
                on_step=None if on_step is None else lambda done: on_step(done, steps),
            )
        return [tokenizer.decode(row[:given]) for row in tokens]

    def _continued(
        self,
        runner: BlockRunner | None,
        mem_budget: str | None,
        *,
        n: int,
        steps: int,
        temperature: float,
        prompt: str,
        top_p: float,
        length: int | None,
        seed: int,
        on_step: Callable[[int, int], None] | None,
    ) -> list[str]:
        """Texts written token by token; see `sample_text`."""
        tokenizer = self.directory.tokenizer
        assert tokenizer is not None
        generation.check_continuing(n=n, steps=steps, temperature=temperature, top_p=top_p)
        chain = self._token_chain(steps, length=length)
        given = tokenizer.encode(prompt)
        generation.check_prompt(given, length=chain.length)
        with (
            nullcontext(runner)
            if runner is not None
            else self.fitting_runner(samples=n, mem_budget=mem_budget, chain=chain) as chosen
        ):
            tokens = generation.write_texts(
                chosen.continued,
                chain,
                prompt=given,
                n=n,
                together=chosen.micro_batch,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_token=on_step,
            )
        return [tokenizer.decode(row) for row in tokens]

    def _token_chain(self, steps: int, *, length: int | None = None) -> TokenChain:
        directory = self.directory
        levels = sampler_levels(directory.partition, num_steps=steps)
        return token_chain(directory.family(), directory.layers, directory.partition, levels, length=length)

    def evaluate(
        self,
        *,
        samples: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        mem_budget: str | None = None,
        listener: Listener | None = None,
    ) -> dict[str, Any]:
        """Validation loss per noise level and in total, and how good the chain is at what it makes.

        Of images: the Frechet distance of fresh samples. Of classes: accuracy and calibration on hold-out images. Of
        text: the bound in bits a token and a character.

        Args:
            samples: images made (None: 256) or classified (None: 1024), 0 leaves the chain out; sequences of text that
                the bound is estimated on (None: 256).
            steps: noise levels of the chain, at least one a block; None: 18 for images, 4 for classes; the bound of a
                text has its own.

        Raises:
            RunError: the data are not those of the run.
        """
        listener = listener or Silent()
        directory = self.directory
        target = build_target(directory.settings.run.target)
        target.prepare()
        budget_bytes = directory.plan.get("ram_budget_bytes") or directory.plan["budget_bytes"]
        if mem_budget is not None and target.host_bytes() is None:
            budget_bytes = device_budget_bytes(mem_budget, target)
        data_set = open_run_data(directory.settings, listener, budget_bytes=budget_bytes, target=target)
        if data_set.fingerprint != directory.data_fingerprint:
            raise RunError(f"{directory.data_source} is not the data that {directory.path} was trained on")
        task = directory.family().task
        if samples is None:
            samples = DEFAULT_SAMPLES[task]
        samples = len(data_set.evaluation_indices(samples)) if data_set.has_held_out else samples
        steps = max(DEFAULT_STEPS[task] if steps is None else steps, len(directory.layers))
        with self.fitting_runner(
            samples=max(samples, metrics.MOST_EXAMPLES[task]),
            mem_budget=mem_budget,
            chain=self._token_chain(max(steps, *CURVE_STEPS)) if task == "continuation" else None,
        ) as runner:
            return self._evaluate(runner, data_set, samples=samples, steps=steps, seed=seed, listener=listener)

    def _evaluate(
        self, runner: BlockRunner, data_set: DataSet, *, samples: int, steps: int, seed: int, listener: Listener
    ) -> dict[str, Any]:
        directory, family = self.directory, self.directory.family()
        loss = metrics.validation_loss(
            family,
            runner,
            data_set,
            seed=directory.settings.run.seed,
            most_examples=max(samples, 2) if family.task in TEXT_TASKS else metrics.MOST_EXAMPLES[family.task],
            on_level=lambda done, total: listener.advance(done, total, "validation loss"),
        )
        result: dict[str, Any] = {
            "run": str(directory.path),
            "blocks": len(directory.layers),
            "steps": [runner_step.step for runner_step in self._headers()],
            "validation_loss": loss["total"],
            "validation_loss_by_block": metrics.mean_by_block(loss["levels"], directory.partition),
            "validation": loss,
        }
        if family.task == "text":
            result["text"] = metrics.text_scores(loss, data_set)
        elif family.task == "continuation":
            assert isinstance(data_set, TextSet)
            result |= self._continuation(runner, data_set, max(samples, 2), steps, seed, listener)
            result["cross_entropy_at_top"] = loss["levels"][0]["loss"]
        elif family.task == "classes" and samples >= 1:
            result["top1_by_block"] = metrics.mean_by_block(loss["levels"], directory.partition, "top1")
            result["classification"] = self._classification(runner, data_set, samples, steps, seed, listener)
        elif family.task == "images" and samples >= 2:
            assert isinstance(data_set, ImageSet)
            made = self.sample(
                n=samples,
                steps=steps,
                seed=seed,
                runner=runner,
                on_level=lambda done: listener.advance(done, steps, "sampling"),
            )
            result["frechet"] = metrics.sample_distance(made, data_set)
        return result

    def _continuation(
        self, runner: BlockRunner, text: TextSet, samples: int, steps: int, seed: int, listener: Listener
    ) -> dict[str, Any]:
        """The bound of hold-out text, over how many levels it is worth going where levels repeat the same network, and
        how varied texts are that the chain writes, beside as many of the hold-out part."""
        tokens, _ = text.gather(text.evaluation_indices(samples))
        chain = self._token_chain(steps)
        found = likelihood.bound(
            runner, chain, tokens, seed=seed, on_noise=lambda done, total: listener.advance(done, total, "bound")
        )
        bounds = [
            {"noises": noises, "nats_per_token": nats, **metrics.bits(nats, error, text)}
            for noises, (nats, error) in found.items()
        ]
        result: dict[str, Any] = {
            "text": {**bounds[-1], **metrics.text_facts(text, len(tokens)), "steps": steps},
            "bounds": bounds,
        }
        if chain.caches_per == "step":
            result["curve"] = self._curve(runner, text, tokens[:CURVE_TEXTS], seed, listener)
        written = self.sample_text(
            n=VARIETY_TEXTS,
            steps=steps,
            seed=seed,
            runner=runner,
            on_step=lambda done, total: listener.advance(done, total, "writing"),
        )
        held_out, _ = text.gather(text.evaluation_indices(VARIETY_TEXTS))
        result["variety"] = {
            "samples": variety(written),
            "held_out": variety([text.tokenizer.decode(row) for row in held_out]),
        }
        return result

    def _curve(
        self, runner: BlockRunner, text: TextSet, tokens: np.ndarray, seed: int, listener: Listener
    ) -> list[dict[str, Any]]:
        """The bound with one noise against the number of levels."""
        rows = []
        for done, steps in enumerate(CURVE_STEPS):
            if steps >= len(self.directory.layers):
                nats, error = likelihood.bound(runner, self._token_chain(steps), tokens, seed=seed, noises=(1,))[1]
                rows.append({"steps": steps, **metrics.bits(nats, error, text)})
            listener.advance(done + 1, len(CURVE_STEPS), "levels")
        return rows

    def _classification(
        self, runner: BlockRunner, data_set: DataSet, samples: int, steps: int, seed: int, listener: Listener
    ) -> dict[str, Any]:
        """`classification.classification_scores` on the first of the hold-out images."""
        pixels, labels = data_set.gather(data_set.evaluation_indices(samples))
        assert labels is not None
        probabilities = self._probabilities(
            runner,
            pixels,
            steps=steps,
            noises=classification.DEFAULT_NOISES,
            seed=seed,
            on_level=lambda done: listener.advance(done, steps, "classifying"),
        )
        return classification.classification_scores(probabilities, labels)

    def _probabilities(
        self,
        runner: BlockRunner,
        pixels: np.ndarray,
        *,
        steps: int,
        noises: int,
        seed: int,
        on_level: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        condition = self.directory.family().condition(pixels)
        return classification.classify(
            lambda z, sigma: runner.denoise(torch.from_numpy(z), sigma, condition).numpy(),
            num_images=len(pixels),
            num_classes=self.directory.data.num_classes,
            levels=sampler_levels(self.directory.partition, num_steps=steps),
            noises=noises,
            seed=seed,
            on_level=on_level,
        )

    def classify(
        self,
        pixels: np.ndarray,
        *,
        steps: int | None = None,
        noises: int = classification.DEFAULT_NOISES,
        seed: int = 0,
        mem_budget: str | None = None,
    ) -> np.ndarray:
        """Probabilities of the classes, float32 [N, classes], of images uint8 [N, H, W, C] of the run's size.

        Raises:
            ConfigError: the run makes images, or these have another size.
            DoesNotFitError: not even one image at a time fits the budget.
        """
        directory, family = self.directory, self.directory.family()
        if family.task != "classes":
            raise ConfigError(f"{directory.path} is a {family.name}, which makes images and does not classify them")
        data = directory.data
        shape = (data.height, data.width, data.channels)
        if pixels.shape[1:] != shape or pixels.dtype != np.uint8:
            raise ConfigError(f"images are {pixels.dtype} {pixels.shape[1:]}; the run takes uint8 {shape}")
        steps = max(DEFAULT_STEPS[family.task] if steps is None else steps, len(directory.layers))
        with self.fitting_runner(samples=len(pixels), mem_budget=mem_budget) as runner:
            return self._probabilities(runner, pixels, steps=steps, noises=noises, seed=seed)

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
