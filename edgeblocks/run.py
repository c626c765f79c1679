"""A run that exists on disk, in use: sampling, evaluation, export."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy, nn

from edgeblocks.data.tokenizer import Tokenizer
from edgeblocks.diffusion.classification import classified_bytes, classified_together
from edgeblocks.diffusion.solver import Solver
from edgeblocks.errors import MAY_BE_REFUSALS, ConfigError, DoesNotFitError, OutOfBudgetError, is_refusal
from edgeblocks.families.base import TextInfo
from edgeblocks.inference import sampling
from edgeblocks.inference.block_runner import BlockRunner, EmaSource
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.inference.evaluate import Evaluated, evaluate
from edgeblocks.inference.sampling import Runners, chains_of
from edgeblocks.inference.staged_weights import loaded_ema
from edgeblocks.inference.trained_network import trained_network
from edgeblocks.inference.tuned_text import tuned_writer
from edgeblocks.methods import Frozen
from edgeblocks.offload.device import Target
from edgeblocks.planning.planner import inference_micro_batch
from edgeblocks.planning.plans import micro_batches
from edgeblocks.pretrained.autoencoder import encoded_means
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.pretrained.writing import TextWriter
from edgeblocks.profiling.budgets import budget_of_this_process, device_budget_bytes
from edgeblocks.profiling.latents import decoding_bytes
from edgeblocks.profiling.measurement import measure
from edgeblocks.profiling.precisions import untouched_bytes
from edgeblocks.progress import Listener, Silent
from edgeblocks.registry import build_exporter, build_target
from edgeblocks.runs.apart import steps_left
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.latents import autoencoder_of
from edgeblocks.runs.merging import Merged, check_same_model, merge_model, write_adapter
from edgeblocks.runs.open_data import stored_source
from edgeblocks.runs.save_weights import WrittenWeights, write_weights
from edgeblocks.tasks import TASKS
from edgeblocks.units import format_bytes


def _fitting(
    micro_batch_of: Callable[..., int],
    *,
    most_together: int,
    sample_bytes: int,
    made_bytes: int,
    most_residents: int,
) -> tuple[int, int, int]:
    """The largest micro-batch that fits, with how many blocks in memory, and with how many samples at the same time.

    Args:
        sample_bytes: of a sample on its way.
        made_bytes: of all samples once they are made.

    All samples together come first, then blocks in memory: a chain loads each block once for the samples that walk it.
    """
    refused: DoesNotFitError | None = None
    for together in micro_batches(most_together):
        for residents in range(most_residents, 0, -1):
            try:
                held_bytes = made_bytes + sample_bytes * together
                return micro_batch_of(residents=residents, held_bytes=held_bytes), residents, together
            except DoesNotFitError as error:
                refused = error
    assert refused is not None
    raise refused


@contextmanager
def within(target: Target, budget_bytes: int, *, untouched_bytes: int = 0) -> Iterator[None]:
    """A cap at a budget while this lasts.

    Raises:
        OutOfBudgetError: memory was refused at it.
    """
    try:
        with target.capped(budget_bytes, untouched_bytes=untouched_bytes):
            yield
    except MAY_BE_REFUSALS as error:
        if not is_refusal(error):
            raise
        raise OutOfBudgetError(
            f"memory was refused at the budget of {format_bytes(budget_bytes)}, "
            f"{format_bytes(target.used_bytes())} are in use; give more with "
            f"--mem-budget {int(budget_bytes * 1.25 / 1e6)}MB, or ask for fewer samples"
        ) from error


CHAIN_COPIES = 8
"""Of a sample whose chain is walked: the solver's five, the network's input, what makes a picture of it."""


class Run:
    """A run that exists on disk, for sampling, evaluation and export with its EMA weights."""

    def __init__(self, directory: RunDirectory, *, frozen: Frozen = "none") -> None:
        """
        Args:
            frozen: as what blocks are in memory while they wait for their turn: none as they are, int8 a quarter of it,
                nf4 a seventh.
        """
        self.directory, self._frozen = directory, frozen

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.directory.path

    @property
    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json, as `train --json` prints it; None while the run is not finished.

        Raises:
            RunError: it is damaged.
        """
        summary = self.directory.summary
        return None if summary is None else summary.to_json()

    @property
    def left(self) -> dict[int, int]:
        """Steps that each block has still to make, by its number; none where the run is trained.

        Raises:
            RunError: a block's file is missing or damaged.
        """
        return steps_left(self.directory)

    def runner(
        self, source: EmaSource, *, micro_batch: int, residents: int = 1, together: int | None = None
    ) -> BlockRunner:
        return sampling.runner_of(
            self.directory,
            source,
            micro_batch=micro_batch,
            residents=residents,
            together=together,
            shared_memory=isinstance(source, EmaLoader) and source.shares_memory,
        )

    @contextmanager
    def fitting_runner(
        self, *, samples: int, mem_budget: str | None = None, kept_bytes: int | None = None
    ) -> Iterator[BlockRunner]:
        """A runner whose micro-batch keeps the process inside the budget (the run's own, or another one), and a cap.

        Args:
            kept_bytes: of text that is written token by token, its keys and values. Because every token runs
                all blocks, as many of these stay in memory as there is room for. So do stages that were trained
                together, because every noise level runs them all.

        Raises:
            DoesNotFitError: one sample at a time does not fit.
            OutOfBudgetError: memory was refused at the cap.
        """
        directory = self.directory
        if directory.family().only_exact:
            check_same_model(directory, model_folder(directory.settings.family.model))
        target = build_target(directory.settings.run.target)
        target.prepare()
        budget_bytes = (
            device_budget_bytes(mem_budget, target) if mem_budget is not None else directory.plan.budget_bytes
        )
        host_budget_bytes = budget_bytes
        if target.host_bytes() is not None:
            host_budget_bytes = budget_of_this_process(directory.settings.run, target)
        autoencoder_of(directory)  # before the memory is measured: its library takes some
        costs, machine = measure(directory.settings, directory.data, None, target, budget_bytes=host_budget_bytes)
        most_together, sample_bytes = samples, CHAIN_COPIES * directory.data.example_bytes
        if directory.family().task == "classes":
            chains = chains_of(directory)
            most_together, sample_bytes = classified_together(**chains), classified_bytes(1, **chains)
        micro_batch, residents, together = _fitting(
            partial(
                inference_micro_batch,
                costs,
                machine,
                layers=directory.file_layers,
                samples=samples,
                budget_bytes=budget_bytes,
                stem_readout_bytes=(4 * costs.parameters(0) if directory.method.one_network else 0)
                + directory.family().resident_bytes
                + decoding_bytes(directory.settings.run, directory.data, samples),
                sample_bytes=kept_bytes or 0,
                master=directory.master,
                frozen=self._frozen,
            ),
            most_together=min(samples, most_together),
            sample_bytes=sample_bytes,
            made_bytes=samples * directory.data.example_bytes // 4 if directory.family().task == "images" else 0,
            most_residents=1 if kept_bytes is None and not directory.method.one_network else len(directory.file_layers),
        )
        ema = loaded_ema(directory, slots=residents, device=target.device, frozen=self._frozen)
        # Stages are the slots' business: to the runner they are one block, whose layers come when they are run.
        blocks = 1 if directory.method.one_network else residents
        runner = self.runner(ema, micro_batch=micro_batch, residents=blocks, together=together)
        runner.budget_bytes = budget_bytes
        with within(target, budget_bytes, untouched_bytes=untouched_bytes(directory.precision)):
            yield runner

    def _runners(self, runner: BlockRunner | None, mem_budget: str | None) -> Runners:
        """The runner that is given, or those that fit."""
        if runner is None:
            return partial(self.fitting_runner, mem_budget=mem_budget)
        return sampling.always(runner)

    def sample(
        self,
        *,
        n: int = 64,
        steps: int | None = None,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        mem_budget: str | None = None,
        runner: BlockRunner | None = None,
        on_level: Callable[[int], None] | None = None,
        on_picture: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Samples, uint8 [n, H, W, C]. The classes take turns unless one is chosen by number or name.

        Args:
            steps: noise levels of the chain, at least one a block; None: 18, or one a block where there are more.
            on_picture: of a run on latents, called with the pictures that are decoded, and how many there will be.

        Raises:
            ConfigError: an impossible argument.
            RunError: the run's autoencoder is not there, or has changed.
            DoesNotFitError: not even one sample at a time fits the budget.
            OutOfBudgetError: memory was refused at the cap.
        """
        return sampling.sample_images(
            self.directory,
            self._runners(runner, mem_budget),
            n=n,
            steps=steps,
            solver=solver,
            guidance=guidance,
            label=label,
            seed=seed,
            on_level=on_level,
            on_picture=on_picture,
        )

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
        """Texts, as long as those that the run was trained on or shorter: that begin with `prompt`, or `fill` with its
        gaps filled.

        Args:
            steps: at least one a block. Of unmasking (None: 64), or noise levels of each token's chain (None: 8).
            temperature: 1 draws as the network was trained, 0 takes the likeliest token.
            fill: for mdlm, a text in which each missing token is written `_` or `[MASK]`.
            prompt: for ar and looped, how each text begins.
            top_p: for ar and looped, draw from the smallest set of the likeliest tokens with this probability; None: 1.
            length: tokens of a text with its prompt, at most as many as the run was trained on; None: that many. mdlm
                makes the whole text and gives its beginning.
            on_step: called with the steps done, or the tokens written, and how many there will be.

        Raises:
            ConfigError: an impossible argument, or the run makes no text.
            DoesNotFitError: not even one text at a time fits the budget.
            OutOfBudgetError: memory was refused at the cap.
        """
        return sampling.sample_texts(
            self.directory,
            self._runners(runner, mem_budget),
            n=n,
            steps=steps,
            temperature=temperature,
            fill=fill,
            prompt=prompt,
            top_p=top_p,
            length=length,
            seed=seed,
            on_step=on_step,
        )

    def evaluate(
        self,
        *,
        samples: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        data: object = None,
        mem_budget: str | None = None,
        listener: Listener | None = None,
    ) -> Evaluated:
        """Validation loss per noise level and in total, and how good the chain is at what it makes.

        Of images: the Frechet distance of fresh samples. Of classes: accuracy and calibration on hold-out images. Of
        text: the bound in bits a token and a character.

        Args:
            samples: images made or classified, 0 leaves the chain out; sequences of text that the bound is estimated
                on. None: what is usual for the task (`tasks.TASKS`).
            steps: noise levels of the chain, at least one a block; None: what is usual for the task. The bound of a
                text that is filled in has its own.
            data: where the run's data are now, if they were moved; or the data themselves, if they came from Python and
                the cache has them no more.

        Raises:
            ConfigError: it cannot be asked for like that.
            RunError: the data are not those of the run.
        """
        source = stored_source(data, self.directory.settings, listener or Silent())
        return evaluate(
            self.directory if source is None else self.directory.changed({"data": source}),
            self._runners(None, mem_budget),
            samples=samples,
            steps=steps,
            seed=seed,
            mem_budget=mem_budget,
            listener=listener or Silent(),
        )

    def classify(
        self,
        pixels: np.ndarray,
        *,
        steps: int | None = None,
        noises: int = TASKS["classes"].noises,
        seed: int = 0,
        mem_budget: str | None = None,
    ) -> np.ndarray:
        """Probabilities of the classes, float32 [N, classes], of images uint8 [N, H, W, C] of the run's size.

        Raises:
            ConfigError: the run makes images, or these have another size.
            DoesNotFitError: not even one image at a time fits the budget.
        """
        runners = self._runners(None, mem_budget)
        return sampling.classify_images(self.directory, runners, pixels, steps=steps, noises=noises, seed=seed)

    def export(
        self,
        out: Path | str,
        *,
        single_file: bool = False,
        weights: str | None = None,
        most_loss: str | None = None,
        overwrite: bool = False,
        mem_budget: str | None = None,
        listener: Listener | None = None,
    ) -> dict[str, Any]:
        """Write the run as ONNX graphs with a manifest, verify it against torch, and return the manifest.

        A fine-tuned model is always one graph, merged as `merge` does it.

        Args:
            single_file: one graph for the whole chain, which runs in any program that has onnxruntime; else one a
                block, of which one at a time is in memory.
            weights: as what matrices are written: int8, int4 or fp32. The default is fp32, and int8 of a fine-tuned
                model of text.
            most_loss: a percentage, such as "0.5%", by which int8 or int4 may raise the loss on hold-out data, or lower
                the probability that a classifier gives the right class, beyond what is noise; None: 0.5% of int8, any
                of int4. Not of a fine-tuned model of text, whose loss is told.
            overwrite: replace an export that is there; anything else is never replaced.
            mem_budget: what it may take of memory; None does not bound it. What it takes is told before it begins.

        Raises:
            ConfigError: there is something in the place already, or arguments do not go together.
            DoesNotFitError: it takes more than `mem_budget`.
            EdgeblocksError: onnxruntime's numbers differ from torch's by more than is promised, or rounding costs more
                than `most_loss`.
        """
        told: dict[str, Any] = {"listener": listener or Silent(), "mem_budget": mem_budget, "overwrite": overwrite}
        manifest: dict[str, Any]
        family = self.directory.family()
        if family.only_exact and single_file:
            raise ConfigError("--single-file: a fine-tuned model is always one graph; leave it out")
        if family.only_exact and family.task == "continuation":
            weights = weights or "int8"
            if weights not in ("int8", "int4", "fp32"):
                raise ConfigError(f"--weights {weights}: int8, int4 or fp32 can be written")
            if most_loss is not None:
                raise ConfigError(f"--most-loss {most_loss}: of a fine-tuned model the loss is told; leave it out")
            manifest = build_exporter("language model")(self, Path(out), weights=weights, **told)
            return manifest
        told |= {"weights": weights, "most_loss": most_loss}
        if family.only_exact:
            manifest = build_exporter("image classifier")(self, Path(out), **told)
            return manifest
        told["single_file"] = single_file
        manifest = build_exporter("blocks")(self.directory, Path(out), **told)
        return manifest

    def network(self, *, last: bool = False) -> nn.Module:
        """The trained network as one torch module on the processor, in evaluation mode, with parameters of its own.

        It is called as the family's blocks are: `network(z, sigma)`, with classes or images behind these; mdlm's
        `network(tokens, t)`. A classifier of `method="exact"` has `network.logits(images)` as well. Blocks that were
        trained alone are the parts `block_0`, `block_1` and so on, and each sample goes to the one of its noise level.
        `state_dict` has the names of `save_weights`. All weights are in memory, whatever the run's budget was.

        Args:
            last: with the weights as the last step left them; else with their average (EMA), which all else uses.

        Raises:
            RunError: a block is damaged, or the run is trained meanwhile.
        """
        return trained_network(self.directory, last=last)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the network's classes are called, in its order; empty where there are none."""
        return self.directory.class_names

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Has `encode`, a text's tokens, and `decode`, the text of tokens; None of a run on images."""
        return self.directory.tokenizer

    def images(self, pixels: np.ndarray) -> Tensor:
        """Images as the network gets them, float32 [N, C, H, W], of uint8 [N, H, W, C] of the run's size.

        Of a run on latents they are encoded, and are the means of their latents.

        Raises:
            ConfigError: the run reads text, or the images have another size.
            RunError: the run's autoencoder is not there, or has changed.
        """
        data = self.directory.data
        if isinstance(data, TextInfo):
            raise ConfigError(f"{self.path} reads text; its tokens come from `run.tokenizer.encode`")
        if pixels.shape[1:] != data.picture_shape or pixels.dtype != np.uint8:
            raise ConfigError(f"images are {pixels.dtype} {pixels.shape[1:]}; the run takes uint8 {data.picture_shape}")
        autoencoder = autoencoder_of(self.directory)
        if autoencoder is not None:
            return (from_numpy(encoded_means(autoencoder, pixels)) - data.mean) * data.scale
        family = self.directory.family()
        return family.condition(pixels) if family.task == "classes" else data.to_model(pixels)

    def writer(self, *, mem_budget: str | None = None, length: int | None = None) -> AbstractContextManager[TextWriter]:
        """Of a fine-tuned model: what continues texts and answers messages, with its weights in memory while this
        lasts; see `pretrained.writing.TextWriter`.

        Args:
            length: tokens of the longest text or conversation; None: as many as the run was trained on.

        Raises:
            ConfigError: the run is no fine-tuned model.
            DoesNotFitError: it does not fit the budget.
        """
        return tuned_writer(self.directory, self._runners(None, mem_budget), texts=1, length=length)

    def merge(
        self, out: Path | str, *, last: bool = False, adapter: bool = False, mem_budget: str | None = None
    ) -> Merged:
        """Write a fine-tuned model into a new folder like the one that it was made of; see `merging.merge_model`.

        Args:
            adapter: of a run of LoRA what was trained alone, as PEFT has it; see `merging.write_adapter`.
        """
        if adapter:
            return write_adapter(self.directory, Path(out), last=last)
        return merge_model(self.directory, Path(out), last=last, mem_budget=mem_budget)

    def save_weights(
        self, out: Path | str, *, last: bool = False, overwrite: bool = False, mem_budget: str | None = None
    ) -> WrittenWeights:
        """Write the weights as one safetensors file, that another run can begin with and torch can load.

        Args:
            last: as the last step left them; else their average (EMA), which all else uses.
            overwrite: replace a file that is there.
            mem_budget: what the process may take of memory; None does not bound it. One block is held at a time.

        Raises:
            ConfigError: the file's name does not end in .safetensors, or the file is there already.
            DoesNotFitError: it takes more than `mem_budget`.
            RunError: a block is damaged or holds values that are not finite, or the run is trained meanwhile.
            StorageError: the disk refused.
        """
        return write_weights(self.directory, Path(out), last=last, overwrite=overwrite, mem_budget=mem_budget)
