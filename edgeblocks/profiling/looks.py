"""Looks at a network during its training: grids of samples and evaluations.

What they keep in memory, and about how long they take: counted in passes of one example forward through a block, or
through the network that stages make up.
"""

from dataclasses import dataclass

from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.autoregression import writing_bytes
from edgeblocks.diffusion.classification import classified_bytes
from edgeblocks.diffusion.noise import NoisePartition
from edgeblocks.families.base import DataInfo, ImageInfo
from edgeblocks.families.family import AnyFamily
from edgeblocks.methods import METHODS
from edgeblocks.registry import family_type
from edgeblocks.settings.fields import RunSettings
from edgeblocks.tasks import GRID_TOKENS, TASKS


@dataclass(frozen=True, kw_only=True)
class Looks:
    """How many there are in a whole training, and the passes of one."""

    grids: int
    grid_passes: float
    evaluations: int
    evaluation_passes: float
    last_passes: float
    """Of the evaluation at the end."""

    def seconds(self, pass_s: float) -> float:
        """Of all."""
        passes = self.grids * self.grid_passes + self.evaluations * self.evaluation_passes + self.last_passes
        return passes * pass_s


def pass_seconds(step_s: float, *, batch: int, again: bool) -> float:
    """Of one example forward, about, given a training step's: backward takes twice as long as forward.

    Args:
        again: whether layers are run forward once more on the way back.

    >>> pass_seconds(6.0, batch=2, again=False)
    1.0
    """
    return step_s / batch / (4 if again else 3)


def expected_looks(run: RunSettings, family: AnyFamily, partition: NoisePartition, data: DataSet) -> Looks:
    """Those that a run's settings ask for."""
    usual, blocks = TASKS[family.task], len(partition.ranges)
    levels = sum(level.strata for level in family.evaluation_levels(partition))
    chain = max(family.chain_steps, blocks)
    grid = float(usual.grid_samples * chain)
    quality = float(len(data.evaluation_indices(usual.quality_examples)))
    if family.task == "images":
        grid = usual.grid_samples * (2.0 * max(run.sample_steps, blocks) - 1)  # Heun runs twice, but at the last level
    elif family.task == "continuation":
        grid *= min(family.data.length, GRID_TOKENS) / family.data.length  # a token at a time, with a KV cache
    is_chain = not METHODS[run.method].trained_together and family.task in ("classes", "continuation")
    return Looks(
        grids=run.sample_grids if usual.grid_samples else 0,
        grid_passes=grid,
        evaluations=run.evaluations,
        evaluation_passes=quality * (chain * usual.noises if is_chain else levels),
        last_passes=float(len(data.evaluation_indices(usual.loss_examples)) * levels),
    )


def quality_bytes(run: RunSettings, data: DataInfo) -> int:
    """What measuring the quality along the training keeps beside the network, where a chain classifies images."""
    usual = TASKS[family_type(run.family).task]
    if not run.evaluations or not isinstance(data, ImageInfo) or METHODS[run.method].trained_together:
        return 0
    if family_type(run.family).task != "classes":
        return 0
    return classified_bytes(
        usual.quality_examples,
        num_classes=data.num_classes,
        noises=usual.noises,
        values_per_image=data.channels * data.height * data.width,
    )


def grid_sample_bytes(family: AnyFamily) -> int:
    """Bytes of the KV cache of a sample that is written token by token during training."""
    if family.task != "continuation" or not family.writes_text:
        return 0
    sets = 1 if family.caches_per == "block" else TASKS[family.task].steps
    return writing_bytes(
        length=min(family.data.length, GRID_TOKENS),
        num_caches=family.num_caches(family.num_layers) * sets,
        width=family.heads * family.head_width,
        vocabulary=family.data.vocabulary,
        code_width=family.code_width,
    )
