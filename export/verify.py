"""Is what was exported what was trained? Each block and the whole chain in onnxruntime against torch.

An export is not finished before this has passed. Both sides keep one block in memory at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edgeblocks.data.dataset import DataSet
from edgeblocks.data.pictures import to_uint8
from edgeblocks.diffusion.noise import sampler_levels, unmasking_steps
from edgeblocks.diffusion.solver import integrate
from edgeblocks.diffusion.token_choice import softmax
from edgeblocks.diffusion.unmasking import unmask
from edgeblocks.errors import ConfigError, DataError, EdgeblocksError, StorageError
from edgeblocks.export import verify_text
from edgeblocks.export.classifier import Classifier
from edgeblocks.export.continuer import Continuer
from edgeblocks.export.manifest_figures import Verified
from edgeblocks.export.onnx_chain import Condition, ExportedChain, ImageChain, Values
from edgeblocks.export.sampler import Sampler
from edgeblocks.export.tolerances import BATCH, NUM_OUTPUTS, check_finite, largest_difference, levels_of
from edgeblocks.export.writer import Writer
from edgeblocks.families.base import Level
from edgeblocks.inference.block_runner import BlockRunner, class_labels, guided
from edgeblocks.inference.sampling import class_probabilities, decode_into_
from edgeblocks.pretrained.autoencoder import Decoder, decoded
from edgeblocks.registry import build_target
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.latents import autoencoder_of
from edgeblocks.runs.open_data import data_of
from edgeblocks.seeds import generator_at, start_noise

BLOCK_LIMIT = 1e-4
OUTPUT_LIMIT = 1e-3
_WORDS = {
    "images": ("final images", "pixels"),
    "classes": ("probabilities", "answers"),
    "text": ("probabilities along the chain", "tokens"),
    "continuation": ("probabilities along the chain", "tokens"),
}
_MOST_LABELS = 25


Labels = NDArray[np.int64]
LogitsOf = Callable[[NDArray[np.int64], float, NDArray[np.bool_]], Values]
"""See `unmask`."""


class Listener(Protocol):
    """What of `api.Listener` an export uses."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, text: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of a block; `what` names it in a message."""

    what: str
    z: NDArray[Any]
    sigma: Values
    condition: Condition | None


def verify_export(
    run: RunDirectory,
    runner: BlockRunner,
    chain: ExportedChain,
    listener: Listener,
    *,
    block_limit: float = BLOCK_LIMIT,
    output_limit: float = OUTPUT_LIMIT,
) -> Verified:
    """Compare every block, and what the chain makes, with torch's.

    Args:
        runner: the run's blocks with their EMA weights.
        chain: the directory being written.
        block_limit: largest difference of a block's `denoised`: images in model space (standard deviation 0.5), or
            probabilities.
        output_limit: the same of what the chain makes.

    Raises:
        EdgeblocksError: a difference is larger than its limit.
        RunError: the network gives values that are not numbers.
    """
    listener.stage("verifying against torch")
    total = len(chain.manifest.graphs) + 1
    data_set = real_data(run, listener)
    block_error = 0.0
    for block in range(len(run.layers)):
        error, where = block_difference(run, runner, chain, data_set, block)
        enforce(f"block {block}", error, block_limit, where)
        block_error = max(block_error, error)
        listener.advance(block + 1, total, "verifying")
    decoder = decoder_of(run)
    if decoder is not None:
        assert isinstance(chain, Sampler)
        error, where = decoder_difference(run, decoder, chain, data_set)
        enforce("the decoder", error, block_limit, where)
        block_error = max(block_error, error)
        listener.advance(len(run.layers) + 1, total, "verifying")
    what, same = _WORDS[chain.manifest.task]
    output_error, equal_share = output_difference(run, runner, chain, data_set, decoder=decoder)
    enforce(f"the chain of {len(run.layers)} blocks", output_error, output_limit, f"{what} of {NUM_OUTPUTS}")
    listener.advance(total, total, "verifying")
    listener.note(
        f"onnxruntime against torch: blocks differ by at most {block_error:.1e} (limit {block_limit:.0e}), {what} by "
        f"{output_error:.1e} (limit {output_limit:.0e}); {equal_share:.2%} of the {same} are the same"
    )
    return Verified(
        block_max_abs_error=block_error,
        block_limit=block_limit,
        output_max_abs_error=output_error,
        output_limit=output_limit,
        output_equal_share=equal_share,
        outputs=NUM_OUTPUTS,
        real_inputs=data_set is not None,
    )


