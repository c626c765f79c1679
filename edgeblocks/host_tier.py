"""Blocks between the disk and a device that has memory of its own: what waits in the host's memory, and how it moves.

The first `ram_blocks` blocks have a copy each in the host's memory, from which they are loaded; the others pass through
one buffer. Every block is written to disk after its visit wherever it lives, because what is only in memory would be
lost with the power. The numbers are the file's at any time: a copy that may be half-written is never loaded.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from edgeblocks.block_buffer import PARTS, BlockBuffer, Part
from edgeblocks.store import BlockStore


class Device(Protocol):
    """What moving blocks needs to know of a device with memory of its own."""

    torch_device: Any
    """A `torch.device`, or its name."""

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in the device's memory."""
        ...

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in the host's memory, from and to which the device copies fast."""
        ...

    def copy_(self, destination: Tensor, source: Tensor) -> None:
        """Copy between the two memories after all work that was given to the device before; returns when it is done."""
        ...


class HostTier:
    """Reads and writes blocks as a `BlockStore` does, for buffers in a device's memory. One thread at a time."""

    def __init__(
        self, store: BlockStore, device: Device, *, parts: Sequence[Part] = PARTS, ram_blocks: int = 0
    ) -> None:
        self.store, self.device, self.parts = store, device, tuple(parts)
        self.layouts = store.layouts
        self._copies = {
            block: BlockBuffer(self.layouts[block], self.parts, allocate=device.host_memory).touched()
            for block in range(ram_blocks)
        }
        self._steps: dict[int, int] = {}
        """The step of each block whose copy is what its file is."""
        passing = self.layouts[ram_blocks:]
        largest = max(passing, key=lambda layout: layout.num_bytes, default=None)
        self._staging = None if largest is None else BlockBuffer(largest, self.parts, allocate=device.host_memory)
        if self._staging is not None:
            self._staging.touched()

    def buffer(self) -> BlockBuffer:
        """Memory on the device for any of the blocks."""
        largest = max(self.layouts, key=lambda layout: layout.num_bytes)
        return BlockBuffer(largest, self.parts, allocate=self.device.empty)

    def read(self, block: int, buffer: BlockBuffer) -> int:
        """Fill a buffer on the device and return the block's step; see `BlockStore.read`."""
        here = self._host_buffer(block)
        if block not in self._steps:
            step = self.store.read(block, here)
            if block not in self._copies:
                self._fill(block, buffer, here)
                return step
            self._steps[block] = step
        self._fill(block, buffer, here)
        return self._steps[block]

    def _fill(self, block: int, buffer: BlockBuffer, here: BlockBuffer) -> None:
        buffer.adopt_(self.layouts[block])
        self.device.copy_(buffer.content, here.content)

    def write(self, block: int, buffer: BlockBuffer, step: int) -> None:
        """Replace a block's file, and its copy if it has one, by a buffer on the device; see `BlockStore.write`."""
        here = self._host_buffer(block)
        self._steps.pop(block, None)  # until the file is written the copy is ahead of it
        here.adopt_(self.layouts[block])
        self.device.copy_(here.content, buffer.content)
        self.store.write(block, here, step)
        if block in self._copies:
            self._steps[block] = step

    def _host_buffer(self, block: int) -> BlockBuffer:
        here = self._copies.get(block, self._staging)
        assert here is not None
        return here
