"""The EMA weights of blocks as their files have them, for inference."""

from collections.abc import Iterator
from contextlib import contextmanager

from edgeblocks.offload.block_buffer import Part
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.device import Device
from edgeblocks.offload.float32_copy import Float32Copy, Weights
from edgeblocks.offload.quantized import QuantizedLayout
from edgeblocks.offload.slots import slot_of
from edgeblocks.offload.tiers import tier_of


class EmaLoader:
    """Buffers for the EMA weights of some blocks at a time, usually of one: all that inference needs."""

    PARTS: tuple[Part, ...] = ("ema",)

    def __init__(self, store: BlockStore, *, device: Device | None = None, slots: int = 1) -> None:
        """
        Args:
            store: of the run's blocks, or of these, quantized.
            device: one with memory of its own, for whose memory blocks are loaded; None: the processor.
            slots: blocks that are in memory; see `slot_of`.
        """
        self._tier = tier_of(store, device, parts=self.PARTS)
        layout = store.layouts[0]
        self.shares_memory = isinstance(layout, QuantizedLayout)
        """Whether blocks wait quantized and are expanded in turn into memory that all share: a network's weights are
        there only after they were asked for again."""
        # Blocks of bfloat16 pass through one buffer on their way into float32.
        self._buffers = [self._tier.buffer().touched() for _ in range(1 if layout.is_rounded else slots)]
        copies = slots if layout.is_rounded else int(self.shares_memory)
        self._copies = [Float32Copy(store.layouts, self._buffers[0].device) for _ in range(copies)]
        self._held: list[int | None] = [None] * slots

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[Weights]:
        slot = slot_of(block, len(self._held))
        buffer = self._buffers[slot if len(self._buffers) > 1 else 0]
        if self._held[slot] != block:
            # Until the load has succeeded: half of a block must not be taken for one.
            self._held[slot] = None
            self._tier.load(block, buffer)
            if self._copies and not self.shares_memory:
                self._copies[slot].hold_(buffer, "ema")
            self._held[slot] = block
        if self.shares_memory:
            if self._copies[0].ema_of != block:
                self._copies[0].hold_(buffer, "ema").ema_of = block
            yield self._copies[0]
        else:
            yield self._copies[slot] if self._copies else buffer
