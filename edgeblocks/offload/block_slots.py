"""Which block is in memory when: loads blocks for their visits, loads the next one early, saves the former behind.

By the number of slots, each of the size of the largest block:
  1  a block is loaded, trained and written back before the next one is loaded;
  2  while one block is trained, the I/O thread writes the former block back and then loads the next one into the same
     buffer;
  3+ the first blocks have a slot each and stay (`planning.plans.kept_blocks`); the others share the last two as above.
     With as many slots as blocks nothing is ever loaded again; visits are still written to disk, for crash safety.
No other copy of any block's optimizer state exists in memory, but for a device with memory of its own: there the slots
are on the device, and the host's memory is one more tier (`offload.tiers.HostTier`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.offload.slots import Slot, Slots
from edgeblocks.offload.tiers import Tier
from edgeblocks.optim.loss_scale import LossScale
from edgeblocks.planning.plans import kept_blocks


class BlockSlots(Slots):
    """Gives blocks for visits, each of which ends with the block's file written."""

    def __init__(self, tier: Tier, *, slots: int) -> None:
        super().__init__(tier, slots=slots)
        self._kept = kept_blocks(len(tier.store.layouts), slots)

    @contextmanager
    def visit(self, block: int, *, then: int | None) -> Iterator[Slot]:
        """Make a block resident, and write it back when the visit ends.

        When the visit ends in an exception the block may be in the middle of a step: it is forgotten, and its file
        stays as it was before the visit.

        Args:
            then: the block of the next visit, loaded early when a slot is free for it; None when there is none.
        """
        slot = self._slot_for(block, keep=None)
        self._wait(slot)
        # Where the next block takes the former one's buffer, the former one's write was handed to the I/O thread
        # before.
        if then is not None and len(self._slots) > 1:
            self._slot_for(then, keep=slot)
        try:
            yield slot
        except BaseException:
            slot.block = None
            raise
        # All as they are now: the slot may be promised to another block before the thread comes to it.
        self._hand_over(slot, partial(self._write, block, slot.buffer, slot.step, slot.loss_scale))
        if len(self._slots) == 1:
            self._wait(slot)  # the next block is loaded into the same slot: there is nothing to do meanwhile

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[BlockBuffer]:
        """A buffer whose `ema` part is the block's, for evaluating and sampling between visits.

        Nothing may be resident. A block that is not in memory takes the place of another one, which is on disk already.
        """
        self.flush()  # all visited blocks are on disk, so that the one that gives way loses nothing
        slot = self._slot_for(block, keep=None)
        self._wait(slot)
        yield slot.buffer

    def _slot_for(self, block: int, *, keep: Slot | None) -> Slot:
        """The slot that holds a block or is about to; a load into the longest unused one is started when needed."""
        slot = self._holder(block)
        if slot is None:
            shared = self._slots[self._kept :]
            slot = self._slots[block] if block < self._kept else self._longest_unused(shared, keep=keep)
            self._hand_over(slot, partial(self._load, slot, block))
            # Promised before it is there: `_holder` finds it, and nobody loads the block a second time.
            slot.block = block
        return self._use(slot)

    def _load(self, slot: Slot, block: int) -> None:
        started = time.perf_counter()
        slot.step = self._tier.load(block, slot.buffer)  # on the I/O thread; the trainer reads it after `_wait`
        self.times.load_s += time.perf_counter() - started

    def _write(self, block: int, buffer: BlockBuffer, step: int, loss_scale: LossScale | None) -> None:
        started = time.perf_counter()
        self._tier.save(self.store, block, buffer, step, loss_scale)
        self.times.store_s += time.perf_counter() - started
