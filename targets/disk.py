"""How fast a folder's disk is, past this system's page cache."""

import contextlib
import errno
import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeblocks.errors import StorageError

ReadWay = Literal["direct", "cache dropped", "page cache"]

_CHUNK_BYTES = 2**20
_SYNC_EVERY_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """Measured on one file of `probe_bytes`, written in order with a sync every 32 MiB, then read in order.

    read_way: `direct` (O_DIRECT), `cache dropped` (the system was asked to forget the file first), or `page cache`:
        this system knows neither, so the read speed is that of memory.
    sync_s: median time until 4 KiB are safe on the disk; None when it was not asked for.
    """

    probe_bytes: int
    write_bytes_per_s: float
    read_bytes_per_s: float
    read_way: ReadWay
    sync_s: float | None


_NONE = DiskSpeed(
    probe_bytes=0, write_bytes_per_s=math.inf, read_bytes_per_s=math.inf, read_way="page cache", sync_s=None
)


def measure_disk(folder: Path | None, *, probe_bytes: int, limit_s: float, num_syncs: int = 0) -> DiskSpeed:
    """Write and read a file in `folder`. The file has no name, so it is gone whatever ends the process.

    Args:
        folder: None where nothing will be written, nor is now: a disk without a limit.
        probe_bytes: size of the file; a slow disk gets a smaller one.
        limit_s: stop writing after this time, at the end of 32 MiB, and stop reading after as long.
        num_syncs: small writes for `sync_s`.

    Raises:
        StorageError: the folder cannot be written to or is full.
    """
    if folder is None:
        return _NONE
    try:
        with _nameless_file(folder) as (file, direct):
            written, write_s = _write(file, probe_bytes, limit_s)
            sync_s = statistics.median(_sync_s(file) for _ in range(num_syncs)) if num_syncs else None
            read, read_s, way = _read(file, direct, written, limit_s)
    except OSError as error:
        cure = "choose a folder with room with --out or --work-dir"
        if error.errno == errno.EFBIG:
            cure = "this process is bounded to smaller files: ulimit -f tells to which, ulimit -f unlimited lifts it"
        raise StorageError(f"cannot write to {folder}: {error.strerror or error}; {cure}") from error
    return DiskSpeed(
        probe_bytes=written,
        write_bytes_per_s=written / write_s,
        read_bytes_per_s=read / read_s,
        read_way=way,
        sync_s=sync_s,
    )


@contextlib.contextmanager
def _nameless_file(folder: Path) -> Iterator[tuple[int, int | None]]:
    """Descriptors of a new file: one to write and read, one to read directly (None: not possible here)."""
    file, name = tempfile.mkstemp(prefix=".edgeblocks-probe.", dir=folder)
    direct = None
    try:
        with contextlib.suppress(AttributeError, OSError):
            direct = os.open(name, os.O_RDONLY | os.O_DIRECT)
        with contextlib.suppress(OSError):  # Windows keeps the name of an open file
            Path(name).unlink()
        yield file, direct
    finally:
        os.close(file)
        if direct is not None:
            os.close(direct)
        Path(name).unlink(missing_ok=True)


def _write(file: int, size_bytes: int, limit_s: float) -> tuple[int, float]:
    """Bytes written and the time it took; random bytes, because some file systems compress."""
    data = os.urandom(_CHUNK_BYTES)
    written = 0
    started = time.perf_counter()
    while written == 0 or (written < size_bytes and time.perf_counter() - started < limit_s):
        end = min(written + _SYNC_EVERY_BYTES, size_bytes)
        while written < end:
            written += os.write(file, data[: end - written])
        os.fsync(file)
    return written, time.perf_counter() - started


def _sync_s(file: int) -> float:
    page = os.urandom(4096)
    started = time.perf_counter()
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, page)
    os.fsync(file)
    return time.perf_counter() - started


def _read(file: int, direct: int | None, size_bytes: int, limit_s: float) -> tuple[int, float, ReadWay]:
    # Also before a direct read: btrfs and zfs take O_DIRECT and may answer from the cache all the same.
    dropped = False
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        dropped = True
    if direct is not None:
        with contextlib.suppress(OSError):  # some file systems open with O_DIRECT and then refuse to read
            return (*_time_read(direct, size_bytes, limit_s), "direct")
    return (*_time_read(file, size_bytes, limit_s), "cache dropped" if dropped else "page cache")


def _time_read(file: int, size_bytes: int, limit_s: float) -> tuple[int, float]:
    """Bytes read from the start and the time it took."""
    read = 0
    os.lseek(file, 0, os.SEEK_SET)
    # A mapping starts on a page, which O_DIRECT asks for.
    with mmap.mmap(-1, _CHUNK_BYTES) as buffer, open(file, "rb", buffering=0, closefd=False) as stream:
        started = time.perf_counter()
        while read == 0 or (read < size_bytes and time.perf_counter() - started < limit_s):
            count = stream.readinto(buffer)
            if not count:
                break
            read += count
        return read, time.perf_counter() - started
