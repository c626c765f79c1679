"""Slots in memory that blocks or stages take turns in: what `BlockSlots` and `StageSlots` have in common.

One I/O thread moves everything. Its queue keeps the order: what leaves a slot is written before the next one is loaded
into the same buffer. A move that failed is raised by whatever waits for that slot next, so that it cannot be lost.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from edgeblocks.offload.block_buffer import BlockBuffer, Part
from edgeblocks.offload.tiers import Tier
from edgeblocks.optim.loss_scale import LossScale


@dataclass
class StreamTimes:
    """Seconds that the training thread waited for blocks (`stall_s`), and seconds of all reading and writing."""

    # The I/O thread and the training thread both add to the last two, without a lock: an addition can be lost, and a
    # lock is more than a figure for people is worth.
    stall_s: float = 0.0
    load_s: float = 0.0
    store_s: float = 0.0

    def add_(self, other: "StreamTimes") -> None:
        """Count what another one has counted, too."""
        self.stall_s += other.stall_s
        self.load_s += other.load_s
        self.store_s += other.store_s

    def waited_for_loading(self, started: float) -> None:
        """The training thread itself read something from then until now, by `time.perf_counter`."""
        waited_s = time.perf_counter() - started
        self.load_s, self.stall_s = self.load_s + waited_s, self.stall_s + waited_s

    def waited_for_storing(self, started: float) -> None:
        """The same of something that it wrote."""
        waited_s = time.perf_counter() - started
        self.store_s, self.stall_s = self.store_s + waited_s, self.stall_s + waited_s


@dataclass(eq=False)
class Slot:
    """A buffer for one block or stage at a time."""

    buffer: BlockBuffer
    block: int | None = None
    """The number of the block or stage that is there, or will be when `pending` is done; None: nothing of use."""
    step: int = 0
    """The step that the block has made: of its file when it comes, then set by the trainer, and written with it."""
    loss_scale: LossScale | None = None
    """Set by the trainer and written with the block, where it is trained in float16."""
    parts: tuple[Part, ...] = ()
    """What of a stage is there."""
    changed: bool = False
    """Whether a stage's bytes in its tier are older."""
    pending: Future[None] | None = None
    """The latest move that the I/O thread was given for this slot."""
    last_used: int = 0


class Slots:
    """Slots with their I/O thread. Not thread-safe: one training thread uses them."""

    def __init__(self, tier: Tier, *, slots: int) -> None:
        """
        Args:
            tier: where blocks are while they are in no slot.
            slots: how many are in memory at a time.
        """
        self.store, self.times = tier.store, StreamTimes()
        self._tier = tier
        self._slots = [Slot(tier.buffer().touched()) for _ in range(slots)]
        self._io = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgeblocks-io")
        self._io.submit(int).result()  # the thread runs before memory can be short
        self._uses = 0

    @property
    def num_slots(self) -> int:
        """Blocks or stages that are in memory at a time."""
        return len(self._slots)

    @property
    def device(self) -> torch.device:
        """Where a block is trained."""
        return self._slots[0].buffer.device

    def flush(self) -> None:
        """Wait until everything handed to the I/O thread is done; raises the first failure that it met."""
        first: Exception | None = None
        for slot in self._slots:
            try:
                self._wait(slot)
            except Exception as error:
                # The others are waited for all the same: a failure that stayed behind would be raised by the flush of
                # whoever handles this one, in its place.
                first = first or error
        if first is not None:
            raise first

    def close(self) -> None:
        """Stop the I/O thread after what it was given, and give the room of the tier back."""
        # What is still to be written is written before the swap file and its bytes go.
        self._io.shutdown(wait=True)
        self._tier.close()

    def _holder(self, block: int) -> Slot | None:
        """The slot that holds a block or is about to."""
        return next((slot for slot in self._slots if slot.block == block), None)

    def _use(self, slot: Slot) -> Slot:
        """The slot, from now on the one that was used last."""
        self._uses += 1
        slot.last_used = self._uses
        return slot

    @staticmethod
    def _longest_unused(slots: Sequence[Slot], *, keep: Slot | None) -> Slot:
        return min((slot for slot in slots if slot is not keep), key=lambda slot: slot.last_used)

    def _hand_over(self, slot: Slot, move: Callable[[], None]) -> None:
        """Have the I/O thread move something into or out of a slot, after what it was given for it before."""
        former = slot.pending
        if former is not None and former.done():
            former.result()  # its failure would be lost with its future

        def moved() -> None:
            if former is not None:
                former.result()  # done already: raises its failure, so that nothing is loaded over unsaved bytes
            move()

        # One thread, so moves of all slots come in the order in which they were submitted.
        slot.pending = self._io.submit(moved)

    def _wait(self, slot: Slot) -> None:
        """Until the slot's moves are done; after a failure it holds nothing that could be relied on."""
        if slot.pending is None:
            return
        started = time.perf_counter()
        # Taken off first, so that a failure is raised to one caller and not again at the next flush.
        pending, slot.pending = slot.pending, None
        try:
            pending.result()
        except BaseException:
            slot.block = None  # half-read or half-written: it is loaded again before it is used
            raise
        finally:
            self.times.stall_s += time.perf_counter() - started


def slot_of(block: int, slots: int) -> int:
    """Where a block is put: the first ones stay, the others take turns in the last slot.

    Blocks are asked for in turn, over and over; with the longest unused one giving way none would ever be there.

    >>> [slot_of(block, 2) for block in range(4)]
    [0, 1, 1, 1]
    """
    return min(block, slots - 1)
