"""What a run's first steps took, held against its plan: told, and kept for the run and for plans to come."""

import contextlib
import statistics
from collections.abc import Callable

from edgeblocks.errors import StorageError
from edgeblocks.planning.corrections import MeasuredSteps
from edgeblocks.profiling.kept_steps import KeptSteps
from edgeblocks.progress import Progress
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.training.guard import Guard
from edgeblocks.units import format_duration

WARM_STEPS = 3
"""That touch memory and load programs, and are left out."""
FEWEST_STEPS = 20
"""That say how long steps take; of long ones fewer do: `FEWEST_LONG_STEPS` in `LONG_S`."""
FEWEST_LONG_STEPS, LONG_S = 3, 60.0
MOST_STEPS = 1280


class RealSteps:
    """Sees a run's steps. When there are enough of them it writes their time into plan.json and, where that is not what
    the plan said, notes it once in a run's life; whenever there are twice as many it keeps their time in the cache."""

    def __init__(self, run: RunDirectory, guard: Guard, note: Callable[[str], None], *, device: str) -> None:
        self._run, self._guard, self._note = run, guard, note
        self._kept = KeptSteps(run.settings, run.data, device=device)
        self._planned = guard.shape
        self._taken_s: list[float] = []
        self._seen_s, self._steps_seen = 0.0, 0
        self._enough = 0
        """The steps after which the next look is due; 0: before the first one."""

    def see(self, progress: Progress) -> None:
        """A step was made."""
        if self._run.method.grows:  # a plan tells the mean over all windows, whose steps differ
            return
        # Without waiting for blocks, which a plan counts apart.
        worked_s = progress.compute_s + progress.data_s
        step_s, self._seen_s, self._steps_seen = worked_s - self._seen_s, worked_s, self._steps_seen + 1
        # A step that the guard has made in smaller parts is not the one that was planned.
        if self._steps_seen <= WARM_STEPS or len(self._taken_s) >= MOST_STEPS or self._guard.shape != self._planned:
            return
        self._taken_s.append(step_s)
        count = len(self._taken_s)
        is_first = not self._enough
        if is_first and count < FEWEST_STEPS and (count < FEWEST_LONG_STEPS or sum(self._taken_s) < LONG_S):
            return
        if count < self._enough:
            return
        self._enough = 2 * count
        found_s = statistics.median(self._taken_s)
        if is_first:
            self._compare(found_s, progress)
        self._keep(found_s)

    def _compare(self, found_s: float, progress: Progress) -> None:
        plan = self._run.trainable_plan
        if plan.measured_step_s is not None:  # told by the process that began the run
            return
        with contextlib.suppress(StorageError):  # no reason to end a run; a full disk will be told by what matters
            self._run.planned_again(plan.model_copy(update={"measured_step_s": found_s}))
        if plan.predicted_step_range_s is None or progress.left_s is None:
            return
        least_s, most_s = plan.predicted_step_range_s
        if least_s <= found_s <= most_s:
            return
        if progress.seconds is None:
            total = f"about {format_duration(progress.left_s)} are left"
        else:
            whole_s = progress.seconds + progress.previews_s + progress.left_s
            total = f"about {format_duration(whole_s)} in all"
        self._note(
            f"note: steps take {format_duration(found_s)} where the plan said {format_duration(least_s)} to "
            f"{format_duration(most_s)}: {total}"
        )

    def _keep(self, found_s: float) -> None:
        run, plan, shape = self._run.settings.run, self._run.trainable_plan, self._planned
        deciles = statistics.quantiles(self._taken_s, n=10)
        self._kept.keep(
            MeasuredSteps(
                step_s=found_s,
                short_s=min(max(deciles[0], min(self._taken_s)), found_s),
                long_s=max(min(deciles[-1], max(self._taken_s)), found_s),
                batch=run.batch,
                blocks=len(plan.layers_per_block),
                micro_batch=shape.micro_batch,
                checkpointing=shape.checkpointing,
                optimizer=run.optimizer,
                trained=run.trained_blocks,
            )
        )
