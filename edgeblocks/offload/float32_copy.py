"""Float32 copies of a block's weights or EMA, for networks to compute with where the block is bfloat16, or
quantized.

A network is of float32, whatever its blocks are kept in: its sums and its gradients are then those of float32, and a
network of one's own knows nothing of it. So the one block that is used takes 4 bytes a parameter more, while those that
wait, in memory or on disk, take 6 instead of 10.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, NetworkPart, bind_parameters_
from edgeblocks.offload.quantized import QuantizedLayout, expand_


class Float32Copy:
    """Memory for one part of one block at a time. One allocation for the life of a run."""

    def __init__(self, layouts: Sequence[BlockLayout], device: torch.device) -> None:
        """
        Args:
            layouts: of the blocks that it is for.
        """
        self._memory = torch.empty(max(layout.num_parameters for layout in layouts), device=device).zero_()  # touched
        self._layout = layouts[0]  # until something is held
        self._part: NetworkPart = "weights"
        self.ema_of: int | None = None
        """The block whose EMA is there, as far as whoever copied it has said so."""

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._memory.device

    def hold_(self, buffer: BlockBuffer, part: NetworkPart) -> "Float32Copy":
        """The copy, of a part of what is in a buffer now. What networks were bound to it for changes with it."""
        layout = buffer.layout
        if isinstance(layout, QuantizedLayout):
            self._layout, self._part, self.ema_of = layout.full, part, None
            expand_(self.flat, buffer)
        else:
            self._layout, self._part, self.ema_of = layout, part, None
            self.flat.copy_(buffer.flat(part))
        return self

    def room_for_(self, layout: BlockLayout) -> "Float32Copy":
        """The copy, for weights of a block that are still to be written into it."""
        self._layout, self._part, self.ema_of = layout, "weights", None
        return self

    @property
    def memory(self) -> Tensor:
        """All of it, float32: for the largest of the blocks."""
        return self._memory

    @property
    def flat(self) -> Tensor:
        """All parameters as one vector, float32 [num_parameters]."""
        return self._memory[: self._layout.num_parameters]

    def tensors(self, part: NetworkPart) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of each parameter, float32; `part` is the one that is there."""
        assert part == self._part
        start = 0
        for entry in self._layout.of_part(part):
            end = start + torch.Size(entry.shape).numel()
            yield entry.own_name, self._memory[start:end].view(entry.shape)
            start = end

    def bind_(self, network: nn.Module) -> None:
        """Make a block's parameters views of the EMA weights."""
        bind_parameters_(network, self.tensors("ema"))


Weights = BlockBuffer | Float32Copy
"""What a network's parameters are views of."""


class EmaBuffers(Protocol):
    """Whatever can put one block's EMA into a buffer, such as the slots of a training."""

    def ema_weights(self, block: int) -> AbstractContextManager[BlockBuffer]: ...


class Float32Ema:
    """EMA weights of blocks of bfloat16 as networks need them, of one block at a time."""

    def __init__(self, buffers: EmaBuffers, copy: Float32Copy) -> None:
        """
        Args:
            copy: may be used for other things in between.
        """
        self._buffers, self._copy = buffers, copy

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[Float32Copy]:
        with self._buffers.ema_weights(block) as buffer:
            # Each layer asks for its stage. An EMA does not change without a step, whose network takes the copy first.
            if self._copy.ema_of != block:
                self._copy.hold_(buffer, "ema").ema_of = block
        yield self._copy