def block_difference(
    run: RunDirectory, runner: BlockRunner, chain: ExportedChain, data_set: DataSet | None, block: int
) -> tuple[float, str]:
    """The largest difference of a block's output between torch and onnxruntime, and the input that shows it."""
    if isinstance(chain, Continuer):
        return verify_text.block_difference(run, runner, chain, data_set, block)
    network = runner.network(block)
    worst, worst_case = -1.0, None
    cases = text_cases if isinstance(chain, Writer) else block_cases
    for case in cases(run, data_set, block):
        with torch.no_grad():
            seen = [torch.from_numpy(case.z), torch.from_numpy(case.sigma)]
            if isinstance(chain, Writer):
                expected = softmax(network(*seen).numpy())
                found = softmax(chain.run_block(block, case.z, case.sigma))
            else:
                assert isinstance(chain, ImageChain)
                condition = None if case.condition is None else torch.from_numpy(case.condition)
                expected = network(*seen, condition).numpy()
                found = chain.run_block(block, case.z, case.sigma, case.condition)
        check_finite(expected, f"block {block}")
        difference = largest_difference(found, expected)
        if difference > worst:
            worst, worst_case = difference, case
    assert worst_case is not None
    return worst, f"{worst_case.what}, batch {len(worst_case.z)}"


def decoder_of(run: RunDirectory) -> Decoder | None:
    """What makes pictures of latents, in torch; None where samples are pictures."""
    autoencoder = autoencoder_of(run)
    return None if autoencoder is None else autoencoder.decoder("cpu")


def decoder_difference(
    run: RunDirectory, decoder: Decoder, sampler: Sampler, data_set: DataSet | None
) -> tuple[float, str]:
    """The largest difference of pictures, of values from 0 to 1, and the latents that show it: random ones and those of
    real images."""
    shape = run.family().state_shape
    random = np.random.default_rng(run.settings.run.seed).standard_normal((2, *shape), dtype=np.float32)
    cases = {"random latents": random}
    if data_set is not None:
        cases["latents of a real image"] = data_set.gather(data_set.evaluation_indices(1))[0][:, 0]
    differences = []
    for what, latents in cases.items():
        expected = decoded(decoder, latents, device="cpu")
        check_finite(expected, "the decoder")
        differences.append((largest_difference(sampler.decode(latents), expected), what))
    return max(differences)


def block_cases(run: RunDirectory, data_set: DataSet | None, block: int) -> Iterator[Case]:
    """Inputs over the whole noise range of a block with both its ends: one alone, five at once, and real images.

    Where a block is given class numbers, these are all of them, or 25 spread over them, and always "no class".
    """
    owned, family = run.partition.ranges[block], run.family()
    levels = levels_of(owned)
    random = np.random.default_rng([run.settings.run.seed, block])
    labels = _shown_labels(family.data.num_classes) if family.task == "images" else None

    def noised(sigma: Values) -> Values:
        eps, clean = random.standard_normal((2, len(sigma), *family.state_shape), dtype=np.float32)
        # Data of about sigma_data, with noise: inputs as large as those that the block was trained on.
        z: Values = 0.5 * clean + sigma.reshape(-1, *(1 for _ in family.state_shape)) * eps
        return z

    def condition(chosen: Labels | None, count: int) -> Condition | None:
        if family.task == "images":
            return chosen
        assert family.condition_spec is not None
        return 0.5 * random.standard_normal((count, *family.condition_spec[1]), dtype=np.float32)

    for index, sigma in enumerate(levels):
        one = levels[index : index + 1]
        label = None if labels is None else labels[-1 - index % len(labels) :][:1]
        yield Case(what=f"random input at sigma {sigma:.4g}", z=noised(one), sigma=one, condition=condition(label, 1))
    for start in range(0, 1 if labels is None else len(labels), BATCH):
        some = None if labels is None else np.resize(labels[start : start + BATCH], BATCH)
        what = f"random inputs at sigma {owned.low:.4g} to {owned.high:.4g}"
        yield Case(what=what, z=noised(levels), sigma=levels, condition=condition(some, BATCH))
    if data_set is None:
        return
    examples, classes = data_set.gather(data_set.evaluation_indices(BATCH))
    for index, sigma in enumerate(levels):
        batch = family.at_level(
            examples, classes, Level.at(float(sigma)), generator_at(run.settings.run.seed, "verify", block, index)
        )
        z, seen = family.inputs(batch)
        own = None if seen is None else seen.numpy()
        yield Case(what=f"real images at sigma {sigma:.4g}", z=z.numpy(), sigma=batch["sigma"].numpy(), condition=own)


