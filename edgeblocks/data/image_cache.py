"""Decoded images on the disk: images.npy [N, H, W, C], labels.npy [N], moments.npy [N, 2] and meta.json.

The moments, sum and sum of squares of each image, give the statistics of any part without a look at the pixels, and
are compared with every image that is read.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, open_or_build, read_meta, read_rows
from edgeblocks.data.deep_grey import GreyRange
from edgeblocks.errors import StorageError
from edgeblocks.limits import MOST_CLASSES, MOST_IMAGES, MOST_PIXELS, MOST_UNREADABLE

FORMAT_VERSION = 3
_KIND = CacheKind(
    name="image cache",
    content="decoded images",
    row="an image",
    remedy="choose a smaller image_size",
    version=FORMAT_VERSION,
)
_SQUARES_CHUNK = 2**20
_MOST_COMPARED = 2**19
"""Images that are looked through for equal ones: each takes 8 bytes of memory while the cache is built."""
_LONGEST_NOTE = 2**12
_MOST_NOTES = 100


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a reader knows about its images beside the pixels. The last `num_test` images are its own test part.

    left_out: what the source holds beside them that is not read, each kind with its number.
    notes: what the user should know of how they were read, one sentence each.
    deep_range: values of grey of more than 8 bits that became 0 and 255; None where the upper eight bits of 16 did.
    num_of_several: images from files that hold more than one, of which the first was taken.
    """

    class_names: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    num_test: int = 0
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    deep_range: GreyRange | None = None
    num_of_several: int = 0


@dataclass(frozen=True, kw_only=True)
class Doubts:
    """What in the pixels may be a slip of who made the images.

    brightest: the largest value of all.
    num_again: images that are there already, value by value.
    num_in_several_classes: images of which an equal one has another label.
    """

    brightest: int = 255
    num_again: int = 0
    num_in_several_classes: int = 0


class ImageFile:
    """images.npy of a finished cache. `view` is the map, uint8 [N, H, W, C]; `read` copies out of the file."""

    def __init__(self, folder: Path) -> None:
        self._images = RowFile(folder / "images.npy", np.uint8, row=_KIND.row, most_rows=MOST_IMAGES)
        self._moments = RowFile(folder / "moments.npy", np.int64, row=_KIND.row, most_rows=MOST_IMAGES)
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
    """A finished cache, or images in memory, which have no file.

    images: uint8 [N, H, W, C], the map of a cache.
    labels: int64 [N], None when unconditional.
    moments: int64 [N, 2], sum and sum of squares of each image's pixel values.
    """

    images: NDArray[np.uint8]
    image_file: ImageFile | None
    labels: NDArray[np.int64] | None
    moments: NDArray[np.int64]
    content: Content
    fingerprint: str
    doubts: Doubts = Doubts()


