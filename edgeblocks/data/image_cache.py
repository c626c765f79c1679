"""Decoded images on the disk: images.npy [N, H, W, C], labels.npy [N], moments.npy [N, 2] and meta.json.

The moments, sum and sum of squares of each image, give the statistics of any part without a look at the pixels, and
are compared with every image that is read.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, open_or_build, read_meta, read_rows
from edgeblocks.errors import StorageError
from edgeblocks.limits import MOST_CLASSES, MOST_IMAGES, MOST_PIXELS, MOST_UNREADABLE

FORMAT_VERSION = 2
_KIND = CacheKind(
    name="image cache",
    content="decoded images",
    row="an image",
    remedy="choose a smaller image_size",
    version=FORMAT_VERSION,
)
_SQUARES_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a reader knows about its images beside the pixels. The last `num_test` images are its own test part."""

    class_names: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    num_test: int = 0


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

    def begin(self, image_shape: tuple[int, int, int], max_images: int, *, has_labels: bool) -> None:
        """Opens the files for up to `max_images` images of `image_shape` (H, W, C), after a look at the free space."""
        self._image_shape, self._has_labels, self._num_images = image_shape, has_labels, 0
        self._pixel_hash, self._label_hash = hashlib.sha256(), hashlib.sha256()
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
        if labels is not None:
            self._label_hash.update(np.ascontiguousarray(labels).data)
            self._files.append("labels.npy", labels)

    def finish(self, content: Content) -> None:
        """Writes what is missing and flushes everything to the disk."""
        shape = (self._num_images, *self._image_shape)
        label_hash = self._label_hash.hexdigest() if self._has_labels else None
        self._files.finish(
            {
                "shape": shape,
                "label_sha256": label_hash,
                "fingerprint": content_fingerprint(shape, self._pixel_hash.hexdigest(), label_hash, content),
                "content": asdict(content),
            }
        )


def open_or_build_images(cache_dir: Path, key: str, fill: Callable[[CacheWriter], Content]) -> StoredImages:
    """The cache of that key, built by `fill` when there is none or a damaged one.

    Raises:
        StorageError: the cache cannot be written or read.
    """

    def build(files: CacheFiles) -> None:
        writer = CacheWriter(files)
        writer.finish(fill(writer))

    return open_or_build(_KIND, cache_dir, key, build=build, read=_read_cache)


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
    labels = read_rows(folder / "labels.npy", (num_images,)) if "labels.npy" in meta["file_bytes"] else None
    if labels is not None and hashlib.sha256(labels.data).hexdigest() != meta["label_sha256"]:
        raise ValueError("the labels are damaged")
    moments = read_rows(folder / "moments.npy", (num_images, 2))
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
    # n (sum of squares) >= (sum)^2, Cauchy and Schwarz; in float64, as the products pass int64 in large images.
    spread = squares.astype(np.float64) * values_per_image >= sums.astype(np.float64) ** 2 * (1 - 1e-9)
    return bool((possible & spread).all())
