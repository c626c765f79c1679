"""A small block, buffers filled with random bytes, and a store for them."""

import torch
from torch import nn

from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, BlockLayout
from edgeblocks.offload.block_files import BlockStore

RUN_ID = "0123456789abcdef"


class Small(nn.Module):
    """Vectors before matrices, large and small ones, as the layout must sort them."""

    def __init__(self, width=64):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(5))
        self.first = nn.Linear(width, 128)
        self.inner = nn.Sequential(nn.Linear(7, 3), nn.Linear(128, 64))


def layout_of(optimizer="adamw8bit", width=64):
    return BlockLayout.of(Small(width), optimizer)


def filled_buffer(layout, seed=0):
    """A buffer of random bytes that are finite numbers where they are fp32."""
    buffer = BlockBuffer(layout)
    generator = torch.Generator().manual_seed(seed)
    for part in PARTS:
        for _, tensor in buffer.tensors(part):
            if not tensor.is_floating_point():
                tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return buffer


def store_in(folder, layouts=None, run_id=RUN_ID):
    return BlockStore(folder, layouts or [layout_of(), layout_of()], run_id)


def all_bytes(buffer):
    return b"".join(bytes(buffer.part_bytes(part).numpy()) for part in buffer.parts)
