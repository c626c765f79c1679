"""A file without a name, for bytes that are worth nothing after a crash: the system takes its room back, whatever ends
the process."""

import os
import tempfile
import weakref
from pathlib import Path

from torch import Tensor

from edgeblocks.offload.block_buffer import bytes_of
from edgeblocks.offload.block_files import storage_error
from edgeblocks.offload.device import Device


class ScratchFile:
    """Bytes at places of one's choice, without checksums and not synced. Made when something is first written.

    Its tensors are in the processor's memory.
    """

    def __init__(self, folder: Path, what: str) -> None:
        """
        Args:
            what: the file holds, for error messages.
        """
        self._folder, self._what = folder, what
        self._descriptor: int | None = None
        self._closing: weakref.finalize[..., ScratchFile] | None = None

    def write(self, start: int, content: Tensor) -> None:
        """Put bytes at a place.

        Raises:
            StorageError: the disk refused.
        """
        view, done = bytes_of(content), 0
        try:
            if self._descriptor is None:
                self._descriptor = self._opened()
            while done < len(view):  # the system may write less than it is asked to
                done += os.pwrite(self._descriptor, view[done:], start + done)
        except OSError as error:
            raise self._error("offload", error) from error

    def read(self, start: int, content: Tensor) -> None:
        """Load bytes from where they were put.

        Raises:
            StorageError: the disk refused.
        """
        assert self._descriptor is not None, "nothing was written yet"
        view, done = bytes_of(content), 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], start + done)
                if not count:
                    raise OSError(f"the file ended {len(view) - done} bytes early")
                done += count
        except OSError as error:
            raise self._error("load", error) from error

    def close(self) -> None:
        """Give the room back; nothing is read or written afterwards."""
        if self._closing is not None:
            self._closing()

    def _opened(self) -> int:
        # Where the system has no files without a name, one with this prefix and suffix exists for a moment;
        # `remove_leftovers` finds it after a crash.
        with tempfile.TemporaryFile(dir=self._folder, buffering=0, prefix=".", suffix=".tmp") as file:
            # A descriptor of its own, since the one of `file` is closed with it; the nameless file lives as long as one
            # is open.
            descriptor = os.dup(file.fileno())
        # Closed at the latest with this object: gradients and boundary activations are written to files that nobody
        # closes.
        self._closing = weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _error(self, verb: str, error: OSError) -> Exception:
        return storage_error(f"cannot {verb} {self._what}", self._folder / "(a file without a name)", error)


class DeviceScratchFile:
    """The same for tensors of a device, which pass through the memory of its host one at a time."""

    def __init__(self, folder: Path, what: str, device: Device, *, largest_bytes: int) -> None:
        """
        Args:
            largest_bytes: of a tensor.
        """
        self._file, self._device = ScratchFile(folder, what), device
        self._passing = device.host_memory(largest_bytes).zero_()  # touched at once

    def write(self, start: int, content: Tensor) -> None:
        host_buffer = self._passing[: content.numel()]
        self._device.copy_(host_buffer, content)
        self._file.write(start, host_buffer)

    def read(self, start: int, content: Tensor) -> None:
        host_buffer = self._passing[: content.numel()]
        self._file.read(start, host_buffer)
        self._device.copy_(content, host_buffer)


AnyScratchFile = ScratchFile | DeviceScratchFile
"""For tensors in the processor's memory, or in a device's."""
