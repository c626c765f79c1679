"""Decoded images on the disk: written once as a stream, read batch by batch without staying resident.

A cache is a folder `cache_dir/<key>` with images.npy [N, H, W, C], labels.npy [N], moments.npy [N, 2] and meta.json. It
is built under another name, flushed to the disk and renamed, so that a folder under its final name is complete. Two
processes that build the same cache both succeed: the second finds the name taken and uses what is there.

Batches are read with pread, not through the map. Pages of a map count as resident once touched, each fault brings in
its neighbours, and a file that shrinks under a map kills the process; pread leaves only the batch in memory.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.limits import MOST_CLASSES, MOST_IMAGES, MOST_PIXELS, MOST_UNREADABLE
from edgeblocks.data.npy import read_npy_header
from edgeblocks.durable import sync
from edgeblocks.errors import StorageError
from edgeblocks.units import format_bytes
from edgeblocks.untrusted import open_regular, read_object

FORMAT_VERSION = 2
_SQUARES_CHUNK = 2**20
_MOST_META_BYTES = 2**26
_ABANDONED_S = 60


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a reader knows about its images beside the pixels. The last `num_test` images are its own test part."""

    class_names: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    num_test: int = 0


class _RowFile:
    """Rows of an .npy file, read with pread: only what is asked for comes into memory."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self._dtype = path, dtype
        with open_regular(path) as file:
            self.shape, self.offset = _array_in(file, dtype)
            self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Rows [b, ...] at `indices` (any order, 0 <= index < N).

        Raises:
            StorageError: the file has been cut since it was opened, or cannot be read.
        """
        num_rows, *row_shape = self.shape
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_rows):
            raise IndexError(f"indices {indices.min()}..{indices.max()} are outside 0..{num_rows - 1}")
        rows = np.empty((len(indices), *row_shape), dtype=self._dtype)
        row_bytes = math.prod(row_shape) * rows.itemsize
        for row, index in zip(rows, indices, strict=True):
            self._read_at(self.offset + int(index) * row_bytes, row)
        return rows

    def _read_at(self, position: int, row: NDArray[Any]) -> None:
        try:
            num_read = os.preadv(self.descriptor, [row.data.cast("B")], position)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error}; check the disk, then start again") from error
        if num_read != row.nbytes:
            raise StorageError(
                f"{self.path} ends before byte {position + row.nbytes}, inside an image: it was changed while in "
                f"use; delete {self.path.parent} and start again"
            )


