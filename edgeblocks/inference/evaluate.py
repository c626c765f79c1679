"""How good a run is: its loss at each noise level, and its chain compared with the hold-out part of the data."""

import math
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch

from edgeblocks.data.dataset import DataSet
from edgeblocks.data.images import ImageSet
from edgeblocks.data.text import TextSet
from edgeblocks.diffusion import classification
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.inference import likelihood, metrics
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.inference.metrics import Bits, SampleDistance, TextBound, TextFacts, ValidationLoss
from edgeblocks.inference.sampling import (
    Runners,
    always,
    classified,
    sample_images,
    sample_texts,
    token_chain_of,
    usual_steps,
)
from edgeblocks.inference.text_variety import variety
from edgeblocks.methods import MethodName
from edgeblocks.profiling.budgets import device_budget_bytes
from edgeblocks.progress import Listener
from edgeblocks.registry import build_target
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.latents import autoencoder_of
from edgeblocks.runs.open_data import open_run_data
from edgeblocks.seeds import generator_at
from edgeblocks.tasks import TASKS, TEXT_TASKS

VARIETY_TEXTS = 16
CURVE_STEPS = (1, 2, 4, 8, 16, 32)
CURVE_TEXTS = 16


class Bound(Bits):
    """Of text that is continued: with so many noises a token."""

    noises: int
    nats_per_token: float


class OfCurve(Bits):
    """Of text that is continued: with so many levels, or iterations."""

    steps: int


class Variety(TypedDict):
    """How varied texts are that were written, beside as many of the hold-out part, see `text_variety.variety`."""

    samples: dict[str, float | None]
    held_out: dict[str, float | None]


class ChainBound(Bound, TextFacts):
    """The bound of text that is continued, and what it is of."""

    steps: int
    """Of the chain."""


class Evaluated(TypedDict):
    """What `Run.evaluate` gives, and `eval --json` prints."""

    run: str
    method: MethodName
    blocks: int
    steps: list[int]
    """Of each block."""
    validation_loss: float
    validation_loss_by_block: list[float | None]
    validation: ValidationLoss
    in_both: NotRequired[metrics.InBoth]
    """Of a network that computes in half precision."""
    text: NotRequired[TextBound | ChainBound]
    bounds: NotRequired[list[Bound]]
    curve: NotRequired[list[OfCurve]]
    variety: NotRequired[Variety]
    perplexity: NotRequired[float]
    cross_entropy_at_top: NotRequired[float]
    top1_by_block: NotRequired[list[float | None]]
    classification: NotRequired[classification.Classification]
    frechet: NotRequired[SampleDistance]


def evaluate(
    directory: RunDirectory,
    runners: Runners,
    *,
    samples: int | None,
    steps: int | None,
    seed: int,
    mem_budget: str | None,
    listener: Listener,
) -> Evaluated:
    """See `Run.evaluate`."""
    task = directory.family().task
    _check(task, samples, steps)
    data_set = _run_data(directory, mem_budget, listener)
    if samples is None:
        samples = TASKS[task].evaluation_samples
    # Not more samples than hold-out examples to set beside them.
    samples = len(data_set.evaluation_indices(samples)) if data_set.has_held_out else samples
    # Each block has at least one level.
    steps = usual_steps(directory) if steps is None else max(steps, len(directory.layers))
    writes = directory.family().writes_text
    chain = token_chain_of(directory, steps) if task == "continuation" and writes else None
    evaluation = Evaluation(
        directory=directory, data_set=data_set, samples=samples, steps=steps, seed=seed, listener=listener
    )
    kept_bytes = None if chain is None else chain.sample_bytes
    with runners(samples=max(samples, TASKS[task].loss_examples), kept_bytes=kept_bytes) as runner:
        result = evaluation.result(runner)
        made = evaluation.images(runner)
    # The runner, its weights and activations with it, makes room first: the budget has none for both.
    del runner
    if made is not None:
        assert isinstance(data_set, ImageSet)
        result["frechet"] = metrics.sample_distance(made, data_set)
    return result


