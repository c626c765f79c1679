"""How good a network is: denoising loss per noise level on the hold-out part, and a Frechet distance of its samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeblocks.data.dataset import DataSet
from edgeblocks.data.images import ImageSet
from edgeblocks.data.text import TextSet
from edgeblocks.diffusion.noise import NoisePartition
from edgeblocks.families.base import Level
from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Precision
from edgeblocks.seeds import generator_at
from edgeblocks.tasks import FEWEST_FOR_ERROR

FEATURE_CHUNK = 16
_FEWEST_OF_A_KIND = 5
MOST_IN_BOTH = 32
"""Examples whose loss is computed in both precisions."""
"""Right or wrong examples from which the error of their share is the usual one."""


class ValidationLoss(TypedDict):
    """What `validation_loss` found."""

    total: float
    standard_error: float | None
    """Over examples; None where they are too few for one."""
    images: int
    """How many examples, of whatever kind."""
    part: str
    levels: list[dict[str, float]]
    """One {sigma, block, share, loss} each, with what else the family's `scores` tell."""


class Bits(TypedDict):
    """A bound of text; the errors are standard errors over sequences, None where they are not known."""

    bits_per_token: float
    bits_per_token_error: float | None
    bits_per_character: float
    bits_per_character_error: float | None


class TextFacts(TypedDict):
    """The text of a bound: its tokenizer and its sequences."""

    characters_per_token: float
    tokenizer: str
    sequences: int
    length: int


class TextBound(Bits, TextFacts):
    """A bound of text, and what it is of."""


class SampleDistance(TypedDict):
    """What `sample_distance` found."""

    to_train: float
    floor: float | None
    samples: int
    train_images: int
    feature_space: str


class NetworkSource(Protocol):
    """Where the networks are that evaluation looks at: the blocks of a run, or one network for all levels."""

    @property
    def partition(self) -> NoisePartition: ...

    @property
    def micro_batch(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where the network is that was given last."""
        ...

    @property
    def precision(self) -> Precision:
        """In which it computes."""
        ...

    def network(self, block: int) -> nn.Module:
        """A block as a module in evaluation."""
        ...


class Scored(Protocol):
    """What of a `Family` a validation loss asks for."""

    def evaluation_levels(self, partition: NoisePartition) -> Sequence[Level]: ...

    def at_level(
        self, examples: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator, /
    ) -> dict[str, Tensor]: ...

    def scores(self, block: nn.Module, batch: dict[str, Tensor], /) -> dict[str, Tensor]: ...


def standard_error(values: NDArray[np.float64]) -> float | None:
    """Of the mean of values [n]; None where they are too few for one.

    >>> standard_error(np.array([1.0, 2.0])), standard_error(np.arange(12.0))
    (None, 1.0408329997330663)
    """
    return None if len(values) < FEWEST_FOR_ERROR else float(values.std(ddof=1) / math.sqrt(len(values)))


def share_error(share: float, count: int) -> float | None:
    """The standard error of a share of `count` examples; None where they are too few for one.

    Source: A. Agresti, B. Coull 1998, "Approximate is better than exact": four more examples, two of them right, where
    nearly all are right or wrong, so that four of four are not certain.

    >>> share_error(1.0, 4), share_error(0.5, 100), round(share_error(1.0, 100), 4)
    (None, 0.05, 0.0135)
    """
    if count < FEWEST_FOR_ERROR:
        return None
    if min(share, 1 - share) * count < _FEWEST_OF_A_KIND:
        share, count = (share * count + 2) / (count + 4), count + 4
    return math.sqrt(share * (1 - share) / count)


def validation_loss(
    family: Scored,
    runner: NetworkSource,
    data: DataSet,
    *,
    seed: int,
    most_examples: int,
    on_level: Callable[[int, int], None] | None = None,
) -> ValidationLoss:
    """The family's loss on hold-out examples with the EMA weights, per noise level and in total.

    The noise of a level depends on the seed and the level's number only, so that runs with other partitions, budgets or
    numbers of blocks are compared on the same noised examples, where the family looks at the same levels.

    Args:
        on_level: called with the numbers of levels done and in all.
    """
    indices = data.evaluation_indices(most_examples)
    rows: list[dict[str, float]] = []
    # An example's mean over levels first: the error is over examples, as one example's levels are not independent.
    per_example = np.zeros(len(indices))
    num_levels = len(family.evaluation_levels(runner.partition))
    for level, block, scores in scores_by_level(family, runner, data, indices, seed=seed):
        per_example += level.share * scores["loss"]
        means = {name: float(values.mean()) for name, values in scores.items()}
        rows.append({"sigma": level.middle, "block": block, "share": level.share, **means})
        if on_level is not None:
            on_level(len(rows), num_levels)
    return {
        "total": float(per_example.mean()),
        "standard_error": standard_error(per_example),
        "images": len(indices),
        "part": part_of(data),
        "levels": rows,
    }


def part_of(data: DataSet) -> str:
    """Which part of the data `evaluation_indices` are of."""
    return "hold-out" if data.has_held_out else "training (there is no hold-out part)"


def scores_by_level(
    family: Scored, runner: NetworkSource, data: DataSet, indices: np.ndarray, *, seed: int
) -> Iterator[tuple[Level, int, dict[str, np.ndarray]]]:
    """Each level that evaluation looks at, its block, and the family's scores of each example there, float64."""
    for number, level in enumerate(family.evaluation_levels(runner.partition)):
        block = runner.partition.block_of(level.middle)
        network = runner.network(block)
        # One a level and not one for all: what a level draws does not depend on the levels before it.
        generator = generator_at(seed, "eval", number)
        sums: dict[str, np.ndarray] = {}
        for part in level.parts():
            for name, values in _scores(family, runner, network, data, indices, part, generator).items():
                sums[name] = sums.get(name, 0) + values / level.strata
        del network  # the next block is made before a name would let go of this one
        yield level, block, sums


def _scores(
    family: Scored,
    runner: NetworkSource,
    network: nn.Module,
    data: DataSet,
    indices: np.ndarray,
    level: Level,
    generator: torch.Generator,
) -> dict[str, np.ndarray]:
    """The family's scores of each example at one level, float64, micro-batch by micro-batch."""
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(indices), runner.micro_batch):
        examples, labels = data.gather(indices[start : start + runner.micro_batch])
        batch = family.at_level(examples, labels, level, generator)
        for name, values in scores_of(family, runner, network, batch).items():
            found.setdefault(name, []).append(values.numpy())
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}


