"""Caches of prepared data on the disk: written once as a stream, read row by row without staying resident.

A cache is a folder `cache_dir/<key>` with some .npy files and meta.json. It is built under another name, flushed to the
disk and renamed, so that a folder under its final name is complete. Two processes that build the same cache both
succeed: the second finds the name taken and uses what is there.

Rows are read with pread, not through a map. Pages of a map count as resident once touched, each fault brings in its
neighbours, and a file that shrinks under a map kills the process; pread leaves only the rows in memory.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.npy import read_npy_header
from edgeblocks.errors import StorageError
from edgeblocks.files.durable import sync
from edgeblocks.files.own import create, file_locks, is_link
from edgeblocks.files.untrusted import open_regular, read_object
from edgeblocks.units import format_bytes

_MOST_META_BYTES = 2**26
_ABANDONED_S = 60

Stored = TypeVar("Stored")
Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class CacheKind:
    """What a cache holds, in the words of its messages.

    name: of the cache, for example "image cache".
    content: what takes the room, in the plural.
    row: one row of its arrays.
    remedy: what makes the content smaller.
    version: of the files; another one is built anew.
    """

    name: str
    content: str
    row: str
    remedy: str
    version: int


class RowFile(Generic[Value]):
    """Rows of an .npy file, read with pread: only what is asked for comes into memory."""

    def __init__(self, path: Path, dtype: np.dtype[Value] | type[Value], *, row: str, most_rows: int) -> None:
        self.path, self._row = path, row
        self._dtype: np.dtype[Value] = np.dtype(dtype)
        with open_regular(path) as file:
            self.shape, self.offset = _array_in(file, self._dtype, most_rows)
            self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Value]:
        """Rows [b, ...] at `indices` (any order, 0 <= index < N).

        Raises:
            StorageError: the file has been cut since it was opened, or cannot be read.
        """
        num_rows, *row_shape = self.shape
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_rows):
            raise IndexError(f"indices {indices.min()}..{indices.max()} are outside 0..{num_rows - 1}")
        rows = np.empty((len(indices), *row_shape), dtype=self._dtype)
        row_bytes = math.prod(row_shape) * rows.itemsize
        for row, index in zip(rows.reshape(len(rows), math.prod(row_shape)), indices, strict=True):
            self._read_at(self.offset + int(index) * row_bytes, row)
        return rows

    def read_into(self, index: int, row: NDArray[Value]) -> None:
        """One row into memory that is there, contiguous and of its size.

        Raises:
            StorageError: the file has been cut since it was opened, or cannot be read.
        """
        self._read_at(self.offset + index * row.nbytes, row)

    def _read_at(self, position: int, row: NDArray[np.generic]) -> None:
        try:
            # Straight into the row, and at a position: no thread that reads moves another one's place in the file.
            num_read = os.preadv(self.descriptor, [row.data.cast("B")], position)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error}; check the disk, then start again") from error
        if num_read != row.nbytes:
            raise StorageError(
                f"{self.path} ends before byte {position + row.nbytes}, inside {self._row}: it was changed "
                f"while in use; delete {self.path.parent} and start again"
            )


class GrowingArray:
    """An .npy file to which rows are appended; numpy leaves room in the header for the final number of rows."""

    def __init__(self, path: Path, dtype: np.dtype[np.generic] | type[np.generic], row_shape: tuple[int, ...]) -> None:
        self._dtype, self._row_shape, self._num_rows = np.dtype(dtype), row_shape, 0
        self._file = create(path)
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, rows: NDArray[np.generic]) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data.cast("B"))
        self._num_rows += len(rows)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class CacheFiles:
    """The files of a cache that is being built: `begin`, `append` often, and `finish`. `begin` again starts over.

    Raises (all methods):
        StorageError: the disk is full or refuses to be written.
    """

    def __init__(self, kind: CacheKind, folder: Path, cache_dir: Path) -> None:
        self._kind, self._folder, self._cache_dir = kind, folder, cache_dir
        self._needed_bytes = 0
        self._arrays: dict[str, GrowingArray] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for array in self._arrays.values():
            with contextlib.suppress(OSError):  # what is still buffered belongs to a build that failed already
                array.close()

    def begin(
        self, arrays: Mapping[str, tuple[np.dtype[np.generic] | type[np.generic], tuple[int, ...]]], needed_bytes: int
    ) -> None:
        """Opens a file for each name in `arrays` (type and shape of a row), after a look at the free space."""
        self._needed_bytes = needed_bytes
        with self._storing():
            self._check_free_space()
            for array in self._arrays.values():
                array.close()
            self._arrays = {
                name: GrowingArray(self._folder / name, dtype, row_shape) for name, (dtype, row_shape) in arrays.items()
            }

    def append(self, name: str, rows: NDArray[np.generic]) -> None:
        """Adds rows [n, ...] to the array of that name."""
        with self._storing():
            self._arrays[name].append(rows)

    def write(self, name: str, content: bytes) -> None:
        """Writes a whole file beside the arrays."""
        with self._storing(), create(self._folder / name) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def extend(self, name: str, content: bytes) -> None:
        """Adds to the end of a file beside the arrays."""
        with self._storing(), (self._folder / name).open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, content: Mapping[str, object]) -> None:
        """Writes `content` and a checksum of it into meta.json, and flushes everything to the disk."""
        with self._storing():
            for array in self._arrays.values():
                array.finish()
            file_bytes = {path.name: path.stat().st_size for path in sorted(self._folder.iterdir())}
            # Written last: with the sizes of all files in it, a folder that was cut short anywhere does not match its
            # meta.json.
            meta: dict[str, Any] = {"version": self._kind.version, "file_bytes": file_bytes, **content}
            meta["sha256"] = meta_digest(meta)
            with create(self._folder / "meta.json") as file:
                file.write(json.dumps(meta).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            sync(self._folder)

    def _check_free_space(self) -> None:
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < self._needed_bytes:
            raise StorageError(
                f"the {self._kind.content} need {self._needed_bytes} bytes ({format_bytes(self._needed_bytes)}) in "
                f"{self._cache_dir}, and the disk has {free_bytes} bytes ({format_bytes(free_bytes)}) free; free "
                f"some space, {self._kind.remedy}, or keep the cache on another disk with EDGEBLOCKS_CACHE=FOLDER"
            )

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _storage_error(error, self._kind, self._cache_dir, self._needed_bytes) from error


def cache_folder() -> Path:
    """Where decoded images and tokens are kept: $EDGEBLOCKS_CACHE, or edgeblocks/ in the user's cache folder; without a
    home (a container's user that no file knows) a folder of the user's own among the temporary ones.

    Raises:
        StorageError: there is none of them.
    """
    given = os.environ.get("EDGEBLOCKS_CACHE")
    if given:
        return Path(given)
    home = _home_cache()
    return _temporary_cache() if home is None else home


def cache_note() -> str | None:
    """What the user should know of where the caches are; None where they are in their usual place."""
    if os.environ.get("EDGEBLOCKS_CACHE") or _home_cache() is not None:
        return None
    return (
        f"there is no home folder (HOME is not set), so caches are kept in {cache_folder()}; "
        "EDGEBLOCKS_CACHE=FOLDER names another place"
    )


def _home_cache() -> Path | None:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeblocks"
    except RuntimeError:  # neither HOME nor an entry of this user
        return None


def _temporary_cache() -> Path:
    """A folder that nobody else can write: everybody can make one of that name beforehand."""
    user = getattr(os, "getuid", lambda: 0)()
    cure = "name a folder for caches with EDGEBLOCKS_CACHE=FOLDER"
    try:
        folder = Path(tempfile.gettempdir()) / f"edgeblocks-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise StorageError(f"there is no home folder and no temporary one ({error.strerror}); {cure}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (user, 0) or status.st_mode & 0o022:
        raise StorageError(f"there is no home folder, and {folder} may be written by others; {cure}")
    return folder


def open_or_build(
    kind: CacheKind,
    cache_dir: Path,
    key: str,
    *,
    build: Callable[[CacheFiles], None],
    read: Callable[[Path], Stored],
) -> Stored:
    """The cache of that key, built by `build` when there is none or a damaged one.

    Args:
        build: fills the files and finishes them.
        read: what is in a finished folder; raises OSError, ValueError, LookupError, TypeError or AttributeError where
            it is not what `build` wrote.

    Raises:
        StorageError: the cache cannot be written or read.
    """
    final = cache_dir / key
    stored = _open_cache(final, read)
    if stored is not None:
        return stored
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        partial = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f"{key[:16]}.", suffix=".partial"))
    except OSError as error:
        raise _storage_error(error, kind, cache_dir, 0) from error
    try:
        with _locked(partial), CacheFiles(kind, partial, cache_dir) as files:
            build(files)
            publish(partial, final, lambda folder: _open_cache(folder, read) is not None)
    except OSError as error:
        raise _storage_error(error, kind, cache_dir, 0) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    stored = _open_cache(final, read)
    if stored is None:
        raise StorageError(
            f"the {kind.name} {final} was damaged as soon as it was written; check the disk of {cache_dir}"
        )
    return stored


def read_meta(folder: Path, version: int) -> dict[str, Any]:
    """What `finish` was given, compared with its checksum and the sizes of the files.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it is not what `finish` wrote.
    """
    meta: dict[str, Any] = read_object(folder / "meta.json", most_bytes=_MOST_META_BYTES)
    if meta["version"] != version or meta.pop("sha256") != meta_digest(meta):
        raise ValueError("another version, or damaged")
    if any((folder / name).stat().st_size != size for name, size in meta["file_bytes"].items()):
        raise ValueError("a file has another size")
    return meta


def meta_digest(meta: Mapping[str, object]) -> str:
    """The checksum in meta.json, of everything else in it."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_rows(path: Path, shape: tuple[int, ...], dtype: type[Value]) -> NDArray[Value]:
    """A whole array of this shape and type.

    Raises:
        OSError, ValueError: unreadable, or another array.
    """
    with open_regular(path) as file:
        found, start = _array_in(file, np.dtype(dtype), shape[0])
        if found != shape:
            raise ValueError("the arrays have different lengths")
        file.seek(start)
        return np.fromfile(file, dtype=dtype, count=math.prod(shape)).reshape(shape)


def _open_cache(folder: Path, read: Callable[[Path], Stored]) -> Stored | None:
    """The cache in `folder`; None when it is missing or damaged, which both mean that it has to be built."""
    try:
        return read(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _array_in(file: BinaryIO, dtype: np.dtype[np.generic], most_rows: int) -> tuple[tuple[int, ...], int]:
    """Shape of the array in an .npy file, and the byte at which its values begin.

    Raises:
        ValueError: not an array of that type, or the file is longer or shorter than its header says.
    """
    header = read_npy_header(file)
    whole = header.file_bytes == os.fstat(file.fileno()).st_size
    if not whole or header.fortran_order or header.dtype != dtype or not 0 < header.shape[0] <= most_rows:
        raise ValueError("the file is not what a cache holds")
    return header.shape, header.num_bytes


def publish(partial: Path, final: Path, is_sound: Callable[[Path], bool]) -> None:
    """Give a finished cache its name; where a sound one has it already, `partial` stays where it is.

    Raises:
        OSError: it cannot be renamed.
    """
    if os.path.lexists(final) and not is_sound(final):
        # Renamed before it is deleted: a folder that is half gone must not have the final name.
        damaged = partial.with_suffix(".damaged.partial")
        final.rename(damaged)
        if is_link(damaged):
            damaged.unlink()
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        partial.rename(final)
    except OSError:
        # The name is taken: another process was first, and what it built is as good as ours.
        if not is_sound(final):
            raise
    sync(final.parent)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Holds a lock beside what is built; the kernel drops it when the process dies: the build is abandoned.

    Raises:
        OSError: somebody else holds it.
    """
    filelock = file_locks()
    lock = filelock.FileLock(partial.with_name(f"{partial.name}.lock"))
    try:
        lock.acquire(blocking=False)
        try:
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise OSError(None, "another process builds it", str(partial)) from error


def _remove_abandoned(cache_dir: Path) -> None:
    """Deletes what killed builds left behind: unlocked, and too old to be on its way to its lock or its name."""
    for partial in cache_dir.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime < _ABANDONED_S:
                continue
            with _locked(partial):
                if partial.is_dir() and not is_link(partial):
                    shutil.rmtree(partial, ignore_errors=True)
                else:  # of a cost trace
                    partial.unlink()


def _storage_error(error: OSError, kind: CacheKind, cache_dir: Path, needed_bytes: int) -> StorageError:
    need = f"; it needs {needed_bytes} bytes ({format_bytes(needed_bytes)})" if needed_bytes else ""
    return StorageError(
        f"the {kind.name} cannot be written in {cache_dir}: {error.strerror or error}{need}; "
        "free some space, mend the permissions, or keep the cache on another disk with EDGEBLOCKS_CACHE=FOLDER"
    )
