"""Greedy training: a window of layers at a time, from the bottom up, over the frozen layers below it.

The window, with the readout on top, is in memory with its gradients, moments and EMA; frozen layers are only run
forward. The first window with the stem is a short network that is trained end to end; `runs.growing` moves the window
up.

Source: Belilovsky et al. 2019, arXiv 1812.11446, whose layers are trained one at a time; here windows overlap by half,
so that upper layers can still change what those below have learned, and all have the same readout.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch
from torch import Tensor

from edgeblocks.data.dataset import DataSet
from edgeblocks.families.base import Batch
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.precision import computing_in
from edgeblocks.inference.staged_weights import StagedEma
from edgeblocks.offload.block_buffer import BlockBuffer, Part
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.block_slots import BlockSlots
from edgeblocks.offload.device import Device
from edgeblocks.offload.float32_copy import Float32Copy, Float32Ema, Weights
from edgeblocks.offload.sections import network_of
from edgeblocks.offload.stage_slots import Need, StageSlots
from edgeblocks.offload.tiers import tier_of
from edgeblocks.optim.loss_scale import scaled
from edgeblocks.planning.plans import StepShape
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.quantized_blocks import quantized_store
from edgeblocks.training.batches import Batches
from edgeblocks.training.guard import Guard
from edgeblocks.training.loop import StepTimer, Visit
from edgeblocks.training.resident import ResidentTrainer

FROZEN_PARTS: tuple[Part, ...] = ("ema",)
"""Of a frozen part its EMA is in memory, which is what it was frozen as; its file has the same as its weights."""


class GreedyTrainer(ResidentTrainer):
    """Trains the window of a run that grows, up to the step at which it grows or ends."""

    def __init__(
        self, run: RunDirectory, data: DataSet, slots: BlockSlots, guard: Guard, *, frozen: StageSlots | None
    ) -> None:
        """
        Args:
            slots: of the window.
            frozen: of the parts below it; None where it is the lowest.
        """
        super().__init__(run, data, slots, guard)
        assert isinstance(self.family, EndToEnd)
        self._end_to_end: EndToEnd = self.family
        self.top, self.frozen = len(run.file_layers) - 1, frozen
        """The number of the window, and the slots of the parts below it."""
        self._networks: dict[tuple[int, int], Block] = {}
        """By the part and the buffer that it lies in."""
        self._expanded = self.float32
        """Where a frozen part is that a network computes with; None: in its slot."""
        if frozen is not None:
            frozen.times = slots.times
            if run.settings.run.frozen != "none" and self._expanded is None:
                self._expanded = Float32Copy(self.store.layouts[: self.top], self.device)

    @classmethod
    def open(cls, run: RunDirectory, data: DataSet, store: BlockStore, guard: Guard, device: Device | None) -> Self:
        top, frozen = len(run.file_layers) - 1, None
        if top:
            if run.settings.run.frozen != "none":
                below = quantized_store(run, top, run.settings.run.frozen)
            else:
                below = BlockStore(store.folder, store.layouts[:top], store.run_id, trained_together=True)
            tier = tier_of(below, device, parts=FROZEN_PARTS, ram_blocks=min(run.plan.ram_blocks, top))
            frozen = StageSlots(tier, slots=min(run.plan.slots - 1, top))
        return cls(run, data, BlockSlots(tier_of(store, device), slots=1), guard, frozen=frozen)

    @property
    def ema(self) -> StagedEma:
        # Made when asked for: kept here, it would keep the trainer, and the window's memory with it, until the garbage
        # is collected, and the next window needs that memory.
        return StagedEma(_Parts(self), self.run.file_layers)

    @property
    def residents(self) -> int:
        return 1

    def part_of(self, visit: Visit) -> int:
        return self.top

    def saved_steps(self) -> list[int]:
        return [self.store.header(self.top).step]

    def close(self) -> None:
        if self.frozen is not None:
            self.frozen.close()
        super().close()

    def train_step(self, visit: Visit, step: int, batches: Batches) -> None:
        """A step of the window, with the loss of the readout on top of it and the gradients of its own layers."""
        resident, settings, timer = self.resident, self.settings, StepTimer(self.slots)
        scale = resident.loss_scale
        gradients = self.gradients[: resident.buffer.layout.num_parameters]

        # The whole batch, [batch, ...]: each frozen part is loaded once for all of it.
        batch = {name: tensor.to(self.device) for name, tensor in batches.of(step).items()}
        timer.batch_is_drawn()

        # Forward through the frozen layers, of which nothing is recorded: [batch, tokens, width], and the conditioning.
        entering = self.guard.attempt(partial(self._through_frozen, batch)) if self.frozen is not None else None

        # Forward and backward through the window, one micro-batch after the other; gradients add up in `gradients`. In
        # a frame of its own: where memory is refused, its activations are gone before the guard makes the next attempt
        # smaller.
        def forward_and_backward(shape: StepShape) -> float:
            network, losses = self._window(), []
            for rows in _micro_batches(settings.batch, shape.micro_batch):
                part = {name: tensor[rows] for name, tensor in batch.items()}
                with computing_in(self.run.precision, self.device):
                    if entering is None:
                        hidden, condition = self._end_to_end.enter(network, part)
                    else:
                        # A leaf that wants a gradient, without which no layer would be checkpointed.
                        hidden = entering[0][rows].detach().requires_grad_(shape.checkpointing)
                        condition = entering[1][rows]
                    out = network.through_stage(hidden, condition, checkpointing=shape.checkpointing)
                    loss = self._end_to_end.loss_after(network, out, condition, part)
                # Divided by the whole batch, so that micro-batches add up to its mean.
                mean = loss.sum() / settings.batch
                scaled(mean, scale).backward()  # type: ignore[no-untyped-call]
                losses.append(mean.detach())
            return float(sum(one.item() for one in losses))  # a device is waited for here, once

        loss = self.guard.attempt(forward_and_backward, undo=gradients.zero_)
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}", step, saved=visit.first)

        # The update: clipping by the window's own norm, AdamW, EMA. From here on the step cannot be made again.
        gradient_norm = self.update_resident_(visit, step)

        self.note(timer, block=None, step=step, loss=loss, gradient_norm=gradient_norm)

    def _through_frozen(self, batch: Batch, shape: StepShape) -> tuple[Tensor, Tensor]:
        """What the window is given of a batch: hidden values and the conditioning, which the stem has made."""
        assert self.frozen is not None
        hidden: Tensor | None = None
        condition: Tensor | None = None
        for part in range(self.top):
            need, then = (Need(stage=stage % self.top, parts=FROZEN_PARTS, changes=False) for stage in (part, part + 1))
            with (
                self.frozen.use(need, then=then) as buffer,
                torch.no_grad(),
                computing_in(self.run.precision, self.device),
            ):
                network = self._frozen_network(part, buffer)
                for rows in _micro_batches(self.settings.batch, shape.micro_batch):
                    if part == 0:
                        samples = {name: tensor[rows] for name, tensor in batch.items()}
                        entered, conditioned = self._end_to_end.enter(network, samples)
                    else:
                        assert hidden is not None
                        assert condition is not None
                        entered, conditioned = hidden[rows], condition[rows]
                    out = network.through_stage(entered, conditioned, checkpointing=False)
                    if hidden is None or condition is None:
                        hidden = out.new_empty(self.settings.batch, *out.shape[1:])
                        condition = conditioned.new_empty(self.settings.batch, *conditioned.shape[1:])
                    hidden[rows] = out  # in the place of what entered this part
                    if part == 0:
                        condition[rows] = conditioned
        assert hidden is not None
        assert condition is not None
        return hidden, condition

    def _window(self) -> Block:
        """The window as a module with its weights of now."""
        buffer = self.resident.buffer
        key = self.top, id(buffer)
        if key not in self._networks:
            build = partial(network_of, self.family, self.run.sections[self.top])
            self._networks[key] = self.network_on(buffer, build, self.gradients)
        self.weights_in(buffer)
        return self._networks[key]

    def _frozen_network(self, part: int, buffer: BlockBuffer) -> Block:
        """A frozen part as a module."""
        # By buffer, too: parameters are views of one slot's memory, and a part comes into whichever slot is free.
        key = part, id(buffer)
        if key not in self._networks:
            with torch.device("meta"):
                network = network_of(self.family, self.run.sections[part])
            with self.device:
                network.reset_tables_()
            self.frozen_weights(part, buffer).bind_(network)
            self._networks[key] = network.eval()
        self.frozen_weights(part, buffer)
        return self._networks[key]

    def frozen_weights(self, part: int, buffer: BlockBuffer) -> Weights:
        """What a network of a frozen part is bound to, given the slot that the part lies in."""
        copy = self._expanded
        if copy is None:
            return buffer
        if copy.ema_of != part:
            copy.hold_(buffer, "ema").ema_of = part
        return copy


class _Parts:
    """The EMA weights of all parts of a trainer's network, of those that are frozen and of the window."""

    def __init__(self, trainer: GreedyTrainer) -> None:
        self._trainer = trainer

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[Weights]:
        """Those of a part, until another part is asked for."""
        trainer = self._trainer
        if trainer.frozen is not None and block < trainer.top:
            with trainer.frozen.ema_weights(block) as buffer:
                yield trainer.frozen_weights(block, buffer)
        elif trainer.float32 is None:
            with trainer.slots.ema_weights(block) as buffer:
                yield buffer
        else:
            with Float32Ema(trainer.slots, trainer.float32).ema_weights(block) as weights:
                yield weights


def _micro_batches(batch: int, micro_batch: int) -> Iterator[slice]:
    return (slice(start, start + micro_batch) for start in range(0, batch, micro_batch))
