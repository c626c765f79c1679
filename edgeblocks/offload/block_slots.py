"""Which block is in memory when: loads blocks for their visits, fetches the next one early, writes back behind.

A scheduler has `slots` buffers, each of the size of the largest block:
  1  a block is loaded, trained and written back before the next one is loaded;
  2  while one block is trained, a single I/O thread writes the former block back and then loads the next one into the
     same buffer (in this order, which the thread's queue guarantees);
  3+ the first blocks have a slot each and stay (`plans.kept_blocks`); the others share the last two as above. With
     as many slots as blocks nothing is ever loaded again; visits are still written to disk, for crash safety.
No other copy of any block's optimizer state exists in memory, but for a device with memory of its own: there the slots
are on the device, and the host's memory is one more tier (`host_tier`).
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.slots import StreamTimes
from edgeblocks.offload.tiers import HostTier
from edgeblocks.planning.plans import kept_blocks


@dataclass
class ResidentBlock:
    """A block in memory. `step` is set by the trainer and written with the block."""

    block: int
    buffer: BlockBuffer
    step: int


@dataclass
class _Slot:
    buffer: BlockBuffer
    holds: ResidentBlock | None = None
    pending: Future[None] | None = None
    last_used: int = field(default=0)


class Scheduler:
    """Gives blocks for visits. Not thread-safe: one training thread uses it."""

    def __init__(self, store: BlockStore, *, slots: int, host: HostTier | None = None) -> None:
        self.store = store
        self.times = StreamTimes()
        self._blocks = store if host is None else host
        self._slots = [_Slot(self._blocks.buffer().touched()) for _ in range(slots)]
        self._kept = kept_blocks(len(store.layouts), slots)
        self._io = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgeblocks-io")
        self._io.submit(int).result()  # the thread runs before memory can be short
        self._clock = 0

    @property
    def device(self) -> torch.device:
        """Where a block is trained."""
        return self._slots[0].buffer.device

    @contextmanager
    def visit(self, block: int, *, then: int | None) -> Iterator[ResidentBlock]:
        """Make a block resident, and write it back when the visit ends.

        When the visit ends in an exception the block may be in the middle of a step: it is forgotten, and its file
        stays as it was before the visit.

        Args:
            then: the block of the next visit, fetched early when a slot is free for it; None when there is none.
        """
        slot = self._slot_for(block, keep=None)
        self._wait(slot)
        if then is not None and len(self._slots) > 1:
            self._slot_for(then, keep=slot)
        resident = slot.holds
        assert resident is not None
        try:
            yield resident
        except BaseException:
            slot.holds = None
            raise
        slot.pending = self._io.submit(self._write, resident)
        if len(self._slots) == 1:
            self._wait(slot)

    @property
    def num_slots(self) -> int:
        """Blocks that are in memory at a time."""
        return len(self._slots)

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[BlockBuffer]:
        """A buffer whose `ema` part is the block's, for looking at the network between visits.

        Nothing may be resident. A block that is not in memory takes the place of another one, which is on disk already.
        """
        self.flush()
        slot = self._slot_for(block, keep=None)
        self._wait(slot)
        assert slot.holds is not None
        yield slot.holds.buffer

    def flush(self) -> None:
        """Wait until everything handed to the I/O thread is on disk; raises what it met."""
        for slot in self._slots:
            self._wait(slot)

    def close(self) -> None:
        """Stop the I/O thread after what it was given."""
        self._io.shutdown(wait=True)

    def _slot_for(self, block: int, keep: _Slot | None) -> _Slot:
        """The slot that holds a block or is about to; a load into the longest unused one is started when needed."""
        self._clock += 1
        for slot in self._slots:
            if slot.holds is not None and slot.holds.block == block:
                slot.last_used = self._clock
                return slot
        if block < self._kept:
            slot = self._slots[block]
        else:
            shared = [slot for slot in self._slots[self._kept :] if slot is not keep]
            slot = min(shared, key=lambda slot: slot.last_used)
        # The write of the block that leaves was queued before this load, and the single thread keeps the order; its
        # failure must not be lost with its future.
        if slot.pending is not None and slot.pending.done():
            slot.pending.result()
        former = slot.pending
        slot.holds = ResidentBlock(block=block, buffer=slot.buffer, step=0)
        slot.last_used = self._clock
        slot.pending = self._io.submit(self._load, slot.holds, former)
        return slot

    def _wait(self, slot: _Slot) -> None:
        if slot.pending is None:
            return
        started = time.perf_counter()
        pending, slot.pending = slot.pending, None
        try:
            pending.result()
        except BaseException:
            slot.holds = None
            raise
        finally:
            self.times.stall_s += time.perf_counter() - started

    def _load(self, resident: ResidentBlock, former: "Future[None] | None") -> None:
        if former is not None:
            former.result()
        started = time.perf_counter()
        resident.step = self._blocks.read(resident.block, resident.buffer)
        self.times.load_s += time.perf_counter() - started

    def _write(self, resident: ResidentBlock) -> None:
        started = time.perf_counter()
        self._blocks.write(resident.block, resident.buffer, resident.step)
        self.times.store_s += time.perf_counter() - started
