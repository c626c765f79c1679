"""Is what was exported what was trained? Each block and the whole chain in onnxruntime against torch.

An export is not finished before this has passed. Both sides keep one block in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from edgeblocks.chain import BlockRunner, class_labels, guided
from edgeblocks.checkpoint import RunDirectory
from edgeblocks.data.cache import cache_folder
from edgeblocks.data.images import ImageSet, open_images
from edgeblocks.errors import ConfigError, DataError, EdgeblocksError, RunError, StorageError
from edgeblocks.export.manifest import Verified
from edgeblocks.export.sampler import Images, Labels, Sampler
from edgeblocks.generators import generator_at
from edgeblocks.noise import NoiseRange, sampler_levels
from edgeblocks.pictures import to_uint8
from edgeblocks.randomness import start_noise
from edgeblocks.solver import integrate

BLOCK_LIMIT = 1e-4
IMAGE_LIMIT = 1e-3
NUM_IMAGES = 8
_BATCH = 5
_MOST_LABELS = 25


class Listener(Protocol):
    """What of `api.Listener` an export uses."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, text: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of a block; `what` names it in a message."""

    what: str
    z: Images
    sigma: Images
    labels: Labels | None


def verify_export(
    run: RunDirectory,
    runner: BlockRunner,
    sampler: Sampler,
    listener: Listener,
    *,
    block_limit: float = BLOCK_LIMIT,
    image_limit: float = IMAGE_LIMIT,
) -> Verified:
    """Compare every block and the final images with torch's.

    Args:
        runner: the run's blocks with their EMA weights.
        sampler: the directory being written.
        block_limit: largest difference of a block's `denoised`, in model space (standard deviation 0.5).
        image_limit: the same of final images.

    Raises:
        EdgeblocksError: a difference is larger than its limit.
        RunError: the network gives values that are not numbers.
    """
    listener.stage("verifying against torch")
    total = len(run.layers) + 1
    images = _real_images(run, listener)
    block_error = 0.0
    for block in range(len(run.layers)):
        error, case = block_difference(run, runner, sampler, images, block)
        _enforce(f"block {block}", error, block_limit, f"{case.what}, batch {len(case.z)}")
        block_error = max(block_error, error)
        listener.advance(block + 1, total, "verifying")
    image_error, equal_share = image_difference(run, runner, sampler)
    _enforce(f"the chain of {len(run.layers)} blocks", image_error, image_limit, f"{NUM_IMAGES} final images")
    listener.advance(total, total, "verifying")
    listener.note(
        f"onnxruntime against torch: blocks differ by at most {block_error:.1e} (limit {block_limit:.0e}), final "
        f"images by {image_error:.1e} (limit {image_limit:.0e}); {equal_share:.2%} of the pixels are the same"
    )
    return Verified(
        block_max_abs_error=block_error,
        block_limit=block_limit,
        image_max_abs_error=image_error,
        image_limit=image_limit,
        image_uint8_equal_share=equal_share,
        images=NUM_IMAGES,
        real_inputs=images is not None,
    )


def block_difference(
    run: RunDirectory, runner: BlockRunner, sampler: Sampler, images: ImageSet | None, block: int
) -> tuple[float, Case]:
    """The largest difference of a block's output between torch and onnxruntime, and the input that shows it."""
    network = runner.network(block)
    worst, worst_case = -1.0, None
    for case in block_cases(run, images, block):
        with torch.no_grad():
            labels = None if case.labels is None else torch.from_numpy(case.labels)
            expected = network(torch.from_numpy(case.z), torch.from_numpy(case.sigma), labels).numpy()
        _check_finite(expected, f"block {block}")
        difference = _largest_difference(sampler.run_block(block, case.z, case.sigma, case.labels), expected)
        if difference > worst:
            worst, worst_case = difference, case
    assert worst_case is not None
    return worst, worst_case


