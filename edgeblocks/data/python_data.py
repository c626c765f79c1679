"""Data that a program holds: arrays, pictures, tensors, rows and strings, read once into the cache.

A source from Python is named `python:` and the sha256 of its content. A run keeps that name, and is resumed and
evaluated like any other as long as the cache has the data; where it has not, they are given again.

Other libraries' objects are known by what they offer, and none of the libraries is imported: a tensor by `detach`, a
data set of Hugging Face by `column_names` and `features`, a data set of torch by its length and its items.
"""

import hashlib
import shutil
import tempfile
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, open_or_build, read_meta
from edgeblocks.data.dataset import Progress
from edgeblocks.errors import DataError, NoRoomToReadError, StorageError
from edgeblocks.files.untrusted import shown
from edgeblocks.tasks import PYTHON_DATA

TEXT_FILE = "text.txt"
_TEXT = CacheKind(name="text cache", content="texts", row="a text", remedy="give less text", version=1)
_PIECE_BYTES = 2**20
_PIXEL_BYTES = 12
"""Of a picture while it is converted: itself, with transparency, on white, and as an array."""
_PICTURES = ("image", "images", "img", "picture", "pixel_values")
_LABELS = ("label", "labels", "fine_label", "class", "target")
_ACCEPTED_IMAGES = (
    "give an array [N, H, W] or [N, H, W, C], a tuple (images, labels), a dict of images, labels and class_names, or "
    "something that gives pictures, arrays or tensors, or pairs of one and its label"
)


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
            f"data '{source}' came from a Python program and are not in the cache {cache_dir} (any more); give them "
            "again from Python: edgeblocks.resume(RUN, data=..), or load(RUN).evaluate(data=..)"
        )
    return folder


def store_texts(data: object, *, cache_dir: Path, text_key: str) -> str:
    """The source of some texts, which are now in the cache: strings, or rows that have one under `text_key`.

    Raises:
        DataError: they are no texts.
        StorageError: the cache cannot be written.
    """

    def build(files: CacheFiles) -> None:
        digest, waiting, is_first = hashlib.sha256(), bytearray(), True
        for text in _texts(data, text_key):
            waiting += text.encode() if is_first else b"\n" + text.encode()
            is_first = False
            if len(waiting) >= _PIECE_BYTES:
                digest.update(waiting)
                files.extend(TEXT_FILE, bytes(waiting))
                waiting.clear()
        digest.update(waiting)
        files.extend(TEXT_FILE, bytes(waiting))
        files.finish({"sha256_of_text": digest.hexdigest()})

    def read(folder: Path) -> str:
        return str(read_meta(folder, _TEXT.version)["sha256_of_text"])

    key = uuid.uuid4().hex
    return _renamed(cache_dir, key, open_or_build(_TEXT, cache_dir, key, build=build, read=read))


def _texts(data: Any, text_key: str) -> Iterator[str]:
    """The texts that are not empty."""
    if isinstance(data, dict):
        _refuse_several_sets(data)
        if text_key not in data:
            raise DataError(
                f"data is a dict of {_listed(data)}, and has no {text_key!r}; name its texts with text_key="
            )
        data = data[text_key]
    elif _is_table(data) and text_key not in data.column_names:
        raise DataError(
            f"the data set has no column {text_key!r}, but {_listed(data.column_names)}; name the one of the text "
            "with text_key="
        )
    for number, item in enumerate(_items(data, "texts: give strings, or rows with a text each")):
        text = item.get(text_key) if isinstance(item, dict) else item
        if text is None and isinstance(item, dict) and text_key in item:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"text {number} of the data is {shown(text)} ({type(item).__name__}), not a string; give strings, or "
                f"rows with a string under text_key={text_key!r}"
            )
        if "\0" in text:
            raise DataError(
                f"text {number} of the data holds a NUL, as binary data do; remove it: text.replace('\\0', '')"
            )
        if text:
            yield text.encode("utf-8", "replace").decode()