class ImageFile:
    """images.npy of a finished cache. `view` is the map, uint8 [N, H, W, C]; `read` copies out of the file."""

    def __init__(self, folder: Path) -> None:
        self._images = _RowFile(folder / "images.npy", np.uint8)
        self._moments = _RowFile(folder / "moments.npy", np.int64)
        with os.fdopen(os.dup(self._images.descriptor), "rb") as file:
            self.view: NDArray[np.uint8] = np.memmap(
                file, np.uint8, mode="r", offset=self._images.offset, shape=self._images.shape
            )

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images uint8 [b, H, W, C] at `indices` (any order, 0 <= index < N), compared with their moments.

        Raises:
            StorageError: the file has been damaged or cut since it was written.
        """
        images = self._images.read(indices)
        different = (image_moments(images) != self._moments.read(indices)).any(axis=1)
        if different.any():
            raise StorageError(
                f"{self._images.path} is damaged: image {indices[different][0]} is not what was decoded; check the "
                f"disk, delete {self._images.path.parent}, and start again: the images are then decoded anew"
            )
        return images


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """A finished cache.

    labels: int64 [N], None when unconditional.
    moments: int64 [N, 2], sum and sum of squares of each image's pixel values.
    """

    image_file: ImageFile
    labels: NDArray[np.int64] | None
    moments: NDArray[np.int64]
    content: Content
    fingerprint: str


class _GrowingArray:
    """An .npy file to which rows are appended; numpy leaves room in the header for the final number of rows."""

    def __init__(self, path: Path, dtype: type[np.generic], row_shape: tuple[int, ...]) -> None:
        self._dtype, self._row_shape, self._num_rows = np.dtype(dtype), row_shape, 0
        self._file = path.open("wb")
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, rows: NDArray[Any]) -> None:
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


class CacheWriter:
    """A cache that is being built: `begin`, `append` often, and `finish`. `begin` again starts over.

    Raises (all methods):
        StorageError: the disk is full or refuses to be written.
    """

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self._folder, self._cache_dir = folder, cache_dir
        self._needed_bytes = 0
        self._arrays: dict[str, _GrowingArray] = {}
        self._image_shape: tuple[int, ...] = ()
        self._num_images = 0
        self._pixel_hash, self._label_hash = hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for array in self._arrays.values():
            with contextlib.suppress(OSError):  # what is still buffered belongs to a build that failed already
                array.close()

    def begin(self, image_shape: tuple[int, int, int], max_images: int, *, has_labels: bool) -> None:
        """Opens the files for up to `max_images` images of `image_shape` (H, W, C), after a look at the free space."""
        self._needed_bytes = max_images * (math.prod(image_shape) + (24 if has_labels else 16))
        self._image_shape, self._num_images = image_shape, 0
        self._pixel_hash, self._label_hash = hashlib.sha256(), hashlib.sha256()
        with self._storing():
            self._check_free_space()
            for array in self._arrays.values():
                array.close()
            self._arrays = {
                "images.npy": _GrowingArray(self._folder / "images.npy", np.uint8, image_shape),
                "moments.npy": _GrowingArray(self._folder / "moments.npy", np.int64, (2,)),
            }
            if has_labels:
                self._arrays["labels.npy"] = _GrowingArray(self._folder / "labels.npy", np.int64, ())

    def append(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        """Adds images [n, H, W, C] and, when the set has them, labels [n]."""
        assert images.shape[1:] == self._image_shape and (labels is not None) == ("labels.npy" in self._arrays)
        images = np.ascontiguousarray(images)
        self._pixel_hash.update(images.data)
        self._num_images += len(images)
        with self._storing():
            self._arrays["images.npy"].append(images)
            self._arrays["moments.npy"].append(image_moments(images))
            if labels is not None:
                self._label_hash.update(np.ascontiguousarray(labels).data)
                self._arrays["labels.npy"].append(labels)

    def finish(self, content: Content) -> None:
        """Writes what is missing and flushes everything to the disk."""
        shape = (self._num_images, *self._image_shape)
        label_hash = self._label_hash.hexdigest() if "labels.npy" in self._arrays else None
        with self._storing():
            for array in self._arrays.values():
                array.finish()
            meta: dict[str, Any] = {
                "version": FORMAT_VERSION,
                "shape": shape,
                "file_bytes": {name: (self._folder / name).stat().st_size for name in self._arrays},
                "label_sha256": label_hash,
                "fingerprint": content_fingerprint(shape, self._pixel_hash.hexdigest(), label_hash, content),
                "content": asdict(content),
            }
            meta["sha256"] = _digest(meta)
            with (self._folder / "meta.json").open("w", encoding="ascii") as file:
                json.dump(meta, file)
                file.flush()
                os.fsync(file.fileno())
            sync(self._folder)

    def _check_free_space(self) -> None:
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < self._needed_bytes:
            raise StorageError(
                f"the decoded images need {self._needed_bytes} bytes ({format_bytes(self._needed_bytes)}) in "
                f"{self._cache_dir}, and the disk has {free_bytes} bytes ({format_bytes(free_bytes)}) free; free "
                "some space, choose a smaller image_size, or keep the cache on another disk"
            )

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _storage_error(error, self._cache_dir, self._needed_bytes) from error


def cache_folder() -> Path:
    """Where decoded images are kept: $EDGEBLOCKS_CACHE, or edgeblocks/ in the user's cache folder."""
    given = os.environ.get("EDGEBLOCKS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeblocks"


def open_or_build(cache_dir: Path, key: str, build: Callable[[CacheWriter], Content]) -> StoredImages:
    """The cache of that key, built by `build` when there is none or a damaged one.

    Raises:
        StorageError: the cache cannot be written or read.
    """
    final = cache_dir / key
    stored = _open_cache(final)
    if stored is not None:
        return stored
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        partial = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f"{key[:16]}.", suffix=".partial"))
    except OSError as error:
        raise _storage_error(error, cache_dir, 0) from error
    try:
        with _locked(partial), CacheWriter(partial, cache_dir) as writer:
            writer.finish(build(writer))
            _publish(partial, final)
    except OSError as error:
        raise _storage_error(error, cache_dir, 0) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    stored = _open_cache(final)
    if stored is None:
        raise StorageError(
            f"the image cache {final} was damaged as soon as it was written; check the disk of {cache_dir}"
        )
    return stored


