"""Data that a program holds: arrays, pictures, tensors, rows and strings, read once into the cache.

A source from Python is named `python:` and the sha256 of its content. A run keeps that name, and is resumed and
evaluated like any other as long as the cache has the data; where it has not, they are given again.
"""

import hashlib
import math
import shutil
import tempfile
import uuid
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, open_or_build, publish, read_meta
from edgeblocks.data.dataset import Progress
from edgeblocks.data.python_objects import (
    ACCEPTED_IMAGES,
    columns_of,
    given_images,
    is_frame,
    is_table,
    items_of,
    listed,
    refuse_several_sets,
    sides,
)
from edgeblocks.data.python_pixels import pixels_of
from edgeblocks.errors import DataError, StorageError
from edgeblocks.files.untrusted import shown
from edgeblocks.tasks import PYTHON_DATA

TEXT_FILE = "text.txt"
_TEXT = CacheKind(name="text cache", content="texts", row="a text", remedy="give less text", version=1)
_PIECE_BYTES = 2**20
_AGAIN = "give them again from Python: edgeblocks.resume(RUN, data=..), or load(RUN).evaluate(data=..)"


class StoredTexts(NamedTuple):
    """Texts that a program gave, in the cache: their file, how many have something in them, and how many are empty."""

    path: Path
    texts: int
    empty: int


def is_python_data(source: str) -> bool:
    """Whether a source is data that a program gave."""
    return source.startswith(PYTHON_DATA)


def python_folder(source: str, cache_dir: Path) -> Path:
    """Where the cache has them.

    Raises:
        DataError: it has not.
    """
    digest = source.removeprefix(PYTHON_DATA)
    folder = cache_dir / f"python-{digest}"
    if not (digest.isalnum() and folder.is_dir()):
        raise DataError(
            f"data '{source}' came from a Python program and are not in the cache {cache_dir} (any more); {_AGAIN}"
        )
    return folder