def store_images(
    data: object, *, cache_dir: Path, image_size: int | None, room_bytes: int | None, progress: Progress
) -> str:
    """The source of some images, which are now in the cache; see `docs/python.md` for what they may be.

    Raises:
        DataError: they are no images.
        NoRoomToReadError: converting one takes more than `room_bytes`.
        StorageError: the cache cannot be written.
    """
    from edgeblocks.data.image_cache import CacheWriter, Content, open_or_build_images
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
    return _renamed(cache_dir, key, open_or_build_images(cache_dir, key, fill).fingerprint)


def _renamed(cache_dir: Path, key: str, digest: str) -> str:
    """The source of what is in the cache under a name for the time being, now under that of its content."""
    built, final = cache_dir / key, cache_dir / f"python-{digest}"
    try:
        if final.is_dir():
            shutil.rmtree(built, ignore_errors=True)
        else:
            built.rename(final)
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
        self._all_labelled = True
        given = _given_images(data)
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
            raise DataError(f"data has {self.num_images} image(s); at least 2 are needed; {_ACCEPTED_IMAGES}")

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
        pixels = self._pixels(number, image)
        if number == 0:
            self.shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
        if pixels.shape[2] == 1 and self.shape[2] == 3:
            pixels = np.repeat(pixels, 3, axis=2)
        if pixels.shape != self.shape:
            cure = "pass image_size=N to cut and resize all of them"
            if pixels.shape[:2] == self.shape[:2]:
                cure = "the first is grey and this one has colours: make all alike, as with picture.convert('RGB')"
            raise DataError(
                f"image {number} of the data is {_sides(pixels.shape)}, the first {_sides(self.shape)}; {cure}"
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

    def _pixels(self, number: int, image: object) -> NDArray[np.uint8]:
        """An image as uint8 [H, W, 1 or 3]."""
        from PIL import Image

        from edgeblocks.data.decoding import fit_square

        if isinstance(image, Image.Image):
            needed_bytes = _PIXEL_BYTES * image.width * image.height
            if self._room_bytes is not None and needed_bytes > self._room_bytes:
                raise NoRoomToReadError(
                    f"image {number} of the data ({image.width} x {image.height} pixels)", needed_bytes
                )
            pixels = _pixels_of_picture(number, image)
        else:
            pixels = _pixels_of_array(number, image)
        if self._image_size is not None and pixels.shape[:2] != (self._image_size, self._image_size):
            picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            pixels = np.asarray(fit_square(picture, self._image_size)).reshape(
                self._image_size, self._image_size, pixels.shape[2]
            )
        return pixels


def _pixels_of_picture(number: int, picture: Any) -> NDArray[np.uint8]:
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        raise DataError(
            f"image {number} of the data has mode {picture.mode}, values of more than 8 bits; give uint8, or floats "
            "from 0 to 1"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    elif picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _pixels_of_array(number: int, image: object) -> NDArray[np.uint8]:
    is_tensor = hasattr(image, "detach")
    values = np.asarray(image.detach().cpu() if is_tensor else image)  # type: ignore[attr-defined]
    if values.dtype.kind not in "buif":
        raise DataError(f"image {number} of the data is {shown(image)} ({type(image).__name__}); {_ACCEPTED_IMAGES}")
    if is_tensor and values.ndim == 3 and values.shape[0] in (1, 3):
        values = np.moveaxis(values, 0, 2)  # tensors have their channels first
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] not in (1, 3) or 0 in values.shape:
        cure = "move the channels last" if values.ndim == 3 and values.shape[0] in (1, 3) else "reshape it"
        cure = "drop the transparency with [..., :3]" if values.shape[-1:] == (4,) else cure
        raise DataError(
            f"image {number} of the data has the shape {_sides(values.shape) or '()'}; wanted height x width, with 1 "
            f"or 3 channels; {cure}"
        )
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    most = 1 if values.dtype.kind == "f" else 255
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= most):
        raise DataError(
            f"image {number} of the data has {values.dtype} from {np.min(values):g} to {np.max(values):g}; wanted 0 to "
            f"{most}; undo its normalisation, or give uint8 from 0 to 255"
        )
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8) if most == 1 else values.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class _GivenImages:
    """Images and labels as the program gave them.

    items: images, or pairs, or rows where the names of two columns are told.
    labels: one an image; None where the items have them, or none.
    class_names: in the order of their numbers; None where nothing names them.
    number: of the items; 0 where it is unknown.
    """

    items: Iterable[object]
    labels: Iterable[object] | None = None
    class_names: tuple[str, ...] | None = None
    number: int = 0
    columns: tuple[str, str | None] | None = None

    def pairs(self) -> Iterator[tuple[object, object]]:
        """Each image with its label, or None."""
        if self.labels is not None:
            yield from zip(self.items, self.labels, strict=True)
            return
        for item in self.items:
            if isinstance(item, dict):
                image, label = self.columns or _columns(list(item))
                yield item[image], None if label is None else item[label]
            elif isinstance(item, tuple | list) and len(item) == 2:
                yield item[0], item[1]
            else:
                yield item, None


