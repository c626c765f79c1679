"""Files that survive a power cut."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from edgeblocks.files.own import create


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file so that the name shows either the former or the new content, even after a power cut.

    Raises:
        OSError: the disk refused; the temporary file is removed and the former content is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with create(temporary, buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece)
                done = 0
                while done < len(view):
                    done += file.write(view[done:]) or 0
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
