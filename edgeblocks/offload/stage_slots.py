"""Which stage is in memory when a network is trained end to end.

A step goes through the stages forward and back, so the stage that was used longest ago is the one that is needed last,
and it gives way. While one stage is used, the I/O thread offloads the one that leaves and loads the next. With as many
slots as stages nothing is ever moved.

Offloaded stages are on disk, or in the host's memory where a device trains (`offload.tiers`). What survives a crash are
the run's block files, which `checkpoint` writes for all stages.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, Part
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.slots import Slot, Slots
from edgeblocks.optim.loss_scale import LossScale
from edgeblocks.planning.stage_order import Use


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a use of a stage needs of it, and whether it changes it."""

    stage: int
    parts: tuple[Part, ...]
    changes: bool

    @classmethod
    def of(cls, use: Use) -> "Need":
        """All of a stage that is changed, else its weights."""
        return cls(stage=use.stage, parts=PARTS if use.changes else ("weights",), changes=use.changes)


class StageSlots(Slots):
    """Gives stages for their uses."""

    @contextmanager
    def use(self, need: Need, *, then: Need | None) -> Iterator[BlockBuffer]:
        """A buffer with what is needed of a stage.

        Args:
            then: the next use, loaded early when a slot is free for it.
        """
        slot = self._slot_for(need, keep=None)
        self._wait(slot)
        # The next load starts now and goes on while the caller computes; with one slot there is no room for it.
        if then is not None and len(self._slots) > 1 and then.stage != need.stage:
            self._slot_for(then, keep=slot)
        yield slot.buffer
        # Not where the use failed: the run then goes back to its last checkpoint, or saves the stage from this very
        # buffer.
        slot.changed |= need.changes

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[BlockBuffer]:
        """A buffer with a stage's EMA weights, until another stage is used; the next stage is loaded early."""
        # After the last stage comes the first: the next micro-batch goes through the whole network again.
        need, then = (
            Need(stage=stage % len(self.store.layouts), parts=("ema",), changes=False) for stage in (block, block + 1)
        )
        with self.use(need, then=then) as buffer:
            yield buffer

    def checkpoint(
        self,
        files: NextBlocks,
        step: int,
        trained: Sequence[bool],
        finish: Callable[[int, BlockBuffer], None],
        *,
        loss_scale: LossScale | None = None,
    ) -> None:
        """Write every trained stage into its new file; they have made `step` steps. The others never change.

        These files must become the run's before a stage is used again: from then on they have its newest bytes. Stages
        in memory come first, so that none of them has to be offloaded for another.

        Args:
            finish: called with each stage before it is written, and may change it.

        Raises:
            FloatingPointError: a stage has weights that are no numbers.
        """
        resident = {slot.block for slot in self._slots}
        stages = [stage for stage, is_trained in enumerate(trained) if is_trained]
        for stage in sorted(stages, key=lambda stage: stage not in resident):
            with self.use(Need(stage=stage, parts=PARTS, changes=False), then=None) as buffer:
                finish(stage, buffer)
                # One sum finds a NaN or an infinity anywhere in the stage, before its file can replace a good one.
                if not math.isfinite(buffer.flat("weights").sum() + buffer.flat("ema").sum()):
                    raise FloatingPointError(f"stage {stage}")
                # On this thread, since nothing can be computed before all files are complete.
                self._tier.save(files, stage, buffer, step, loss_scale)
            # Its new file has the same bytes, so it may leave without being offloaded.
            for slot in self._slots:
                slot.changed &= slot.block != stage

    def _slot_for(self, need: Need, *, keep: Slot | None) -> Slot:
        """The slot that has what is needed of a stage, or is about to."""
        slot, parts = self._holder(need.stage), self.store.layouts[need.stage].stored(need.parts)
        if slot is None:
            slot = self._longest_unused(self._slots, keep=keep)
            leaves = slot.block if slot.changed else None  # unchanged, its tier has the same bytes
            if leaves is not None:
                # Counted when it is ordered: the next look at the limit of disk writes may come before the I/O thread
                # does it.
                self.store.bytes_written += self._tier.offload_bytes(leaves)
            self._hand_over(slot, partial(self._swap, slot.buffer, leaves, need.stage, parts))
            slot.block, slot.parts, slot.changed = need.stage, parts, False
        # In memory, but with its weights alone, as the forward pass needs it: the update needs the rest too.
        elif missing := tuple(part for part in parts if part not in slot.parts):
            self._hand_over(slot, partial(self._swap, slot.buffer, None, need.stage, missing))
            slot.parts = tuple(part for part in PARTS if part in (*slot.parts, *missing))
        return self._use(slot)

    def _swap(self, buffer: BlockBuffer, leaves: int | None, comes: int, parts: tuple[Part, ...]) -> None:
        """Offload the stage that leaves a buffer, and then load parts of another one into it."""
        started = time.perf_counter()
        if leaves is not None:
            self._tier.offload(leaves, buffer)
        written = time.perf_counter()
        self._tier.load(comes, buffer, parts)
        self.times.store_s += written - started
        self.times.load_s += time.perf_counter() - written
