"""Where blocks and stages are while they are in no slot: on disk, or in the host's memory where a device trains.

What survives a crash are the run's block files; `save` writes them. Stages of a network that is trained end to end
change in every step, so between two checkpoints their newest bytes are kept in a swap file (`offload`), which is
overwritten in place again and again and is worth nothing after a crash. Where a device with memory of its own trains,
the first blocks have a copy each in the host's memory, from which they are loaded; the others pass through one buffer.
"""

import threading
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, BlockLayout, Part, largest_of
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.device import Device
from edgeblocks.offload.scratch import ScratchFile
from edgeblocks.optim.loss_scale import LossScale

BlockFiles = BlockStore | NextBlocks
"""Files that a block can be saved in: the run's, or those of its next checkpoint."""


class SwapFile:
    """The bytes of stages, each at its place in a scratch file."""

    def __init__(self, folder: Path, layouts: Sequence[BlockLayout]) -> None:
        self._file, self._layouts = ScratchFile(folder, "a stage"), tuple(layouts)
        self._starts = [0, *accumulate(layout.num_bytes for layout in self._layouts)]

    def write(self, stage: int, buffer: BlockBuffer) -> None:
        """Keep all of a stage's bytes.

        Raises:
            StorageError: the disk refused.
        """
        self._file.write(self._starts[stage], buffer.content)

    def read(self, stage: int, buffer: BlockBuffer, parts: Sequence[Part]) -> None:
        """Fill some parts of a buffer.

        Raises:
            StorageError: the disk refused.
        """
        # Stages differ in size, and a frozen one has no moments: the views follow the stage that comes.
        buffer.adopt_(self._layouts[stage])
        for part in buffer.layout.stored(parts):
            self._file.read(self._starts[stage] + buffer.layout.part_span(part)[0], buffer.part_bytes(part))

    def close(self) -> None:
        """Give the file's room back."""
        self._file.close()


class DiskTier:
    """On disk, for slots in the processor's memory: in the run's block files, or newer ones in the swap file."""

    def __init__(self, store: BlockStore, *, parts: Sequence[Part] = PARTS, swap: SwapFile | None = None) -> None:
        """
        Args:
            parts: of a block that come into a slot.
            swap: for `offload`; None where blocks are only saved.
        """
        self.store, self._parts, self._swap = store, tuple(parts), swap
        self._swapped: set[int] = set()
        """Those whose newest bytes are in the swap file, as far as they are not in a slot."""
        self.file_steps: dict[int, int] = {}
        """The step of each block's file, when it was last read or written."""

    def buffer(self) -> BlockBuffer:
        """A slot's memory, for any of the blocks."""
        return self.store.buffer(self._parts)

    def load(self, block: int, buffer: BlockBuffer, parts: Sequence[Part] | None = None) -> int:
        """Fill a slot's buffer, or some parts of it: with the bytes that were offloaded last, or as the file has them.

        Returns:
            The step of the block's file.

        Raises:
            RunError: the block file is damaged.
            StorageError: the disk refused.
        """
        if block in self._swapped:
            assert self._swap is not None
            self._swap.read(block, buffer, parts or self._parts)
        else:
            self.file_steps[block] = self.store.read(block, buffer, parts)
        return self.file_steps[block]

    def offload_bytes(self, block: int) -> int:
        """What offloading this block writes to disk."""
        return self.store.layouts[block].num_bytes

    def offload(self, block: int, buffer: BlockBuffer) -> None:
        """Keep all bytes of a block that are newer than its file. It was loaded from here before.

        Raises:
            StorageError: the disk refused.
        """
        assert self._swap is not None
        self._swap.write(block, buffer)
        self._swapped.add(block)

    def save(
        self, files: BlockFiles, block: int, buffer: BlockBuffer, step: int, loss_scale: LossScale | None = None
    ) -> None:
        """Write a block's file. New files must become the run's before the block is loaded again.

        Raises:
            StorageError: the disk refused.
        """
        files.write(block, buffer, step, loss_scale)
        self._swapped.discard(block)  # the file is as new as the swap file now, and has a checksum
        self.file_steps[block] = step

    def close(self) -> None:
        """Give the room on disk back."""
        if self._swap is not None:
            self._swap.close()


