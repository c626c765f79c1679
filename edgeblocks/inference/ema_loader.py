"""The EMA weights of blocks as their files have them, for inference."""

from collections.abc import Iterator
from contextlib import contextmanager

from edgeblocks.offload.block_buffer import BlockBuffer, Part
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.offload.device import Device
from edgeblocks.offload.slots import slot_of
from edgeblocks.offload.tiers import HostTier


class EmaLoader:
    """Buffers for the EMA weights of some blocks at a time, usually of one: all that inference needs."""

    PARTS: tuple[Part, ...] = ("ema",)

    def __init__(self, store: BlockStore, *, host: HostTier | None = None, slots: int = 1) -> None:
        """A loader for the processor's memory; or for a device's, where `host` moves these `PARTS`.

        Args:
            slots: buffers; see `slot_of`.
        """
        self._blocks = store if host is None else host
        self._buffers = [(store.buffer(self.PARTS) if host is None else host.buffer()).touched() for _ in range(slots)]
        self._held: list[int | None] = [None] * slots

    @classmethod
    def of(cls, store: BlockStore, device: Device | None, *, slots: int) -> "EmaLoader":
        """A loader for a device with memory of its own; None: for the processor's."""
        return cls(store, host=None if device is None else HostTier(store, device, parts=cls.PARTS), slots=slots)

    @contextmanager
    def ema_weights(self, block: int) -> Iterator[BlockBuffer]:
        slot = slot_of(block, len(self._buffers))
        if self._held[slot] != block:
            self._held[slot] = None
            self._blocks.read(block, self._buffers[slot])
            self._held[slot] = block
        yield self._buffers[slot]
