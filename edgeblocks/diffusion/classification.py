"""Classes of images from a chain of label denoisers, and how good they are. No torch: the deployed chain runs it."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeblocks.diffusion.solver import integrate
from edgeblocks.seeds import seed_at, start_noise

CALIBRATION_BINS = 15
LEAST_PROBABILITY = 1e-12
"""A class that is given less counts as this in the cross-entropy."""


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
    images = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    starts = [
        start_noise((num_classes,), samples=images, seed=seed_at(seed, "chain", number)) for number in range(noises)
    ]

    # The end of one chain is a draw from the classes' distribution, not the distribution: by itself it is right as
    # often as the network is sure. The denoised label is a martingale along a chain, whose mean at every level is the
    # distribution, so all levels count; measured on the digits (2 blocks of 2 layers, 300 steps, 4 noises, 4 levels),
    # the ends alone were right in 74 % and all levels in 89 %.
    total = np.zeros((len(pixels), num_classes), dtype=np.float32)

    def denoise_all(z: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        parts = [denoise(part, sigma) for part in np.split(z, noises)]
        for part in parts:
            np.add(total, part, out=total)
        return np.concatenate(parts)

    # All chains together: at each level they run before the next level's block is needed, so each is loaded once.
    integrate(denoise_all, np.concatenate(starts), levels, solver="euler", on_level=on_level)
    mean: NDArray[np.float32] = total / np.float32(noises * len(levels))
    return mean


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


def classification_scores(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> Classification:
    """How good probabilities [images, classes] are, given the classes [images].

    Shares of images whose class is the likeliest (top1) or among the five likeliest (top5). `cross_entropy` is the mean
    of -log p of the right class, in nats; `calibration_error` the mean distance between how sure answers are and how
    often they are right, over bins of equal width in the largest probability, weighted by the images in each (Guo et
    al. 2017, arXiv 1706.04599).

    >>> found = classification_scores(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]))
    >>> found["top1"], round(found["calibration_error"], 3)
    (0.5, 0.4)
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    right = order == labels[:, None]
    sure = probabilities.max(axis=1)
    bins = np.minimum((sure * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)  # 1.0 is in the last
    rows: list[CalibrationBin] = []
    for number in range(CALIBRATION_BINS):
        inside = bins == number
        if inside.any():
            rows.append(
                {
                    "images": int(inside.sum()),
                    "confidence": float(sure[inside].mean()),
                    "accuracy": float(right[inside, 0].mean()),
                }
            )
    distance = sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    likelihood = np.maximum(probabilities[np.arange(len(labels)), labels].astype(np.float64), LEAST_PROBABILITY)
    return {
        "top1": float(right[:, 0].mean()),
        "top5": float(right[:, :5].any(axis=1).mean()),
        "cross_entropy": float(-np.log(likelihood).mean()),
        "calibration_error": distance / len(labels),
        "calibration": rows,
        "images": len(labels),
    }
