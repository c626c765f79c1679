"""An .npz file of images, read as a stream: `images` [`labels`], or Keras' x_train [y_train] [x_test [y_test]].

Labels are numbers of classes or their names; `class_names` may name what the numbers stand for.

An .npz is a zip of .npy files. Each member is unpacked a piece at a time, so that the arrays may be larger than the
memory, and its header is compared with its size before anything is allocated. Pickled objects are never loaded.
"""

import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeblocks.data.dataset import Progress
from edgeblocks.data.decoding import fit_square
from edgeblocks.data.file_identity import file_identity
from edgeblocks.data.image_cache import FORMAT_VERSION, CacheWriter, Content
from edgeblocks.data.labels import Classes, Labels, number_classes
from edgeblocks.data.npy import NpyHeader, Readable, read_npy_header
from edgeblocks.data.picture_files import listed
from edgeblocks.errors import DataError
from edgeblocks.files.untrusted import MalformedFileError, open_regular
from edgeblocks.limits import LONGEST_SIDE, MOST_CLASSES, MOST_IMAGES, MOST_PIXELS, MOST_RESIZED_PIXELS

_CHUNK_VALUES = 2**20
_PIECE_BYTES = 2**20
_MOST_DEFLATED = 1032
"""Deflate, the only packing that numpy uses, makes nothing smaller than this many times."""
_CLASS_NAMES = "class_names"
_LONGEST_NAME_BYTES = 2**12
_ACCEPTED_KEYS = "`images` and optionally `labels`, or x_train, y_train, x_test, y_test"


@dataclass(frozen=True, kw_only=True)
class _Member:
    """An array inside the file, not yet read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def piece_values(self) -> int:
        """Values that are unpacked together."""
        return _PIECE_BYTES // self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Images [n, H, W] or [n, H, W, C] and their labels, checked against each other."""

    images: _Member
    labels: Labels | None
    labels_name: str | None

    def values_per_image(self, image_size: int | None) -> int:
        """The larger of what an image has in the file and in the cache."""
        height, width, num_channels = self.image_shape
        return max(height * width, (image_size or 0) ** 2) * num_channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, *channels = self.images.shape[1:]
        return height, width, channels[0] if channels else 1


