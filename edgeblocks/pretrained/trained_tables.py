"""A model's table of tokens, its head and its norms outside of the layers as parameters, where these are trained too.

The table belongs to the first stage and the rest to the last one. Where a model has one matrix for both, either stage
has a copy of it, which begins alike and is updated with the sum of both gradients (`training.clipping`), so that the
copies stay equal. Gradients of the matrices are added to in place: what is added is as large as the rows of a batch's
tokens, or nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edgeblocks.families.precision import computing_in, precision_now
from edgeblocks.pretrained.keys import as_key, from_key
from edgeblocks.pretrained.model_folder import Table

TABLE, READOUT, HEAD = "table", "readout", "head"


class TrainedTable(nn.Module):
    """The table of tokens."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers [n], none of which is there twice: [n, width]."""
        found: Tensor = _Rows.apply(self.weight, numbers)  # type: ignore[no-untyped-call]
        return found


class TrainedReadout(nn.Module):
    """The head, and vectors that the model has outside of its layers."""

    def __init__(self, shape: tuple[int, ...], vectors: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.empty(shape))
        self.vectors = nn.ParameterDict(
            {as_key(name): nn.Parameter(torch.empty(shape)) for name, shape in vectors.items()}
        )

    def named_vectors(self) -> Iterator[tuple[str, Tensor]]:
        """By their names in the model."""
        for key, value in self.vectors.items():
            yield from_key(key), value


class HeldTable(Table):
    """A matrix in memory."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape)
        self.matrix = matrix

    def slices(self, device: torch.device, *, most_bytes: int) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time."""
        count = max(1, most_bytes // (4 * self.shape[1]))
        for start in range(0, self.shape[0], count):
            part = slice(start, min(start + count, self.shape[0]))
            yield part, self.matrix.detach()[part]


def gradient_of(parameter: Tensor) -> Tensor:
    """What a parameter's gradient is added to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, numbers: Tensor) -> Tensor:
        ctx.matrix, ctx.numbers = matrix, numbers
        return matrix.detach().index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient_of(ctx.matrix).index_add_(0, ctx.numbers, grad_outputs[0].to(ctx.matrix.dtype))
        return None, None


class TrainedLoss(torch.autograd.Function):
    """Cross-entropy of answers, the logits of some rows at a time; these are made again on the way back, where the
    gradient of each row's loss is known, because the head's is a sum over all rows."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, answers: Tensor, counts: Tensor, shell: Any, readout: TrainedReadout, size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states, answers, counts)
        ctx.shell, ctx.readout, ctx.size, ctx.precision = shell, readout, size, precision_now(states.device)
        losses = torch.zeros(len(states), device=states.device)
        right = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        for rows in chunks(counts, size):
            with torch.no_grad():
                logits = shell.leave(states[rows].unsqueeze(0), readout)[0]
            wanted = answers[rows].unsqueeze(1)
            losses[rows] = (logits.logsumexp(-1, keepdim=True) - logits.gather(1, wanted)).squeeze(1)
            right[rows] = logits.argmax(-1) == wanted.squeeze(1)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        states, answers, counts = ctx.saved_tensors
        vectors = [value for value in ctx.readout.vectors.values() if value.requires_grad]
        found = torch.zeros_like(states)
        for rows in chunks(counts, ctx.size):
            with torch.enable_grad(), computing_in(ctx.precision, states.device):
                part = states[rows].detach().requires_grad_()
                logits = ctx.shell.leave(part.unsqueeze(0), ctx.readout)[0]
            shares = logits.detach().softmax(-1)
            wanted = answers[rows].unsqueeze(1)
            shares.scatter_add_(1, wanted, torch.full_like(shares[:, :1], -1.0))
            shares.mul_(grad_outputs[0][rows].unsqueeze(1))
            found[rows], *others = torch.autograd.grad(logits, [part, *vectors], shares, allow_unused=True)
            for vector, gradient in zip(vectors, others, strict=True):
                if gradient is not None:
                    gradient_of(vector).add_(gradient)
        return found, None, None, None, None, None


def chunks(counts: Tensor, size: int) -> Iterator[Tensor]:
    """Numbers of the rows that count, some at a time; on the meta device, where nothing can be counted, of all."""
    every = torch.arange(len(counts), device=counts.device)
    chosen = every if counts.is_meta else every[counts]
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]
