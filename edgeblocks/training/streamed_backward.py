"""Streamed back-propagation: end-to-end training with true gradients and one stage in memory at a time.

A network is cut into stages (`offload.sections`). A step sends all its micro-batches forward through one stage after
the other and keeps the activations at the stage boundaries (`training.boundaries`). Then it goes backward from the last
stage to the first: a stage is run again from the activations at its boundary, now recorded by autograd, and updated
when its gradient is complete, or later (`training.clipping`). A stage is needed twice a step, the last one once; where
some are frozen, those below the lowest trained one once, forward.

The gradients are those of ordinary back-propagation, bit for bit: see `StreamedBackward._continue_backward` for the
order in which the conditioning's gradient is summed.
"""

import torch
from torch import Tensor

from edgeblocks.families.base import Batch
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Precision
from edgeblocks.optim.loss_scale import LossScale, scaled
from edgeblocks.training.boundaries import Boundaries, InMemory


class StreamedBackward:
    """The forward and backward pass of one batch, stage by stage.

    The activations at the stage boundaries are kept until the backward pass. A stage that was refused memory can be run
    again: nothing changes before all samples have passed it.
    """

    def __init__(
        self,
        family: EndToEnd,
        batch: Batch,
        *,
        num_stages: int,
        lowest: int = 0,
        boundaries: Boundaries | None = None,
        precision: Precision = "fp32",
        loss_scale: LossScale | None = None,
    ) -> None:
        """
        Args:
            boundaries: keeps the activations at the stage boundaries; None: in memory, as they are.
            lowest: the stage at which the backward pass ends.
            precision: in which the stages compute.
            loss_scale: what all gradients are multiplied with.
        """
        self._family, self._batch, self._last, self._lowest = family, batch, num_stages - 1, lowest
        self._precision: Precision = precision
        self._loss_scale = loss_scale
        self._device = next(iter(batch.values())).device
        self._size = len(next(iter(batch.values())))
        self._boundaries = boundaries or InMemory(self._size)
        """By the stage that the activations enter; none of the first stage, which gets the batch itself."""
        self._condition: Tensor | None = None
        self._gradients: tuple[Tensor, Tensor] | None = None
        """The loss's gradients by the output of the next stage of the backward pass, and by the conditioning of all
        stages behind it."""
        self.loss = 0.0
        """The mean over the batch; known after the backward pass of the last stage."""

    def forward(self, number: int, stage: Block, *, micro_batch: int) -> None:
        """Send all samples through a stage that is not the last one, a micro-batch at a time."""
        conditions = _BatchTensor(self._size)
        # Nothing is recorded: a stage is run again in the backward pass, from the activations kept here.
        with torch.no_grad(), computing_in(self._precision, self._device):
            for part in self._parts(micro_batch):
                hidden, condition = self._stage_inputs(number, stage, part)
                if number == 0:
                    conditions.put(part, condition)
                # [micro_batch, tokens, width], under the number of the stage that they enter.
                self._boundaries.put(number + 1, part, stage.through_stage(hidden, condition, checkpointing=False))
        if number < self._lowest:
            self._boundaries.forget(number)  # the backward pass does not come down to this stage
        if number == 0:
            self._condition = conditions.all()

    def backward(self, number: int, stage: Block, *, micro_batch: int, checkpointing: bool) -> None:
        """Run a stage again and add the gradient of all samples to its parameters' gradients."""
        loss, by_hidden, by_condition = 0.0, _BatchTensor(self._size), _BatchTensor(self._size)
        # Parts may be smaller here than in the forward pass, where the guard has shrunk the step in between; so all
        # that is kept goes by rows of the batch, not by micro-batch.
        for part in self._parts(micro_batch):
            with computing_in(self._precision, self._device):
                hidden, condition = self._stage_inputs(number, stage, part)
                if number > 0:
                    # Leaves of this stage's graph: their gradients are what the stage below continues from.
                    hidden, condition = hidden.detach().requires_grad_(), condition.detach().requires_grad_()
                out = stage.through_stage(hidden, condition, checkpointing=checkpointing)
                if number == self._last:
                    losses = self._family.loss_after(stage, out, condition, self._samples(part))
            if number == self._last:
                mean = losses.sum() / self._size  # by the whole batch, so that micro-batches add up to its mean
                scaled(mean, self._loss_scale).backward()  # type: ignore[no-untyped-call]
                loss += mean.item()
            else:
                self._continue_backward(out, condition, part)
            # Below the lowest trained stage nobody needs a gradient.
            if number > self._lowest:
                assert hidden.grad is not None
                by_hidden.put(part, hidden.grad)
                # A network without conditioning has an empty one, which no layer reads: autograd leaves its gradient
                # None.
                by_condition.put(part, torch.zeros_like(condition) if condition.grad is None else condition.grad)
        # Replaced only when all samples are through: a stage that was refused memory begins again from the former ones.
        self.loss = loss if number == self._last else self.loss
        if number > self._lowest:
            self._gradients = by_hidden.all(), by_condition.all()
        self._boundaries.forget(number)

    def _parts(self, micro_batch: int) -> list[slice]:
        return [slice(start, start + micro_batch) for start in range(0, self._size, micro_batch)]

    def _samples(self, part: slice) -> Batch:
        return {name: tensor[part] for name, tensor in self._batch.items()}

    def _stage_inputs(self, number: int, stage: Block, part: slice) -> tuple[Tensor, Tensor]:
        """A stage's input activations and conditioning for some samples."""
        # The stem is in stage 0, so there both are parts of its graph and the stem's parameters get their gradients.
        if number == 0:
            return self._family.enter(stage, self._samples(part))
        assert self._condition is not None
        return self._boundaries.of(number, part), self._condition[part]

    def _continue_backward(self, out: Tensor, condition: Tensor, part: slice) -> None:
        """Back-propagate from a stage's output to its parameters, its input activations and the conditioning."""
        assert self._gradients is not None
        by_hidden, by_condition = (gradient[part] for gradient in self._gradients)
        # A scalar whose gradients are the given ones. `out.backward(by_hidden)` would do the same, but imports 20 MB of
        # symbolic libraries.
        carried = (out * by_hidden).sum()
        if condition.requires_grad:
            # The conditioning's gradient must be summed as autograd sums it where all stages are one graph: from the
            # last layer to the first, one at a time. autograd goes from the latest operation to the first. This product
            # is made last, so that the sum begins with what the later stages contributed; this stage's layers are added
            # to it one by one.
            carried = carried + (condition * by_condition).sum()
        carried.backward()  # type: ignore[no-untyped-call]


class _BatchTensor:
    """A tensor of the whole batch, filled a micro-batch at a time; its shape follows from the first."""

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
