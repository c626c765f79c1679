"""End-to-end training: the true gradients of the whole network, of which some stages are in memory at a time.

A step sends the batch forward through the stages and the gradient back through them (`streamed_backward`); a stage is
updated when its gradient is complete, or when it is used next (`clipping`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Self

from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import ConfigError
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.inference.staged_weights import StagedEma
from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.device import Device
from edgeblocks.offload.float32_copy import Float32Ema
from edgeblocks.offload.scratch import AnyScratchFile, DeviceScratchFile, ScratchFile
from edgeblocks.offload.sections import network_of
from edgeblocks.offload.stage_slots import Need, StageSlots
from edgeblocks.offload.tiers import SwapFile, tier_of
from edgeblocks.optim.loss_scale import unscale_
from edgeblocks.planning.plans import StepShape
from edgeblocks.planning.stage_order import traffic_of_a_step, uses_of_a_step
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.training.batches import Batches
from edgeblocks.training.boundaries import InMemory, OnDisk
from edgeblocks.training.clipping import ClipByNetwork, ClipByStage, StageClipping
from edgeblocks.training.guard import Guard
from edgeblocks.training.loop import StepTimer, Trainer, Visit
from edgeblocks.training.streamed_backward import StreamedBackward


class ExactTrainer(Trainer):
    """Trains all stages of one run together."""

    def __init__(
        self, run: RunDirectory, data: DataSet, slots: StageSlots, guard: Guard, *, device: Device | None = None
    ) -> None:
        """
        Args:
            device: the one that the slots are on, where it has memory of its own.
        """
        super().__init__(run, data, slots, guard)
        assert isinstance(self.family, EndToEnd)
        self._end_to_end: EndToEnd = self.family
        self.slots = slots
        stages = slots if self.float32 is None else Float32Ema(slots, self.float32)
        # Weights are looked at between steps, when the memory of gradients has nothing to keep.
        self._ema = StagedEma(stages, run.file_layers, spare=self.gradients, tied=self.family.tied_parameters)
        self._trained, self._late = run.trained, self.settings.clip_by == "network"
        self._uses = uses_of_a_step(self._trained, late=self._late)
        self._clipping = self._clipping_by_settings(device)
        self._boundary_bytes = run.plan.boundary_disk_bytes
        """Written in every step: the activations at the stage boundaries, where these wait on disk."""
        self._boundaries_on_disk: OnDisk | None = None
        if self._boundary_bytes:
            self._boundaries_on_disk = OnDisk(
                self.settings.batch, self.store.folder, self.times, dtype=self.settings.boundary_dtype
            )
        self._is_whole = True
        self._loss_scale = self.saved_loss_scale(self._trained.index(True))
        """One for all stages, as the loss is one; None where float16 is not computed in."""
        self._overflowed = False
        """Whether a gradient of this step was too large for float16."""
        self._networks: dict[tuple[int, int], Block] = {}
        self._saved = self.progress.step = min(run.saved_steps(self.store))

    @classmethod
    def open(cls, run: RunDirectory, data: DataSet, store: BlockStore, guard: Guard, device: Device | None) -> Self:
        swap = SwapFile(run.blocks_folder, store.layouts)
        tier = tier_of(store, device, swap=swap, ram_blocks=run.plan.ram_blocks)
        return cls(run, data, StageSlots(tier, slots=run.plan.slots), guard, device=device)

    @property
    def ema(self) -> StagedEma:
        return self._ema

    @property
    def residents(self) -> int:
        return 1

    @property
    def is_whole(self) -> bool:
        """False while some stages have made a step that others have not."""
        return self._is_whole

    def saved_steps(self) -> list[int]:
        return [self._saved]

    @contextmanager
    def visit(self, visit: Visit, then: Visit | None) -> Iterator[None]:
        yield
        self._checkpoint()

    def train_step(self, visit: Visit, step: int, batches: Batches) -> None:
        """A step of the whole network, with the gradients of ordinary back-propagation."""
        if self.settings.max_disk_writes is not None:  # else not worth the look at every stage's file
            self.check_write_limit(self._most_bytes_written(), "the next step and saving it")
        settings, timer = self.settings, StepTimer(self.slots)
        last, lowest = len(self.store.layouts) - 1, self._trained.index(True)

        # The whole batch, [batch, ...], as the forward pass has used all of it before the backward pass begins.
        batch = {name: tensor.to(self.device) for name, tensor in batches.of(step).items()}
        timer.batch_is_drawn()

        # Forward through all stages but the last, keeping the activations at their boundaries; then backward from the
        # last stage to the lowest trained one, each stage run again from the activations that entered it.
        boundaries = self._boundaries_on_disk or InMemory(settings.batch, dtype=settings.boundary_dtype)
        streamed = StreamedBackward(
            self._end_to_end,
            batch,
            num_stages=last + 1,
            lowest=lowest,
            boundaries=boundaries,
            precision=self.run.precision,
            loss_scale=self._loss_scale,
        )
        for use, then in zip(self._uses, [*self._uses[1:], self._uses[0]], strict=True):
            # `then` is the next use, after the last one the next step's first: its stage is loaded while this one
            # computes.
            stage = use.stage
            with self.slots.use(Need.of(use), then=Need.of(then)) as buffer:
                # Where the last step's gradients waited for the norm of all of them, the stage is updated now.
                self._clipping.finish(stage, buffer)
                if not use.backward:
                    self.guard.attempt(partial(self._forward, streamed, stage, buffer))
                    continue
                self.guard.attempt(partial(self._backward, streamed, stage, buffer))
                if stage == last and not math.isfinite(streamed.loss):
                    raise self.diverged(f"the loss is {streamed.loss}", step, saved=self._saved)
                # The stage's gradient is complete: clip by its own norm and update it, or keep it for later.
                if self._trained[stage]:
                    unscale_(self.gradients[: buffer.layout.num_parameters], self._loss_scale)
                    with self._overflow(step):
                        self._clipping.complete(stage, self._network(stage, buffer), buffer, step)
                    # Clipped one by one, the stages above the lowest are a step ahead until it is updated, too. Where
                    # updates wait for the norm of all, none is made in this step, and a checkpoint makes those that are
                    # pending.
                    self._is_whole = stage == lowest or self._late

        gradient_norm = math.nan
        with self._overflow(step):
            gradient_norm = self._clipping.end_step(step)
        if self._loss_scale is not None:
            gradient_norm = math.nan if self._overflowed else gradient_norm
            with self.divergence(step, saved=self._saved):
                self._loss_scale = self._loss_scale.after(finite=not self._overflowed)
            self._overflowed = False
        # Offloading stages is counted by the slots; these two write to scratch files of their own.
        self.store.bytes_written += self._clipping.step_bytes + self._boundary_bytes
        self.note(timer, block=None, step=step, loss=streamed.loss, gradient_norm=gradient_norm)

    def _forward(self, streamed: StreamedBackward, stage: int, buffer: BlockBuffer, shape: StepShape) -> None:
        network = self._network(stage, buffer)
        self.weights_in(buffer)
        streamed.forward(stage, network, micro_batch=shape.micro_batch)

    def _backward(self, streamed: StreamedBackward, stage: int, buffer: BlockBuffer, shape: StepShape) -> None:
        if self._trained[stage]:
            self.gradients[: buffer.layout.num_parameters].zero_()  # also of an attempt that was refused memory
        network = self._network(stage, buffer)
        self.weights_in(buffer)
        streamed.backward(stage, network, micro_batch=shape.micro_batch, checkpointing=shape.checkpointing)

    def _network(self, stage: int, buffer: BlockBuffer) -> Block:
        """A stage as a module on a buffer that has it; made once for each buffer that it comes to lie in."""
        # By buffer, too: parameters are views of one slot's memory, and a stage comes into whichever slot is free.
        key = stage, id(buffer)
        if key not in self._networks:
            gradients = self.gradients if self._trained[stage] else None
            build = partial(network_of, self.family, self.run.sections[stage])
            self._networks[key] = self.network_on(buffer, build, gradients)
        return self._networks[key]

    def _checkpoint(self) -> None:
        """Save all stages, which have made the same steps; once."""
        step = self.progress.step
        if self._saved == step:
            return
        # After a failure the new files go and the former ones stay: all stages are then of the step saved before.
        files = NextBlocks(self.store)
        try:
            self.slots.checkpoint(files, step, self._trained, self._clipping.finish, loss_scale=self._loss_scale)
        except FloatingPointError as error:
            files.recover()
            raise self.diverged(f"{error} has weights that are no numbers", step, saved=self._saved) from error
        except BaseException:
            files.recover()
            raise
        files.commit()
        self._saved, self.progress.bytes_written = step, self.store.run_bytes_written

    def _most_bytes_written(self) -> int:
        """What a step and a checkpoint after it write to disk at the most."""
        sizes = [self.store.file_bytes(stage) for stage, trained in enumerate(self._trained) if trained]
        in_ram = self.run.plan.ram_blocks
        # As if every stage that moves were the largest one: a limit holds only if this is never too little.
        traffic = traffic_of_a_step(self._trained, self.slots.num_slots, late=self._late, in_ram=in_ram)
        return traffic.offloaded * max(sizes) + self._clipping.step_bytes + self._boundary_bytes + sum(sizes)

    def _clipping_by_settings(self, device: Device | None) -> StageClipping:
        clip, place = self.settings.clip, (self.store.folder, "a stage's gradient")
        tied = self.family.tied_parameters
        if tied is not None and (not self._late or self.settings.master != "fp32" or not all(self._trained)):
            raise ConfigError(
                "a table of tokens that is the head as well is trained as two copies with one gradient: this needs "
                "clip_by=network, master=fp32, and all stages trained"
            )
        if not self._late:
            return ClipByStage(self.gradients, self.update_, clip=clip)
        file: AnyScratchFile = ScratchFile(*place)
        if device is not None:
            file = DeviceScratchFile(*place, device, largest_bytes=self.gradients.nbytes)
        return ClipByNetwork(
            self.gradients,
            self.update_,
            clip=clip,
            file=file,
            layouts=self.store.layouts,
            trained=self._trained,
            times=self.times,
            tied=tied,
        )

    @contextmanager
    def _overflow(self, step: int) -> Iterator[None]:
        """Gradients that are no numbers leave an update out in float16; otherwise they end the run.

        That update is a stage's, and those of the stages below it, into which the gradient goes on; or, clipped by the
        norm of all, the whole network's.
        """
        with self.divergence(step, saved=self._saved):
            try:
                yield
            except FloatingPointError:
                if self._loss_scale is None:
                    raise
                self._overflowed = True
