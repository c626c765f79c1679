"""Training: visits of blocks, and in a visit the train step.

Every draw of a step comes from a generator at (seed, block, step), and a block's whole state is in its file, so a
resumed run, a run in another order of visits, and a run with everything in memory make the same numbers.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import EdgeblocksError, OutOfBudgetError, WriteLimitError
from edgeblocks.offload.block_buffer import BlockBuffer, bind_parameters_
from edgeblocks.offload.block_slots import ResidentBlock, Scheduler
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.update import adamw_, clip_, ema_exponent, follow_, learning_rate_at
from edgeblocks.progress import Progress
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.training.batches import Batches, drawing, helper_for
from edgeblocks.training.guard import Guard, is_refusal
from edgeblocks.training.interruption import Interruption
from edgeblocks.units import format_bytes, parse_size

METRICS_RECORDS = 1000
"""About so many records of each block go into metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One stay of a block in memory: its steps from `first` up to, not including, `last`."""

    block: int
    first: int
    last: int


def plan_visits(saved_steps: Sequence[int], *, steps: int, visit_steps: int) -> Iterator[Visit]:
    """Rounds over all blocks until each has made `steps` steps, going on from where each one is.

    >>> [(v.block, v.first, v.last) for v in plan_visits([4, 2], steps=5, visit_steps=4)]
    [(1, 2, 4), (0, 4, 5), (1, 4, 5)]
    """
    saved_steps = tuple(saved_steps)
    for start in range(0, steps, visit_steps):
        end = min(start + visit_steps, steps)
        for block, saved in enumerate(saved_steps):
            if saved < end:
                yield Visit(block=block, first=max(start, saved), last=end)


class Trainer:
    """Trains the blocks of one run. One process, one block at a time."""

    def __init__(self, run: RunDirectory, data: DataSet, scheduler: Scheduler, guard: Guard) -> None:
        self.run, self.data, self.scheduler, self.guard = run, data, scheduler, guard
        self.device = scheduler.device
        self.settings, self.plan = run.settings.run, run.plan
        self.family, self.partition = run.family(), run.partition
        layouts = scheduler.store.layouts
        most = max(layout.num_parameters for layout in layouts)
        self._gradients = torch.empty(most, device=self.device).zero_()  # touched at once
        quantized = any(layout.num_quantized for layout in layouts)
        self._workspace = Workspace.for_device(self.device) if quantized else None
        self._ema_exponent = ema_exponent(self.settings.ema_length)
        self._metrics_every = max(1, self.settings.steps // METRICS_RECORDS)
        self._helper = helper_for(self.device)
        self._updating = False
        self._ending: OutOfBudgetError | OSError | None = None
        self.progress = Progress(
            bytes_written=scheduler.store.run_bytes_written,
            budget_bytes=int(self.plan["budget_bytes"]),
            example="img" if self.family.reads == "images" else "seq",
            earlier_s=run.trained_s(),
        )

    def train(
        self,
        interruption: Interruption,
        *,
        on_step: Callable[[Progress], None],
        between_visits: Callable[[Sequence[int]], None],
    ) -> list[int]:
        """Train every block to its last step, or until interrupted; returns each block's step.

        Args:
            on_step: called after every step.
            between_visits: called with the steps of all blocks when no block is resident.

        Raises:
            EdgeblocksError: the loss is no longer finite; the run is as it was before the visit.
            OutOfBudgetError: memory ran out and nothing was left to shrink; what was trained is saved.
            WriteLimitError: the next visit would write more to disk than the user allows; everything is saved.
        """
        store, settings = self.scheduler.store, self.settings
        steps = [store.header(block).step for block in range(len(store.layouts))]
        visits = plan_visits(steps, steps=settings.steps, visit_steps=self.plan["visit_steps"])
        self.progress.steps_total = settings.steps * len(steps)
        self.progress.steps_done = sum(steps)
        following = next(visits, None)
        while (visit := following) is not None:
            following = next(visits, None)
            self._count_write(store.file_bytes(visit.block))
            with self.scheduler.visit(visit.block, then=following.block if following else None) as resident:
                self.visit(visit, resident, interruption, on_step)
            steps[visit.block] = resident.step
            if interruption.signal_name is not None:
                break
            if self._ending is not None:
                self.scheduler.flush()
                raise self._ending
            between_visits(steps)
        self.scheduler.flush()
        return steps

    def visit(
        self,
        visit: Visit,
        resident: ResidentBlock,
        interruption: Interruption,
        on_step: Callable[[Progress], None],
    ) -> None:
        """Train a resident block through one visit, or until interrupted."""
        assert resident.step == visit.first, f"block {visit.block} is at step {resident.step}, not {visit.first}"
        layout = resident.buffer.layout
        gradients = self._gradients[: layout.num_parameters].zero_()
        batch, seed, noise = self.settings.batch, self.settings.seed, self.partition.ranges[visit.block]
        draw = drawing(self.family, self.data, noise, batch=batch, seed=seed, block=visit.block)
        batches = Batches(draw, last=visit.last, helper=self._helper)
        try:
            self._steps(visit, resident, interruption, on_step, gradients, batches)
        finally:
            batches.close()

    def _steps(
        self,
        visit: Visit,
        resident: ResidentBlock,
        interruption: Interruption,
        on_step: Callable[[Progress], None],
        gradients: Tensor,
        batches: Batches,
    ) -> None:
        shape, network = None, None
        while resident.step < visit.last and interruption.signal_name is None:
            try:
                wanted = self.guard.before_step()
                if shape != wanted or network is None:
                    shape = wanted
                    network = self._network(visit.block, resident.buffer, gradients, wanted.checkpointing)
                made = self._step_was_made(network, resident, batches, gradients, wanted.micro_batch)
            except OutOfBudgetError as error:
                self._ending = error  # the block is whole, so it is written before the run ends
                break
            if made and not self._was_heard(on_step):
                break

    def _was_heard(self, on_step: Callable[[Progress], None]) -> bool:
        """Report a step; False when the listener had no memory, or nobody to tell it to, which ends the run."""
        try:
            on_step(self.progress)
        except OSError as error:  # its pipe or its terminal was closed; the block is whole and is written first
            self._ending = error
        except (MemoryError, RuntimeError) as error:
            if not is_refusal(error):
                raise
            self._ending = self.guard.refused("what hears of each step")
        return self._ending is None

    def _step_was_made(
        self, network: nn.Module, resident: ResidentBlock, batches: Batches, gradients: Tensor, micro_batch: int
    ) -> bool:
        """Make the block's next step; False when memory was refused to it and it has to be made again, smaller."""
        try:
            self._train_step(network, resident, batches, gradients, resident.step, micro_batch)
        except (MemoryError, RuntimeError) as error:
            if self._updating or not is_refusal(error):
                raise
        else:
            return True
        gradients.zero_()
        self.guard.after_refusal()
        return False

    def _count_write(self, num_bytes: int) -> None:
        """Account for a visit's write before the visit is made."""
        allowed = self.settings.max_disk_writes
        written = self.progress.bytes_written + num_bytes
        if allowed is not None and written > parse_size(allowed):
            self.scheduler.flush()  # "everything is saved" must be true
            raise WriteLimitError(
                f"the run has written {format_bytes(self.progress.bytes_written)} to disk; the next visit would pass "
                f"--max-disk-writes {allowed}. Everything is saved; go on with a larger limit: "
                f"edgeblocks train --resume {self.run.path} --max-disk-writes {math.ceil(2 * written / 1e9)}GB"
            )
        self.progress.bytes_written = written

    def _network(self, block: int, buffer: BlockBuffer, gradients: Tensor, checkpointing: bool) -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = self.family.block(num_layers=self.run.layers[block], checkpointing=checkpointing)
        with self.device:
            network.reset_tables_()  # type: ignore[operator]
        bind_parameters_(network, buffer.tensors("weights"), gradients)
        return network.train()

    def _train_step(
        self,
        network: nn.Module,
        resident: ResidentBlock,
        batches: Batches,
        gradients: Tensor,
        step: int,
        micro_batch: int,
    ) -> None:
        settings, block = self.settings, resident.block
        started = time.perf_counter()
        batch = batches.of(step)
        drawn = time.perf_counter()

        losses = []
        for start in range(0, settings.batch, micro_batch):
            part = {name: tensor[start : start + micro_batch].to(self.device) for name, tensor in batch.items()}
            loss = self.family.loss(network, part).sum() / settings.batch
            loss.backward()
            losses.append(loss.detach())
        loss_sum = sum(loss.item() for loss in losses)  # a device is waited for here, once
        if not math.isfinite(loss_sum):
            raise EdgeblocksError(
                f"the loss of block {block} is {loss_sum} at step {step}; a smaller --set learning_rate="
                f"{settings.learning_rate / 3:.2g} or --set optimizer=adamw usually mends it. "
                f"The block's last saved state is intact"
            )
        gradient_norm = clip_(gradients, settings.clip)
        learning_rate = learning_rate_at(
            step, steps=settings.steps, warmup=settings.warmup, peak=settings.learning_rate
        )
        self._updating = True  # from here on the step cannot be made again
        adamw_(
            resident.buffer,
            gradients,
            step=step,
            learning_rate=learning_rate,
            weight_decay=settings.weight_decay,
            workspace=self._workspace,
        )
        gradients.zero_()
        follow_(resident.buffer, step=step, exponent=self._ema_exponent)
        resident.step = step + 1
        self._updating = False
        self._note(block, step, loss_sum, gradient_norm, learning_rate, drawn - started, started)

    def _note(
        self,
        block: int,
        step: int,
        loss: float,
        gradient_norm: float,
        learning_rate: float,
        data_s: float,
        started: float,
    ) -> None:
        progress, step_s = self.progress, time.perf_counter() - started
        progress.block, progress.step = block, step + 1
        progress.used_bytes, progress.stall_s = self.guard.used_bytes, self.scheduler.times.stall_s
        progress.steps_done += 1
        progress.data_s += data_s
        progress.compute_s += step_s - data_s
        former = progress.losses.get(block, loss)
        progress.losses[block] = former + 0.05 * (loss - former)
        speed = self.settings.batch / step_s
        progress.examples_per_s += (0.1 if progress.examples_per_s else 1.0) * (speed - progress.examples_per_s)
        if progress.step % self._metrics_every and progress.step != self.settings.steps:
            return
        self.run.append_metrics(
            {
                "block": block,
                "step": step + 1,
                "loss": loss,
                "gradient_norm": gradient_norm,
                "learning_rate": learning_rate,
                "examples_per_s": round(speed, 2),
                "seconds": progress.seconds,
                "used_bytes": progress.used_bytes,
            }
        )
