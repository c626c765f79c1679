"""Previews during training: samples and quality between visits; and the evaluation at the end."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from edgeblocks.callbacks import Evaluated, Sampled
from edgeblocks.data import pictures
from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.unmasking import texts_as_file
from edgeblocks.errors import MAY_BE_REFUSALS, is_refusal
from edgeblocks.families.base import TextInfo
from edgeblocks.inference import metrics
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.inference.quality import run_quality
from edgeblocks.inference.sampling import always, runner_of, sample_images, sample_texts
from edgeblocks.profiling.looks import expected_looks, pass_seconds
from edgeblocks.progress import Listener
from edgeblocks.runs.directory import BEFORE_FILE, RunDirectory, write_text
from edgeblocks.tasks import GRID_TOKENS, TASKS, TEXT_TASKS
from edgeblocks.training.growth import Growth
from edgeblocks.training.interruption import Interrupted, Interruption
from edgeblocks.training.loop import Trainer

T = TypeVar("T")


class Previews:
    """Grids of samples with the same noise each time, and evaluations, between visits and at the end.

    A signal stops one at its next noise level.
    """

    def __init__(
        self,
        run: RunDirectory,
        data_set: DataSet,
        trainer: Trainer,
        interruption: Interruption,
        tell: Callable[[Evaluated | Sampled], None],
    ) -> None:
        """
        Args:
            tell: called with what was made, when it is saved.
        """
        self._progress, self._guard = trainer.progress, trainer.guard
        self._source, self._residents = trainer.ema, trainer.residents
        self._run, self._data_set, self._interruption, self._tell = run, data_set, interruption, tell
        self._task = run.family().task
        self._total = run.settings.run.steps
        self._looks = expected_looks(run.settings.run, run.family(), run.partition, data_set)
        self._grids = _Marks(self._looks.grids, self._total, made=self._newest_grid())
        self._growth = Growth(run, data_set)
        self._evaluations = _Marks(
            self._looks.evaluations, self._total, made=max((mark.step for mark in run.quality()), default=0)
        )
        self.evaluation_s = 0.0
        """That the evaluation at the end took."""

    def _newest_grid(self) -> int:
        """The steps of the newest grid that was made: one that a crash prevented is due, one that exists is not."""
        numbers = (path.stem.removeprefix("step_") for path in (self._run.path / "samples").glob("step_*.*"))
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def after_visit(self, steps: Sequence[int]) -> None:
        """Make those that are due, with blocks that have made these steps."""
        # Blocks take turns: a mark is reached when the last of them has come to it.
        done = min(steps)
        if self._evaluations.are_due(done):
            self._preview(self._evaluations, done, self._note_quality, "the measure of quality")
        if self._grids.are_due(done):
            self._preview(self._grids, done, self._make_grid, "the grid of samples")

    def is_to_grow(self, steps: Sequence[int]) -> bool:
        """Whether the network, as these steps have made it, is to get more layers now."""
        return self._timed(lambda: self._growth.is_due(min(steps), self._runner))

    def before_growing(self, steps: Sequence[int]) -> None:
        """Look at the loss of the network as it is, before it gets more layers."""
        self._timed(lambda: self._growth.look(min(steps), self._runner))

    def _timed(self, look: Callable[[], T]) -> T:
        started = time.perf_counter()
        found = look()
        self._progress.previews_s += time.perf_counter() - started
        return found

    def left_s(self) -> float:
        """What those to come and the evaluation at the end will take: as the last ones took, else as steps suggest."""
        progress, settings = self._progress, self._run.settings.run
        made = max(progress.steps_done - progress.steps_before, 1)
        again = self._guard.shape.checkpointing or self._run.method.trained_together
        pass_s = pass_seconds(progress.compute_s / made, batch=settings.batch, again=again)
        kinds = ((self._grids, self._looks.grid_passes), (self._evaluations, self._looks.evaluation_passes))
        to_come = (marks.left * (passes * pass_s if marks.took_s is None else marks.took_s) for marks, passes in kinds)
        return sum(to_come, self._looks.last_passes * pass_s)

    def _preview(self, marks: "_Marks", done: int, make: Callable[[int], Evaluated | Sampled], what: str) -> None:
        started, made = time.perf_counter(), None
        try:
            made = make(done)
        # A preview that is refused memory is left out; the training does without.
        except MAY_BE_REFUSALS as error:
            if not is_refusal(error):
                raise
            self._guard.go_on_without(f"{what} at step {done}, which is left out")
        finally:
            marks.took_s = time.perf_counter() - started
            self._progress.previews_s += marks.took_s
        if made is not None:
            self._tell(made)

    def _note_quality(self, done: int) -> Evaluated:
        trained_s = self._progress.seconds
        found = run_quality(self._run, self._runner(), self._data_set)
        self._stop_if_interrupted(done)
        if trained_s is not None:
            self._run.append("quality.jsonl", {"step": done, "seconds": trained_s, **asdict(found)})
        return Evaluated(step=done, measure=TASKS[self._task].measure.name, **asdict(found))

    def _make_grid(self, done: int) -> Sampled:
        path = self._run.path / "samples" / f"step_{done:07d}"
        # With the same seed each time: what changes from grid to grid is the network.
        count, runners = TASKS[self._task].grid_samples, always(self._runner())
        if self._task in TEXT_TASKS:
            data = self._run.data
            assert isinstance(data, TextInfo)
            length = None if self._task == "text" else min(data.length, GRID_TOKENS)
            texts = sample_texts(self._run, runners, n=count, length=length, seed=0, on_step=self._stop_if_interrupted)
            write_text(path.with_suffix(".txt"), texts_as_file(texts))
            return Sampled(step=done, path=path.with_suffix(".txt"), texts=texts)
        images = sample_images(
            self._run,
            runners,
            n=count,
            steps=max(self._run.settings.run.sample_steps, len(self._run.layers)),  # each block has a level
            seed=0,
            on_level=self._stop_if_interrupted,
            on_picture=self._stop_if_interrupted,
        )
        grid = pictures.image_grid(images, columns=10)
        pictures.save_png(path.with_suffix(".png"), grid)
        return Sampled(step=done, path=path.with_suffix(".png"), grid=grid)

    def _micro_batch(self) -> int:
        """As planned, or as small as the guard has made a step's since."""
        plan, step = self._run.plan, self._guard.shape.micro_batch
        return plan.look_micro_batch or step if step == plan.micro_batch else step

    def _runner(self) -> BlockRunner:
        """With all blocks, where they are in memory anyway."""
        self._guard.give_back()
        return runner_of(
            self._run,
            self._source,
            micro_batch=self._micro_batch(),
            residents=self._residents if self._residents >= len(self._run.layers) else 1,
        )

    def before_training(self, listener: Listener) -> None:
        """Evaluate a pretrained network as it is, once."""
        family = self._run.family()
        # Of a head that begins as zeros it would say nothing.
        is_pretrained: bool = family.only_exact and not family.fresh_parts(self._run.class_names)
        if is_pretrained and not (self._run.path / BEFORE_FILE).exists():
            listener.stage("evaluating the model as it is")
            self._run.write_json(BEFORE_FILE, dict(self._timed(lambda: self._evaluated(listener))))

    def evaluation(self, listener: Listener) -> metrics.ValidationLoss:
        """At the end."""
        started = time.perf_counter()
        found = self._evaluated(listener)
        self.evaluation_s = time.perf_counter() - started
        self._tell(
            Evaluated(
                step=self._total,
                measure="validation loss",
                value=found["total"],
                standard_error=found["standard_error"],
                examples=found["images"],
            )
        )
        return found

    def _evaluated(self, listener: Listener) -> metrics.ValidationLoss:
        def on_level(done: int, total: int) -> None:
            listener.advance(done, total, "evaluating")
            self._stop_if_interrupted(done)

        return metrics.validation_loss(
            self._run.family(),
            self._runner(),
            self._data_set,
            seed=self._run.settings.run.seed,
            most_examples=TASKS[self._task].loss_examples,
            on_level=on_level,
        )

    def _stop_if_interrupted(self, _done: int, _total: int | None = None) -> None:
        if self._interruption.signal_name is not None:
            raise Interrupted


class _Marks:
    """Numbers of steps, the same for all blocks and evenly spaced, of which the last is the training's end."""

    def __init__(self, count: int, total: int, *, made: int) -> None:
        """
        Args:
            made: the steps of the newest mark that is done with.
        """
        self._marks = [math.ceil(total * (i + 1) / count) for i in range(count)]
        self._made = made
        self.took_s: float | None = None
        """Seconds of the last one in this process."""

    @property
    def left(self) -> int:
        """Marks that are still to come."""
        return sum(mark > self._made for mark in self._marks)

    def are_due(self, done: int) -> bool:
        """Whether a mark was reached since the last time; it is done with then."""
        reached = any(self._made < mark <= done for mark in self._marks)
        self._made = max(self._made, done)
        return reached