def image_moments(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Sum and sum of squares of each image's pixel values: uint8 [n, ...] -> int64 [n, 2].

    >>> image_moments(np.array([[1, 2], [0, 255]], dtype=np.uint8)).tolist()
    [[3, 5], [255, 65025]]
    """
    flat = images.reshape(len(images), -1)
    moments = np.zeros((len(images), 2), dtype=np.int64)
    columns = min(_SQUARES_CHUNK, max(1, flat.shape[1]))
    rows = _SQUARES_CHUNK // columns
    for start in range(0, len(flat), rows):  # in pieces: the squares take twice the room of the pixels
        for left in range(0, flat.shape[1], columns):
            part = flat[start : start + rows, left : left + columns]
            moments[start : start + rows, 0] += part.sum(axis=1, dtype=np.int64)
            moments[start : start + rows, 1] += np.square(part, dtype=np.uint16).sum(axis=1, dtype=np.int64)
    return moments


def content_fingerprint(shape: tuple[int, ...], pixel_hash: str, label_hash: str | None, content: Content) -> str:
    """sha256 over what a training run sees, from the hashes of the pixels and labels."""
    seen = [list(shape), pixel_hash, label_hash, list(content.class_names), content.num_test]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _open_cache(folder: Path) -> StoredImages | None:
    """The cache in `folder`; None when it is missing or damaged, which both mean that it has to be built."""
    try:
        return _read_cache(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _read_cache(folder: Path) -> StoredImages:
    """The cache in `folder`.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it is not what `CacheWriter` wrote.
    """
    meta = read_object(folder / "meta.json", most_bytes=_MOST_META_BYTES)
    if meta["version"] != FORMAT_VERSION or meta.pop("sha256") != _digest(meta):
        raise ValueError("another version, or damaged")
    if any((folder / name).stat().st_size != size for name, size in meta["file_bytes"].items()):
        raise ValueError("a file has another size")
    image_file = ImageFile(folder)
    num_images, height, width, num_channels = image_file.view.shape
    if list(image_file.view.shape) != meta["shape"] or not 0 < num_channels * height * width <= 3 * MOST_PIXELS:
        raise ValueError("the images have another shape")
    labels = _read_rows(folder / "labels.npy", (num_images,)) if "labels.npy" in meta["file_bytes"] else None
    if labels is not None and hashlib.sha256(labels.data).hexdigest() != meta["label_sha256"]:
        raise ValueError("the labels are damaged")
    moments = _read_rows(folder / "moments.npy", (num_images, 2))
    if not _are_moments(moments, num_channels * height * width):
        raise ValueError("the moments are of no images")
    fingerprint = meta["fingerprint"]
    if not isinstance(fingerprint, str):
        raise ValueError("a fingerprint is a text")
    return StoredImages(
        image_file=image_file,
        labels=labels,
        moments=moments,
        content=_content(meta["content"], num_images, labels),
        fingerprint=fingerprint,
    )


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _content(told: dict[str, Any], num_images: int, labels: NDArray[np.int64] | None) -> Content:
    """What meta.json tells of the images, compared with the arrays.

    Raises:
        ValueError, LookupError, TypeError: it is not what `CacheWriter` wrote.
    """
    class_names, unreadable, num_test = told["class_names"], told["unreadable"], told["num_test"]
    for names, most in ((class_names, MOST_CLASSES), (unreadable, MOST_UNREADABLE)):
        if not isinstance(names, list) or len(names) > most or not all(isinstance(name, str) for name in names):
            raise ValueError("names are a list of texts")
    if type(num_test) is not int or not 0 <= num_test < num_images:
        raise ValueError("the test part is a part")
    if (labels is None) != (not class_names):
        raise ValueError("labels are numbers of classes")
    if labels is not None and not (labels.min() >= 0 and labels.max() < len(class_names)):
        raise ValueError("labels are numbers of classes")
    return Content(class_names=tuple(class_names), unreadable=tuple(unreadable), num_test=num_test)


def _are_moments(moments: NDArray[np.int64], values_per_image: int) -> bool:
    """Whether each row can be the sum and the sum of squares of so many values from 0 to 255."""
    sums, squares = moments.T
    possible = (sums >= 0) & (sums <= 255 * values_per_image) & (squares >= sums) & (squares <= 255 * sums)
    spread = squares.astype(np.float64) * values_per_image >= sums.astype(np.float64) ** 2 * (1 - 1e-9)
    return bool((possible & spread).all())


def _array_in(file: BinaryIO, dtype: type[np.generic]) -> tuple[tuple[int, ...], int]:
    """Shape of the array in an .npy file, and the byte at which its values begin.

    Raises:
        ValueError: not an array of that type, or the file is longer or shorter than its header says.
    """
    header = read_npy_header(file)
    whole = header.file_bytes == os.fstat(file.fileno()).st_size
    if not whole or header.fortran_order or header.dtype != dtype or not 0 < header.shape[0] <= MOST_IMAGES:
        raise ValueError("the file is not what a cache holds")
    return header.shape, header.num_bytes


def _read_rows(path: Path, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """A whole array of this shape.

    Raises:
        OSError, ValueError: unreadable, or another array.
    """
    with open_regular(path) as file:
        found, start = _array_in(file, np.int64)
        if found != shape:
            raise ValueError("the arrays have different lengths")
        file.seek(start)
        return np.fromfile(file, dtype=np.int64, count=math.prod(shape)).reshape(shape)


def _publish(partial: Path, final: Path) -> None:
    """Gives the finished cache its name, unless another process has meanwhile built a sound one."""
    if final.exists() and _open_cache(final) is None:
        damaged = partial.with_suffix(".damaged.partial")
        final.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        partial.rename(final)
    except OSError:
        if _open_cache(final) is None:
            raise
    sync(final.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder; the kernel drops it when the process dies: the folder is abandoned."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(cache_dir: Path) -> None:
    """Deletes what killed builds left behind: unlocked, and too old to be on its way to its lock or its name."""
    for partial in cache_dir.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime < _ABANDONED_S:
                continue
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                else:  # of a cost trace
                    partial.unlink()
            finally:
                os.close(descriptor)


def _storage_error(error: OSError, cache_dir: Path, needed_bytes: int) -> StorageError:
    need = f"; it needs {needed_bytes} bytes ({format_bytes(needed_bytes)})" if needed_bytes else ""
    return StorageError(
        f"the image cache cannot be written in {cache_dir}: {error.strerror or error}{need}; "
        "free some space, mend the permissions, or keep the cache on another disk"
    )