def _check(task: str, samples: int | None, steps: int | None) -> None:
    """That an evaluation can be asked for like that.

    Raises:
        ConfigError: with all that is impossible.
    """
    problems = []
    fewest = 2 if task in TEXT_TASKS else 0
    if samples is not None and samples < fewest:
        problems.append(f"--samples {samples}: at least {fewest} are needed")
    if steps is not None and steps < 1:
        problems.append(f"--steps {steps}: a chain has at least one noise level")
    if steps is not None and task == "text":
        problems.append(f"--steps {steps}: the bound of a text that is filled in has no chain; leave --steps out")
    if problems:
        raise ConfigError(*problems)


def _run_data(directory: RunDirectory, mem_budget: str | None, listener: Listener) -> DataSet:
    """The data of a run, after a look that they are those."""
    autoencoder_of(directory)
    target = build_target(directory.settings.run.target)
    target.prepare()
    budget_bytes = directory.plan.ram_budget_bytes or directory.plan.budget_bytes
    if mem_budget is not None and target.host_bytes() is None:
        budget_bytes = device_budget_bytes(mem_budget, target)
    data_set = open_run_data(directory.data_settings, listener, budget_bytes=budget_bytes, target=target)
    if data_set.fingerprint != directory.data_fingerprint:
        raise RunError(f"{directory.data_source} is not the data that {directory.path} was trained on")
    return data_set


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one evaluation looks at."""

    directory: RunDirectory
    data_set: DataSet
    samples: int
    steps: int
    seed: int
    listener: Listener

    def result(self, runner: BlockRunner) -> Evaluated:
        """The loss, and what the family's task adds to it while its weights are in memory."""
        directory, data_set, samples = self.directory, self.data_set, self.samples
        family, store = directory.family(), directory.store()
        loss = metrics.validation_loss(
            family,
            runner,
            data_set,
            seed=directory.settings.run.seed,
            most_examples=max(samples, 2) if family.task in TEXT_TASKS else TASKS[family.task].loss_examples,
            on_level=lambda done, total: self.listener.advance(done, total, "validation loss"),
        )
        result: Evaluated = {
            "run": str(directory.path),
            "method": directory.settings.run.method,
            "blocks": len(directory.file_layers),
            "steps": directory.saved_steps(store),
            "validation_loss": loss["total"],
            "validation_loss_by_block": metrics.mean_by_block(loss["levels"], directory.partition),
            "validation": loss,
        }
        if runner.precision != "fp32":
            result["in_both"] = metrics.loss_in_both(family, runner, data_set, seed=directory.settings.run.seed)
        if not family.writes_text:
            result["perplexity"] = math.exp(loss["total"])
        elif family.task == "text":
            result["text"] = metrics.text_scores(loss["total"], loss["standard_error"], loss["images"], data_set)
        elif family.task == "continuation":
            assert isinstance(data_set, TextSet)
            self._add_continuation_(result, runner, data_set)
            result["cross_entropy_at_top"] = loss["levels"][0]["loss"]
        elif family.task == "classes" and samples >= 1:
            result["top1_by_block"] = metrics.mean_by_block(loss["levels"], directory.partition, "top1")
            result["classification"] = self._classification(runner)
        return result

    def images(self, runner: BlockRunner) -> np.ndarray | None:
        """Fresh samples, where the family makes images and enough are asked for to compare them with others."""
        if self.directory.family().task != "images" or self.samples < 2:
            return None
        return sample_images(
            self.directory,
            always(runner),
            n=self.samples,
            steps=self.steps,
            seed=self.seed,
            on_level=lambda done: self.listener.advance(done, self.steps, "sampling"),
            on_picture=lambda done, total: self.listener.advance(done, total, "decoding"),
        )

    def _add_continuation_(self, result: Evaluated, runner: BlockRunner, text: TextSet) -> None:
        """Add the bound of hold-out text, over how many levels it is worth going where levels repeat the same network,
        and how varied texts are that the chain writes, beside as many of the hold-out part."""
        tokens, _ = text.gather(text.evaluation_indices(max(self.samples, 2)))
        chain = token_chain_of(self.directory, self.steps)
        found = likelihood.bound(
            runner,
            chain,
            tokens,
            seed=self.seed,
            on_noise=lambda done, total: self.listener.advance(done, total, "bound"),
        )
        bounds: list[Bound] = [
            {"noises": noises, "nats_per_token": nats, **metrics.bits(nats, error, text)}
            for noises, (nats, error) in found.items()
        ]
        whole_bound: ChainBound = {**bounds[-1], **metrics.text_facts(text, len(tokens)), "steps": self.steps}
        result["text"] = whole_bound
        result["bounds"] = bounds
        # Levels are iterations of one core there, so more of them can be worth their time; elsewhere another block
        # runs.
        if chain.caches_per == "step":
            result["curve"] = self._curve(runner, text, tokens[:CURVE_TEXTS])
        elif runner.family.unrolled:
            result["curve"] = self._iterations_curve(runner, text)
        written = sample_texts(
            self.directory,
            always(runner),
            n=VARIETY_TEXTS,
            steps=self.steps,
            seed=self.seed,
            on_step=lambda done, total: self.listener.advance(done, total, "writing"),
        )
        held_out, _ = text.gather(text.evaluation_indices(VARIETY_TEXTS))
        result["variety"] = {
            "samples": variety(written),
            "held_out": variety([text.tokenizer.decode(row) for row in held_out]),
        }

    def _curve(self, runner: BlockRunner, text: TextSet, tokens: np.ndarray) -> list[OfCurve]:
        """The bound with one noise against the number of levels."""
        rows: list[OfCurve] = []
        for done, steps in enumerate(CURVE_STEPS):
            if steps >= len(self.directory.layers):
                chain = token_chain_of(self.directory, steps)
                nats, error = likelihood.bound(runner, chain, tokens, seed=self.seed, noises=(1,))[1]
                rows.append({"steps": steps, **metrics.bits(nats, error, text)})
            self.listener.advance(done + 1, len(CURVE_STEPS), "levels")
        return rows

    def _iterations_curve(self, runner: BlockRunner, text: TextSet) -> list[OfCurve]:
        """Bits against the number of iterations of a core that was trained unrolled."""
        family = runner.family
        rows: list[OfCurve] = []
        assert family.task == "continuation"
        indices, network = text.evaluation_indices(CURVE_TEXTS), runner.network(0)
        level = family.evaluation_levels(self.directory.partition)[0]
        batch = family.at_level(*text.gather(indices), level, generator_at(0))
        for done, count in enumerate(CURVE_STEPS):
            # The same examples for every count: what differs from row to row is the number of iterations alone.
            nats = []
            for start in range(0, len(indices), runner.micro_batch):
                part = {name: tensor[start : start + runner.micro_batch] for name, tensor in batch.items()}
                asking = family.with_iterations(part, count)
                nats.append(metrics.scores_of(family, runner, network, asking)["loss"])
            rows.append({"steps": count, **metrics.bits(float(torch.cat(nats).mean()), None, text)})
            self.listener.advance(done + 1, len(CURVE_STEPS), "iterations")
        return rows

    def _classification(self, runner: BlockRunner) -> classification.Classification:
        """`classification.classification_scores` on the first of the hold-out images."""
        answers = classified(
            self.directory,
            runner,
            self.data_set,
            self.data_set.evaluation_indices(self.samples),
            steps=self.steps,
            # Where nothing is noised, several would be the same.
            noises=1 if self.directory.method.one_network else TASKS["classes"].noises,
            seed=self.seed,
            on_level=lambda done: self.listener.advance(done, self.steps, "classifying"),
        )
        return classification.classification_scores(answers)
