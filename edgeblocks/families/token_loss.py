"""Cross-entropy of tokens without the logits of a whole micro-batch.

With 50,000 different tokens the logits of 32 sequences of 1,024 take 6.5 GB, far more than the network. Here they are
made a chunk of rows at a time, in one buffer, and made again in the backward pass. The buffer's size depends on the
vocabulary alone: what it adds to a step's peak is the same for every micro-batch, as the planner's straight lines need.

Positions that count come first, and chunks end with them. Shapes stay what they are for any number of them, and the
planner's trace counts all positions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from edgeblocks.families.layers import add_product_
from edgeblocks.families.precision import lowered

MOST_CHUNK_ROWS = 4096
CHUNK_BYTES = 16 * 2**20


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits exist at a time.

    >>> chunk_rows(27), chunk_rows(50_000)
    (4096, 83)
    """
    return max(1, min(MOST_CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """-log softmax(x W^T + b)[target] of each row that counts; adds to W's and b's gradients where they lie."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        # One number a row is kept for the backward pass, log sum exp, and not the row's logits.
        x = lowered(x)
        losses, log_sums = bias.new_zeros(len(x)), bias.new_zeros(len(x))
        for rows, _, logits in _chunks(x, weight, bias, counts):
            log_sums[rows], losses[rows] = _cross_entropy_(logits[: len(rows)], targets[rows])
        ctx.save_for_backward(x, weight, bias, targets, counts, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, counts, log_sums = ctx.saved_tensors
        # As in `Linear`: gradients that exist are added to, and no second table [vocabulary, width] is made.
        in_place = weight.grad is not None
        grad_x = torch.zeros_like(x)
        grad_weight = weight.grad if in_place else torch.zeros_like(weight)
        grad_bias = bias.grad if in_place else torch.zeros_like(bias)
        # d(-log softmax)/d(logits) is softmax - one-hot, here times the row's gradient. Logits are made again from x:
        # those of the forward pass were overwritten chunk by chunk.
        rounded = weight.to(x.dtype)
        for rows, part, logits in _chunks(x, weight, bias, counts):
            grad = grad_outputs[0][rows].unsqueeze(1)
            grad_logits = logits[: len(rows)].sub_(log_sums[rows].unsqueeze(1)).exp_().mul_(grad)
            grad_logits.scatter_add_(1, targets[rows].unsqueeze(1), -grad)
            grad_bias.add_(grad_logits.sum(0))
            logits[len(rows) :] = 0
            grad_logits = logits.to(x.dtype)
            add_product_(grad_weight, grad_logits.t(), part)
            grad_x.index_copy_(0, rows, torch.mm(grad_logits, rounded, out=part)[: len(rows)])
        return (grad_x, None, None, None, None) if in_place else (grad_x, grad_weight, grad_bias, None, None)


def _chunks(x: Tensor, weight: Tensor, bias: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows that count at a time: their numbers, their x and their logits; each chunk overwrites the former.

    In half precision x and logits may have some more rows, whose x is zero.
    """
    size = chunk_rows(len(weight))
    # Rows that count come first, so that the loop ends with them: on average half of the tokens are masked, in the last
    # of three blocks a sixth. On the meta device nothing can be counted, and the trace takes all rows.
    order = counts.int().argsort(descending=True, stable=True)
    most = len(x) if x.is_meta else int(counts.sum())
    # What no row touches would count at the cap all the same. The trace has the largest buffer, for a straight line.
    half = x.dtype != bias.dtype
    held = size if x.is_meta else min(size, max(1, _fewer_shapes(most) if half else most))
    x_buffer, buffer = x.new_empty(held, x.shape[1]), bias.new_empty(held, len(weight))
    columns = weight.to(x.dtype).t()  # [width, vocabulary]
    for start in range(0, most, size):
        rows = order[start : min(start + size, most)]
        if not half:
            part = torch.index_select(x, 0, rows, out=x_buffer[: len(rows)])
            yield rows, part, torch.addmm(bias, part, columns, out=buffer[: len(rows)])
            continue
        count = min(_fewer_shapes(len(rows)), held)
        part, logits = x_buffer[:count], buffer[:count]
        torch.index_select(x, 0, rows, out=part[: len(rows)])
        part[len(rows) :] = 0
        # Rounded as products are, and float32 from here on.
        yield rows, part, torch.add(part @ columns, bias, out=logits)


def _fewer_shapes(rows: int) -> int:
    """At least so many rows, one of few numbers.

    For each shape of bfloat16 matrices a program is made and kept, and how many tokens are masked differs from step to
    step.
    """
    return max(64, 1 << (rows - 1).bit_length())


def _cross_entropy_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log of each row's sum of exponentials, and its -log softmax at the target; `logits` are destroyed."""
    highest = logits.amax(1)  # taken off before exp, which would overflow otherwise
    of_targets = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    log_sums = logits.sub_(highest.unsqueeze(1)).exp_().sum(1).log_().add_(highest)
    return log_sums, log_sums - of_targets


def token_losses(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"],
    targets: Int[Tensor, " rows"],
    counts: Bool[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """Cross-entropy of each row's target, in nats, zero for rows that do not count.

    x are hidden states, weight and bias those of a readout. Gradients of weight and bias that exist are added to.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(x, weight, bias, targets, counts)  # type: ignore[no-untyped-call]
    return losses


@torch.no_grad()
def token_scores(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"],
    targets: Int[Tensor, " rows"],
    counts: Bool[Tensor, " rows"],
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Each row's cross-entropy in nats, and whether its likeliest token is the target; zero where it does not count."""
    x = lowered(x)
    losses, right = bias.new_zeros(len(x)), torch.zeros_like(counts)
    for rows, _, padded in _chunks(x, weight, bias, counts):
        logits = padded[: len(rows)]
        right[rows] = logits.argmax(1) == targets[rows]
        _, losses[rows] = _cross_entropy_(logits, targets[rows])
    return losses, right


@torch.no_grad()
def token_estimates(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"],
    targets: Int[Tensor, " rows"],
    codes: Float[Tensor, "vocabulary code"],
) -> tuple[Float[Tensor, "rows code"], Float[Tensor, " rows"]]:
    """Each row's mean of the code-book's rows, weighted by the tokens' probabilities, and log p(target) in nats."""
    x = lowered(x)
    denoised, log_shares = codes.new_empty(len(x), codes.shape[1]), codes.new_empty(len(x))
    for rows, _, padded in _chunks(x, weight, bias, torch.ones_like(targets, dtype=torch.bool)):
        logits = padded[: len(rows)]
        highest = logits.amax(1, keepdim=True)  # taken off before exp, which would overflow otherwise
        of_targets = logits.gather(1, targets[rows].unsqueeze(1)) - highest
        weights = logits.sub_(highest).exp_()
        sums = weights.sum(1, keepdim=True)
        log_shares[rows] = (of_targets - sums.log()).squeeze(1)
        denoised[rows] = weights @ codes / sums
    return denoised, log_shares