def stored_texts(source: str, cache_dir: Path) -> StoredTexts:
    """The texts of a source that a program gave.

    Raises:
        DataError: the cache has them not, or damaged, or has images under that name.
    """
    folder = python_folder(source, cache_dir)
    if not (folder / TEXT_FILE).exists():
        raise DataError(f"data '{source}' are images; give text, such as a list of strings, or another family")
    try:
        meta = read_meta(folder, _TEXT.version)
        return StoredTexts(folder / TEXT_FILE, int(meta["texts"]), int(meta["empty"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"data '{source}' are damaged in the cache {cache_dir}; {_AGAIN}") from error


def store_texts(data: object, *, cache_dir: Path, text_key: str) -> str:
    """The source of some texts, which are now in the cache: strings, or rows that have one under `text_key`.

    Raises:
        DataError: they are no texts.
        StorageError: the cache cannot be written.
    """

    def build(files: CacheFiles) -> None:
        digest, waiting, texts, empty = hashlib.sha256(), bytearray(), 0, 0
        for text in _texts(data, text_key):
            if not text:
                empty += 1
                continue
            waiting += b"\n" + text.encode() if texts else text.encode()
            texts += 1
            if len(waiting) >= _PIECE_BYTES:
                digest.update(waiting)
                files.extend(TEXT_FILE, bytes(waiting))
                waiting.clear()
        digest.update(waiting)
        files.extend(TEXT_FILE, bytes(waiting))
        files.finish({"sha256_of_text": digest.hexdigest(), "texts": texts, "empty": empty})

    def read(folder: Path) -> str:
        return str(read_meta(folder, _TEXT.version)["sha256_of_text"])

    key = uuid.uuid4().hex
    digest = open_or_build(_TEXT, cache_dir, key, build=build, read=read)
    return _renamed(cache_dir, key, digest, lambda folder: bool(read_meta(folder, _TEXT.version)))


def _texts(data: Any, text_key: str) -> Iterator[str]:
    """The texts; "" where one is missing in its row or column."""
    data, is_column = (columns_of(data) if is_frame(data) else data), False
    if isinstance(data, dict):
        refuse_several_sets(data)
        if text_key not in data:
            raise DataError(f"data is a dict of {listed(data)}, and has no {text_key!r}; name its texts with text_key=")
        data, is_column = data[text_key], True
    elif is_table(data) and data.column_names is not None and text_key not in data.column_names:
        raise DataError(
            f"the data set has no column {text_key!r}, but {listed(data.column_names)}; name the one of the text "
            "with text_key="
        )
    for number, item in enumerate(items_of(data, "texts: give strings, or rows with a text each")):
        if isinstance(item, dict) and text_key not in item:
            raise DataError(
                f"row {number} of the data has no {text_key!r}, but {listed(item)}; name the one of the text with "
                "text_key="
            )
        text = item[text_key] if isinstance(item, dict) else item
        if (is_column or isinstance(item, dict)) and _is_missing(text):
            text = ""
        if not isinstance(text, str):
            raise DataError(
                f"text {number} of the data is {shown(text)} ({type(item).__name__}), not a string; give strings, or "
                f"rows with a string under text_key={text_key!r}"
            )
        if "\0" in text:
            raise DataError(
                f"text {number} of the data holds a NUL, as binary data do; remove it: text.replace('\\0', '')"
            )
        yield text.encode("utf-8", "replace").decode()


def _is_missing(text: object) -> bool:
    """Whether a cell is empty: pandas has NaN there, or a value of its own."""
    return text is None or (isinstance(text, float) and math.isnan(text)) or type(text).__name__ == "NAType"


def store_images(
    data: object, *, cache_dir: Path, image_size: int | None, room_bytes: int | None, progress: Progress
) -> str:
    """The source of some images, which are now in the cache; see `docs/python.md` for what they may be.

    Raises:
        DataError: they are no images.
        NoRoomToReadError: converting one takes more than `room_bytes`.
        StorageError: the cache cannot be written.
    """
    from edgeblocks.data.image_cache import CacheWriter, Content, open_images_of, open_or_build_images
    from edgeblocks.data.labels import Labels, number_classes

    def fill(cache: CacheWriter) -> Content:
        with _Gathered(data, cache_dir, image_size, room_bytes, progress) as found:
            classes = None
            if found.labels is not None:
                try:
                    classes = number_classes([Labels(*found.labels)], found.class_names)
                except ValueError as error:
                    raise DataError(f"the labels of the data cannot be used: {error}") from error
            cache.begin(found.shape, found.num_images, has_labels=classes is not None)
            start = 0
            for pixels in found.pieces():
                stop = start + len(pixels)
                cache.append(pixels, None if classes is None else classes.labels[0][start:stop])
                start = stop
                progress(start, found.num_images, "copying")
        return Content() if classes is None else Content(class_names=classes.names, notes=classes.notes)

    key = uuid.uuid4().hex
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the cache {cache_dir} cannot be written: {error.strerror}; mend its permissions"
        ) from error
    digest = open_or_build_images(cache_dir, key, fill).fingerprint
    return _renamed(cache_dir, key, digest, lambda folder: open_images_of(folder) is not None)


def _renamed(cache_dir: Path, key: str, digest: str, is_whole: Callable[[Path], bool]) -> str:
    """The source of what is in the cache under a name for the time being, now under that of its content.

    Args:
        is_whole: whether a folder can be read; may raise what `read_meta` raises.
    """
    built, final = cache_dir / key, cache_dir / f"python-{digest}"

    def is_sound(folder: Path) -> bool:
        try:
            return is_whole(folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    try:
        publish(built, final, is_sound)
        if built.is_dir():  # equal data are there, of which something else may have been told, such as empty classes
            (built / "meta.json").replace(final / "meta.json")
            shutil.rmtree(built, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{built} cannot be renamed to {final.name}: {error.strerror}") from error
    return f"{PYTHON_DATA}{digest}"


class _Gathered:
    """Images uint8 that are all of one shape, and their labels, in a nameless file: classes are known at the end."""

    def __init__(
        self, data: object, cache_dir: Path, image_size: int | None, room_bytes: int | None, progress: Progress
    ) -> None:
        self._image_size, self._room_bytes = image_size, room_bytes
        self.shape: tuple[int, int, int] = (0, 0, 0)
        self.num_images = 0
        self._numbers, self._names = array("q"), dict[str, int]()
        given = given_images(data)
        self.class_names = given.class_names
        self._file: BinaryIO = tempfile.TemporaryFile(dir=cache_dir)  # noqa: SIM115 - closed by __exit__
        try:
            for number, (image, label) in enumerate(given.pairs()):
                self._add(number, image, label)
                progress(number + 1, max(given.number, number + 1), "reading")
        except BaseException:
            self._file.close()
            raise
        if self.num_images < 2:
            self._file.close()
            raise DataError(f"data has {self.num_images} image(s); at least 2 are needed; {ACCEPTED_IMAGES}")

    def __enter__(self) -> "_Gathered":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    @property
    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None] | None:
        """A number for each image, and what the numbers stand for; None without labels."""
        if not self._numbers:
            return None
        return np.array(self._numbers, dtype=np.int64), tuple(self._names) or None

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """The images, some at a time."""
        image_bytes = self.shape[0] * self.shape[1] * self.shape[2]
        self._file.seek(0)
        together = max(1, _PIECE_BYTES // image_bytes)
        for start in range(0, self.num_images, together):
            count = min(together, self.num_images - start)
            read = self._file.read(count * image_bytes)
            yield np.frombuffer(read, dtype=np.uint8).reshape(count, *self.shape)

    def _add(self, number: int, image: object, label: object) -> None:
        pixels = pixels_of(number, image, image_size=self._image_size, room_bytes=self._room_bytes)
        if number == 0:
            self.shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
        if pixels.shape[2] == 1 and self.shape[2] == 3:
            pixels = np.repeat(pixels, 3, axis=2)
        if pixels.shape != self.shape:
            cure = "pass image_size=N to cut and resize all of them"
            if pixels.shape[:2] == self.shape[:2]:
                cure = "the first is grey and this one has colours: make all alike, as with picture.convert('RGB')"
            raise DataError(
                f"image {number} of the data is {sides(pixels.shape)}, the first {sides(self.shape)}; {cure}"
            )
        try:
            self._file.write(np.ascontiguousarray(pixels).data)
        except OSError as error:
            raise StorageError(f"the cache cannot be written: {error.strerror}; free some space") from error
        self.num_images += 1
        self._label(number, label)

    def _label(self, number: int, label: object) -> None:
        if label is None:
            if self._numbers:
                raise DataError(f"image {number} of the data has no label, and those before have one; give all or none")
            return
        if number and not self._numbers:
            raise DataError(f"image {number} of the data has a label, and those before have none; give all or none")
        value = label.item() if hasattr(label, "item") else label
        if isinstance(value, str):
            if self._numbers and not self._names:
                raise DataError(f"label {number} is {shown(value)}, and those before are numbers; give one kind")
            self._numbers.append(self._names.setdefault(value, len(self._names)))
        elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 and not self._names:
            self._numbers.append(value)
        else:
            raise DataError(
                f"label {number} of the data is {shown(value)}; give whole numbers from 0, or names as strings "
                "(one-hot rows become numbers with argmax(1))"
            )
