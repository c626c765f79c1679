"""Activations at the stage boundaries, kept from the forward to the backward pass: in memory or in a scratch file.

A network that computes in float32 may keep them as bfloat16: they take half of the room and are rounded by up to one
part in 256, so that gradients are no longer exactly those of plain back-propagation. As float32 nothing changes, nor
where the network computes in bfloat16: there they have that type already.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from edgeblocks.methods import BoundaryDtype
from edgeblocks.offload.scratch import ScratchFile
from edgeblocks.offload.slots import StreamTimes

DTYPES: dict[BoundaryDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class InMemory:
    """Keeps all activations in memory until they are dropped."""

    def __init__(self, size: int, *, dtype: BoundaryDtype = "float32") -> None:
        """
        Args:
            size: samples of a batch.
        """
        self._size, self._dtype = size, DTYPES[dtype]
        self._kept: dict[int, Tensor] = {}
        self._given = torch.float32

    def put(self, stage: int, part: slice, hidden: Tensor) -> None:
        """Keep the activations with which some samples enter a stage."""
        # Room for the whole batch at once, [batch, tokens, width]: joining micro-batches later would take it twice.
        if stage not in self._kept:
            self._given = hidden.dtype
            self._kept[stage] = hidden.new_empty(self._size, *hidden.shape[1:], dtype=_kept_as(self._dtype, hidden))
        self._kept[stage][part] = hidden

    def of(self, stage: int, part: slice) -> Tensor:
        """The activations that were put, of the type that they had."""
        return self._kept[stage][part].to(self._given)

    def forget(self, stage: int) -> None:
        """Drop a stage's activations, which are not needed again."""
        self._kept.pop(stage, None)


class OnDisk:
    """Keeps the activations in a file without a name; only those of one micro-batch are in memory.

    A device's activations pass through its host's memory, a micro-batch at a time.
    """

    def __init__(self, size: int, folder: Path, times: StreamTimes, *, dtype: BoundaryDtype = "float32") -> None:
        """
        Args:
            size: samples of a batch.
            times: counts the time of writing and reading as a stall, since nothing is computed meanwhile.
        """
        self._size, self._times, self._dtype = size, times, DTYPES[dtype]
        self._file = ScratchFile(folder, "the activations at the stage boundaries")
        self._shape: torch.Size | None = None
        """Of one sample."""
        self._given = torch.float32
        self._device = torch.device("cpu")
        """Where stages get them."""

    def put(self, stage: int, part: slice, hidden: Tensor) -> None:
        self._shape, self._device, started = hidden.shape[1:], hidden.device, time.perf_counter()
        self._given, self._dtype = hidden.dtype, _kept_as(self._dtype, hidden)
        # Rounded where it is, before the copy: as bfloat16 half of the bytes leave a device. The copy waits for it.
        kept = hidden.detach().to(self._dtype).contiguous().cpu()
        self._file.write(self._start(stage, part), kept.view(torch.uint8))
        self._times.waited_for_storing(started)

    def of(self, stage: int, part: slice) -> Tensor:
        assert self._shape is not None
        started = time.perf_counter()
        count = len(range(*part.indices(self._size)))
        kept = torch.empty(count, *self._shape, dtype=self._dtype)
        self._file.read(self._start(stage, part), kept.view(torch.uint8))
        given = kept.to(self._device)
        self._times.waited_for_loading(started)
        return given.to(self._given)

    def forget(self, stage: int) -> None:
        """Nothing: the next step overwrites their place in the file."""

    def _start(self, stage: int, part: slice) -> int:
        assert self._shape is not None
        # By stage and row, so that micro-batches of another size find them. No stage 0, whose place stays a hole in the
        # file.
        return (stage * self._size + int(part.start)) * self._shape.numel() * self._dtype.itemsize


def _kept_as(asked: torch.dtype, hidden: Tensor) -> torch.dtype:
    """The type in which activations are kept: no wider one than they have."""
    return min(asked, hidden.dtype, key=lambda dtype: dtype.itemsize)


Boundaries = InMemory | OnDisk
"""Keeps the activations of all samples, by the stage that they enter."""
