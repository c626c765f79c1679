"""Classes of images from a chain of label denoisers, and how good they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from edgeblocks.chain import BlockRunner
from edgeblocks.noise import sampler_levels
from edgeblocks.randomness import seed_at, start_noise
from edgeblocks.solver import integrate

DEFAULT_STEPS = 4
DEFAULT_NOISES = 4
CALIBRATION_BINS = 15


def classify(
    family: Any,
    runner: BlockRunner,
    pixels: np.ndarray,
    *,
    steps: int = DEFAULT_STEPS,
    noises: int = DEFAULT_NOISES,
    seed: int = 0,
    on_level: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "images classes"]:
    """The probabilities of each image's classes: the mean of chains that start from `noises` different noises.

    Args:
        pixels: uint8 [N, H, W, C].
        steps: noise levels of a chain, at least one a block.

    Raises:
        ConfigError: fewer steps than blocks.
    """
    levels = sampler_levels(runner.partition, num_steps=steps)
    condition, count = family.condition(pixels), len(pixels)
    starts = [
        start_noise(family.state_shape, num_samples=count, seed=seed_at(seed, "chain", number))
        for number in range(noises)
    ]

    def denoise(z: torch.Tensor, sigma: float) -> torch.Tensor:
        parts = [runner.denoise(part, sigma, condition) for part in torch.split(z, count)]
        return torch.cat(parts)

    ends = integrate(denoise, torch.from_numpy(np.concatenate(starts)), levels, solver="euler", on_level=on_level)
    mean: np.ndarray = ends.view(noises, count, -1).mean(0).numpy()
    return mean


def classification_scores(
    probabilities: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, " images"]
) -> dict[str, Any]:
    """Shares of images whose class is the likeliest (top1) or among the five likeliest (top5), and the calibration.

    `calibration_error` is the mean distance between how sure the answers are and how often they are right, over bins
    of equal width in the largest probability, weighted by the images in each (Guo et al. 2017, arXiv 1706.04599).

    >>> found = classification_scores(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]))
    >>> found["top1"], round(found["calibration_error"], 3)
    (0.5, 0.4)
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    right = order == labels[:, None]
    sure = probabilities.max(axis=1)
    bins = np.minimum((sure * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    rows = []
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
    return {
        "top1": float(right[:, 0].mean()),
        "top5": float(right[:, :5].any(axis=1).mean()),
        "calibration_error": distance / len(labels),
        "calibration": rows,
        "images": len(labels),
    }
