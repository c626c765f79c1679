"""Images to train on: the built-in digits, a folder, or an .npz file, behind one small type.

A folder or an .npz may be larger than the memory budget. It is therefore decoded once, image by image, into a cache on
the disk, and a batch is read from there; only the labels and the indices of the two parts stay in memory.
"""

import hashlib
import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeblocks.data.archive import ImageArchive
from edgeblocks.data.dataset import Progress, silent
from edgeblocks.data.decoding import fit_square
from edgeblocks.data.deep_grey import GreyRange
from edgeblocks.data.folder import ImageFolder
from edgeblocks.data.image_cache import (
    Content,
    ImageFile,
    StoredImages,
    content_fingerprint,
    image_moments,
    open_images_of,
    open_or_build_images,
)
from edgeblocks.data.image_reading import doubtful, reading, untrained
from edgeblocks.data.order import BatchOrder
from edgeblocks.data.python_data import is_python_data, python_folder
from edgeblocks.errors import ConfigError, DataError

_SPLIT_STREAM = 0x5B117  # keeps the split's random numbers apart from everything else drawn from the user's seed
_MAX_HOLD_OUT = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images with their training and hold-out parts.

    images: uint8 [N, H, W, C]; memory-mapped for a folder or an .npz, where every page that is looked at counts as
        resident memory: use `gather` to read.
    labels: int64 [N], None when unconditional.
    class_names: one name a class, () when unconditional.
    train, held_out: int64 indices, ascending, without a common element.
    mean, std: of the pixel values, scaled to [0, 1], of the training part, over all components together.
    unreadable: the image files that were skipped, relative to the folder.
    fingerprint: sha256 of pixels, labels and class names, in hexadecimal: the same wherever the data lies.
    resident_bytes: what the set keeps in memory.
    reading: what was read and what was left out with its numbers, in one line.
    warnings: what may be a slip of who made the set, and what was changed of it, one sentence each.
    deep_range: values of grey of more than 8 bits that became 0 and 255; None where the upper eight bits of 16 did.
    image_file: where `gather` reads from; None when the images are in memory.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    mean: float
    std: float
    unreadable: tuple[str, ...]
    fingerprint: str
    source: str
    resident_bytes: int
    reading: str
    image_file: ImageFile | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    deep_range: GreyRange | None = None

    def pixels(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copies of the images uint8 [b, H, W, C] at `indices`; leaves nothing else resident.

        Raises:
            StorageError: the cache cannot be read any more.
        """
        indices = np.asarray(indices, dtype=np.int64)
        return self.images[indices] if self.image_file is None else self.image_file.read(indices)

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
        """`pixels`, and labels int64 [b]; leaves nothing else resident.

        Raises:
            StorageError: the cache cannot be read any more.
        """
        return self.pixels(indices), None if self.labels is None else self.labels[np.asarray(indices, dtype=np.int64)]

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an example."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    @property
    def tokenizer(self) -> None:
        """Images are no text."""
        return None

    @property
    def has_held_out(self) -> bool:
        return len(self.held_out) > 0

    @property
    def train_examples(self) -> int:
        return len(self.train)

    def order(self, *, batch: int, seed: int, block: int) -> BatchOrder:
        """The order in which a block sees the training part."""
        return BatchOrder(self.train, batch=batch, seed=seed, block=block)

    def evaluation_indices(self, most: int) -> NDArray[np.int64]:
        """The first of the hold-out part, else of the training part."""
        return (self.held_out if self.has_held_out else self.train)[:most]

    def describe(self) -> str:
        """How much there is, for people."""
        _, height, width, channels = self.images.shape
        classes = f"{len(self.class_names)} classes" if self.class_names else "no classes"
        return (
            f"{len(self.train)} training and {len(self.held_out)} hold-out images of {height}x{width}x{channels}, "
            f"{classes}"
        )

    def batch_resident_bytes(self, batch: int) -> int:
        """What a call of `gather` with `batch` indices adds to the resident memory, in bytes."""
        label_bytes = 0 if self.labels is None else self.labels.itemsize
        return batch * (math.prod(self.images.shape[1:]) + label_bytes)


def open_images(
    source: str,
    *,
    image_size: int | None,
    hold_out: float,
    seed: int,
    cache_dir: Path,
    progress: Progress | None = None,
    room_bytes: int | None = None,
) -> ImageSet:
    """The images of `source`: "digits", a folder (one sub-folder per class, or flat) or an .npz file.

    image_size: side of the square every image is cut and resized to; None keeps the size, if it is the same for all.
    hold_out: share of the images in the hold-out part, 0 to 0.5; ignored when the .npz brings its own test part.
    cache_dir: where a folder or an .npz is decoded to, once; the next call with the same files finds it there.
    progress: called with (done, total, what), for example (12, 500, "decoding").
    room_bytes: memory that decoding one picture may take; None bounds its pixels alone.

    Raises:
        ConfigError: image_size or hold_out is out of range.
        DataError: the data cannot be trained on.
        StorageError: the cache cannot be written or read.
        NoRoomToReadError: a picture takes more than `room_bytes` to decode.
    """
    _check_settings(image_size, hold_out)
    if source == "digits":
        return _open_digits(image_size, hold_out, seed)
    if is_python_data(source):
        return _image_set(_stored_from_python(source, image_size, cache_dir), source, hold_out, seed)
    reader = _reader(source, image_size, room_bytes)
    stored = open_or_build_images(cache_dir, reader.key, lambda cache: reader.fill(cache, progress or silent))
    beside = reader.left_out.described() if isinstance(reader, ImageFolder) else ()
    warnings = reader.warnings if isinstance(reader, ImageFolder) else ()
    return _image_set(stored, source, hold_out, seed, left_out=beside, warnings=warnings)


def _stored_from_python(source: str, image_size: int | None, cache_dir: Path) -> StoredImages:
    """What a program gave, which is in the cache or nowhere.

    Raises:
        DataError: it is not there, or has another size.
    """
    stored = open_images_of(python_folder(source, cache_dir))
    if stored is None:
        raise DataError(
            f"data '{source}' in the cache {cache_dir} are no images, or damaged; give them again from Python"
        )
    height, width = stored.images.shape[1:3]
    if image_size is not None and (height, width) != (image_size, image_size):
        raise DataError(
            f"data '{source}' were read at {height} x {width} pixels, and image_size is {image_size}; give them again "
            "from Python with that image_size"
        )
    return stored


def split(num_images: int, hold_out: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, held_out) indices, ascending. At least one image is in each part, none is held out when `hold_out` is 0.

    >>> train, held_out = split(5, 0.4, seed=0)
    >>> len(train), len(held_out)
    (3, 2)
    """
    num_held_out = min(num_images - 1, max(1, round(hold_out * num_images))) if hold_out > 0 else 0
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(num_images).astype(np.int64)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def with_every_class(
    train: NDArray[np.int64], held_out: NDArray[np.int64], labels: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The two parts, where the first held-out image of a class without any in the training part has moved there.

    >>> with_every_class(np.array([0, 1]), np.array([2, 3, 4]), np.array([0, 0, 0, 1, 1]))
    (array([0, 1, 3]), array([2, 4]))
    """
    if labels is None:
        return train, held_out
    classes, firsts = np.unique(labels[held_out], return_index=True)
    needed = firsts[~np.isin(classes, labels[train])]
    return np.sort(np.concatenate([train, held_out[needed]])), np.delete(held_out, needed)


def _check_settings(image_size: int | None, hold_out: float) -> None:
    problems = []
    if image_size is not None and image_size < 1:
        problems.append(f"image_size is {image_size}; it must be at least 1 pixel (--set image_size=64)")
    if not 0 <= hold_out <= _MAX_HOLD_OUT:
        problems.append(f"hold_out is {hold_out}; it is the share of images kept for validation, 0 to {_MAX_HOLD_OUT}")
    if problems:
        raise ConfigError(*problems)


def _reader(source: str, image_size: int | None, room_bytes: int | None) -> ImageFolder | ImageArchive:
    accepted = 'give "digits" (built in), a folder of images, or an .npz file'
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return ImageFolder(path.resolve(), image_size, room_bytes)
        if not path.exists():
            raise DataError(f"data '{source}' does not exist; {accepted}")
        if not path.is_file() or path.suffix.lower() != ".npz":
            is_text = path.suffix.lower() in (".txt", ".jsonl", ".parquet")
            hint = "; text is for the families mdlm, ar and looped: edgeblocks train mdlm --data .." if is_text else ""
            raise DataError(f"data '{source}' is neither a folder nor an .npz file; {accepted}{hint}")
        return ImageArchive(path.resolve(), image_size)
    except OSError as error:
        raise DataError(f"data '{source}' cannot be looked at: {error.strerror}; {accepted}") from error
    except (RuntimeError, ValueError) as error:  # nobody's home folder; a name that no file can have
        raise DataError(f"data '{source}' cannot be looked at: {error}; {accepted}") from error


def _open_digits(image_size: int | None, hold_out: float, seed: int) -> ImageSet:
    with importlib.resources.files("edgeblocks.data").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images: NDArray[np.uint8] = arrays["images"]
        labels: NDArray[np.int64] = arrays["labels"].astype(np.int64)
    if image_size is not None:
        images = np.stack([np.asarray(fit_square(Image.fromarray(image), image_size)) for image in images])
    images = images[..., None]
    content = Content(class_names=tuple("0123456789"))
    stored = StoredImages(
        images=images,
        image_file=None,
        labels=labels,
        moments=image_moments(images),
        content=content,
        fingerprint=content_fingerprint(
            images.shape, hashlib.sha256(images.data).hexdigest(), hashlib.sha256(labels.data).hexdigest(), content
        ),
    )
    return _image_set(stored, "digits", hold_out, seed)


def _image_set(
    stored: StoredImages,
    source: str,
    hold_out: float,
    seed: int,
    *,
    left_out: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> ImageSet:
    images, labels, content = stored.images, stored.labels, stored.content
    num_images = len(images)
    if num_images < 2:
        raise DataError(f"data '{source}' has {num_images} usable image; at least 2 are needed")
    notes = [*warnings, *content.notes, *doubtful(stored)]
    if content.num_test:
        train, held_out = np.split(np.arange(num_images, dtype=np.int64), [num_images - content.num_test])
    else:
        train, held_out = split(num_images, hold_out, seed)
        train, held_out = with_every_class(train, held_out, labels)
        if hold_out and not len(held_out):
            notes.append("no image is held out: each one is the only one of its class; give more images a class")
    notes += untrained(labels, train, content.class_names)
    mean, std = _mean_std(stored.moments[train], math.prod(images.shape[1:]), source)
    in_memory: list[NDArray[Any]] = [train, held_out]
    in_memory += [images] if stored.image_file is None else []
    in_memory += [] if labels is None else [labels]
    return ImageSet(
        images=images,
        labels=labels,
        class_names=content.class_names,
        train=train,
        held_out=held_out,
        mean=mean,
        std=std,
        unreadable=content.unreadable,
        fingerprint=stored.fingerprint,
        source=source,
        reading=reading(stored, left_out),
        resident_bytes=sum(array.nbytes for array in in_memory),
        image_file=stored.image_file,
        warnings=tuple(notes),
        deep_range=content.deep_range,
    )


def _mean_std(moments: NDArray[np.int64], pixels_per_image: int, source: str) -> tuple[float, float]:
    """Mean and standard deviation in [0, 1] from per-image sums [n, 2], exact up to the last division."""
    count = len(moments) * pixels_per_image
    total, total_squares = (int(column) for column in moments.sum(axis=0))
    variance_numerator = count * total_squares - total * total
    if variance_numerator <= 0:
        raise DataError(
            f"data '{source}': all {count} pixel values of the {len(moments)} training images are {total // count}; "
            "there is nothing to learn from a constant; check how the images were made"
        )
    return total / (255 * count), math.sqrt(variance_numerator / count**2) / 255
