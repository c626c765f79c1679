"""Moments as a training has them, and what rounding them does to Adam's update."""

import torch


def adam_moments(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments after 300 steps of gradients whose sizes are spread log-normally."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1e-4 * torch.exp(spread * torch.randn(2**16, generator=generator))
    exp_avg, exp_avg_sq = torch.zeros(2**16), torch.zeros(2**16)
    for _ in range(300):
        gradients = sizes * torch.randn(2**16, generator=generator)
        exp_avg.mul_(0.9).add_(gradients, alpha=0.1)
        exp_avg_sq.mul_(0.99).addcmul_(gradients, gradients, value=0.01)
    return exp_avg, exp_avg_sq


def update_error(exact: tuple[torch.Tensor, torch.Tensor], found: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The root mean square error of exp_avg / sqrt(exp_avg_sq), relative."""
    updates = [exp_avg / exp_avg_sq.sqrt() for exp_avg, exp_avg_sq in (exact, found)]
    return float((updates[1] - updates[0]).square().mean().sqrt() / updates[0].square().mean().sqrt())
