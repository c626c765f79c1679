"""Block-wise training: each block alone, as a denoiser of its own range of noise levels.

Every draw of a step comes from a generator at (seed, block, step), and a block's whole state is in its file, so a
resumed run, a run in another order of visits, and a run with everything in memory make the same numbers.

Source: DiffusionBlocks, arXiv 2506.14202.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from edgeblocks.data.dataset import DataSet
from edgeblocks.families.block import Block
from edgeblocks.families.precision import computing_in
from edgeblocks.inference.block_runner import EmaSource
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.block_slots import BlockSlots
from edgeblocks.offload.device import Device
from edgeblocks.offload.float32_copy import Float32Ema
from edgeblocks.offload.slots import Slot
from edgeblocks.offload.tiers import tier_of
from edgeblocks.optim.loss_scale import scaled
from edgeblocks.planning.plans import StepShape
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.training.batches import Batches
from edgeblocks.training.guard import Guard
from edgeblocks.training.loop import StepTimer, Visit
from edgeblocks.training.resident import ResidentTrainer


class DiffusionTrainer(ResidentTrainer):
    """Trains the blocks of a run, one at a time."""

    def __init__(self, run: RunDirectory, data: DataSet, slots: BlockSlots, guard: Guard) -> None:
        super().__init__(run, data, slots, guard)
        self._network: tuple[bool, Block] | None = None
        """The resident block as a module, and whether it is built with checkpointing."""

    @classmethod
    def open(cls, run: RunDirectory, data: DataSet, store: BlockStore, guard: Guard, device: Device | None) -> Self:
        tier = tier_of(store, device, ram_blocks=run.plan.ram_blocks)
        return cls(run, data, BlockSlots(tier, slots=run.plan.slots), guard)

    @property
    def ema(self) -> EmaSource:
        return self.slots if self.float32 is None else Float32Ema(self.slots, self.float32)

    @property
    def residents(self) -> int:
        return self.slots.num_slots if self.float32 is None else 1

    def saved_steps(self) -> list[int]:
        return [self.store.header(block).step for block in range(len(self.store.layouts))]

    @contextmanager
    def visit(self, visit: Visit, then: Visit | None) -> Iterator[None]:
        with super().visit(visit, then):
            try:
                yield
            finally:
                self._network = None

    def train_step(self, visit: Visit, step: int, batches: Batches) -> None:
        """A step of one block, with the loss of its family (`Family.loss`): arXiv 2506.14202, section 3."""
        resident, settings, timer = self.resident, self.settings, StepTimer(self.slots)
        scale = resident.loss_scale
        gradients = self.gradients[: resident.buffer.layout.num_parameters]

        # A batch of examples, each at a noise level of this block's range.
        # By name, [batch, ...] in the processor's memory; micro-batches go to the device one at a time.
        batch = batches.of(step)
        timer.batch_is_drawn()

        # Forward and backward, one micro-batch after the other; gradients add up in `gradients`. In a frame of its own:
        # where memory is refused, its activations are gone before the guard makes the next attempt smaller.
        def forward_and_backward(shape: StepShape) -> float:
            network, losses = self._block(visit.block, resident, shape.checkpointing), []
            for start in range(0, settings.batch, shape.micro_batch):
                rows = slice(start, start + shape.micro_batch)
                part = {name: tensor[rows].to(self.device) for name, tensor in batch.items()}
                # Per sample, [micro_batch]. Divided by the whole batch, so that micro-batches add up to its mean.
                with computing_in(self.run.precision, self.device):
                    loss = self.family.loss(network, part).sum() / settings.batch
                scaled(loss, scale).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())  # not .item(): that waits for a device
            return float(sum(loss.item() for loss in losses))  # a device is waited for here, once

        loss = self.guard.attempt(forward_and_backward, undo=gradients.zero_)
        if not math.isfinite(loss):
            raise self.diverged(f"the loss of block {visit.block} is {loss}", step, saved=visit.first)

        # The update: clipping by the block's own norm, AdamW, EMA. From here on the step cannot be made again.
        gradient_norm = self.update_resident_(visit, step)

        self.note(timer, block=visit.block, step=step, loss=loss, gradient_norm=gradient_norm)

    def _block(self, number: int, resident: Slot, checkpointing: bool) -> Block:
        """The resident block as a module with its weights of now; made once a visit, and again where the guard turns
        checkpointing on."""
        if self._network is None or self._network[0] != checkpointing:
            self._network = None  # the former one is gone before the next is made

            def build() -> Block:
                return self.family.block(num_layers=self.run.layers[number], checkpointing=checkpointing)

            self._network = checkpointing, self.network_on(resident.buffer, build, self.gradients)
        self.weights_in(resident.buffer)
        return self._network[1]
