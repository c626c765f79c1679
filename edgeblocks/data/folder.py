"""A folder of image files: one sub-folder per class, or all files in one folder without classes.

The tree is walked as a stream, in the order of the names, and never listed in memory; images are decoded one at a time.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.dataset import Progress
from edgeblocks.data.decoding import EXTENSIONS, UnreadableImageError, decode, read_header
from edgeblocks.data.image_cache import FORMAT_VERSION, CacheWriter, Content
from edgeblocks.errors import DataError
from edgeblocks.limits import MOST_CLASSES, MOST_IMAGES, MOST_UNREADABLE

_SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation"})
_NAMES_SHOWN = 10
_LOOKED_FOR = ", ".join(sorted(EXTENSIONS))


class FoundFile(NamedTuple):
    """An image file: its class, its name relative to the folder, its size (-1 if unknown) and time of change."""

    label: int
    name: str
    size_bytes: int
    mtime_ns: int


class ImageFolder:
    """Reads the images of a folder into a cache.

    key: names the cache; changes with any file's name, size or time of change, and with `image_size`.

    Raises:
        DataError: no images, empty class folders, or images beside class folders.
    """

    def __init__(self, root: Path, image_size: int | None, room_bytes: int | None = None) -> None:
        self._root, self._image_size, self._room_bytes = root, image_size, room_bytes
        self._class_folders = _class_folders(root)
        self.key, self._num_files = self._key_and_count()

    def fill(self, cache: CacheWriter, progress: Progress) -> Content:
        """Decodes every image into `cache`; unreadable ones are skipped and named in the result.

        Raises:
            DataError: no readable image, a class without one, or several sizes and no `image_size`.
            NoRoomToReadError: decoding an image takes more than `room_bytes`.
            StorageError: the cache cannot be written.
        """
        skipped: dict[str, str] = {}
        shape = self._survey(skipped, progress)
        while True:
            num_known = len(skipped)
            counts = self._decode_all(cache, shape, skipped, progress)
            # A damaged file may look sound in its header. Where it decided the shape of the set, all are decoded again.
            if len(skipped) == num_known or (new_shape := self._survey(skipped, progress)) == shape:
                break
            shape = new_shape
        self._check_counts(counts, skipped)
        return Content(
            class_names=tuple(_printable(folder) for folder in self._class_folders),
            unreadable=tuple(sorted(_printable(name) for name in skipped)),
        )

    def _files(self) -> Iterator[FoundFile]:
        if not self._class_folders:
            yield from _walk(self._root, "", 0)
        for label, folder in enumerate(self._class_folders):
            yield from _walk(self._root, folder, label)

    def _key_and_count(self) -> tuple[str, int]:
        """The key and the number of image files."""
        digest = hashlib.sha256(f"folder {FORMAT_VERSION} {self._image_size}\0".encode() + os.fsencode(self._root))
        counts = np.zeros(max(1, len(self._class_folders)), dtype=np.int64)
        for file in self._files():
            counts[file.label] += 1
            digest.update(os.fsencode(f"\0{file.name}\0{file.size_bytes} {file.mtime_ns}"))
        if not counts.any():
            raise DataError(
                f"data folder {self._root} holds no images: looked for {_LOOKED_FOR} in it and in its sub-folders; "
                "give a folder with one sub-folder of images per class, or one with the images themselves"
            )
        if counts.sum() > MOST_IMAGES:
            raise DataError(
                f"data folder {self._root} holds {counts.sum()} images, and at most {MOST_IMAGES} are trained on; "
                "give a part of it"
            )
        empty = [folder for folder, count in zip(self._class_folders, counts, strict=False) if count == 0]
        if empty:
            num_classes = len(self._class_folders)
            raise DataError(
                f"data folder {self._root}: {len(empty)} of its {num_classes} class folders hold no images: "
                f"{_listed(empty)}; every sub-folder is a class: remove the empty ones, or add images to them"
            )
        return digest.hexdigest(), int(counts.sum())

    def _survey(self, skipped_: dict[str, str], progress: Progress) -> tuple[int, int, int]:
        """The shape (H, W, C) of the set, from all headers not in `skipped_`, which grows by the unreadable."""
        all_grey, sizes = True, _Sizes()
        for done, file in enumerate(self._files(), start=1):
            if file.name not in skipped_:
                try:
                    header = read_header(
                        self._root / file.name, image_size=self._image_size, room_bytes=self._room_bytes
                    )
                except UnreadableImageError as error:
                    self._skip(file.name, error, skipped_)
                else:
                    all_grey = all_grey and header.grey
                    sizes.add(header.width, header.height)
            progress(done, max(done, self._num_files), "inspecting")
        num_channels = 1 if all_grey else 3
        if self._image_size is not None or not sizes.num_images:
            side = self._image_size or 1
            return side, side, num_channels
        if sizes.smallest != sizes.largest:
            raise DataError(
                f"data folder {self._root}: its {sizes.num_images} images have different sizes, {sizes}; "
                "pass --set image_size=N to cut and resize all of them to N x N pixels"
            )
        width, height = sizes.smallest
        return height, width, num_channels

    def _decode_all(
        self,
        cache: CacheWriter,
        shape: tuple[int, int, int],
        skipped_: dict[str, str],
        progress: Progress,
    ) -> NDArray[np.int64]:
        """Images written per class; `skipped_` grows by the files that could not be decoded."""
        has_labels = bool(self._class_folders)
        cache.begin(shape, self._num_files - len(skipped_), has_labels=has_labels)
        counts = np.zeros(max(1, len(self._class_folders)), dtype=np.int64)
        for done, file in enumerate(self._files(), start=1):
            if file.name not in skipped_:
                try:
                    pixels = self._decode(file.name, shape)
                except UnreadableImageError as error:
                    self._skip(file.name, error, skipped_)
                else:
                    cache.append(pixels[None], np.array([file.label]) if has_labels else None)
                    counts[file.label] += 1
            progress(done, max(done, self._num_files), "decoding")
        return counts

    def _skip(self, name: str, why: UnreadableImageError, skipped_: dict[str, str]) -> None:
        skipped_[name] = str(why)
        if len(skipped_) > MOST_UNREADABLE:
            raise DataError(
                f"data folder {self._root}: more than {MOST_UNREADABLE} of its {self._num_files} image files cannot be "
                f"read, the last being {_printable(name)}: {why}; replace or remove them"
            )

    def _decode(self, name: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        pixels = decode(self._root / name, image_size=self._image_size, grey=shape[2] == 1)
        if pixels.shape != shape:
            raise UnreadableImageError(f"it was replaced while it was read: {pixels.shape} after {shape}")
        return pixels

    def _check_counts(self, counts: NDArray[np.int64], skipped: dict[str, str]) -> None:
        num_images = int(counts.sum())
        if num_images < 2:
            reasons = "".join(f"\n  {_printable(name)}: {why}" for name, why in list(skipped.items())[:_NAMES_SHOWN])
            raise DataError(
                f"data folder {self._root}: {num_images} of its {self._num_files} image files can be read, and at "
                f"least 2 are needed; looked for {_LOOKED_FOR}; add images or replace the damaged ones{reasons}"
            )
        without = [folder for folder, count in zip(self._class_folders, counts, strict=False) if count == 0]
        if without:
            raise DataError(
                f"data folder {self._root}: {len(without)} classes have no image that can be read: {_listed(without)}; "
                "replace the damaged files or remove these folders"
            )


@dataclass(kw_only=True)
class _Sizes:
    """The smallest and the largest (width, height) seen, by area, and how often each."""

    smallest: tuple[int, int] = (0, 0)
    largest: tuple[int, int] = (0, 0)
    num_smallest: int = 0
    num_largest: int = 0
    num_images: int = 0

    def add(self, width: int, height: int) -> None:
        size, key = (width, height), (width * height, width)
        self.num_images += 1
        if self.num_images == 1 or key < (self.smallest[0] * self.smallest[1], self.smallest[0]):
            self.smallest, self.num_smallest = size, 0
        if key > (self.largest[0] * self.largest[1], self.largest[0]):
            self.largest, self.num_largest = size, 0
        self.num_smallest += size == self.smallest
        self.num_largest += size == self.largest

    def __str__(self) -> str:
        (w0, h0), (w1, h1) = self.smallest, self.largest
        return f"from {w0} x {h0} ({self.num_smallest} images) to {w1} x {h1} ({self.num_largest} images)"


def _class_folders(root: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted; () for a flat folder."""
    _, entries = _entries(root)
    folders = tuple(entry.name for entry in entries if _is_folder(entry))
    num_loose = sum(_is_image(entry) for entry in entries)
    if len(folders) > MOST_CLASSES:
        raise DataError(
            f"data folder {root} has {len(folders)} sub-folders, each a class, and at most {MOST_CLASSES} classes are "
            "accepted; put the images into fewer"
        )
    if folders and num_loose:
        raise DataError(
            f"data folder {root} has {num_loose} images beside {len(folders)} sub-folders ({_listed(folders)}); "
            "each sub-folder is a class: move the images into one, or move the sub-folders elsewhere"
        )
    if len(folders) > 1 and _SPLIT_NAMES.issuperset(name.lower() for name in folders):
        raise DataError(
            f"data folder {root} holds {_listed(folders)}, parts of a data set, not classes; give "
            f"one of them, for example {root / folders[0]}; hold_out sets the share kept for validation"
        )
    return folders