class CacheWriter:
    """An image cache that is being built: `begin`, `append` often, and `finish`. `begin` again starts over.

    Raises (all methods):
        StorageError: the disk is full or refuses to be written.
    """

    def __init__(self, files: CacheFiles) -> None:
        self._files = files
        self._image_shape: tuple[int, ...] = ()
        self._has_labels = False
        self._num_images = 0
        self._pixel_hash, self._label_hash = hashlib.sha256(), hashlib.sha256()
        self._digests, self._labels, self._brightest = bytearray(), bytearray(), 0

    def begin(self, image_shape: tuple[int, int, int], max_images: int, *, has_labels: bool) -> None:
        """Opens the files for up to `max_images` images of `image_shape` (H, W, C), after a look at the free space."""
        self._image_shape, self._has_labels, self._num_images = image_shape, has_labels, 0
        self._pixel_hash, self._label_hash = hashlib.sha256(), hashlib.sha256()
        self._digests, self._labels, self._brightest = bytearray(), bytearray(), 0
        arrays: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "images.npy": (np.uint8, image_shape),
            "moments.npy": (np.int64, (2,)),
        }
        if has_labels:
            arrays["labels.npy"] = (np.int64, ())
        self._files.begin(arrays, max_images * (math.prod(image_shape) + (24 if has_labels else 16)))

    def append(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        """Adds images [n, H, W, C] and, when the set has them, labels [n]."""
        assert images.shape[1:] == self._image_shape and (labels is not None) == self._has_labels
        images = np.ascontiguousarray(images)
        self._pixel_hash.update(images.data)
        self._num_images += len(images)
        self._files.append("images.npy", images)
        self._files.append("moments.npy", image_moments(images))
        self._look_at(images, labels)
        if labels is not None:
            self._label_hash.update(np.ascontiguousarray(labels).data)
            self._files.append("labels.npy", labels)

    def _look_at(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        self._brightest = max(self._brightest, int(images.max(initial=0)))
        if self._num_images <= _MOST_COMPARED:
            for image in images:
                self._digests += hashlib.blake2b(image.data, digest_size=8).digest()
            self._labels += b"" if labels is None else labels.astype(np.int32).tobytes()

    def _doubts(self) -> Doubts:
        if self._num_images > _MOST_COMPARED:
            return Doubts(brightest=self._brightest)
        _, group, sizes = np.unique(
            np.frombuffer(self._digests, dtype=np.uint64), return_inverse=True, return_counts=True
        )
        in_several = 0
        if self._has_labels:
            labels = np.frombuffer(self._labels, dtype=np.int32)
            first = np.zeros(len(sizes), dtype=np.int32)
            first[group] = labels
            differs = np.zeros(len(sizes), dtype=bool)
            differs[group[first[group] != labels]] = True
            in_several = int(differs[group].sum())
        return Doubts(brightest=self._brightest, num_again=len(group) - len(sizes), num_in_several_classes=in_several)

    def finish(self, content: Content) -> None:
        """Writes what is missing and flushes everything to the disk."""
        shape = (self._num_images, *self._image_shape)
        content = replace(content, left_out=_shortened(content.left_out), notes=_shortened(content.notes))
        label_hash = self._label_hash.hexdigest() if self._has_labels else None
        self._files.finish(
            {
                "shape": shape,
                "label_sha256": label_hash,
                "fingerprint": content_fingerprint(shape, self._pixel_hash.hexdigest(), label_hash, content),
                "content": asdict(content),
                "doubts": asdict(self._doubts()),
            }
        )


def _shortened(notes: Sequence[str]) -> tuple[str, ...]:
    """Notes of a length that is believed when they are read: names in them may be of any."""
    return tuple(note[:_LONGEST_NOTE] for note in notes[:_MOST_NOTES])


def open_or_build_images(cache_dir: Path, key: str, fill: Callable[[CacheWriter], Content]) -> StoredImages:
    """The cache of that key, built by `fill` when there is none or a damaged one.

    Raises:
        StorageError: the cache cannot be written or read.
    """

    def build(files: CacheFiles) -> None:
        writer = CacheWriter(files)
        writer.finish(fill(writer))

    return open_or_build(_KIND, cache_dir, key, build=build, read=_read_cache)


def open_images_of(folder: Path) -> StoredImages | None:
    """A finished cache; None where it is damaged, or of something else."""
    try:
        return _read_cache(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


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
            # 255^2 is the largest square, and uint16 holds it.
            moments[start : start + rows, 1] += np.square(part, dtype=np.uint16).sum(axis=1, dtype=np.int64)
    return moments


def content_fingerprint(shape: tuple[int, ...], pixel_hash: str, label_hash: str | None, content: Content) -> str:
    """sha256 over what a training run sees, from the hashes of the pixels and labels."""
    seen = [list(shape), pixel_hash, label_hash, list(content.class_names), content.num_test]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _read_cache(folder: Path) -> StoredImages:
    """The cache in `folder`.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it is not what `CacheWriter` wrote.
    """
    meta = read_meta(folder, FORMAT_VERSION)
    image_file = ImageFile(folder)
    num_images, height, width, num_channels = image_file.view.shape
    if list(image_file.view.shape) != meta["shape"] or not 0 < num_channels * height * width <= 3 * MOST_PIXELS:
        raise ValueError("the images have another shape")
    labels = read_rows(folder / "labels.npy", (num_images,), np.int64) if "labels.npy" in meta["file_bytes"] else None
    if labels is not None and hashlib.sha256(labels.data).hexdigest() != meta["label_sha256"]:
        raise ValueError("the labels are damaged")
    moments = read_rows(folder / "moments.npy", (num_images, 2), np.int64)
    if not _are_moments(moments, num_channels * height * width):
        raise ValueError("the moments are of no images")
    fingerprint = meta["fingerprint"]
    if not isinstance(fingerprint, str):
        raise ValueError("a fingerprint is a text")
    return StoredImages(
        images=image_file.view,
        image_file=image_file,
        labels=labels,
        moments=moments,
        content=_content(meta["content"], num_images, labels),
        fingerprint=fingerprint,
        doubts=Doubts(**{name: _count(meta["doubts"][name]) for name in asdict(Doubts())}),
    )


def _content(content: object, num_images: int, labels: NDArray[np.int64] | None) -> Content:
    """What meta.json says of the images, compared with the arrays.

    Raises:
        ValueError, LookupError, TypeError: it is not what `CacheWriter` wrote.
    """
    if not isinstance(content, dict):
        raise ValueError("the content is no object")
    class_names, unreadable, num_test = content["class_names"], content["unreadable"], content["num_test"]
    for names, most in ((class_names, MOST_CLASSES), (unreadable, MOST_UNREADABLE)):
        if not isinstance(names, list) or len(names) > most or not all(isinstance(name, str) for name in names):
            raise ValueError("names are a list of texts")
    for notes in (content["left_out"], content["notes"]):
        if not isinstance(notes, list) or len(notes) > _MOST_NOTES:
            raise ValueError("notes are a list of texts")
        if not all(isinstance(note, str) and len(note) <= _LONGEST_NOTE for note in notes):
            raise ValueError("a note is a short text")
    if type(num_test) is not int or not 0 <= num_test < num_images:
        raise ValueError("the test part is a part")
    if (labels is None) != (not class_names):
        raise ValueError("labels are numbers of classes")
    if labels is not None and not (labels.min() >= 0 and labels.max() < len(class_names)):
        raise ValueError("labels are numbers of classes")
    return Content(
        class_names=tuple(class_names),
        unreadable=tuple(unreadable),
        num_test=num_test,
        left_out=tuple(content["left_out"]),
        notes=tuple(content["notes"]),
        deep_range=_deep_range(content["deep_range"]),
        num_of_several=_count(content["num_of_several"]),
    )


def _deep_range(told: object) -> GreyRange | None:
    if told is None:
        return None
    if not isinstance(told, list) or len(told) != 2 or any(type(end) is not int or abs(end) >= 2**32 for end in told):
        raise ValueError("a range has two ends")
    return GreyRange(*told)


def _count(told: object) -> int:
    if type(told) is not int or not 0 <= told < 2**63:
        raise ValueError("a count is a number")
    return told


def _are_moments(moments: NDArray[np.int64], values_per_image: int) -> bool:
    """Whether each row can be the sum and the sum of squares of so many values from 0 to 255."""
    sums, squares = moments.T
    possible = (sums >= 0) & (sums <= 255 * values_per_image) & (squares >= sums) & (squares <= 255 * sums)
    # n (sum of squares) >= (sum)^2, Cauchy and Schwarz; in float64, as the products pass int64 in large images.
    spread = squares.astype(np.float64) * values_per_image >= sums.astype(np.float64) ** 2 * (1 - 1e-9)
    return bool((possible & spread).all())
