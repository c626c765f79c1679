"""How good a network is: denoising loss per noise level on the hold-out part, and a Frechet distance of its samples."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from edgeblocks.chain import BlockRunner
from edgeblocks.data.images import ImageSet
from edgeblocks.generators import generator_at
from edgeblocks.noise import NoiseDistribution, NoisePartition

NUM_LEVELS = 24
MOST_IMAGES = 512
FEATURE_CHUNK = 64


def evaluation_levels(distribution: NoiseDistribution, num_levels: int = NUM_LEVELS) -> tuple[float, ...]:
    """Noise levels at the middles of `num_levels` equal shares of the training distribution, descending.

    A plain mean over them estimates the loss under the training distribution, whatever the partition.
    """
    low, high = distribution.quantile(distribution.sigma_min), distribution.quantile(distribution.sigma_max)
    shares = [(index + 0.5) / num_levels for index in range(num_levels)]
    return tuple(distribution.sigma_at(high + share * (low - high)) for share in shares)


def validation_loss(
    family: Any,
    runner: BlockRunner,
    images: ImageSet,
    *,
    seed: int,
    most_images: int = MOST_IMAGES,
    on_level: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The family's loss on hold-out images with the EMA weights, per noise level and in total.

    The noise of a level depends on the seed and the level's number only, so that runs with other partitions, budgets or
    numbers of blocks are compared on the same noised images.

    Returns:
        `total`, `standard_error` (over images), `images`, and `levels`: one {sigma, block, loss} each, with what else
        the family's `scores` tell.
    """
    indices = images.held_out[:most_images] if len(images.held_out) else images.train[:most_images]
    levels = []
    per_image = np.zeros(len(indices))
    for number, sigma in enumerate(evaluation_levels(family.noise)):
        block = runner.partition.block_of(sigma)
        network = runner.network(block)
        generator = generator_at(seed, "eval", number)
        found: list[dict[str, np.ndarray]] = []
        for start in range(0, len(indices), runner.micro_batch):
            pixels, labels = images.gather(indices[start : start + runner.micro_batch])
            batch = family.at_level(pixels, labels, sigma, generator)
            with torch.no_grad():
                there = {name: tensor.to(runner.device) for name, tensor in batch.items()}
                scores = family.scores(network, there)
            found.append({name: values.cpu().numpy() for name, values in scores.items()})
        whole = {name: np.concatenate([part[name] for part in found]).astype(np.float64) for name in found[0]}
        per_image += whole["loss"] / NUM_LEVELS
        levels.append(
            {"sigma": sigma, "block": block, **{name: float(values.mean()) for name, values in whole.items()}}
        )
        if on_level is not None:
            on_level(number + 1)
    return {
        "total": float(per_image.mean()),
        "standard_error": float(per_image.std(ddof=1) / math.sqrt(len(per_image))) if len(per_image) > 1 else None,
        "images": len(indices),
        "part": "hold-out" if len(images.held_out) else "training (there is no hold-out part)",
        "levels": levels,
    }


def mean_by_block(
    levels: Sequence[dict[str, Any]], partition: NoisePartition, score: str = "loss"
) -> list[float | None]:
    """The mean of a score of each block over the evaluation levels that it owns; None where it owns none."""
    means: list[float | None] = []
    for block in range(partition.num_blocks):
        own = [level[score] for level in levels if level["block"] == block]
        means.append(sum(own) / len(own) if own else None)
    return means


def sample_distance(samples: np.ndarray, images: ImageSet) -> dict[str, Any]:
    """Frechet distance of samples to the training part, beside what the hold-out part itself scores.

    Args:
        samples: uint8 [N, H, W, C].

    Returns:
        `to_train` for the samples, `floor` for as many hold-out images against the same training images (None without
        a hold-out part of that size), `samples`, and `feature_space`.
    """
    from edgeblocks.frechet import FEATURE_SPACE, frechet_distance, image_features

    def features_of(indices: np.ndarray) -> np.ndarray:
        chunks = [indices[start : start + FEATURE_CHUNK] for start in range(0, len(indices), FEATURE_CHUNK)]
        return np.concatenate([image_features(images.gather(chunk)[0]) for chunk in chunks])

    count = len(samples)
    train = features_of(images.train[: max(4 * count, 2048)])
    floor = frechet_distance(features_of(images.held_out[:count]), train) if len(images.held_out) >= count else None
    return {
        "to_train": frechet_distance(image_features(samples), train),
        "floor": floor,
        "samples": count,
        "train_images": len(train),
        "feature_space": FEATURE_SPACE,
    }