def _walk(root: Path, folder: str, label: int) -> Iterator[FoundFile]:
    """Image files below root/folder. A folder that links lead to twice is read once, so that loops end."""
    seen = {_entries(root)[0]} if folder else set()
    waiting = [folder]
    while waiting:
        name = waiting.pop()
        identity, entries = _entries(root / name)
        if identity in seen:
            continue
        seen.add(identity)
        waiting += [f"{name}/{entry.name}" for entry in reversed(entries) if _is_folder(entry)]
        for entry in entries:
            if _is_image(entry):
                yield _found(entry, f"{name}/{entry.name}" if name else entry.name, label)


def _found(entry: os.DirEntry[str], name: str, label: int) -> FoundFile:
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere: found, and named as unreadable once it is opened
        return FoundFile(label, name, -1, 0)
    return FoundFile(label, name, status.st_size, status.st_mtime_ns)


def _entries(folder: Path) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    """Which folder it is, as device and inode, and what it holds, hidden entries left out, sorted by name."""
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"data folder {folder} cannot be read: {error.strerror}; mend its permissions or remove it"
        ) from error
    return (status.st_dev, status.st_ino), sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its name. Dead links count, so that they are reported; pipes and devices, which may block, do not."""
    if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:  # noqa: PTH122  # a Path for each of a million files is slow
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))  # noqa: PTH110
    except OSError:
        return True


def _listed(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(_printable(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _printable(name: str) -> str:
    """A file's name as text that can be printed and written, whatever bytes it has on the disk."""
    return os.fsencode(name).decode("utf-8", errors="replace")
