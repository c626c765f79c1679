"""What a run's blocks make: images, texts, the probabilities of an image's classes.

Each function looks at what is asked before it opens a runner: what is impossible is reported before memory is measured.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeblocks.data import pictures
from edgeblocks.data.dataset import DataSet
from edgeblocks.data.gaps import with_gaps
from edgeblocks.data.tokenizer import check_readable
from edgeblocks.diffusion import autoregression, classification, token_choice, unmasking
from edgeblocks.diffusion.autoregression import TokenChain
from edgeblocks.diffusion.classification import ClassChains
from edgeblocks.diffusion.noise import sampler_levels, unmasking_steps
from edgeblocks.diffusion.solver import Solver, check_request, class_number, integrate
from edgeblocks.errors import ConfigError
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.family import FamilyOfContinuations, FamilyOfImages, FamilyOfText
from edgeblocks.inference.block_runner import BlockRunner, EmaSource, class_labels, guided, token_chain
from edgeblocks.inference.tuned_text import tuned_writer
from edgeblocks.offload.device import Target
from edgeblocks.pretrained.autoencoder import Decoder as LatentDecoder
from edgeblocks.pretrained.autoencoder import decoded
from edgeblocks.pretrained.decoder import Decoder
from edgeblocks.registry import build_target
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.latents import autoencoder_of
from edgeblocks.seeds import start_noise
from edgeblocks.tasks import TASKS, TEXT_TASKS
from edgeblocks.terminal import command


def usual_steps(directory: RunDirectory) -> int:
    """Of a run's chain: what is usual for the family's task, one where there is no chain, at least one a block."""
    family = directory.family()
    return max(family.chain_steps, len(directory.layers))


def runner_of(
    directory: RunDirectory,
    source: EmaSource,
    *,
    micro_batch: int,
    residents: int = 1,
    together: int | None = None,
    shared_memory: bool = False,
) -> BlockRunner:
    """A run's blocks, with weights from a source; see `BlockRunner`."""
    return BlockRunner(
        directory.family(),
        directory.layers,
        directory.partition,
        source,
        micro_batch=micro_batch,
        residents=residents,
        together=together,
        precision=directory.precision,
        shared_memory=shared_memory,
    )


class Runners(Protocol):
    """Where a runner comes from once it is known for how many samples; see `Run.fitting_runner`."""

    def __call__(self, *, samples: int, kept_bytes: int | None = None) -> AbstractContextManager[BlockRunner]: ...


def always(runner: BlockRunner) -> Runners:
    """This runner, whatever is asked of it."""

    def given(*, samples: int, kept_bytes: int | None = None) -> AbstractContextManager[BlockRunner]:
        return nullcontext(runner)

    return given


