"""The EMA weights of blocks as their files have them, for inference."""

from collections.abc import Iterator
from contextlib import contextmanager

from edgeblocks.offload.block_buffer import BlockBuffer, Part
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.device import Device
from edgeblocks.offload.slots import slot_of
from edgeblocks.offload.tiers import tier_of


class EmaLoader:
    """Buffers for the EMA weights of some blocks at a time, usually of one: all that inference needs."""

    PARTS: tuple[Part, ...] = ("ema",)

    def __init__(self, store: BlockStore, *, device: Device | None = None, slots: int = 1) -> None:
        """
        Args:
            device: one with memory of its own, for whose memory blocks are loaded; None: the processor.
            slots: buffers; see `slot_of`.
        """
        self._tier = tier_of(store, device, parts=self.PARTS)
        self._buffers = [self._tier.buffer().touched() for _ in range(slots)]
        self._held: list[int | None] = [None] * slots

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[BlockBuffer]:
        slot = slot_of(block, len(self._buffers))
        if self._held[slot] != block:
            # Until the load has succeeded: half of a block must not be taken for one.
            self._held[slot] = None
            self._tier.load(block, self._buffers[slot])
            self._held[slot] = block
        yield self._buffers[slot]