def _given_images(data: Any) -> _GivenImages:
    if isinstance(data, dict):
        _refuse_several_sets(data)
        image, label = _columns(list(data))
        names = data.get("class_names")
        return _with_labels(data[image], None if label is None else data[label], names)
    if _is_table(data):
        features = data.features or {}
        columns = _columns(list(data.column_names), features)
        names = getattr(features.get(columns[1]), "names", None) if columns[1] else None
        return _GivenImages(
            items=data, columns=columns, class_names=None if names is None else tuple(names), number=_length(data)
        )
    if isinstance(data, tuple) and len(data) == 2 and _is_many(data[0]):
        return _with_labels(data[0], data[1], None)
    if _is_many(data):
        return _with_labels(data, None, None)
    names = getattr(data, "classes", None)  # of torchvision's data sets
    return _GivenImages(
        items=_items(data, _ACCEPTED_IMAGES),
        class_names=tuple(map(str, names)) if isinstance(names, list | tuple) else None,
        number=_length(data),
    )


def _with_labels(images: Any, labels: Any, names: Any) -> _GivenImages:
    number = _length(images)
    if labels is not None and _length(labels) != number:
        raise DataError(f"data has {number} images and {_length(labels)} labels; give one label per image")
    return _GivenImages(
        items=_items(images, _ACCEPTED_IMAGES),
        labels=labels,
        class_names=None if names is None else tuple(map(str, names)),
        number=number,
    )


def _is_many(data: Any) -> bool:
    """Whether an array or a tensor holds several images."""
    return hasattr(data, "dtype") and len(getattr(data, "shape", ())) in (3, 4)


def _is_table(data: Any) -> bool:
    """Whether this is a data set of Hugging Face."""
    return hasattr(data, "column_names") and hasattr(data, "features") and not isinstance(data, dict)


def _refuse_several_sets(data: dict[Any, Any]) -> None:
    if data and all(_is_table(part) for part in data.values()):
        raise DataError(
            f"data holds the parts {_listed(data)} of a data set; give one of them: data=..[{next(iter(data))!r}]"
        )


def _columns(names: list[str], features: Any = None) -> tuple[str, str | None]:
    """The columns of the images and of the labels."""
    kinds = {name: type(feature).__name__ for name, feature in (features or {}).items()}
    images = [name for name in names if kinds.get(name) == "Image"] or [name for name in _PICTURES if name in names]
    if not images:
        raise DataError(
            f"data has the columns {_listed(names)}, of which none is called `image`; rename that of the images"
        )
    labels = [name for name in _LABELS if name in names]
    labels = labels or [name for name in names if kinds.get(name) == "ClassLabel"]
    return images[0], labels[0] if labels else None


def _items(data: Any, accepted: str) -> Iterable[object]:
    """What is in something that can be gone through; a data set of torch knows its length and its items only."""
    if isinstance(data, str | bytes):
        raise DataError(f"data is {shown(data)}, one string; wanted {accepted}")
    if hasattr(data, "__iter__"):
        items: Iterable[object] = data
        return items
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return (data[index] for index in range(len(data)))
    raise DataError(f"data is a {type(data).__name__}, which holds nothing that is known; {accepted}")


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        return 0


def _listed(names: Iterable[object]) -> str:
    return ", ".join(shown(name) for name in list(names)[:10]) or "(none)"


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
