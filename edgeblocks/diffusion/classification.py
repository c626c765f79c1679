"""Classes of images from a chain of label denoisers, and how good they are. No torch: the deployed chain runs it."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from edgeblocks.diffusion.solver import integrate
from edgeblocks.seeds import seed_at, start_noise

CALIBRATION_BINS = 15
LEAST_PROBABILITY = 1e-12
"""A class that is given less counts as this in the cross-entropy."""


CLASSIFIED_BYTES = 2**24
"""Of the images and chains that are in memory together."""
_CHAIN_COPIES = 6
"""Of a chain's labels, while they are integrated."""


class ClassChains(TypedDict):
    """What the memory of classifying an image depends on."""

    num_classes: int
    noises: int
    values_per_image: int
    """Components of its pixels, which are there as bytes and as float32."""


def classified_together(**chains: Unpack[ClassChains]) -> int:
    """How many images are classified at once: as many as `CLASSIFIED_BYTES` hold, at least one."""
    return max(1, CLASSIFIED_BYTES // _image_bytes(**chains))


def classified_bytes(num_images: int, **chains: Unpack[ClassChains]) -> int:
    """What classifying so many images keeps beside the network."""
    return min(num_images, classified_together(**chains)) * _image_bytes(**chains)


def _image_bytes(*, num_classes: int, noises: int, values_per_image: int) -> int:
    return 4 * _CHAIN_COPIES * noises * num_classes + 5 * values_per_image


def classify(
    denoise: Callable[[NDArray[np.float32], float], NDArray[np.float32]],
    *,
    pixels: NDArray[np.uint8],
    num_classes: int,
    levels: Sequence[float],
    noises: int,
    seed: int,
    on_level: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """The probabilities of each image's classes, [images, classes]: the mean over several chains and all their levels.

    Args:
        denoise: the denoised labels [images, classes] of noised ones [images, classes] at a noise level.
        pixels: the images, [images, height, width, channels]. An image's noise follows from its pixels, so that the
            same image has the same answer whatever its place and the other images.
        levels: descending noise levels.
        noises: chains an image.
    """
    # The end of one chain is a draw from the classes' distribution, not the distribution: by itself it is right as
    # often as the network is sure. The denoised label is a martingale along a chain, whose mean at every level is the
    # distribution, so all levels count; measured on the digits (2 blocks of 2 layers, 300 steps, 4 noises, 4 levels),
    # the ends alone were right in 74 % and all levels in 89 %.
    total = np.zeros((len(pixels), num_classes), dtype=np.float32)

    def denoise_all(z: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        denoised = np.empty_like(z)
        for one, part in zip(np.split(denoised, noises), np.split(z, noises), strict=True):
            one[:] = denoise(part, sigma)
            np.add(total, one, out=total)
        return denoised

    # All chains together: at each level they run before the next level's block is needed, so each is loaded once.
    integrate(
        denoise_all,
        np.concatenate(label_noise(pixels, num_classes=num_classes, noises=noises, seed=seed)),
        levels,
        solver="euler",
        on_level=on_level,
    )
    mean: NDArray[np.float32] = total / np.float32(noises * len(levels))
    return mean


def label_noise(pixels: NDArray[np.uint8], *, num_classes: int, noises: int, seed: int) -> NDArray[np.float32]:
    """Where the chains of each image begin: standard normal, [noises, images, classes]."""
    images = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    chains = [start_noise((num_classes,), samples=images, seed=seed_at(seed, "chain", n)) for n in range(noises)]
    return np.stack(chains)


class CalibrationBin(TypedDict):
    """Answers that are about equally sure."""

    images: int
    confidence: float
    accuracy: float


class Classification(TypedDict):
    """What `classification_scores` found."""

    top1: float
    top5: float
    cross_entropy: float
    calibration_error: float
    calibration: list[CalibrationBin]
    images: int


def classification_scores(
    answers: Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]],
) -> Classification:
    """How good probabilities [images, classes] are, given the classes [images]; both come some images at a time.

    Shares of images whose class is the likeliest (top1) or among the five likeliest (top5). `cross_entropy` is the mean
    of -log p of the right class, in nats; `calibration_error` the mean distance between how sure answers are and how
    often they are right, over bins of equal width in the largest probability, weighted by the images in each (Guo et
    al. 2017, arXiv 1706.04599).

    >>> found = classification_scores([(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]))])
    >>> found["top1"], round(found["calibration_error"], 3)
    (0.5, 0.4)
    """
    # Of an image with thousands of classes only three numbers are kept.
    kept = [np.concatenate(column) for column in zip(*(_answered(*answer) for answer in answers), strict=True)]
    rank, sure, own = kept
    right = rank == 0
    bins = np.minimum((sure * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)  # 1.0 is in the last
    rows: list[CalibrationBin] = []
    for number in range(CALIBRATION_BINS):
        inside = bins == number
        if inside.any():
            rows.append(
                {
                    "images": int(inside.sum()),
                    "confidence": float(sure[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    distance = sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    likelihood = np.maximum(own.astype(np.float64), LEAST_PROBABILITY)
    return {
        "top1": float(right.mean()),
        "top5": float((rank < 5).mean()),
        "cross_entropy": float(-np.log(likelihood).mean()),
        "calibration_error": distance / len(rank),
        "calibration": rows,
        "images": len(rank),
    }


def _answered(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Of each image: how many classes are likelier than the right one, the largest probability, the right one's."""
    own = probabilities[np.arange(len(labels)), labels]
    # Without sorting; of classes that are equally likely the first counts as the likelier.
    before = np.arange(probabilities.shape[1]) < labels[:, None]
    likelier = (probabilities > own[:, None]) | ((probabilities == own[:, None]) & before)
    return likelier.sum(axis=1), probabilities.max(axis=1), own
