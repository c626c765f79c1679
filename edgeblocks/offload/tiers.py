"""Blocks between the disk and a device that has memory of its own: what waits in the host's memory, and how it moves.

The first `ram_blocks` blocks have a copy each in the host's memory, from which they are loaded; the others pass through
one buffer. Every block is written to disk after its visit wherever it lives, because what is only in memory would be
lost with the power. The numbers are the file's at any time: a copy that may be half-written is never loaded.
"""

from collections.abc import Sequence

from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, BlockLayout, Part, largest_of
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.device import Device


class HostBuffers:
    """The host's memory for blocks: a copy of each of the first ones, and one buffer that the others pass through."""

    def __init__(
        self, layouts: Sequence[BlockLayout], device: Device, *, parts: Sequence[Part] = PARTS, copies: int = 0
    ) -> None:
        """
        Args:
            copies: how many blocks, from the first one on, have one.
        """
        self._layouts, self._device, self._parts = tuple(layouts), device, tuple(parts)
        self._copies = [self._on_host(layout) for layout in self._layouts[:copies]]
        passing = self._layouts[copies:]
        self._staging = self._on_host(largest_of(passing, self._parts)) if passing else None

    def _on_host(self, layout: BlockLayout) -> BlockBuffer:
        return BlockBuffer(layout, self._parts, allocate=self._device.host_memory).touched()

    def on_device(self) -> BlockBuffer:
        """Memory on the device for any of the blocks."""
        return BlockBuffer(largest_of(self._layouts, self._parts), self._parts, allocate=self._device.empty)

    def has_copy(self, block: int) -> bool:
        return block < len(self._copies)

    def of(self, block: int) -> BlockBuffer:
        """Its copy, or the buffer through which it passes."""
        here = self._copies[block] if self.has_copy(block) else self._staging
        assert here is not None
        here.adopt_(self._layouts[block])
        return here

    def give(self, block: int, buffer: BlockBuffer, parts: Sequence[Part]) -> None:
        """Fill some parts of a buffer on the device from the block's here."""
        here = self.of(block)
        buffer.adopt_(here.layout)
        for part in parts:
            self._device.copy_(buffer.part_bytes(part), here.part_bytes(part))

    def take(self, block: int, buffer: BlockBuffer) -> BlockBuffer:
        """The block's buffer here, with the bytes of one on the device."""
        here = self.of(block)
        self._device.copy_(here.content, buffer.content)
        return here


class HostTier:
    """Reads and writes blocks as a `BlockStore` does, for buffers in a device's memory. One thread at a time."""

    def __init__(
        self, store: BlockStore, device: Device, *, parts: Sequence[Part] = PARTS, ram_blocks: int = 0
    ) -> None:
        self.store, self.device, self.parts = store, device, tuple(parts)
        self._host = HostBuffers(store.layouts, device, parts=parts, copies=ram_blocks)
        self._steps: dict[int, int] = {}
        """The step of each block whose copy is what its file is."""

    def buffer(self) -> BlockBuffer:
        """Memory on the device for any of the blocks."""
        return self._host.on_device()

    def read(self, block: int, buffer: BlockBuffer) -> int:
        """Fill a buffer on the device and return the block's step; see `BlockStore.read`."""
        step = self._steps.get(block)
        if step is None:
            step = self.store.read(block, self._host.of(block))
            if self._host.has_copy(block):
                self._steps[block] = step
        self._host.give(block, buffer, self.parts)
        return step

    def write(self, block: int, buffer: BlockBuffer, step: int) -> None:
        """Replace a block's file, and its copy if it has one, by a buffer on the device; see `BlockStore.write`."""
        self._steps.pop(block, None)  # until the file is written the copy is ahead of it
        self.store.write(block, self._host.take(block, buffer), step)
        if self._host.has_copy(block):
            self._steps[block] = step
