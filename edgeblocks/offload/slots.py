"""What moves blocks and stages between disk, host and device: slots, their one I/O thread, the seconds it costs."""

import time
from dataclasses import dataclass


@dataclass
class StreamTimes:
    """Seconds that the training thread waited for blocks (`stall`), and that reading and writing took in all."""

    stall_s: float = 0.0
    load_s: float = 0.0
    store_s: float = 0.0

    def waited_for_loading(self, started: float) -> None:
        """The training thread itself read something from then until now, by `time.perf_counter`."""
        waited_s = time.perf_counter() - started
        self.load_s, self.stall_s = self.load_s + waited_s, self.stall_s + waited_s

    def waited_for_storing(self, started: float) -> None:
        """The same of something that it wrote."""
        waited_s = time.perf_counter() - started
        self.store_s, self.stall_s = self.store_s + waited_s, self.stall_s + waited_s


def slot_of(block: int, slots: int) -> int:
    """Where a block is put: the first ones stay, the others take turns in the last slot.

    Blocks are asked for in turn, over and over; with the longest unused one giving way none would ever be there.

    >>> [slot_of(block, 2) for block in range(4)]
    [0, 1, 1, 1]
    """
    return min(block, slots - 1)
