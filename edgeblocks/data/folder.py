"""A folder of image files: one sub-folder per class, or all files in one folder without classes.

The tree is walked as a stream, in the order of the names, and never listed in memory; images are decoded one at a time.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.class_folders import find_classes
from edgeblocks.data.dataset import Progress
from edgeblocks.data.decoding import EXTENSIONS, PictureHeader, UnreadableImageError, decode, range_of, read_header
from edgeblocks.data.deep_grey import GreyRange
from edgeblocks.data.image_cache import FORMAT_VERSION, CacheWriter, Content
from edgeblocks.data.picture_files import FoundFile, LeftOut, entries_of, listed, printable, walk
from edgeblocks.errors import DataError, NoRoomToReadError
from edgeblocks.limits import MOST_IMAGES, MOST_PIXELS, MOST_UNREADABLE

_REASONS_SHOWN = 10
_LOOKED_FOR = ", ".join(sorted(EXTENSIONS))


class ImageFolder:
    """Reads the images of a folder into a cache.

    key: names the cache; changes with any file's name, size, times or place on the disk, and with `image_size`.
    left_out: what lies among the pictures and is not read.
    warnings: what the user should know of how the folder is taken.

    Raises:
        DataError: no images, empty class folders, images beside class folders, or parts of a data set.
    """

    def __init__(self, root: Path, image_size: int | None, room_bytes: int | None = None) -> None:
        self._image_size, self._room_bytes = image_size, room_bytes
        classes = find_classes(root)
        self._root, self._class_folders = classes.root, classes.names
        self.left_out = LeftOut()
        for folder in classes.above:
            entries_of(folder, self.left_out)
        self.key, self._num_files = self._look_through()
        told = self.left_out.warning()
        self.warnings = (*classes.warnings, *(() if told is None else (told,)))

    def fill(self, cache: CacheWriter, progress: Progress) -> Content:
        """Decodes every image into `cache`; unreadable ones are skipped and named in the result.

        Raises:
            DataError: no readable image, a class without one, several sizes or too large ones and no `image_size`.
            NoRoomToReadError: decoding an image takes more than `room_bytes`.
            StorageError: the cache cannot be written.
        """
        skipped: dict[str, str] = {}
        survey = self._survey(skipped, progress)
        while True:
            num_known = len(skipped)
            counts = self._decode_all(cache, survey, skipped, progress)
            # A damaged file may look sound in its header. Where it decided what the set is, all are decoded again.
            if len(skipped) == num_known or (again := self._survey(skipped, progress)).as_decided == survey.as_decided:
                break
            survey = again
        self._check_counts(counts, skipped)
        return Content(
            class_names=tuple(printable(folder) for folder in self._class_folders),
            unreadable=tuple(sorted(printable(name) for name in skipped)),
            deep_range=survey.deep_range,
            num_of_several=survey.num_of_several,
        )

    def _files(self, left_out_: LeftOut | None = None) -> Iterator[FoundFile]:
        if not self._class_folders:
            yield from walk(self._root, "", 0, left_out_)
        for label, folder in enumerate(self._class_folders):
            yield from walk(self._root, folder, label, left_out_)

    def _look_through(self) -> tuple[str, int]:
        """The key and the number of image files."""
        digest = hashlib.sha256(f"folder {FORMAT_VERSION} {self._image_size}\0".encode() + os.fsencode(self._root))
        counts = np.zeros(max(1, len(self._class_folders)), dtype=np.int64)
        for file in self._files(self.left_out):
            counts[file.label] += 1
            digest.update(os.fsencode(f"\0{file.name}\0{file.identity}"))
        if not counts.any():
            beside = "; ".join(self.left_out.described())
            raise DataError(
                f"data folder {self._root} holds no images: looked for {_LOOKED_FOR} in it and in its sub-folders"
                f"{f' and found {beside}' if beside else ''}; "
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
                f"{listed(empty)}; every sub-folder is a class: remove the empty ones, or add images to them"
            )
        return digest.hexdigest(), int(counts.sum())

    def _survey(self, skipped_: dict[str, str], progress: Progress) -> "_Survey":
        """What all images not in `skipped_`, which grows by the unreadable, are together."""
        survey, sizes = _Survey(), _Sizes()
        for done, file in enumerate(self._files(), start=1):
            if file.name not in skipped_:
                try:
                    header = self._header(file.name)
                    if header.deep:
                        survey.add_range(range_of(self._root / file.name))
                except UnreadableImageError as error:
                    self._skip(file.name, error, skipped_)
                else:
                    survey.all_grey = survey.all_grey and header.grey
                    survey.num_of_several += header.several
                    sizes.add(header.width, header.height)
            progress(done, max(done, self._num_files), "inspecting")
        if self._image_size is not None or not sizes.num_images:
            survey.size = (self._image_size or 1,) * 2
            return survey
        width, height = sizes.smallest
        if sizes.smallest != sizes.largest:
            raise DataError(
                f"data folder {self._root}: its {sizes.num_images} images have different sizes, {sizes}; "
                "pass --set image_size=N to cut and resize all of them to N x N pixels"
            )
        if width * height > MOST_PIXELS:
            raise DataError(
                f"data folder {self._root}: its images have {width} x {height} pixels, and at most {MOST_PIXELS:,} are "
                "trained on; pass --set image_size=N to make them smaller"
            )
        survey.size = sizes.smallest
        return survey

    def _header(self, name: str) -> PictureHeader:
        path = self._root / name
        header = read_header(path, image_size=self._image_size)
        if self._room_bytes is not None and header.decoding_bytes > self._room_bytes:
            what = f"{path} ({header.width} x {header.height} pixels, {header.format})"
            raise NoRoomToReadError(what, header.decoding_bytes)
        return header

    def _decode_all(
        self,
        cache: CacheWriter,
        survey: "_Survey",
        skipped_: dict[str, str],
        progress: Progress,
    ) -> NDArray[np.int64]:
        """Images written per class; `skipped_` grows by the files that could not be decoded."""
        has_labels = bool(self._class_folders)
        cache.begin(survey.shape, self._num_files - len(skipped_), has_labels=has_labels)
        counts = np.zeros(max(1, len(self._class_folders)), dtype=np.int64)
        for done, file in enumerate(self._files(), start=1):
            if file.name not in skipped_:
                try:
                    pixels = self._decode(file.name, survey)
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
                f"read, the last being {printable(name)}: {why}; replace or remove them"
            )

    def _decode(self, name: str, survey: "_Survey") -> NDArray[np.uint8]:
        grey = survey.all_grey
        pixels = decode(self._root / name, image_size=self._image_size, grey=grey, deep_range=survey.deep_range)
        if pixels.shape != survey.shape:
            raise UnreadableImageError(f"it was replaced while it was read: {pixels.shape} after {survey.shape}")
        return pixels

    def _check_counts(self, counts: NDArray[np.int64], skipped: dict[str, str]) -> None:
        num_images = int(counts.sum())
        if num_images < 2:
            reasons = "".join(f"\n  {printable(name)}: {why}" for name, why in list(skipped.items())[:_REASONS_SHOWN])
            raise DataError(
                f"data folder {self._root}: {num_images} of its {self._num_files} image files can be read, and at "
                f"least 2 are needed; looked for {_LOOKED_FOR}; add images or replace the damaged ones{reasons}"
            )
        without = [folder for folder, count in zip(self._class_folders, counts, strict=False) if count == 0]
        if without:
            raise DataError(
                f"data folder {self._root}: {len(without)} classes have no image that can be read: {listed(without)}; "
                "replace the damaged files or remove these folders"
            )


@dataclass(kw_only=True)
class _Survey:
    """What is known of the images of a set before they are decoded.

    size: (width, height) of all of them.
    num_of_several: pictures of files that hold more than one.
    """

    all_grey: bool = True
    size: tuple[int, int] = (1, 1)
    num_of_several: int = 0
    _values: GreyRange | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""
        width, height = self.size
        return height, width, 1 if self.all_grey else 3

    @property
    def deep_range(self) -> GreyRange | None:
        """The values of deep grey that are spread over 0..255; None where the upper eight bits of 16 are kept."""
        return None if self._values is None or self._values.is_most_of_16_bits else self._values

    @property
    def as_decided(self) -> tuple[object, ...]:
        """All that decoding an image depends on."""
        return self.shape, self.deep_range

    def add_range(self, found: GreyRange | None) -> None:
        """Count a picture of deep grey; None is one of which nothing is seen."""
        if found is not None:
            self._values = found if self._values is None else self._values.with_values_of(found)


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
