"""One figure of how good a network is, the same for every way to train it: for curves over a training, and to compare.

Images are judged by their denoising loss, classes by accuracy, text by bits a character. A chain is walked where the
network is one; an ordinary network answers in one pass.
"""

from dataclasses import dataclass

from edgeblocks.data.dataset import DataSet
from edgeblocks.data.text import TextSet
from edgeblocks.families.family import Family
from edgeblocks.inference import likelihood, metrics
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.inference.metrics import NetworkSource
from edgeblocks.inference.sampling import classified, token_chain_of, usual_steps
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.tasks import TASKS, TEXT_TASKS


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A figure, its standard error over examples, None where they are too few for one, and their number."""

    value: float
    standard_error: float | None
    examples: int


def run_quality(directory: RunDirectory, runner: BlockRunner, data: DataSet) -> Quality:
    """Of a run, with the weights that the runner has."""
    family, seed = directory.family(), directory.settings.run.seed
    if directory.method.trained_together or family.task in ("images", "text"):
        return network_quality(family, runner, data, seed=seed)
    indices = data.evaluation_indices(TASKS[family.task].quality_examples)
    if family.task == "classes":
        steps, noises = usual_steps(directory), TASKS[family.task].noises
        found = classified(directory, runner, data, indices, steps=steps, noises=noises, seed=seed)
        right = sum(int((probabilities.argmax(axis=1) == labels).sum()) for probabilities, labels in found)
        return _accuracy(right / len(indices), len(indices))
    examples, _ = data.gather(indices)
    assert isinstance(data, TextSet)
    chain = token_chain_of(directory, usual_steps(directory))
    return _bits(*likelihood.bound(runner, chain, examples, seed=seed, noises=(1,))[1], data, len(examples))


def network_quality(family: Family, runner: NetworkSource, data: DataSet, *, seed: int) -> Quality:
    """Of one pass of a network at each level that evaluation looks at; at the first level alone where that says most.

    Args:
        runner: gives the network; see `metrics.validation_loss`.
    """
    found = metrics.validation_loss(family, runner, data, seed=seed, most_examples=TASKS[family.task].quality_examples)
    # The highest level, where z says least and the network has to know the answer itself.
    first = found["levels"][0]
    if family.task == "classes":
        return _accuracy(first["top1"], found["images"])
    if family.task not in TEXT_TASKS:
        return Quality(value=found["total"], standard_error=found["standard_error"], examples=found["images"])
    assert isinstance(data, TextSet)
    if family.task == "continuation":
        error = found["standard_error"] if len(found["levels"]) == 1 else None
        return _bits(first["loss"], error, data, found["images"])
    return _bits(found["total"], found["standard_error"], data, found["images"])


def _accuracy(share: float, count: int) -> Quality:
    return Quality(value=share, standard_error=metrics.share_error(share, count), examples=count)


def _bits(nats: float, error: float | None, text: TextSet, count: int) -> Quality:
    found = metrics.bits(nats, error, text)
    return Quality(value=found["bits_per_character"], standard_error=found["bits_per_character_error"], examples=count)
