"""Blocks for tests of families."""

import torch
from torch import nn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_block(family, *, num_layers=2, checkpointing=False, seed=0):
    """A block whose every parameter is random, the zero-initialised ones too."""
    block = family.block(num_layers=num_layers, checkpointing=checkpointing)
    block.reset_tables_()
    generator = seeded(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return block


def fresh_block(family, *, num_layers=2):
    block = family.block(num_layers=num_layers, checkpointing=False)
    block.reset_tables_()
    block.init_(seeded())
    return block
