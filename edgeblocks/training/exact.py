"""End-to-end training, stage by stage: steps, updates, checkpoints."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import EdgeblocksError, OutOfBudgetError, WriteLimitError
from edgeblocks.offload.block_buffer import BlockBuffer, bind_parameters_
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.device import Device
from edgeblocks.offload.scratch import DeviceScratchFile, Scratch, ScratchFile
from edgeblocks.offload.sections import network_of
from edgeblocks.offload.stage_slots import Need, StageSlots
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.update import adamw_, ema_exponent, follow_, learning_rate_at
from edgeblocks.planning.plans import StepShape
from edgeblocks.planning.stage_order import traffic_of_a_step, uses_of_a_step
from edgeblocks.progress import Progress
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.training.batches import Batches, drawing, helper_for
from edgeblocks.training.boundaries import InMemory, OnDisk
from edgeblocks.training.clipping import StageUpdates, UpdatedAtOnce, UpdatedLater
from edgeblocks.training.diffusion import METRICS_RECORDS
from edgeblocks.training.guard import Guard, is_refusal
from edgeblocks.training.interruption import Interruption
from edgeblocks.training.streamed_backward import Pass
from edgeblocks.units import format_bytes, parse_size


class ExactTrainer:
    """Trains all stages of one run together."""

    def __init__(
        self, run: RunDirectory, data: DataSet, slots: StageSlots, guard: Guard, *, beside_host: Device | None = None
    ) -> None:
        """
        Args:
            beside_host: the device that the slots are on, where it has memory of its own.
        """
        self.run, self.data, self.slots, self.guard = run, data, slots, guard
        self.settings, self.family = run.settings.run, run.family()
        (self.range,) = run.partition.ranges
        self.store, self.layouts = slots.store, slots.store.layouts
        self.device = slots.device
        self._trained, self._late = run.trained, self.settings.clip_by == "network"
        self._uses = uses_of_a_step(self._trained, late=self._late)
        most = max(layout.num_parameters for layout, one in zip(self.layouts, self._trained, strict=True) if one)
        self._gradients = torch.empty(most, device=self.device).zero_()  # touched at once
        quantized = any(layout.num_quantized for layout in self.layouts)
        self._workspace = Workspace.for_device(self.device) if quantized else None
        self._ema_exponent = ema_exponent(self.settings.ema_length)
        self._metrics_every = max(1, self.settings.steps // METRICS_RECORDS)
        self._updates = self._updates_of(self._gradients, beside_host)
        self._boundary_bytes = int(run.plan.get("boundary_disk_bytes", 0))
        """Written in every step of what enters the stages."""
        self._boundaries = self._boundaries_on_disk() if self._boundary_bytes else None
        batch, seed = self.settings.batch, self.settings.seed
        draw = drawing(self.family, data, self.range, batch=batch, seed=seed, block=0)
        self._batches = Batches(draw, last=self.settings.steps, helper=helper_for(self.device))
        self._changing = False
        """Whether some stages have made a step that others have not."""
        self._networks: dict[tuple[int, int], nn.Module] = {}
        self.progress = Progress(
            block=None,
            budget_bytes=int(run.plan["budget_bytes"]),
            bytes_written=self.store.run_bytes_written,
            example="img" if self.family.reads == "images" else "seq",
            earlier_s=run.trained_s(),
        )
        self._saved = self.progress.step = min(run.saved_steps(self.store))

    def train(
        self,
        interruption: Interruption,
        *,
        on_step: Callable[[Progress], None],
        between_visits: Callable[[Sequence[int]], None],
    ) -> list[int]:
        """Train to the last step, or until interrupted; returns the step of each stage, frozen or not.

        Args:
            on_step: called after every step.
            between_visits: called with the steps of all stages when they have been written.

        Raises:
            EdgeblocksError: the loss is no longer finite; the run is as it was at its last checkpoint.
            OutOfBudgetError: memory ran out and nothing was left to shrink; the same.
        """
        settings, store, every = self.settings, self.store, self.run.plan["visit_steps"]
        number, count = self._saved, len(store.layouts)
        self.progress.steps_total, self.progress.steps_done = settings.steps, number
        while number < settings.steps and interruption.signal_name is None:
            self._check_writes(number)
            self._step(number)
            number += 1
            self._tell(on_step, number)
            if number % every == 0 or number == settings.steps or interruption.signal_name is not None:
                self._batches.close()  # what was drawn ahead gives its memory to the look
                self._checkpoint(number)
                if interruption.signal_name is None:
                    between_visits([number] * count)
        return [number] * count

    def _checkpoint(self, number: int) -> None:
        """Save all stages, which have made so many steps; once."""
        if self._saved == number:
            return
        files = NextBlocks(self.store)
        try:
            self.slots.checkpoint(files, number, self._trained, self._updates.finish)
        except FloatingPointError as error:
            files.recover()
            raise self._diverged(f"{error} has weights that are no numbers", number) from error
        except BaseException:
            files.recover()
            raise
        files.commit()
        self._saved, self.progress.bytes_written = number, self.store.run_bytes_written

    def _tell(self, on_step: Callable[[Progress], None], number: int) -> None:
        """Report a step; what the listener meets there ends the run, saved."""
        try:
            on_step(self.progress)
        except BaseException as error:
            self._checkpoint(number)
            if isinstance(error, MemoryError | RuntimeError) and is_refusal(error):
                raise self.guard.refused("what hears of each step") from error
            raise

    def _check_writes(self, number: int) -> None:
        """End the run, saved, before a step and a checkpoint after it would write more than the user allows."""
        allowed = self.settings.max_disk_writes
        if allowed is None:
            return
        written = self.store.run_bytes_written
        sizes = [self.store.file_bytes(stage) for stage, one in enumerate(self._trained) if one]
        in_ram = int(self.run.plan.get("ram_blocks", 0))
        traffic = traffic_of_a_step(self._trained, self.slots.num_slots, late=self._late, in_ram=in_ram)
        swapped = traffic.put_away * max(sizes)
        waiting = self._updates.step_bytes + self._boundary_bytes
        most = written + swapped + waiting + sum(sizes)
        if most > parse_size(allowed):
            self._checkpoint(number)
            raise WriteLimitError(
                f"the run has written {format_bytes(self.store.run_bytes_written)} to disk; the next step and saving "
                f"it could pass --max-disk-writes {allowed}. Everything is saved; go on with a larger limit: "
                f"edgeblocks train --resume {self.run.path} --max-disk-writes {math.ceil(2 * most / 1e9)}GB"
            )

    def _diverged(self, what: str, number: int) -> EdgeblocksError:
        rate = self.settings.learning_rate / 3
        return EdgeblocksError(
            f"{what} at step {number}; a smaller --set learning_rate={rate:.2g} or --set optimizer=adamw usually mends "
            f"it. The last checkpoint, of step {self._saved}, is intact"
        )

    def _step(self, number: int) -> None:
        """Make the step of that number, counted from 0."""
        settings, started = self.settings, time.perf_counter()
        batch = {name: tensor.to(self.device) for name, tensor in self._batches.of(number).items()}
        drawn = time.perf_counter()
        last, lowest = len(self.layouts) - 1, self._trained.index(True)
        boundaries = self._boundaries or InMemory(settings.batch, dtype=settings.boundary_dtype)
        going = Pass(self.family, batch, num_stages=len(self.layouts), lowest=lowest, boundaries=boundaries)
        for use, then in zip(self._uses, [*self._uses[1:], self._uses[0]], strict=True):
            with self.slots.use(Need.of(use), then=Need.of(then)) as buffer:
                self._updates.finish(use.stage, buffer)
                if not use.backward:
                    self._go(partial(self._forward, going, use.stage, buffer))
                    continue
                self._go(partial(self._backward, going, use.stage, buffer))
                if use.stage == last and not math.isfinite(going.loss):
                    raise self._diverged(f"the loss is {going.loss}", number)
                if self._trained[use.stage]:
                    self._learn_from(use.stage, buffer, number)
                    self._changing = use.stage > lowest and not self._late
        self._note(number, going.loss, self._norm(number), drawn - started, started)

    def _go(self, through: Callable[[StepShape], None]) -> None:
        """Through a stage; what memory is refused to is done again with fewer samples at a time.

        Raises:
            OutOfBudgetError: nothing is left to shrink. The run is saved as it is where no stage has made the step yet,
                else as it was at its last checkpoint.
        """
        try:
            while True:
                try:
                    through(self.guard.before_step())
                    return
                except (MemoryError, RuntimeError) as error:
                    if not is_refusal(error):
                        raise
                self.guard.after_refusal()
        except OutOfBudgetError:
            if not self._changing:
                self._checkpoint(self.progress.step)
            raise

    def _forward(self, going: Pass, stage: int, buffer: BlockBuffer, shape: StepShape) -> None:
        going.forward(stage, self._network(stage, buffer), micro_batch=shape.micro_batch)

    def _backward(self, going: Pass, stage: int, buffer: BlockBuffer, shape: StepShape) -> None:
        if self._trained[stage]:
            self._gradients[: buffer.layout.num_parameters].zero_()
        network = self._network(stage, buffer)
        going.backward(stage, network, micro_batch=shape.micro_batch, checkpointing=shape.checkpointing)

    def _updates_of(self, gradients: Tensor, beside_host: Device | None) -> StageUpdates:
        """How stages learn, as the settings have it."""
        clip, place = self.settings.clip, (self.store.folder, "a stage's gradient")
        if not self._late:
            return UpdatedAtOnce(gradients, self._learn, clip=clip)
        file: Scratch = ScratchFile(*place)
        if beside_host is not None:
            file = DeviceScratchFile(*place, beside_host, largest_bytes=gradients.nbytes)
        return UpdatedLater(
            gradients,
            self._learn,
            clip=clip,
            file=file,
            layouts=self.layouts,
            trained=self._trained,
            times=self.slots.times,
        )

    def _boundaries_on_disk(self) -> OnDisk:
        settings = self.settings
        return OnDisk(settings.batch, self.store.folder, self.slots.times, dtype=settings.boundary_dtype)

    def _learn_from(self, stage: int, buffer: BlockBuffer, number: int) -> None:
        try:
            self._updates.complete(stage, self._network(stage, buffer), buffer, number)
        except FloatingPointError as error:
            raise self._diverged(str(error), number) from error

    def _norm(self, number: int) -> float:
        """Of the whole gradient, when it is complete."""
        try:
            norm = self._updates.end_step(number)
        except FloatingPointError as error:
            raise self._diverged(str(error), number) from error
        self.store.bytes_written += self._updates.step_bytes + self._boundary_bytes
        return norm

    def _learn(self, buffer: BlockBuffer, gradients: Tensor, number: int) -> None:
        settings = self.settings
        rate = learning_rate_at(number, steps=settings.steps, warmup=settings.warmup, peak=settings.learning_rate)
        adamw_(
            buffer,
            gradients,
            step=number,
            learning_rate=rate,
            weight_decay=settings.weight_decay,
            workspace=self._workspace,
        )
        follow_(buffer, step=number, exponent=self._ema_exponent)

    def _network(self, stage: int, buffer: BlockBuffer) -> nn.Module:
        """A stage as a module on a buffer that has it; made once for each buffer that it comes to lie in."""
        key = stage, id(buffer)
        if key not in self._networks:
            self._networks[key] = self._new_network(stage, buffer)
        return self._networks[key]

    def _new_network(self, stage: int, buffer: BlockBuffer) -> nn.Module:
        with torch.device("meta"):
            network = network_of(self.family, self.run.sections[stage])
        with self.device:
            network.reset_tables_()  # type: ignore[operator]
        bind_parameters_(network, buffer.tensors("weights"), self._gradients if self._trained[stage] else None)
        return network.train()

    def _note(self, number: int, loss: float, norm: float, data_s: float, started: float) -> None:
        progress, step_s = self.progress, time.perf_counter() - started
        stalled = self.slots.times.stall_s - progress.stall_s
        progress.step, progress.steps_done = number + 1, number + 1
        progress.used_bytes, progress.stall_s = self.guard.used_bytes, self.slots.times.stall_s
        progress.bytes_written = self.store.run_bytes_written
        progress.data_s += data_s
        progress.compute_s += max(0.0, step_s - data_s - stalled)
        former = progress.losses.get(0, loss)
        progress.losses[0] = former + 0.05 * (loss - former)
        speed = self.settings.batch / step_s
        progress.examples_per_s += (0.1 if progress.examples_per_s else 1.0) * (speed - progress.examples_per_s)
        if progress.step % self._metrics_every == 0 or progress.step == self.settings.steps:
            self.run.append_metrics(
                {
                    "block": 0,
                    "step": number + 1,
                    "loss": loss,
                    "gradient_norm": norm,
                    "examples_per_s": round(speed, 2),
                    "seconds": progress.seconds,
                    "used_bytes": progress.used_bytes,
                }
            )
