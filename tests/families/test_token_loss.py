"""Chunked cross-entropy: the plain one's values and gradients, in a chunk's memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgeblocks.families import token_loss
from edgeblocks.families.token_loss import chunk_rows, token_estimates, token_losses, token_scores

WIDTH, VOCABULARY = 6, 11


def problem(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).requires_grad_()
        for shape in ((rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    return x, weight, bias, targets, torch.rand(rows, generator=generator)


def everywhere(targets):
    return torch.ones_like(targets, dtype=torch.bool)


@pytest.mark.parametrize("gradients_exist", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 17, 20])
def test_it_is_the_plain_cross_entropy(monkeypatch, rows, share, gradients_exist):
    """Oracle: torch's cross-entropy of all logits; values and all gradients, over one and several chunks of 5 rows.

    Rows that do not count have no loss and give no gradient.
    """
    monkeypatch.setattr(token_loss, "MOST_CHUNK_ROWS", 5)
    x, weight, bias, targets, row_weights = problem(rows)
    counts = torch.rand(rows, generator=torch.Generator().manual_seed(1)) < share
    expected = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="none") * counts
    (expected * row_weights).sum().backward()
    plain = [tensor.grad for tensor in (x, weight, bias)]
    for tensor in (x, weight, bias):
        tensor.grad = None
    if gradients_exist:
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        memory = weight.grad.data_ptr(), bias.grad.data_ptr()
    losses = token_losses(x, weight, bias, targets, counts)
    assert losses.shape == (rows,)
    torch.testing.assert_close(losses, expected)
    (losses * row_weights).sum().backward()
    if gradients_exist:
        assert (weight.grad.data_ptr(), bias.grad.data_ptr()) == memory
        weight.grad -= 1
        bias.grad -= 1
    for tensor, grad in zip((x, weight, bias), plain, strict=True):
        torch.testing.assert_close(tensor.grad, grad, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_finite_differences():
    """gradcheck in double precision."""
    x, weight, bias, targets, _ = (tensor.detach() for tensor in problem(4))
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *parts: token_losses(*parts, targets, everywhere(targets)), inputs)


def test_rows_that_do_not_count_are_not_computed(monkeypatch):
    """With 3 rows of 20 that count one chunk of 5 is made, not four; their hidden states alone have gradients."""
    monkeypatch.setattr(token_loss, "MOST_CHUNK_ROWS", 5)
    x, weight, bias, targets, _ = problem(20)
    counts = torch.zeros(20, dtype=torch.bool)
    counts[[2, 11, 19]] = True
    with torch.no_grad():
        chunks = [rows.tolist() for rows, _, _ in token_loss._chunks(x, weight, bias, counts)]
    assert chunks == [[2, 11, 19]]
    token_losses(x, weight, bias, targets, counts).sum().backward()
    assert torch.equal(x.grad.abs().sum(1) > 0, counts)


def test_large_logits_neither_overflow_nor_vanish():
    """Logits of 10^4 give finite losses: 0 for the likeliest token, the difference for others."""
    x = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    weight, bias = torch.eye(2), torch.zeros(2)
    targets = torch.tensor([0, 0])
    torch.testing.assert_close(token_losses(x, weight, bias, targets, everywhere(targets)), torch.tensor([0.0, 1e4]))


def test_scores_are_losses_and_right_answers(monkeypatch):
    """Oracle: all logits at once."""
    monkeypatch.setattr(token_loss, "MOST_CHUNK_ROWS", 5)
    x, weight, bias, targets, _ = problem(13)
    counts = torch.arange(13) != 4
    losses, right = token_scores(x, weight, bias, targets, counts)
    logits = F.linear(x, weight, bias)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none") * counts)
    assert torch.equal(right, (logits.argmax(1) == targets) & counts)


class Largest(TorchDispatchMode):
    """Follows the largest storage that an operator gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_bytes = max(self.num_bytes, *sizes, 0)
        return result


def test_no_tensor_is_larger_than_a_chunk():
    """50,000 tokens and 1,000 positions: 200 MB of logits never exist, forward or backward; 16 MiB do."""
    with torch.device("meta"):
        x, weight, bias = torch.empty(1000, 8), torch.empty(50_000, 8), torch.empty(50_000)
        targets = torch.empty(1000, dtype=torch.int64)
        for tensor in (x, weight, bias):
            tensor.requires_grad_()
            tensor.grad = torch.empty_like(tensor)
    with Largest() as largest:
        token_losses(x, weight, bias, targets, everywhere(targets)).sum().backward()
    assert largest.num_bytes == chunk_rows(50_000) * 50_000 * 4 <= 16 * 2**20


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_estimates_are_those_of_all_logits(monkeypatch, rows):
    """Oracle: softmax of all logits times the code-book, and its logarithm at the target; over several chunks."""
    monkeypatch.setattr(token_loss, "MOST_CHUNK_ROWS", 5)
    x, weight, bias, targets, _ = problem(rows)
    codes = torch.randn(VOCABULARY, 3, generator=torch.Generator().manual_seed(2))
    denoised, log_shares = token_estimates(x, weight, bias, targets, codes)
    expected = F.linear(x, weight, bias).log_softmax(1)
    torch.testing.assert_close(denoised, expected.exp() @ codes)
    torch.testing.assert_close(log_shares, expected.gather(1, targets.unsqueeze(1)).squeeze(1))
    assert not denoised.requires_grad
