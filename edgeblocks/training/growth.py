"""When a network grows, and how good it was before it did.

The loss on hold-out examples, with the EMA weights, is looked at before layers are added; with `--set grow=auto` also
after the same number of steps each time (`planning.windows.look_steps`), and layers are added when it has flattened:
when from the last look to this one it fell by less than `FLAT` of its mean fall since the first look at this window.
That has no unit: it is the same for a loss in nats and for one of pixels. A loss that falls with the logarithm of the
steps does not flatten so in 50 looks; the window then ends where just enough steps are left for those above it
(`latest_steps`).
"""

from collections.abc import Callable, Sequence

from edgeblocks.data.dataset import DataSet
from edgeblocks.inference import metrics
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.runs.directory import RunDirectory

FLAT = 0.25
FEWEST_LOOKS = 4
"""At a window, before it can be called flat."""
LOOK_BATCHES = 16
"""That a look sends forward through the network, about: as much computing as five steps. Masked text is looked at with
128 shares of its tokens masked, so that it has few examples; they are the same ones each time."""
FEWEST_EXAMPLES = 4


def is_flat(losses: Sequence[float]) -> bool:
    """Whether the losses of a window, at each look in turn, have stopped falling.

    >>> is_flat([3.0, 2.0, 1.5, 1.25]), is_flat([3.0, 2.0, 1.5, 1.45])
    (False, True)
    """
    if len(losses) < FEWEST_LOOKS:
        return False
    mean_fall = (losses[0] - losses[-1]) / (len(losses) - 1)
    return losses[-2] - losses[-1] < FLAT * mean_fall or mean_fall <= 0


class Growth:
    """Looks at the loss of a run's network, and says when it is to grow. What it finds is in growth.jsonl."""

    def __init__(self, run: RunDirectory, data: DataSet) -> None:
        self._run, self._data = run, data

    def is_due(self, step: int, runner: Callable[[], BlockRunner]) -> bool:
        """Whether layers are to be added after a step, before the window has to end; looks at the loss in its turn.

        Args:
            runner: gives one with the weights as they are now.
        """
        run, every = self._run, self._run.look_steps
        if every is None or run.window is None:
            return False
        if step > run.window.first_step and step % every == 0:
            self.look(step, runner)
        return is_flat([loss for seen, loss in sorted(self._looks().items()) if seen <= step])

    def look(self, step: int, runner: Callable[[], BlockRunner]) -> None:
        """Look at the loss after a step; once."""
        run = self._run
        if step in self._looks():
            return
        passes = sum(level.strata for level in run.family().evaluation_levels(run.partition))
        most = max(FEWEST_EXAMPLES, LOOK_BATCHES * run.settings.run.batch // passes)
        found = metrics.validation_loss(
            run.family(), runner(), self._data, seed=run.settings.run.seed, most_examples=most
        )
        run.append("growth.jsonl", {"step": step, "loss": found["total"], "layers": sum(run.layers)})

    def _looks(self) -> dict[int, float]:
        """The losses that were seen of this window, by the step."""
        layers = sum(self._run.layers)
        return {look.step: look.loss for look in self._run.growth() if look.layers == layers}
