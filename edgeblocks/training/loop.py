"""The training loop of every method; what a method does in a step is in a file of its own.

A run is trained in visits: spans of steps of one block, or of the whole network, after which what was trained is saved.
A signal, memory that does not suffice, a limit of disk writes or a listener that fails end the loop after a whole step,
and that step is saved.
"""

import heapq
import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import EdgeblocksError, OutOfBudgetError, WriteLimitError, is_refusal
from edgeblocks.families.block import Block
from edgeblocks.inference.block_runner import EmaSource
from edgeblocks.methods import Method, imported
from edgeblocks.offload.block_buffer import BlockBuffer, bind_parameters_
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.device import Device
from edgeblocks.offload.float32_copy import Float32Copy, Weights
from edgeblocks.offload.slots import Slots, StreamTimes
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.loss_scale import LossScale
from edgeblocks.optim.schedule import learning_rate_over
from edgeblocks.optim.update import ema_exponent, update_
from edgeblocks.progress import Progress
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.disk_room import check_writes
from edgeblocks.runs.history import smoothed_losses, trained_s
from edgeblocks.training.batches import Batches, BatchThread, drawing
from edgeblocks.training.guard import Guard
from edgeblocks.training.interruption import Interruption

METRICS_RECORDS = 1000
"""About so many records of each block go into metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Steps from `first` up to, not including, `last` that are made before anything is saved."""

    block: int
    """The one that is trained; 0 where all are trained together."""
    first: int
    last: int


def plan_visits(
    saved_steps: Sequence[int],
    *,
    steps: int,
    visit_steps: int,
    look_steps: int | None = None,
    only: Collection[int] | None = None,
) -> Iterator[Visit]:
    """Rounds over all blocks until each has made `steps` steps, going on from where each one is.

    Args:
        look_steps: a visit also ends after so many steps each time, from step 0 on.
        only: the blocks that are visited; None: all.

    >>> [(v.block, v.first, v.last) for v in plan_visits([4, 2], steps=5, visit_steps=4)]
    [(1, 2, 4), (0, 4, 5), (1, 4, 5)]
    >>> [(v.first, v.last) for v in plan_visits([0], steps=8, visit_steps=4, look_steps=3)]
    [(0, 3), (3, 4), (4, 6), (6, 8)]
    >>> [(v.block, v.first, v.last) for v in plan_visits([0, 2], steps=5, visit_steps=4, only=[1])]
    [(1, 2, 4), (1, 4, 5)]
    """
    saved_steps = tuple(saved_steps)
    looks = range(look_steps, steps, look_steps) if look_steps else ()
    start = 0
    for end in (*heapq.merge(range(visit_steps, steps, visit_steps), looks), steps):
        if end == start:
            continue
        for block, saved in enumerate(saved_steps):
            if saved < end and (only is None or block in only):
                yield Visit(block=block, first=max(start, saved), last=end)
        start = end


class StepTimer:
    """Where the seconds of a step go; begins when it is made."""

    def __init__(self, slots: Slots) -> None:
        self._times = slots.times
        self._started, self._stalled_s, self._data_s = time.perf_counter(), slots.times.stall_s, 0.0

    def batch_is_drawn(self) -> None:
        self._data_s = time.perf_counter() - self._started

    def add_to_(self, progress: Progress) -> float:
        """Count the step, which ends now, and return its seconds."""
        step_s = time.perf_counter() - self._started
        progress.data_s += self._data_s
        progress.compute_s += max(0.0, step_s - self._data_s - (self._times.stall_s - self._stalled_s))
        progress.stall_s = self._times.stall_s
        return step_s


@dataclass(frozen=True, kw_only=True)
class SoFar:
    """What was counted of a training in this process."""

    progress: Progress
    times: StreamTimes