def sample_images(
    directory: RunDirectory,
    runners: Runners,
    *,
    n: int,
    steps: int | None = None,
    solver: Solver = "heun",
    guidance: float = 1.0,
    label: int | str | None = None,
    seed: int,
    on_level: Callable[[int], None] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """See `Run.sample`."""
    family = directory.family()
    if family.task != "images":
        does = "classifies images" if family.task == "classes" else "writes text (sample_text)"
        raise ConfigError(
            f"{directory.path} is of the family {family.name}, which {does} and makes no images; see how well with: "
            f"{command('eval', directory.path)}"
        )
    steps = usual_steps(directory) if steps is None else steps
    check_request(n=n, steps=steps, guidance=guidance, conditional=family.conditional)
    # Each inside one block's range, descending: blocks come in order, and each is loaded once.
    levels = sampler_levels(directory.partition, num_steps=steps)
    labels = class_labels(n, num_classes=family.data.num_classes, chosen=class_number(label, directory.class_names))
    data = family.data
    autoencoder = autoencoder_of(directory)
    made = np.empty((n, *data.picture_shape), dtype=np.uint8)
    latents = np.empty((n if autoencoder else 0, *family.state_shape), dtype=np.float32)
    with runners(samples=n) as runner:
        groups = range(0, n, runner.together or n)
        for done, first in enumerate(groups):
            chosen_ones = slice(first, min(first + (runner.together or n), n))
            conditions = None if labels is None else labels[chosen_ones]
            x = integrate(
                guided(runner.denoise, conditions, guidance=guidance, no_class=data.num_classes),
                _noise(family, range(n)[chosen_ones], seed=seed),
                levels,
                solver=solver,
                on_level=_in_turn(on_level, done, len(groups), steps),
            )
            if autoencoder is None:
                made[chosen_ones] = pictures.to_uint8(x.numpy(), mean=data.mean, scale=data.scale)
            else:
                latents[chosen_ones] = x.numpy() / data.scale + data.mean
        if autoencoder is not None:
            target = build_target(directory.settings.run.target)
            decode_into_(made, latents, autoencoder.decoder(target.torch_device), target, on_picture=on_picture)
    return made


def decode_into_(
    made: NDArray[np.uint8],
    latents: NDArray[np.float32],
    decoder: LatentDecoder,
    target: Target,
    *,
    on_picture: Callable[[int, int], None] | None = None,
) -> None:
    """Pictures uint8 [n, H, W, c] of latents [n, C, h, w], a few at a time.

    Raises:
        RunError: a value is not a number.
    """
    together = pictures.pictures_together(*made.shape[1:3])
    for start in range(0, len(made), together):
        some = slice(start, start + together)
        with target.without_gaps():
            some_made = decoded(decoder, latents[some], device=target.torch_device)
        made[some] = pictures.to_uint8(some_made, mean=0.0, scale=1.0)
        if on_picture is not None:
            on_picture(min(some.stop, len(made)), len(made))


def _noise(family: FamilyOfImages, samples: Sequence[int], *, seed: int) -> Tensor:
    shape = (family.data.channels, family.data.height, family.data.width)
    return torch.from_numpy(start_noise(shape, samples=samples, seed=seed))


def _in_turn(
    on_level: Callable[[int], None] | None, group: int, groups: int, steps: int
) -> Callable[[int], None] | None:
    """For one of several groups: tells the levels that are done as if all groups went together."""
    if on_level is None:
        return None
    return lambda done: on_level((group * steps + done) // groups)


def sample_texts(
    directory: RunDirectory,
    runners: Runners,
    *,
    n: int,
    steps: int | None = None,
    temperature: float = 1.0,
    fill: str | None = None,
    prompt: str | None = None,
    top_p: float | None = None,
    length: int | None = None,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> list[str]:
    """See `Run.sample_text`."""
    family = directory.family()
    if family.task in TEXT_TASKS:
        token_choice.check_options(family.task, fill=fill, prompt=prompt, top_p=top_p, length=length)
    if isinstance(family, Decoder):
        if steps is not None:
            raise ConfigError(f"--steps {steps}: a model of transformers has no noise levels; leave it out")
        with tuned_writer(directory, runners, texts=n, length=length) as writer:
            return writer.continued(
                prompt or "",
                n=n,
                temperature=temperature,
                top_p=1.0 if top_p is None else top_p,
                length=length,
                seed=seed,
                on_token=on_step,
            )
    steps = usual_steps(directory) if steps is None else steps
    common: dict[str, Any] = {
        "n": n,
        "steps": steps,
        "temperature": temperature,
        "length": length,
        "seed": seed,
        "on_step": on_step,
    }
    if family.task == "text":
        return _unmasked(directory, family, runners, fill=fill, **common)
    if family.task == "continuation":
        top_p = 1.0 if top_p is None else top_p
        return _continued(directory, family, runners, prompt=prompt or "", top_p=top_p, **common)
    raise ConfigError(f"{directory.path} is of the family {family.name}, which makes no text")


def _unmasked(
    directory: RunDirectory,
    family: FamilyOfText,
    runners: Runners,
    *,
    n: int,
    steps: int,
    temperature: float,
    fill: str | None,
    length: int | None,
    seed: int,
    on_step: Callable[[int, int], None] | None,
) -> list[str]:
    """Texts from masked diffusion; see `sample_text`."""
    trained_length = family.data.length
    unmasking.check_writing(n=n, steps=steps, temperature=temperature, length=length, trained_length=trained_length)
    intervals = unmasking_steps(directory.partition, num_steps=steps)
    tokenizer = directory.tokenizer
    assert tokenizer is not None
    # Always the trained length, as the network knows no other; what is asked for is cut from it at the end.
    start, given = with_gaps(fill, tokenizer, length=trained_length, mask=family.mask)
    with runners(samples=n) as runner:
        tokens = unmasking.unmask(
            runner.logits,
            np.tile(start, (n, 1)),
            steps=intervals,
            mask=family.mask,
            temperature=temperature,
            seed=seed,
            micro_batch=runner.micro_batch,
            on_step=None if on_step is None else lambda done: on_step(done, steps),
        )
    return [tokenizer.decode(row[: length or given]) for row in tokens]


def _continued(
    directory: RunDirectory,
    family: FamilyOfContinuations,
    runners: Runners,
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
    tokenizer = directory.tokenizer
    assert tokenizer is not None
    trained_length = family.data.length
    autoregression.check_continuing(
        n=n, steps=steps, temperature=temperature, top_p=top_p, length=length, trained_length=trained_length
    )
    chain = token_chain_of(directory, steps, length=length)
    check_readable("--prompt", prompt, tokenizer)
    given = tokenizer.encode(prompt)
    autoregression.check_prompt(given, length=chain.length, trained_length=trained_length)
    with runners(samples=n, kept_bytes=chain.sample_bytes) as runner:
        tokens = autoregression.write_texts(
            runner.continued,
            chain,
            prompt=given,
            n=n,
            together=runner.micro_batch,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_token=on_step,
        )
    return [tokenizer.decode(row) for row in tokens]


def token_chain_of(directory: RunDirectory, steps: int, *, length: int | None = None) -> TokenChain:
    """How a token is written over `steps` noise levels; None is as long as the training's texts."""
    family, levels = directory.family(), sampler_levels(directory.partition, num_steps=steps)
    assert family.task == "continuation"
    return token_chain(family, directory.layers, directory.partition, levels, length=length)


def classify_images(
    directory: RunDirectory, runners: Runners, pixels: np.ndarray, *, steps: int | None, noises: int, seed: int
) -> np.ndarray:
    """See `Run.classify`."""
    family = directory.family()
    if family.task != "classes":
        does = "makes images" if family.task == "images" else "writes text (sample_text)"
        raise ConfigError(f"{directory.path} is of the family {family.name}, which {does} and does not classify images")
    data = family.data
    shape = (data.height, data.width, data.channels)
    if pixels.shape[1:] != shape or pixels.dtype != np.uint8:
        raise ConfigError(f"images are {pixels.dtype} {pixels.shape[1:]}; the run takes uint8 {shape}")
    steps = usual_steps(directory) if steps is None else max(steps, len(directory.layers))
    noises = 1 if directory.method.one_network else noises  # where nothing is noised, several would be the same
    with runners(samples=len(pixels)) as runner:
        return np.concatenate(
            [
                class_probabilities(directory, runner, pixels[group], steps=steps, noises=noises, seed=seed)
                for group in _groups(directory, runner, np.arange(len(pixels)), noises=noises)
            ]
        )


def classified(
    directory: RunDirectory,
    runner: BlockRunner,
    data: DataSet,
    indices: NDArray[np.int64],
    *,
    steps: int,
    noises: int,
    seed: int,
    on_level: Callable[[int], None] | None = None,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Probabilities of the classes [some, classes] and the classes [some] of a data set's images, some at a time."""
    groups = _groups(directory, runner, indices, noises=noises)
    for done, group in enumerate(groups):
        pixels, labels = data.gather(group)
        assert labels is not None
        told = _in_turn(on_level, done, len(groups), steps)
        yield (
            class_probabilities(directory, runner, pixels, steps=steps, noises=noises, seed=seed, on_level=told),
            labels,
        )


def chains_of(directory: RunDirectory, noises: int = TASKS["classes"].noises) -> ClassChains:
    """What the memory for classifying a run's images depends on."""
    family = directory.family()
    assert isinstance(family.data, ImageInfo) and family.condition_spec is not None
    values = math.prod(family.condition_spec[1])  # as the network gets them, which may be in more colours
    return ClassChains(num_classes=family.data.num_classes, noises=noises, values_per_image=values)


def _groups(
    directory: RunDirectory, runner: BlockRunner, indices: NDArray[np.int64], *, noises: int
) -> list[NDArray[np.int64]]:
    """Images that are classified together; their number changes no answer."""
    size = classification.classified_together(**chains_of(directory, noises))
    size = min(size, runner.together or size)
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def class_probabilities(
    directory: RunDirectory,
    runner: BlockRunner,
    pixels: np.ndarray,
    *,
    steps: int,
    noises: int,
    seed: int,
    on_level: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Probabilities of the classes, float32 [N, classes], of images uint8 [N, H, W, C] of the run's size."""
    family = directory.family()
    assert family.task == "classes"
    condition = family.condition(pixels)
    return classification.classify(
        lambda z, sigma: runner.denoise(torch.from_numpy(z), sigma, condition).numpy(),
        pixels=pixels,
        num_classes=family.data.num_classes,
        levels=sampler_levels(directory.partition, num_steps=steps),
        noises=noises,
        seed=seed,
        on_level=on_level,
    )
