"""Cross-entropy of tokens without the logits of a whole micro-batch.

With 50,000 different tokens the logits of 32 sequences of 1,024 take 6.5 GB, far more than the network. Here they are
made a chunk of rows at a time, in one buffer, and made again in the backward pass. The buffer's size depends on the
vocabulary alone: what it adds to a step's peak is the same for every micro-batch, as the planner's straight lines need.

All positions take part, also those whose loss counts nothing: how many tokens are masked is a matter of chance, and a
shape that depends on chance can be neither planned nor traced.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_CHUNK_ROWS = 4096
CHUNK_BYTES = 16 * 2**20


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits exist at a time.

    >>> chunk_rows(27), chunk_rows(50_000)
    (4096, 83)
    """
    return max(1, min(MOST_CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """-log softmax(x W^T + b)[target] of each row; the backward pass adds to W's and b's gradients where they lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        losses, log_sums = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])
        for rows, logits in _logit_chunks(x, weight, bias):
            losses[rows], log_sums[rows] = _cross_entropy_(logits, targets[rows])
        ctx.save_for_backward(x, weight, bias, targets, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, weight, bias, targets, log_sums = ctx.saved_tensors
        in_place = weight.grad is not None
        grad_weight = weight.grad if in_place else torch.zeros_like(weight)
        grad_bias = bias.grad if in_place else torch.zeros_like(bias)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for rows, logits in _logit_chunks(x, weight, bias):
            grad = grad_outputs[0][rows].unsqueeze(1)
            grad_logits = logits.sub_(log_sums[rows].unsqueeze(1)).exp_().mul_(grad)
            grad_logits.scatter_add_(1, targets[rows].unsqueeze(1), -grad)
            grad_weight.addmm_(grad_logits.t(), x[rows])
            grad_bias.add_(grad_logits.sum(0))
            if grad_x is not None:
                torch.mm(grad_logits, weight, out=grad_x[rows])
        return (grad_x, None, None, None) if in_place else (grad_x, grad_weight, grad_bias, None)


def _logit_chunks(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits of some rows at a time; each chunk overwrites the former."""
    size = chunk_rows(len(weight))
    buffer = x.new_empty(size, len(weight))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, torch.addmm(bias, x[rows], weight.t(), out=buffer[: rows.stop - start])


def _cross_entropy_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's -log softmax at the target, and log of the sum of exponentials; `logits` are destroyed."""
    highest = logits.amax(1)
    of_targets = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    log_sums = logits.sub_(highest.unsqueeze(1)).exp_().sum(1).log_().add_(highest)
    return log_sums - of_targets, log_sums


def token_losses(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"],
    targets: Int[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """Cross-entropy of each row's target, in nats, where x are hidden states and weight and bias those of a readout.

    Gradients of weight and bias that exist already are added to.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(x, weight, bias, targets)  # type: ignore[no-untyped-call]
    return losses


@torch.no_grad()
def token_scores(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"],
    targets: Int[Tensor, " rows"],
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Each row's cross-entropy in nats, and whether its likeliest token is the target."""
    losses, right = torch.empty_like(x[:, 0]), torch.empty_like(targets, dtype=torch.bool)
    for rows, logits in _logit_chunks(x, weight, bias):
        right[rows] = logits.argmax(1) == targets[rows]
        losses[rows], _ = _cross_entropy_(logits, targets[rows])
    return losses, right