def block_cases(run: RunDirectory, images: ImageSet | None, block: int) -> Iterator[Case]:
    """Inputs over the whole noise range of a block with both its ends: one alone, five at once, and real images.

    The classes shown are all of them, or 25 spread over them, and always "no class".
    """
    owned = run.partition.ranges[block]
    levels = _levels(owned)
    shape = (run.data.channels, run.data.height, run.data.width)
    random = np.random.default_rng([run.settings.run.seed, block])
    labels = _shown_labels(run.data.num_classes)

    def noised(sigma: Images) -> Images:
        eps, clean = random.standard_normal((2, len(sigma), *shape), dtype=np.float32)
        z: Images = 0.5 * clean + sigma.reshape(-1, 1, 1, 1) * eps
        return z

    for index, sigma in enumerate(levels):
        one = levels[index : index + 1]
        label = None if labels is None else labels[-1 - index % len(labels) :][:1]
        yield Case(what=f"random input at sigma {sigma:.4g}", z=noised(one), sigma=one, labels=label)
    for start in range(0, 1 if labels is None else len(labels), _BATCH):
        some = None if labels is None else np.resize(labels[start : start + _BATCH], _BATCH)
        what = f"random inputs at sigma {owned.low:.4g} to {owned.high:.4g}"
        yield Case(what=what, z=noised(levels), sigma=levels, labels=some)
    if images is None:
        return
    indices = (images.held_out if len(images.held_out) else images.train)[:_BATCH]
    pixels, classes = images.gather(indices)
    family = run.family()
    for index, sigma in enumerate(levels):
        batch = family.at_level(
            pixels, classes, float(sigma), generator_at(run.settings.run.seed, "verify", block, index)
        )
        z = torch.addcmul(batch["clean"], batch["sigma"].view(-1, 1, 1, 1), batch["eps"]).numpy()
        own = batch["labels"].numpy() if "labels" in batch else None
        yield Case(what=f"real images at sigma {sigma:.4g}", z=z, sigma=batch["sigma"].numpy(), labels=own)


def image_difference(run: RunDirectory, runner: BlockRunner, sampler: Sampler) -> tuple[float, float]:
    """The largest difference of final images in model space, and the share of their pixels that agree as uint8."""
    settings, data = sampler.manifest.sampler, run.data
    shape = (data.channels, data.height, data.width)
    labels = class_labels(NUM_IMAGES, num_classes=data.num_classes, chosen=None)
    expected = integrate(
        guided(runner.denoise, labels, guidance=settings.guidance, no_class=data.num_classes),
        torch.from_numpy(start_noise(shape, num_samples=NUM_IMAGES, seed=0)),
        sampler_levels(run.partition, num_steps=settings.steps),
        solver=settings.solver,
    ).numpy()
    _check_finite(expected, "the chain")
    found = sampler.sample_model_space(
        NUM_IMAGES,
        steps=settings.steps,
        solver=settings.solver,
        guidance=settings.guidance,
        micro_batch=runner.micro_batch,
    )
    difference = _largest_difference(found, expected)
    if not np.isfinite(difference):
        return difference, 0.0
    pixels = [to_uint8(x, mean=data.mean, scale=data.scale) for x in (found, expected)]
    return difference, float((pixels[0] == pixels[1]).mean())


def _real_images(run: RunDirectory, listener: Listener) -> ImageSet | None:
    """The run's data; None, with a note, when they are gone or have changed."""

    settings = run.settings.run
    try:
        images = open_images(
            settings.data,
            image_size=settings.image_size,
            hold_out=settings.hold_out,
            seed=settings.seed,
            cache_dir=cache_folder(),
            progress=listener.advance,
        )
    except (ConfigError, DataError, StorageError) as error:
        listener.note(f"verifying with random inputs only, because the run's data cannot be read: {error}")
        return None
    if images.fingerprint != run.data_fingerprint:
        listener.note(f"verifying with random inputs only, because {run.data_source} has changed since the training")
        return None
    return images


def _levels(owned: NoiseRange) -> Images:
    """Five noise levels of a block, geometrically from its lower end to its upper end."""
    levels: Images = np.geomspace(owned.low, owned.high, _BATCH).astype(np.float32)
    return levels


def _shown_labels(num_classes: int) -> Labels | None:
    """Classes to show, ascending, the last one being "no class"."""
    if num_classes == 0:
        return None
    return np.unique(np.linspace(0, num_classes, min(num_classes + 1, _MOST_LABELS)).round().astype(np.int64))


def _largest_difference(found: Images, expected: Images) -> float:
    """The largest absolute difference; infinite when a shape or dtype differs or a value is not a number."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    difference = float(np.abs(found - expected).max())
    return difference if np.isfinite(difference) else float("inf")


def _check_finite(expected: Images, what: str) -> None:
    if not np.isfinite(expected).all():
        raise RunError(
            f"{what} of the run gives values that are not finite numbers in torch itself, so there is nothing to "
            f"export: its training diverged; look at the loss in metrics.jsonl and train again with a lower "
            f"--set learning_rate"
        )


def _enforce(what: str, difference: float, limit: float, where: str) -> None:
    if difference > limit:
        raise EdgeblocksError(
            f"the export is wrong: {what} gives other numbers in onnxruntime than in torch: they differ by "
            f"{difference:.2e} ({where}), {limit:.0e} is allowed. Nothing was written. Try another version of "
            "onnxruntime or torch, and report this with both versions"
        )