def text_cases(run: RunDirectory, data_set: DataSet | None, block: int) -> Iterator[Case]:
    """Tokens over the whole range of times of a block with both its ends, random ones and those of the run's text."""
    family = run.family()
    assert family.task == "text"
    data, mask = family.data, family.mask
    levels = levels_of(run.partition.ranges[block])
    random = np.random.default_rng([run.settings.run.seed, block])

    def masked(tokens: NDArray[np.int64], t: Values) -> NDArray[np.int64]:
        hidden = random.random(tokens.shape) < t[:, None]
        return np.where(hidden, mask, tokens)

    texts = {"random tokens": random.integers(0, data.vocabulary, (BATCH, data.length))}
    if data_set is not None:
        examples = data_set.gather(data_set.evaluation_indices(BATCH))[0]
        texts["real text"] = np.resize(examples, (BATCH, data.length))
    for what, tokens in texts.items():
        for index, t in enumerate(levels):
            one = slice(index, index + 1)
            yield Case(
                what=f"{what} at t {t:.4g}", z=masked(tokens[one], levels[one]), sigma=levels[one], condition=None
            )
        whole = f"{what} at t {levels[0]:.4g} to {levels[-1]:.4g}"
        yield Case(what=whole, z=masked(tokens, levels), sigma=levels, condition=None)


def output_difference(
    run: RunDirectory,
    runner: BlockRunner,
    chain: ExportedChain,
    data_set: DataSet | None,
    *,
    decoder: Decoder | None = None,
) -> tuple[float, float]:
    """The largest difference of what the two chains make, and the share of it that is the same in the end."""
    if isinstance(chain, Classifier):
        return _class_difference(run, runner, chain, data_set)
    if isinstance(chain, Writer):
        return _text_difference(run, runner, chain)
    if isinstance(chain, Continuer):
        return verify_text.text_difference(run, runner, chain, data_set)
    assert isinstance(chain, Sampler)
    return _image_difference(run, runner, chain, decoder)


def _class_difference(
    run: RunDirectory, runner: BlockRunner, classifier: Classifier, data_set: DataSet | None
) -> tuple[float, float]:
    """Of probabilities, and the share of images whose likeliest class is the same."""
    settings = classifier.manifest.sampler
    pixels = shown_pixels(run, classifier, data_set)
    expected = class_probabilities(run, runner, pixels, steps=settings.steps, noises=settings.noises, seed=0)
    check_finite(expected, "the chain")
    found = classifier.classify(pixels, micro_batch=runner.micro_batch)
    difference = largest_difference(found, expected)
    if not np.isfinite(difference):
        return difference, 0.0
    return difference, float((found.argmax(1) == expected.argmax(1)).mean())


def shown_pixels(run: RunDirectory, classifier: Classifier, data_set: DataSet | None) -> NDArray[np.uint8]:
    """Images [8, H, W, C] of the run's data, or random ones."""
    if data_set is None:
        channels, height, width = classifier.manifest.image_shape
        shape = (NUM_OUTPUTS, height, width, channels)
        return np.random.default_rng(run.settings.run.seed).integers(0, 256, shape, dtype=np.uint8)
    return data_set.gather(np.resize(data_set.evaluation_indices(NUM_OUTPUTS), NUM_OUTPUTS))[0]