class HostTier:
    """In the host's memory and on disk, for slots in the memory of a device."""

    def __init__(
        self,
        store: BlockStore,
        device: Device,
        *,
        parts: Sequence[Part] = PARTS,
        swap: SwapFile | None = None,
        ram_blocks: int = 0,
    ) -> None:
        """
        Args:
            ram_blocks: how many blocks, from the first one on, have a copy in the host's memory.
        """
        self.store, self.device, self._parts = store, device, tuple(parts)
        self._disk = DiskTier(store, parts=parts, swap=swap)
        self._copies = [self._on_host(layout) for layout in store.layouts[:ram_blocks]]
        passing = store.layouts[ram_blocks:]
        self._staging = self._on_host(largest_of(passing, self._parts)) if passing else None
        """What the other blocks pass through."""
        self._copied: set[int] = set()
        """Blocks whose copy has their newest bytes, as far as they are not in a slot. One that may be half-written, or
        ahead of a file that could not be written, is not among them and is never loaded."""
        # At a checkpoint the training thread saves a stage while the I/O thread may still be loading another one: both
        # go through `_staging`, so that one waits for the other.
        self._lock = threading.Lock()

    def buffer(self) -> BlockBuffer:
        return BlockBuffer(largest_of(self.store.layouts, self._parts), self._parts, allocate=self.device.empty)

    def load(self, block: int, buffer: BlockBuffer, parts: Sequence[Part] | None = None) -> int:
        with self._lock:
            host_buffer = self._host_buffer(block)
            if not self._has_copy(block):
                self._disk.load(block, host_buffer, parts)
            elif block not in self._copied:
                self._disk.load(block, host_buffer)  # all parts: from now on the copy stands for the file
                self._copied.add(block)
            buffer.adopt_(host_buffer.layout)
            for part in buffer.layout.stored(parts or self._parts):
                self.device.copy_(buffer.part_bytes(part), host_buffer.part_bytes(part))
            return self._disk.file_steps[block]

    def offload_bytes(self, block: int) -> int:
        return 0 if self._has_copy(block) else self._disk.offload_bytes(block)

    def offload(self, block: int, buffer: BlockBuffer) -> None:
        with self._lock:
            host_buffer = self._copied_to_host(block, buffer)
            if self._has_copy(block):
                self._copied.add(block)
            else:
                self._disk.offload(block, host_buffer)

    def save(
        self, files: BlockFiles, block: int, buffer: BlockBuffer, step: int, loss_scale: LossScale | None = None
    ) -> None:
        with self._lock:
            # All under the lock: the copy, or `_staging`, must hold this block until its file is written.
            self._copied.discard(block)  # until the file is written the copy is ahead of it
            self._disk.save(files, block, self._copied_to_host(block, buffer), step, loss_scale)
            if self._has_copy(block):
                self._copied.add(block)

    def close(self) -> None:
        self._disk.close()

    def _has_copy(self, block: int) -> bool:
        return block < len(self._copies)

    def _on_host(self, layout: BlockLayout) -> BlockBuffer:
        return BlockBuffer(layout, self._parts, allocate=self.device.host_memory).touched()

    def _host_buffer(self, block: int) -> BlockBuffer:
        """The block's copy, or the buffer that it passes through."""
        host_buffer = self._copies[block] if self._has_copy(block) else self._staging
        assert host_buffer is not None
        host_buffer.adopt_(self.store.layouts[block])
        return host_buffer

    def _copied_to_host(self, block: int, buffer: BlockBuffer) -> BlockBuffer:
        """The block's buffer on the host, with the bytes of one on the device."""
        host_buffer = self._host_buffer(block)
        self.device.copy_(host_buffer.content, buffer.content)
        return host_buffer


Tier = DiskTier | HostTier
"""Takes blocks from slots and gives them back as they were."""


def tier_of(
    store: BlockStore,
    device: Device | None,
    *,
    parts: Sequence[Part] = PARTS,
    swap: SwapFile | None = None,
    ram_blocks: int = 0,
) -> Tier:
    """Blocks for slots in a device's memory; None: in the processor's."""
    if device is None:
        return DiskTier(store, parts=parts, swap=swap)
    return HostTier(store, device, parts=parts, swap=swap, ram_blocks=ram_blocks)
