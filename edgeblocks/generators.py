"""torch generators at a position; see `randomness`."""

import torch

from edgeblocks.seeds import seed_at


def generator_at(*position: int | str) -> torch.Generator:
    """A CPU generator for a position such as (seed, "train", block, step)."""
    return torch.Generator().manual_seed(seed_at(*position))
