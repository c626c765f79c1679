"""Which stage is in memory when a network is trained end to end, and where the others wait.

A step goes through the stages forward and back, so the stage that was used longest ago is the one that is needed last,
and it gives way. While one stage is used, a single I/O thread puts away the one that leaves and fetches the next. With
as many slots as stages nothing is ever moved.

Where they wait, on disk or in the memory beside a device's, says `waiting_stages`. What survives a crash are the run's
block files, which `checkpoint` writes for all stages.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, Part
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.slots import StreamTimes
from edgeblocks.planning.stage_order import Use
from edgeblocks.waiting_stages import WaitingStages


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


@dataclass
class _Slot:
    buffer: BlockBuffer
    stage: int | None = None
    parts: tuple[Part, ...] = ()
    """What of the stage is there, or will be when `pending` is done."""
    changed: bool = False
    """Whether the stage's bytes elsewhere are older."""
    pending: Future[None] | None = None
    last_used: int = field(default=0)


class StageSlots:
    """Gives stages for their uses. Not thread-safe: one training thread uses it."""

    def __init__(self, waiting: WaitingStages, *, slots: int) -> None:
        """All stages wait, as the run's block files have them."""
        self.times = StreamTimes()
        self.store, self._waiting = waiting.store, waiting
        self._slots = [_Slot(waiting.buffer().touched()) for _ in range(slots)]
        self._io = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgeblocks-io")
        self._io.submit(int).result()  # the thread runs before memory can be short
        self._clock = 0

    @property
    def num_slots(self) -> int:
        """Stages that are in memory at a time."""
        return len(self._slots)

    @property
    def device(self) -> torch.device:
        """Where a stage is trained."""
        return self._slots[0].buffer.device

    @contextmanager
    def use(self, need: Need, *, then: Need | None) -> Iterator[BlockBuffer]:
        """A buffer with what is needed of a stage.

        Args:
            then: the next use, fetched early when a slot is free for it.
        """
        slot = self._slot_for(need, keep=None)
        self._wait(slot)
        if then is not None and len(self._slots) > 1 and then.stage != need.stage:
            self._slot_for(then, keep=slot)
        yield slot.buffer
        slot.changed |= need.changes

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[BlockBuffer]:
        """A buffer with a stage's EMA weights, until another stage is used; the next stage is fetched early."""
        need, then = (
            Need(stage=stage % len(self.store.layouts), parts=("ema",), changes=False) for stage in (block, block + 1)
        )
        with self.use(need, then=then) as buffer:
            yield buffer

    def flush(self) -> None:
        """Wait until everything handed to the I/O thread is done; raises what it met."""
        for slot in self._slots:
            self._wait(slot)

    def checkpoint(
        self, files: NextBlocks, step: int, trained: Sequence[bool], finish: Callable[[int, BlockBuffer], None]
    ) -> None:
        """Write every trained stage into its new file; they have made `step` steps. The others never change.

        These files must become the run's before a stage is used again: from then on they have its newest bytes. Stages
        in memory come first, so that none of them has to be put away for another.

        Args:
            finish: called with each stage before it is written, and may change it.

        Raises:
            FloatingPointError: a stage has weights that are no numbers.
        """
        here = {slot.stage for slot in self._slots}
        stages = [stage for stage, one in enumerate(trained) if one]
        for stage in sorted(stages, key=lambda stage: stage not in here):
            with self.use(Need(stage=stage, parts=PARTS, changes=False), then=None) as buffer:
                finish(stage, buffer)
                if not math.isfinite(buffer.flat("weights").sum() + buffer.flat("ema").sum()):
                    raise FloatingPointError(f"stage {stage}")
                self._waiting.save(files, stage, buffer, step)
            for slot in self._slots:
                slot.changed &= slot.stage != stage

    def close(self) -> None:
        """Stop the I/O thread and give the room on disk back."""
        self._io.shutdown(wait=True)
        self._waiting.close()

    def _slot_for(self, need: Need, keep: _Slot | None) -> _Slot:
        """The slot that has what is needed of a stage, or is about to."""
        self._clock += 1
        slot = next((slot for slot in self._slots if slot.stage == need.stage), None)
        if slot is None:
            slot = min((slot for slot in self._slots if slot is not keep), key=lambda slot: slot.last_used)
            self._hand_over(slot, slot.stage if slot.changed else None, need, need.parts)
            slot.stage, slot.parts, slot.changed = need.stage, need.parts, False
        elif missing := tuple(part for part in need.parts if part not in slot.parts):
            self._hand_over(slot, None, need, missing)
            slot.parts = tuple(part for part in PARTS if part in (*slot.parts, *missing))
        slot.last_used = self._clock
        return slot

    def _hand_over(self, slot: _Slot, leaves: int | None, need: Need, parts: tuple[Part, ...]) -> None:
        """Have the I/O thread put away the stage that leaves, and then fetch parts of another one."""
        if leaves is not None:
            self.store.bytes_written += self._waiting.disk_bytes(leaves)
        former, slot.pending = slot.pending, None
        slot.pending = self._io.submit(self._move, former, slot.buffer, leaves, need.stage, parts)

    def _move(
        self,
        former: "Future[None] | None",
        buffer: BlockBuffer,
        leaves: int | None,
        comes: int,
        parts: tuple[Part, ...],
    ) -> None:
        if former is not None:
            former.result()
        started = time.perf_counter()
        if leaves is not None:
            self._waiting.put_away(leaves, buffer)
        written = time.perf_counter()
        self._waiting.fetch(comes, buffer, parts)
        self.times.store_s += written - started
        self.times.load_s += time.perf_counter() - written

    def _wait(self, slot: _Slot) -> None:
        if slot.pending is None:
            return
        started = time.perf_counter()
        pending, slot.pending = slot.pending, None
        pending.result()
        self.times.stall_s += time.perf_counter() - started