class ImageArchive:
    """Reads the images of an .npz file into a cache.

    key: names the cache; changes with the file's path, size, times or place on the disk, and with `image_size`.
    """

    def __init__(self, path: Path, image_size: int | None) -> None:
        self._path, self._image_size = path, image_size
        described = f"npz {FORMAT_VERSION} {image_size} {file_identity(path.stat())}\0"
        self.key = hashlib.sha256(described.encode() + os.fsencode(path)).hexdigest()

    def fill(self, cache: CacheWriter, progress: Progress) -> Content:
        """Unpacks every image into `cache`.

        Raises:
            DataError: the file is damaged, or its arrays are not images with labels.
            StorageError: the cache cannot be written.
        """
        with self._reading(), _BoundedReader(self._path) as file, zipfile.ZipFile(file) as archive:
            parts = self._parts(archive)
            num_images = sum(part.images.shape[0] for part in parts)
            if num_images < 2:
                raise DataError(f"{self._path} holds {num_images} image; at least 2 are needed; add images")
            self._check_number(num_images)
            classes = self._classes(archive, parts)
            shape = self._common_shape(parts)
            cache.begin(shape, num_images, has_labels=parts[0].labels is not None)
            done = 0
            for number, part in enumerate(parts):
                start = 0
                for pixels in self._pixels(archive, part):
                    stop = start + len(pixels)
                    cache.append(pixels, classes.labels[number][start:stop] if classes.labels else None)
                    done, start = done + len(pixels), stop
                    progress(done, num_images, "decoding")
            left_out = self._left_out(archive, parts)
        num_test = parts[1].images.shape[0] if len(parts) > 1 else 0
        return Content(class_names=classes.names, num_test=num_test, left_out=left_out, notes=classes.notes)

    def _parts(self, archive: zipfile.ZipFile) -> list[_Part]:
        found = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        if ("images" in found) == ("x_train" in found):
            raise DataError(
                f"{self._path} holds the arrays {', '.join(sorted(found)) or '(none)'}; wanted {_ACCEPTED_KEYS}; "
                "save it with numpy.savez(path, images=..., labels=...)"
            )
        if "images" in found:
            return [self._part(archive, "images", "labels" if "labels" in found else None)]
        has_test, labelled = "x_test" in found, "y_train" in found
        if ("y_test" in found) != (has_test and labelled):
            raise DataError(
                f"{self._path} holds the arrays {', '.join(sorted(found))}: labels for one part only; "
                "save both y_train and y_test, or neither"
            )
        parts = [self._part(archive, "x_train", "y_train" if labelled else None)]
        if has_test:
            parts.append(self._part(archive, "x_test", "y_test" if labelled else None))
        return parts

    def _part(self, archive: zipfile.ZipFile, images_name: str, labels_name: str | None) -> _Part:
        images = self._member(archive, images_name)
        self._check_images(images)
        labels = None if labels_name is None else self._labels(archive, labels_name, images)
        return _Part(images=images, labels=labels, labels_name=labels_name)

    def _member(self, archive: zipfile.ZipFile, name: str) -> _Member:
        """An array's header, which must agree with the bytes that follow it."""
        info = archive.getinfo(f"{name}.npy")
        self._check_packing(info, name)
        with archive.open(info) as stream:
            header = self._header(stream, name)
        shape, dtype = header.shape, header.dtype
        if dtype.hasobject:
            raise DataError(
                f"{self._path}: `{name}` holds Python objects (dtype {dtype}), which only pickle could load, and a "
                "pickle can run any code; make one array of it, for example with numpy.stack, or of names with "
                "numpy.array(.., str), and save it again"
            )
        if header.fortran_order:
            raise DataError(
                f"{self._path}: `{name}` is stored column by column (Fortran order) and cannot be read image by image; "
                f"save numpy.ascontiguousarray({name})"
            )
        if info.file_size != header.file_bytes:
            raise DataError(
                f"{self._path}: `{name}` of shape {shape} and dtype {dtype} needs {header.file_bytes} bytes and has "
                f"{info.file_size}; the file is damaged: copy or save it again"
            )
        return _Member(name=name, shape=shape, dtype=dtype)

    def _check_packing(self, info: zipfile.ZipInfo, name: str) -> None:
        """That a member can have as many bytes as it claims. Other packings unpack whole blocks of any size at once."""
        present_bytes = self._path.stat().st_size
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{self._path}: `{name}` is packed by the zip method {info.compress_type}; numpy packs by method 8 or "
                "not at all: save it again with numpy.savez or numpy.savez_compressed"
            )
        possible = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _MOST_DEFLATED)
        if info.file_size > possible or info.compress_size > present_bytes:
            raise DataError(
                f"{self._path}: `{name}` claims {info.file_size} bytes, packed in {info.compress_size} bytes of a file "
                f"of {present_bytes}; the file is damaged: copy or save it again"
            )

    def _header(self, stream: Readable, name: str) -> NpyHeader:
        try:
            return read_npy_header(stream)
        except MalformedFileError as error:
            raise DataError(
                f"{self._path}: `{name}` is not an array that numpy saved ({error}); save the file again"
            ) from error

    def _check_images(self, images: _Member) -> None:
        where = f"{self._path}: `{images.name}` has shape {images.shape}"
        wanted = "wanted N x height x width, or N x height x width x channels with 1 or 3 channels"
        if len(images.shape) not in (3, 4):
            raise DataError(f"{where}, {len(images.shape)} dimensions; {wanted}; reshape it")
        if 0 in images.shape:
            raise DataError(f"{where}: it is empty; {wanted}; check how it was saved")
        if len(images.shape) == 4 and images.shape[3] not in (1, 3):
            cure = "drop the transparency with images[..., :3]" if images.shape[3] == 4 else "reshape it"
            if images.shape[1] in (1, 3):
                cure = "move the channels last with images.transpose(0, 2, 3, 1)"
            raise DataError(f"{where}, {images.shape[3]} channels; {wanted}; {cure}")
        if images.dtype.kind not in "buif":
            raise DataError(f"{self._path}: `{images.name}` has dtype {images.dtype}; wanted uint8; convert it")
        self._check_number(images.shape[0])
        height, width = images.shape[1:3]
        most_pixels = MOST_PIXELS if self._image_size is None else MOST_RESIZED_PIXELS
        if max(height, width) > LONGEST_SIDE or height * width > most_pixels:
            raise DataError(
                f"{where}: images of {height} x {width} pixels; at most {most_pixels} pixels and {LONGEST_SIDE} a side "
                "are read; make them smaller"
            )

    def _check_number(self, num_images: int) -> None:
        if num_images > MOST_IMAGES:
            raise DataError(
                f"{self._path} holds {num_images} images, and at most {MOST_IMAGES} are trained on; give a part of them"
            )

    def _labels(self, archive: zipfile.ZipFile, name: str, images: _Member) -> Labels:
        member = self._member(archive, name)
        num_images = images.shape[0]
        if len(member.shape) != 1 and not (len(member.shape) == 2 and member.shape[1] == 1):
            raise DataError(
                f"{self._path}: `{name}` has shape {member.shape}; wanted one class number per image ({num_images},); "
                "turn one-hot rows into numbers with argmax(1)"
            )
        if member.shape[0] != num_images:
            raise DataError(
                f"{self._path}: {num_images} images in `{images.name}` and {member.shape[0]} labels in `{name}`; "
                "save one label per image, in the same order"
            )
        if member.dtype.kind in "US":
            return self._named_labels(archive, member)
        if member.dtype.kind not in "iu":
            raise DataError(
                f"{self._path}: `{name}` has dtype {member.dtype}; wanted whole numbers or names; save it as int64"
            )
        values = np.empty(num_images, dtype=np.int64)
        smallest = largest = num_negative = 0
        for start, piece in self._pieces(archive, member):
            smallest, largest = min(smallest, int(piece.min())), max(largest, int(piece.max()))
            num_negative += int((piece < 0).sum())
            values[start : start + len(piece)] = piece.astype(np.int64)
        if smallest < 0:
            raise DataError(
                f"{self._path}: `{name}` holds {num_negative} negative class numbers, the smallest {smallest}; "
                "number the classes from 0"
            )
        if largest >= MOST_CLASSES:
            raise DataError(
                f"{self._path}: `{name}` goes up to {largest}, which means {largest + 1} classes, and at most "
                f"{MOST_CLASSES} are accepted; number the classes from 0 without gaps"
            )
        return Labels(values)

    def _named_labels(self, archive: zipfile.ZipFile, member: _Member) -> Labels:
        """Labels that are names, numbered as they come."""
        numbers: dict[str, int] = {}
        values = np.empty(member.shape[0], dtype=np.int64)
        for start, piece in self._pieces(archive, member):
            names, places = np.unique(piece, return_inverse=True)
            known = [numbers.setdefault(name, len(numbers)) for name in self._texts(names, member.name)]
            values[start : start + len(piece)] = np.array(known, dtype=np.int64)[places]
            if len(numbers) > MOST_CLASSES:
                raise DataError(
                    f"{self._path}: `{member.name}` holds more than {MOST_CLASSES} different names, the most "
                    "that are accepted; give each image the name of its class"
                )
        return Labels(values, tuple(numbers))

    def _pieces(self, archive: zipfile.ZipFile, member: _Member) -> Iterator[tuple[int, NDArray[Any]]]:
        """An array's values, flat, a piece at a time, and the number of the first one of each."""
        if not 0 < member.dtype.itemsize <= _LONGEST_NAME_BYTES:
            raise DataError(
                f"{self._path}: the texts in `{member.name}` take {member.dtype.itemsize} bytes each, and names of "
                f"classes take 1 to {_LONGEST_NAME_BYTES}; give shorter names"
            )
        num_values = member.shape[0]
        with self._unpacking(archive, member) as take:
            for start in range(0, num_values, member.piece_values):
                yield start, take(min(member.piece_values, num_values - start))

    def _texts(self, values: NDArray[Any], name: str) -> list[str]:
        """Values of an array of texts, or of bytes in UTF-8."""
        try:
            texts = [text.decode("utf-8") if isinstance(text, bytes) else text for text in values.tolist()]
            for text in texts:
                text.encode("utf-8")
        except ValueError as error:  # half a character, or a number that is none
            raise DataError(
                f"{self._path}: `{name}` holds names that are no text in Unicode ({error}); save it as str again"
            ) from error
        return texts

    def _classes(self, archive: zipfile.ZipFile, parts: list[_Part]) -> Classes:
        labels = [part.labels for part in parts if part.labels is not None]
        given = self._class_names(archive) if labels and f"{_CLASS_NAMES}.npy" in archive.namelist() else None
        try:
            return number_classes(labels, given) if labels else Classes(labels=[], names=())
        except ValueError as error:
            raise DataError(f"{self._path}: {error}; mend the labels or the names and save the file again") from error

    def _class_names(self, archive: zipfile.ZipFile) -> tuple[str, ...]:
        member = self._member(archive, _CLASS_NAMES)
        where = f"{self._path}: `{_CLASS_NAMES}`"
        if member.dtype.kind not in "US" or len(member.shape) != 1 or not 0 < member.shape[0] <= MOST_CLASSES:
            raise DataError(
                f"{where} has shape {member.shape} and dtype {member.dtype}; wanted 1 to {MOST_CLASSES} names, the "
                "first that of class 0; save numpy.array(names, str)"
            )
        names = [name for _, piece in self._pieces(archive, member) for name in self._texts(piece, _CLASS_NAMES)]
        if num_twice := len(names) - len(set(names)):
            raise DataError(f"{where}: {num_twice} of its {len(names)} names are there already; make them differ")
        return tuple(names)

    def _left_out(self, archive: zipfile.ZipFile, parts: list[_Part]) -> tuple[str, ...]:
        """Arrays that stand for nothing here, such as labels under another name."""
        used = {name for part in parts for name in (part.images.name, part.labels_name)}
        used |= {_CLASS_NAMES} if parts[0].labels else set()
        beside = sorted({name.removesuffix(".npy") for name in archive.namelist()} - used)
        return (f"{len(beside)} arrays ({listed(beside)})",) if beside else ()

    def _common_shape(self, parts: list[_Part]) -> tuple[int, int, int]:
        """The (H, W, C) that all images have in the cache."""
        shapes = [self._cached_shape(part) for part in parts]
        if len(set(shapes)) > 1:
            raise DataError(
                f"{self._path}: the images of `x_train` are {_sides(shapes[0])} and those of `x_test` "
                f"{_sides(shapes[1])}; make them alike, or pass --set image_size=N if only height and width differ"
            )
        return shapes[0]

    def _cached_shape(self, part: _Part) -> tuple[int, int, int]:
        height, width, num_channels = part.image_shape
        size = self._image_size
        return (height, width, num_channels) if size is None else (size, size, num_channels)

    def _pixels(self, archive: zipfile.ZipFile, part: _Part) -> Iterator[NDArray[np.uint8]]:
        """Images uint8 [n, H, W, C] as they go into the cache, a piece at a time."""
        values, num_images = _ValueRange(part.images), part.images.shape[0]
        num_together = max(1, _CHUNK_VALUES // part.values_per_image(self._image_size))
        with self._unpacking(archive, part.images) as take:
            for start in range(0, num_images, num_together):
                pixels = np.empty((min(num_together, num_images - start), *part.image_shape), dtype=np.uint8)
                flat = pixels.reshape(-1)
                for place in range(0, flat.size, part.images.piece_values):
                    count = min(part.images.piece_values, flat.size - place)
                    flat[place : place + count] = values.to_uint8(take(count))
                yield pixels if self._image_size is None else _resized(pixels, self._image_size)
        values.check(self._path)

    @contextmanager
    def _unpacking(self, archive: zipfile.ZipFile, member: _Member) -> Iterator[Callable[[int], NDArray[Any]]]:
        """A function that gives the array's next values, flat; nothing is allocated that has not been read."""
        with archive.open(f"{member.name}.npy") as stream:
            self._header(stream, member.name)

            def take(count: int) -> NDArray[Any]:
                wanted_bytes = count * member.dtype.itemsize
                data = stream.read(wanted_bytes)
                if len(data) != wanted_bytes:
                    raise EOFError(f"`{member.name}` ends {wanted_bytes - len(data)} bytes early")
                return np.frombuffer(data, dtype=member.dtype)

            yield take
            stream.read(1)  # at the end, zipfile compares the checksum

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns the ways in which a zip can be broken (encrypted included: RuntimeError) into one."""
        try:
            yield
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            UnicodeDecodeError,
            EOFError,
            OSError,
            RuntimeError,
        ) as error:
            raise DataError(
                f"{self._path} cannot be read as an .npz file (a zip of arrays): {error}; it is damaged, cut short or "
                "of another kind: copy or save it again with numpy.savez"
            ) from error


class _BoundedReader(io.BufferedReader):
    """A file of which no more than a piece is read at once; zipfile would take a table of contents of any size."""

    def __init__(self, path: Path) -> None:
        file = open_regular(path)
        self._num_bytes = os.fstat(file.fileno()).st_size
        super().__init__(file.detach())

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._num_bytes - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > _PIECE_BYTES:
            raise zipfile.BadZipFile(f"its table of contents has {wanted} bytes, and at most {_PIECE_BYTES} are read")
        return super().read(size)


class _ValueRange:
    """Converts pixel values to bytes; keeps account of those out of range, to report them all together at the end."""

    def __init__(self, member: _Member) -> None:
        self._member = member
        self._is_float = member.dtype.kind == "f"
        self._limit = 1 if self._is_float else 255
        self._smallest, self._largest = math.inf, -math.inf
        self._num_nonfinite, self._num_values = 0, 0
        self._first_nonfinite: tuple[int, ...] = ()

    def to_uint8(self, chunk: NDArray[Any]) -> NDArray[np.uint8]:
        if chunk.dtype == np.uint8:
            return chunk
        if chunk.dtype.kind == "b":
            return chunk.astype(np.uint8) * np.uint8(255)
        if self._is_float:
            with np.errstate(all="ignore"):  # longer floats may not fit, and are then infinite
                chunk = self._finite(chunk.astype(np.float64))
        self._smallest = min(self._smallest, chunk.min().item())
        self._largest = max(self._largest, chunk.max().item())
        self._num_values += len(chunk)
        clipped = chunk.clip(0, self._limit)
        return np.rint(clipped * 255).astype(np.uint8) if self._is_float else clipped.astype(np.uint8)

    def _finite(self, chunk: NDArray[np.float64]) -> NDArray[np.float64]:
        bad = ~np.isfinite(chunk)
        num_bad = int(bad.sum())
        if num_bad and not self._num_nonfinite:
            place = self._num_values + int(bad.argmax())
            self._first_nonfinite = tuple(int(index) for index in np.unravel_index(place, self._member.shape))
        self._num_nonfinite += num_bad
        return np.where(bad, 0.0, chunk) if num_bad else chunk

    def check(self, path: Path) -> None:
        where = f"{path}: `{self._member.name}` ({self._member.dtype})"
        if self._num_nonfinite:
            first = ", ".join(str(index) for index in self._first_nonfinite)
            raise DataError(
                f"{where} holds {self._num_nonfinite} values that are NaN or infinite, the first at [{first}]; "
                "find where they come from and save it again"
            )
        if self._smallest < 0 or self._largest > self._limit:
            wanted = "0 to 1 for floating-point numbers" if self._is_float else "0 to 255 for whole numbers"
            raise DataError(
                f"{where} has values from {self._smallest:g} to {self._largest:g}; wanted {wanted}; "
                "rescale it, or save it as uint8 from 0 to 255"
            )


def _resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, C] -> [n, size, size, C]."""
    num_images, _, _, num_channels = pixels.shape
    squares = np.empty((num_images, size, size, num_channels), dtype=np.uint8)
    for square, image in zip(squares, pixels, strict=True):
        picture = Image.fromarray(image[..., 0] if num_channels == 1 else image)
        square[...] = np.asarray(fit_square(picture, size)).reshape(square.shape)
    return squares


def _sides(shape: tuple[int, int, int]) -> str:
    return " x ".join(str(side) for side in shape)
