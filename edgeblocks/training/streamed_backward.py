"""Streamed back-propagation: end-to-end training with true gradients, of which one stage is in memory at a time.

A network is cut into stages (`sections`). A step sends all its micro-batches forward through one stage after the
other, keeping what enters each, and then backward from the last stage to the first: a stage is run again from what
entered it, now followed by autograd, and updated when its gradient is complete, or later (`stage_updates`). A stage is
needed twice a step, the last one once; where some are frozen, those below the lowest trained one once, forward.

The gradients are those of ordinary back-propagation. What a condition contributes to the stem is summed in the order in
which autograd sums it when all stages are one graph: from the last layer to the first, one at a time.
"""

import torch
from torch import Tensor

from edgeblocks.families.base import Batch
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.training.boundaries import Boundaries, InMemory


class StreamedBackward:
    """One batch on its way through the stages and back.

    What enters each stage is kept until the way back. A stage that was refused memory can be gone through again: before
    all samples are through nothing changes.
    """

    def __init__(
        self,
        family: EndToEnd,
        batch: Batch,
        *,
        num_stages: int,
        lowest: int = 0,
        boundaries: Boundaries | None = None,
    ) -> None:
        """
        Args:
            boundaries: where what enters the stages is kept; None: in memory, as it is.
            lowest: the stage at which the way back ends.
        """
        self._family, self._batch, self._last, self._lowest = family, batch, num_stages - 1, lowest
        self._size = len(next(iter(batch.values())))
        self._entering = boundaries or InMemory(self._size)
        """The first stage is given the batch itself."""
        self._condition: Tensor | None = None
        self._gradients: tuple[Tensor, Tensor] | None = None
        """The loss's, by what entered the stage behind on the way back, and by the condition of all stages behind."""
        self.loss = 0.0
        """The mean over the batch; known when the last stage is behind."""

    def forward(self, number: int, stage: Block, *, micro_batch: int) -> None:
        """Send all samples through a stage that is not the last one, a micro-batch at a time."""
        told = _Rows(self._size)
        with torch.no_grad():
            for part in self._parts(micro_batch):
                hidden, condition = self._entered(number, stage, part)
                if number == 0:
                    told.put(part, condition)
                self._entering.put(number + 1, part, stage.through_stage(hidden, condition, checkpointing=False))
        if number < self._lowest:
            self._entering.forget(number)
        if number == 0:
            self._condition = told.all()

    def backward(self, number: int, stage: Block, *, micro_batch: int, checkpointing: bool) -> None:
        """Run a stage again and add the gradient of all samples to its parameters' gradients."""
        loss, by_hidden, by_condition = 0.0, _Rows(self._size), _Rows(self._size)
        for part in self._parts(micro_batch):
            hidden, condition = self._entered(number, stage, part)
            if number > 0:
                hidden, condition = hidden.detach().requires_grad_(), condition.detach().requires_grad_()
            out = stage.through_stage(hidden, condition, checkpointing=checkpointing)
            if number == self._last:
                losses = self._family.loss_after(stage, out, condition, self._samples(part))
                mean = losses.sum() / self._size
                mean.backward()  # type: ignore[no-untyped-call]
                loss += mean.item()
            else:
                self._continue_backward(out, condition, part)
            if number > self._lowest:
                assert hidden.grad is not None
                by_hidden.put(part, hidden.grad)
                by_condition.put(part, torch.zeros_like(condition) if condition.grad is None else condition.grad)
        self.loss = loss if number == self._last else self.loss
        if number > self._lowest:
            self._gradients = by_hidden.all(), by_condition.all()
        self._entering.forget(number)

    def _parts(self, micro_batch: int) -> list[slice]:
        return [slice(start, start + micro_batch) for start in range(0, self._size, micro_batch)]

    def _samples(self, part: slice) -> Batch:
        return {name: tensor[part] for name, tensor in self._batch.items()}

    def _entered(self, number: int, stage: Block, part: slice) -> tuple[Tensor, Tensor]:
        """What a stage is given of some samples."""
        if number == 0:
            return self._family.enter(stage, self._samples(part))
        assert self._condition is not None
        return self._entering.of(number, part), self._condition[part]

    def _continue_backward(self, out: Tensor, condition: Tensor, part: slice) -> None:
        """From what leaves a stage to its parameters and to what entered it.

        Products with the gradients are summed, because `backward` with gradients would import 20 MB of symbolic
        libraries. The condition's part is made last, so autograd, which goes from the latest operation to the first,
        begins with what later stages contributed and adds this stage's layers to it one by one.
        """
        assert self._gradients is not None
        by_hidden, by_condition = (gradient[part] for gradient in self._gradients)
        carried = (out * by_hidden).sum()
        if condition.requires_grad:
            carried = carried + (condition * by_condition).sum()
        carried.backward()  # type: ignore[no-untyped-call]


class _Rows:
    """A tensor of all samples, put together from parts; its shape follows from the first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._whole: Tensor | None = None

    def put(self, part: slice, rows: Tensor) -> None:
        if self._whole is None:
            self._whole = rows.new_empty(self._size, *rows.shape[1:])
        self._whole[part] = rows

    def all(self) -> Tensor:
        assert self._whole is not None
        return self._whole
