"""When a network grows (`--set grow=auto`): when what the window still gains is little beside what it has gained.

The loss on hold-out examples, with the EMA weights, is looked at after the same number of steps each time
(`planning.windows.look_steps`). It has flattened when from the last look to this one it fell by less than `FLAT` of its
mean fall since the first look at this window. That has no unit: it is the same for a loss in nats and for one of
pixels. A loss that falls with the logarithm of the steps does not flatten so in 50 looks; the window then ends where
just enough steps are left for those above it (`latest_steps`).
"""

from collections.abc import Sequence

from edgeblocks.data.dataset import DataSet
from edgeblocks.inference import metrics
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.runs.directory import RunDirectory

FLAT = 0.25
FEWEST_LOOKS = 4
"""At a window, before it can be called flat."""
LOOK_BATCHES = 2
"""Hold-out examples of a look, in batches: the same ones each time, so that their own spread cancels."""


def is_flat(losses: Sequence[float]) -> bool:
    """Whether the losses of a window, at each look in turn, have stopped falling.

    >>> is_flat([3.0, 2.0, 1.5, 1.25]), is_flat([3.0, 2.0, 1.5, 1.45])
    (False, True)
    """
    if len(losses) < FEWEST_LOOKS:
        return False
    mean_fall = (losses[0] - losses[-1]) / (len(losses) - 1)
    return losses[-2] - losses[-1] < FLAT * mean_fall or mean_fall <= 0


def is_to_grow(run: RunDirectory, runner: BlockRunner, data: DataSet, step: int) -> bool:
    """Whether a run's network is to grow after a step; looks at the loss where it is due, and writes it down."""
    assert run.window is not None
    every, first = run.look_steps, run.window.first_step
    if every is None:
        return False
    looks = {look.step: look.loss for look in run.growth() if first < look.step <= step}
    if step > first and step % every == 0 and step not in looks:
        most = LOOK_BATCHES * run.settings.run.batch
        found = metrics.validation_loss(run.family(), runner, data, seed=run.settings.run.seed, most_examples=most)
        looks[step] = found["total"]
        run.append("growth.jsonl", {"step": step, "loss": looks[step]})
    return is_flat([looks[step] for step in sorted(looks)])
