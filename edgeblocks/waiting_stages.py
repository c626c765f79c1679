"""Where the stages of a network that is trained end to end are while they are not in a slot.

Stages that changed wait in a file of their own (`SwapFile`), which is overwritten in place again and again and is worth
nothing after a crash. Beside a device with memory of its own, as many as its host's memory holds wait there instead,
and the others pass through it to that file. What survives a crash are the run's block files.
"""

import threading
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, BlockLayout, Part
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.device import Device
from edgeblocks.offload.scratch import ScratchFile
from edgeblocks.offload.tiers import HostBuffers


class SwapFile:
    """The bytes of stages, each at its place in a scratch file."""

    def __init__(self, folder: Path, layouts: Sequence[BlockLayout]) -> None:
        self._file, self._layouts = ScratchFile(folder, "a stage"), tuple(layouts)
        self._starts = [0, *accumulate(layout.num_bytes for layout in self._layouts)]

    def write(self, stage: int, buffer: BlockBuffer) -> None:
        """Put all of a stage's bytes away.

        Raises:
            StorageError: the disk refused.
        """
        self._file.write(self._starts[stage], buffer.content)

    def read(self, stage: int, buffer: BlockBuffer, parts: Sequence[Part]) -> None:
        """Fill some parts of a buffer.

        Raises:
            StorageError: the disk refused.
        """
        buffer.adopt_(self._layouts[stage])
        for part in parts:
            self._file.read(self._starts[stage] + buffer.layout.part_span(part)[0], buffer.part_bytes(part))

    def close(self) -> None:
        """Give the file's room back."""
        self._file.close()


class WaitingStages(Protocol):
    """What takes stages from slots and gives them back as they were."""

    store: BlockStore

    def buffer(self) -> BlockBuffer:
        """A slot's memory, for any of the stages."""
        ...

    def disk_bytes(self, stage: int) -> int:
        """What putting this stage away writes to disk."""
        ...

    def put_away(self, stage: int, buffer: BlockBuffer) -> None:
        """Keep all of a stage's bytes, which are newer than those that it waited with before.

        Raises:
            StorageError: the disk refused.
        """
        ...

    def fetch(self, stage: int, buffer: BlockBuffer, parts: Sequence[Part]) -> None:
        """Fill some parts of a slot's buffer: as they were put away last, or as the run's block file has them.

        Raises:
            RunError: the block file is damaged.
            StorageError: the disk refused.
        """
        ...

    def save(self, files: NextBlocks, stage: int, buffer: BlockBuffer, step: int) -> None:
        """Write a stage's new block file, which becomes the run's before the stage is fetched again."""
        ...

    def close(self) -> None:
        """Give the room on disk back."""
        ...


class WaitingOnDisk:
    """In the swap file, for slots in the processor's memory."""

    def __init__(self, store: BlockStore, swap: SwapFile) -> None:
        self.store, self._swap = store, swap
        self._swapped: set[int] = set()
        """Stages whose newest bytes are in the swap file, as far as they are not in a slot."""

    def buffer(self) -> BlockBuffer:
        return self.store.buffer()

    def disk_bytes(self, stage: int) -> int:
        return self.store.layouts[stage].num_bytes

    def put_away(self, stage: int, buffer: BlockBuffer) -> None:
        self._swap.write(stage, buffer)
        self._swapped.add(stage)

    def fetch(self, stage: int, buffer: BlockBuffer, parts: Sequence[Part]) -> None:
        if stage in self._swapped:
            self._swap.read(stage, buffer, parts)
        else:
            self.store.read(stage, buffer, parts)

    def save(self, files: NextBlocks, stage: int, buffer: BlockBuffer, step: int) -> None:
        files.write(stage, buffer, step)
        self._swapped.discard(stage)

    def close(self) -> None:
        self._swap.close()


class WaitingOnHost:
    """For slots on a device: the first stages have a copy in the host's memory, the others pass through it to disk."""

    def __init__(self, store: BlockStore, swap: SwapFile, device: Device, *, ram_stages: int) -> None:
        """
        Args:
            ram_stages: how many have a copy.
        """
        self.store, self._disk = store, WaitingOnDisk(store, swap)
        self._host = HostBuffers(store.layouts, device, copies=ram_stages)
        self._copied: set[int] = set()
        """Stages whose copy is filled; it has their newest bytes, as far as they are not in a slot."""
        self._lock = threading.Lock()
        """The training thread saves a stage while the I/O thread may still fetch another one, through one buffer."""

    def buffer(self) -> BlockBuffer:
        return self._host.on_device()

    def disk_bytes(self, stage: int) -> int:
        return 0 if self._host.has_copy(stage) else self._disk.disk_bytes(stage)

    def put_away(self, stage: int, buffer: BlockBuffer) -> None:
        with self._lock:
            here = self._host.take(stage, buffer)
            if self._host.has_copy(stage):
                self._copied.add(stage)
            else:
                self._disk.put_away(stage, here)

    def fetch(self, stage: int, buffer: BlockBuffer, parts: Sequence[Part]) -> None:
        with self._lock:
            if not self._host.has_copy(stage):
                self._disk.fetch(stage, self._host.of(stage), parts)
            elif stage not in self._copied:
                self._disk.fetch(stage, self._host.of(stage), PARTS)
                self._copied.add(stage)
            self._host.give(stage, buffer, parts)

    def save(self, files: NextBlocks, stage: int, buffer: BlockBuffer, step: int) -> None:
        with self._lock:
            self._disk.save(files, stage, self._host.take(stage, buffer), step)
            if self._host.has_copy(stage):
                self._copied.add(stage)

    def close(self) -> None:
        self._disk.close()