class Trainer(ABC):
    """Trains a run to its last step. One process, one training thread."""

    def __init__(self, run: RunDirectory, data: DataSet, slots: Slots, guard: Guard) -> None:
        self.run, self.data, self.guard = run, data, guard
        self.store, self.device, self.times = slots.store, slots.device, slots.times
        self.settings, self.family, self.partition = run.settings.run, run.family(), run.partition
        self._slots = slots
        layouts = self.store.layouts
        most = max(layout.num_parameters for layout, trained in zip(layouts, run.trained, strict=True) if trained)
        self.gradients = torch.empty(most, device=self.device).zero_()  # touched at once
        """float32, flat; of the block or stage that is trained now."""
        quantized = any(layout.num_quantized for layout in layouts)
        rounds = run.master == "bf16"
        self._workspace = Workspace.for_device(self.device, rounds=rounds) if quantized or rounds else None
        self.float32 = Float32Copy(layouts, self.device) if rounds else None
        """Of the weights that are trained now, or between visits of an EMA, where blocks are bfloat16."""
        self._first_step = 0 if run.window is None else run.window.first_step
        """From which on moments and EMA of what is trained now are counted."""
        self._ema_exponent = ema_exponent(self.settings.ema_length)
        self._metrics_every = max(1, self.settings.steps // METRICS_RECORDS)
        self._thread = BatchThread(self.device)
        self._goes_on = False
        self.progress = Progress(
            steps=self.settings.steps,
            bytes_written=self.store.run_bytes_written,
            budget_bytes=run.plan.budget_bytes,
            example="img" if self.family.reads == "images" else "seq",
            losses=smoothed_losses(run),
            earlier_s=trained_s(run),
        )
        self._machine = platform.node()

    @classmethod
    @abstractmethod
    def open(cls, run: RunDirectory, data: DataSet, store: BlockStore, guard: Guard, device: Device | None) -> Self:
        """A trainer with slots in the memory of a device that has its own; None: in the processor's."""

    @property
    @abstractmethod
    def ema(self) -> EmaSource:
        """The EMA weights as they are between visits, for previews and evaluation."""

    @property
    @abstractmethod
    def residents(self) -> int:
        """How many of `ema`'s networks are in memory anyway."""

    @abstractmethod
    def saved_steps(self) -> list[int]:
        """The steps of what is trained apart: of each block, or one number for a whole network."""

    @abstractmethod
    def visit(self, visit: Visit, then: Visit | None) -> AbstractContextManager[None]:
        """Bring what is trained into memory; it is saved when the context ends, and dropped where that is by an error.

        Raises:
            WriteLimitError: saving it would write more to disk than the user allows.
        """

    @abstractmethod
    def train_step(self, visit: Visit, step: int, batches: Batches) -> None:
        """Make a step, counted from 0.

        Raises:
            EdgeblocksError: the loss or a gradient is no number.
            OutOfBudgetError, WriteLimitError: the step was not made; see `is_whole`.
        """

    @property
    def is_whole(self) -> bool:
        """Whether all that is trained together has made the same steps, so that it can be saved as it is."""
        return True

    def train(
        self,
        interruption: Interruption,
        *,
        on_step: Callable[[Progress], None],
        between_visits: Callable[[Sequence[int]], bool],
        blocks_here: Collection[int] | None = None,
    ) -> list[int]:
        """Train to the last step, or to the one at which the network grows, or until interrupted.

        Returns:
            The steps that were made, as `saved_steps` counts them.

        Args:
            on_step: called after every step. What it raises ends the run, saved.
            between_visits: called with the steps when nothing is resident; says whether the training ends here. What it
                raises ends the run, saved.
            blocks_here: those that are trained, where the others are left to other machines; None: all.

        Raises:
            EdgeblocksError: the loss is no longer finite; the run is as it was before the visit.
            OutOfBudgetError: memory ran out and nothing was left to shrink; whole steps are saved.
            WriteLimitError: more would be written to disk than the user allows; everything is saved.
        """
        steps = self.saved_steps()
        here = range(len(steps)) if blocks_here is None else blocks_here
        self.progress.steps_total = self.run.steps_of_all if blocks_here is None else len(here) * self.run.last_step
        self.progress.steps_done = sum(steps[block] for block in here)
        if not self._goes_on:
            self.progress.steps_before = self.progress.steps_done
        visits = plan_visits(
            steps,
            steps=self.run.last_step,
            visit_steps=self.run.trainable_plan.visit_steps,
            look_steps=self.run.look_steps,
            only=here,
        )
        following = next(visits, None)
        while (visit := following) is not None and interruption.signal_name is None:
            # One visit ahead, so that its block is loaded while this one is trained.
            following = next(visits, None)
            ending: Exception | None = None
            # What was drawn ahead gives its memory back before the visit's end saves, evaluates and samples.
            with self.visit(visit, following), closing(self._batches(visit)) as batches:
                while steps[visit.block] < visit.last and interruption.signal_name is None and ending is None:
                    # What ends the run is kept and raised after the visit: an error that left the visit would take the
                    # steps with it that were made since it began.
                    try:
                        self.train_step(visit, steps[visit.block], batches)
                    except (OutOfBudgetError, WriteLimitError) as error:
                        if not self.is_whole:
                            # Some stages have made the step and others not: none is saved, and the last checkpoint
                            # stays.
                            raise
                        ending = error
                    else:
                        steps[visit.block] += 1
                        ending = self._report(on_step)
            if ending is not None:
                self._slots.flush()  # "everything is saved" must be true
                raise ending
            if interruption.signal_name is None:  # a preview can take minutes: a stop does not wait for one
                try:
                    if between_visits(steps):
                        break
                except BaseException:
                    self._slots.flush()
                    raise
        self._slots.flush()
        return steps

    @property
    def so_far(self) -> "SoFar":
        """What was counted; without the memory that the trainer had."""
        return SoFar(progress=self.progress, times=self.times)

    def go_on_from(self, so_far: "SoFar") -> None:
        """Count on from there, where the network has grown in this process."""
        self.progress, self._goes_on = so_far.progress, True
        self.times.add_(so_far.times)

    def close(self) -> None:
        """Stop the threads that move blocks and draw batches, and give the room on disk back."""
        self._slots.close()
        self._thread.close()

    def update_(self, buffer: BlockBuffer, gradients: Tensor, step: int, block: int = 0) -> None:
        """AdamW, then the EMA, in a block or stage. Steps count from 0."""
        update_(
            buffer,
            gradients,
            step=step - self._first_step,
            learning_rate=self.learning_rate(step, block),
            weight_decay=self.settings.weight_decay,
            exponent=self._ema_exponent,
            workspace=self._workspace,
            position=(self.settings.seed, "round", block, step),
        )

    def learning_rate(self, step: int, block: int = 0) -> float:
        """Of a step, which counts from 0."""
        stretches, settings = self.run.stretches(block), self.settings
        return learning_rate_over(
            stretches, step, warmup=settings.warmup, peak=settings.learning_rate, floor=self.run.lowest_rate_share
        )

    def weights_in(self, buffer: BlockBuffer) -> Weights:
        """What a network computes with that is bound to a buffer's weights, as they are now.

        Called before each pass: where blocks are bfloat16 their float32 copy is made here.
        """
        return buffer if self.float32 is None else self.float32.hold_(buffer, "weights")

    def network_on(self, buffer: BlockBuffer, build: Callable[[], Block], gradients: Tensor | None) -> Block:
        """A network whose parameters are views of a buffer's weights, and their gradients views of `gradients`."""
        with torch.device("meta"):  # no memory is taken for parameters that are replaced at once
            network = build()
        # Tables are computed, not loaded, so they need real memory, where the network is.
        with self.device:
            network.reset_tables_()
        bind_parameters_(network, self.weights_in(buffer).tensors("weights"), gradients)
        return network.train()

    def saved_loss_scale(self, block: int) -> LossScale | None:
        """What a block's file has of it, or the first one; None where float16 is not computed in."""
        if self.run.precision != "fp16":
            return None
        return self.store.header(block).loss_scale or LossScale()

    def diverged(self, what: str, step: int, *, saved: int) -> EdgeblocksError:
        """The error for a loss, a gradient or weights that are no numbers."""
        wider = "--precision fp32, " if self.run.precision == "fp16" else ""
        return EdgeblocksError(
            f"{what} at step {step}; {wider}a smaller --set learning_rate={self.settings.learning_rate / 3:.2g} or "
            f"--set optimizer=adamw usually mends it. What was saved last, at step {saved}, is intact"
        )

    @contextmanager
    def divergence(self, step: int, *, saved: int) -> Iterator[None]:
        """Gradients that are no numbers end the run with the error that says what to do."""
        try:
            yield
        except FloatingPointError as error:
            raise self.diverged(str(error), step, saved=saved) from error

    def check_write_limit(self, num_bytes: int, what: str) -> None:
        """Before something that writes `num_bytes` to disk.

        Raises:
            WriteLimitError: with them, the run would have written more than the user allows.
        """
        try:
            check_writes(self.run, num_bytes, what, written=self.progress.bytes_written)
        except WriteLimitError:
            self._slots.flush()  # "everything is saved" must be true
            raise

    def note(self, timer: StepTimer, *, block: int | None, step: int, loss: float, gradient_norm: float) -> None:
        """Count a step that was made: the progress, and a record in metrics.jsonl, about `METRICS_RECORDS` a block.

        Args:
            block: None where all are trained together.
            step: counts from 0.
            loss: the mean over the batch.
            gradient_norm: before clipping; no number where float16 could not hold the gradient.
        """
        progress, number = self.progress, block or 0
        step_s = timer.add_to_(progress)
        progress.block, progress.step, progress.steps_done = block, step + 1, progress.steps_done + 1
        progress.loss, progress.gradient_norm = loss, gradient_norm
        progress.learning_rate = self.learning_rate(step, number)
        progress.used_bytes = self.guard.used_bytes
        # Whichever is ahead: a visit is counted when it begins, the store's own count as it writes.
        progress.bytes_written = max(progress.bytes_written, self.store.run_bytes_written)
        # Moving averages, of the last 20 losses and the last 10 speeds or so: a single step says little.
        former = progress.losses.get(number, loss)
        progress.losses[number] = former + 0.05 * (loss - former)
        speed = self.settings.batch / step_s
        progress.examples_per_s += (0.1 if progress.examples_per_s else 1.0) * (speed - progress.examples_per_s)
        if progress.step % self._metrics_every and progress.step != self.settings.steps:
            return
        self.run.append(
            "metrics.jsonl",
            {
                "block": number,
                "step": step + 1,
                "loss": loss,
                "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
                "learning_rate": progress.learning_rate,
                "examples_per_s": round(speed, 2),
                "seconds": progress.seconds,
                "used_bytes": progress.used_bytes,
                "smoothed_loss": progress.losses[number],
                "machine": self._machine,
            },
        )

    def _batches(self, visit: Visit) -> Batches:
        noise, settings = self.partition.ranges[visit.block], self.settings
        draw = drawing(self.family, self.data, noise, batch=settings.batch, seed=settings.seed, block=visit.block)
        return self._thread.batches(draw, last=visit.last)

    def _report(self, on_step: Callable[[Progress], None]) -> Exception | None:
        """Report a step; what the listener fails with ends the run, after the step is saved."""
        try:
            on_step(self.progress)
        except Exception as error:  # its pipe or its terminal was closed, or it is a user's own
            if is_refusal(error):
                return self.guard.refused("the report of a step (its display or callback)")
            return error
        return None


def trainer_type(method: Method) -> type[Trainer]:
    """What trains with a method."""
    found: type[Trainer] = imported(method.trainer)
    return found