def _text_difference(run: RunDirectory, runner: BlockRunner, writer: Writer) -> tuple[float, float]:
    """Of the probabilities at each step of torch's chain, and the share of the tokens that both chains end with."""
    worst = 0.0

    def both(tokens: NDArray[np.int64], t: float, wanted: NDArray[np.bool_]) -> Values:
        nonlocal worst
        expected = runner.logits(tokens, t, wanted)
        check_finite(expected, "the chain")
        found = writer.logits(tokens, t, wanted)
        # Both networks see the tokens that torch's chain has chosen: after one token that differs, two chains write two
        # texts.
        worst = max(worst, largest_difference(softmax(found), softmax(expected)))
        return expected

    expected = torch_texts(
        run, both, writer, temperature=writer.manifest.sampler.temperature, micro_batch=runner.micro_batch
    )
    found, _ = writer.write_tokens(NUM_OUTPUTS, micro_batch=runner.micro_batch)
    return worst, float((found == expected).mean())


def torch_texts(
    run: RunDirectory, logits_of: LogitsOf, writer: Writer, *, temperature: float, micro_batch: int
) -> NDArray[np.int64]:
    """Texts [8, length] that a network writes as an export's manifest says."""
    family = run.family()
    assert family.task == "text"
    return unmask(
        logits_of,
        np.full((NUM_OUTPUTS, family.data.length), family.mask),
        steps=unmasking_steps(run.partition, num_steps=writer.manifest.sampler.steps),
        mask=family.mask,
        temperature=temperature,
        seed=0,
        micro_batch=micro_batch,
    )


def _image_difference(
    run: RunDirectory, runner: BlockRunner, sampler: Sampler, decoder: Decoder | None
) -> tuple[float, float]:
    """Of images in model space, and the share of their pixels that agree as uint8."""
    settings, family = sampler.manifest.sampler, run.family()
    assert family.task == "images"
    data = family.data
    labels = class_labels(NUM_OUTPUTS, num_classes=data.num_classes, chosen=None)
    expected = integrate(
        guided(runner.denoise, labels, guidance=settings.guidance, no_class=data.num_classes),
        torch.from_numpy(start_noise(family.state_shape, samples=range(NUM_OUTPUTS), seed=0)),
        sampler_levels(run.partition, num_steps=settings.steps),
        solver=settings.solver,
    ).numpy()
    check_finite(expected, "the chain")
    found, pictures = sampler.sample_both(
        NUM_OUTPUTS,
        steps=settings.steps,
        solver=settings.solver,
        guidance=settings.guidance,
        micro_batch=runner.micro_batch,
    )
    difference = largest_difference(found, expected)
    if not np.isfinite(difference):
        return difference, 0.0
    if decoder is None:
        same = to_uint8(expected, mean=data.mean, scale=data.scale)
    else:
        same = np.empty((NUM_OUTPUTS, *data.picture_shape), dtype=np.uint8)
        latents = np.asarray(expected / data.scale + data.mean, dtype=np.float32)
        decode_into_(same, latents, decoder, build_target("cpu"))
    return difference, float(((sampler.pictures(found) if pictures is None else pictures) == same).mean())


def real_data(run: RunDirectory, listener: Listener) -> DataSet | None:
    """The run's data; None, with a note, when they are gone or have changed."""
    try:
        data_set = data_of(run.data_settings.run, listener.advance)
    except (ConfigError, DataError, StorageError) as error:
        listener.note(
            f"verifying with random inputs only, because the run's data cannot be read: {'; '.join(error.problems)}"
        )
        return None
    if data_set.fingerprint != run.data_fingerprint:
        listener.note(f"verifying with random inputs only, because {run.data_source} has changed since the training")
        return None
    return data_set


def _shown_labels(num_classes: int) -> Labels | None:
    """Classes to show, ascending, the last one being "no class"."""
    if num_classes == 0:
        return None
    return np.unique(np.linspace(0, num_classes, min(num_classes + 1, _MOST_LABELS)).round().astype(np.int64))


def enforce(what: str, difference: float, limit: float, where: str) -> None:
    if difference > limit:
        raise EdgeblocksError(
            f"the export is wrong: {what} gives other numbers in onnxruntime than in torch: they differ by "
            f"{difference:.2e} ({where}), {limit:.0e} is allowed. Nothing was written. Try another version of "
            "onnxruntime or torch, and report this with both versions"
        )