class InBoth(TypedDict):
    """Mean losses of the same examples with the same noise, over all levels, in half precision and in float32."""

    precision: Precision
    half: float
    fp32: float
    examples: int


def loss_in_both(family: Family, runner: NetworkSource, data: DataSet, *, seed: int) -> InBoth:
    """What computing in half precision changes in the family's loss, on a few hold-out examples."""
    # Half a micro-batch, as an activation takes twice the room.
    indices = data.evaluation_indices(max(1, min(runner.micro_batch // 2, MOST_IN_BOTH)))
    examples, labels = data.gather(indices)
    sums: dict[Precision, float] = {runner.precision: 0.0, "fp32": 0.0}
    for number, level in enumerate(family.evaluation_levels(runner.partition)):
        network = runner.network(runner.partition.block_of(level.middle))
        batch = family.at_level(examples, labels, level, generator_at(seed, "eval", number))
        for precision in sums:
            losses = scores_of(family, runner, network, batch, precision=precision)["loss"]
            sums[precision] += level.share * float(losses.double().mean())
        del network
    half = sums[runner.precision]
    return {"precision": runner.precision, "half": half, "fp32": sums["fp32"], "examples": len(indices)}


@torch.no_grad()
def scores_of(
    family: Scored,
    runner: NetworkSource,
    network: nn.Module,
    batch: dict[str, Tensor],
    *,
    precision: Precision | None = None,
) -> dict[str, Tensor]:
    """The family's scores of each example of a batch; the batch and the scores lie in the processor's memory.

    Args:
        precision: None: the runner's.
    """
    there = {name: tensor.to(runner.device) for name, tensor in batch.items()}
    with computing_in(precision or runner.precision, runner.device):
        scores = family.scores(network, there)
    return {name: values.cpu() for name, values in scores.items()}


def mean_by_block(
    levels: Sequence[Mapping[str, float]], partition: NoisePartition, score: str = "loss"
) -> list[float | None]:
    """The mean of a score of each block over the evaluation levels that it owns, weighted by their shares; None where
    it owns none."""
    means: list[float | None] = []
    for block in range(partition.num_blocks):
        own = [level for level in levels if level["block"] == block]
        # Divided by the shares of its own levels, which need not be evenly many for every block.
        share = sum(level["share"] for level in own)
        means.append(sum(level["share"] * level[score] for level in own) / share if own else None)
    return means


def text_scores(nats: float, error: float | None, sequences: int, data: DataSet) -> TextBound:
    """A text's bound in bits a token and a character, from that in nats a token and its error over sequences."""
    assert isinstance(data, TextSet)
    return {**bits(nats, error, data), **text_facts(data, sequences)}


def bits(nats: float, error: float | None, text: TextSet) -> Bits:
    """Nats a token and their standard error in bits a token and a character."""
    per_token, error_per_token = nats / math.log(2), None if error is None else error / math.log(2)
    per_character = 1 / text.characters_per_token
    return {
        "bits_per_token": per_token,
        "bits_per_token_error": error_per_token,
        "bits_per_character": per_token * per_character,
        "bits_per_character_error": None if error_per_token is None else error_per_token * per_character,
    }


def text_facts(text: TextSet, sequences: int) -> TextFacts:
    """The text of a bound: its tokenizer and its sequences."""
    return {
        "characters_per_token": text.characters_per_token,
        "tokenizer": text.tokenizer.kind,
        "sequences": sequences,
        "length": text.length,
    }


def sample_distance(samples: np.ndarray, images: ImageSet) -> SampleDistance:
    """Frechet distance of samples to the training part, and that of the hold-out part to compare it with.

    Args:
        samples: uint8 [N, H, W, C].

    Returns:
        `to_train` for the samples, `floor` for as many hold-out images against the same training images (None without
        a hold-out part of that size), `samples`, and `feature_space`.
    """
    from edgeblocks.inference.frechet import FEATURE_SPACE, frechet_distance, image_features

    def features_of(indices: np.ndarray) -> np.ndarray:
        chunks = [indices[start : start + FEATURE_CHUNK] for start in range(0, len(indices), FEATURE_CHUNK)]
        return np.concatenate([image_features(images.pixels(chunk)) for chunk in chunks])

    count = len(samples)
    # More of them than samples: the distance has the noise of both sets, and real images cost only their features.
    train = features_of(images.train[: max(4 * count, 2048)])
    floor = frechet_distance(features_of(images.held_out[:count]), train) if len(images.held_out) >= count else None
    return {
        "to_train": frechet_distance(image_features(samples), train),
        "floor": floor,
        "samples": count,
        "train_images": len(train),
        "feature_space": FEATURE_SPACE,
    }
