"""A file without a name, for bytes that are worth nothing after a crash: the system takes its room back, whatever ends
the process."""

import os
import tempfile
import weakref
from pathlib import Path

from edgeblocks.store import storage_error


class ScratchFile:
    """Bytes at places of one's choice, without checksums and not synced. Made when something is first written."""

    def __init__(self, folder: Path, what: str) -> None:
        """
        Args:
            what: it holds, in words.
        """
        self._folder, self._what = folder, what
        self._descriptor: int | None = None
        self._closing: weakref.finalize[..., ScratchFile] | None = None

    def write(self, start: int, content: memoryview) -> None:
        """Put bytes at a place.

        Raises:
            StorageError: the disk refused.
        """
        done = 0
        try:
            if self._descriptor is None:
                self._descriptor = self._opened()
            while done < len(content):
                done += os.pwrite(self._descriptor, content[done:], start + done)
        except OSError as error:
            raise self._error("put away", error) from error

    def read(self, start: int, content: memoryview) -> None:
        """Fetch bytes from where they were put.

        Raises:
            StorageError: the disk refused.
        """
        assert self._descriptor is not None, "what is fetched was put away"
        done = 0
        try:
            while done < len(content):
                count = os.preadv(self._descriptor, [content[done:]], start + done)
                if not count:
                    raise OSError(f"the file ended {len(content) - done} bytes early")
                done += count
        except OSError as error:
            raise self._error("fetch", error) from error

    def close(self) -> None:
        """Give the room back; nothing is read or written afterwards."""
        if self._closing is not None:
            self._closing()

    def _opened(self) -> int:
        with tempfile.TemporaryFile(dir=self._folder, buffering=0, prefix=".", suffix=".tmp") as file:
            descriptor = os.dup(file.fileno())
        self._closing = weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _error(self, verb: str, error: OSError) -> Exception:
        return storage_error(f"cannot {verb} {self._what}", self._folder / "(a file without a name)", error)
