"""What is in the objects that a program gave: items, columns, images with their labels.

Other libraries' objects are known by what they offer, and none of the libraries is imported: a tensor by `detach`, a
data set of Hugging Face by `column_names` and `features`, a data set of torch by its length and its items.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgeblocks.errors import DataError
from edgeblocks.files.untrusted import shown

_PICTURES = ("image", "images", "img", "picture", "pixel_values")
_LABELS = ("label", "labels", "fine_label", "class", "target")
ACCEPTED_IMAGES = (
    "give an array [N, H, W] or [N, H, W, C], a tuple (images, labels), a dict of images, labels and class_names, or "
    "something that gives pictures, arrays or tensors, or pairs of one and its label"
)


@dataclass(frozen=True, kw_only=True)
class GivenImages:
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


def given_images(data: Any) -> GivenImages:
    """The images and labels in whatever a program gave; docs/python.md says what it may be.

    Raises:
        DataError: nothing in it is known as images.
    """
    if isinstance(data, dict):
        refuse_several_sets(data)
        image, label = _columns(list(data))
        names = data.get("class_names")
        return _with_labels(data[image], None if label is None else data[label], names)
    if is_frame(data):
        return given_images(columns_of(data))
    if is_table(data):
        features = data.features or {}
        columns = None if data.column_names is None else _columns(list(data.column_names), features)
        names = getattr(features.get(columns[1]), "names", None) if columns and columns[1] else None
        return GivenImages(
            items=data, columns=columns, class_names=None if names is None else tuple(names), number=_length(data)
        )
    if isinstance(data, tuple) and len(data) == 2 and _is_many(data[0]):
        return _with_labels(data[0], data[1], None)
    if _is_many(data):
        return _with_labels(data, None, None)
    names = getattr(data, "classes", None)  # of torchvision's data sets
    return GivenImages(
        items=items_of(data, ACCEPTED_IMAGES),
        class_names=tuple(map(str, names)) if isinstance(names, list | tuple) else None,
        number=_length(data),
    )


def _with_labels(images: Any, labels: Any, names: Any) -> GivenImages:
    number = _length(images)
    if labels is not None and _length(labels) != number:
        raise DataError(f"data has {number} images and {_length(labels)} labels; give one label per image")
    return GivenImages(
        items=items_of(images, ACCEPTED_IMAGES),
        labels=labels,
        class_names=None if names is None else tuple(map(str, names)),
        number=number,
    )


def _is_many(data: Any) -> bool:
    """Whether an array or a tensor holds several images."""
    return hasattr(data, "dtype") and len(getattr(data, "shape", ())) in (3, 4)


def is_table(data: Any) -> bool:
    """Whether this is a data set of Hugging Face. Of a stream the names of the columns may be unknown: None."""
    return hasattr(data, "column_names") and hasattr(data, "features") and not isinstance(data, dict)


def is_frame(data: Any) -> bool:
    """Whether this is a data frame, of pandas or of polars: gone through, some of them give the names of columns."""
    return type(data).__name__ == "DataFrame" and hasattr(data, "columns")


def columns_of(frame: Any) -> dict[str, Any]:
    """The columns of a data frame by their names."""
    return {str(name): frame[name] for name in frame.columns}


def refuse_several_sets(data: dict[Any, Any]) -> None:
    """Check that a dict is not a data set of Hugging Face with all its parts.

    Raises:
        DataError: it is.
    """
    if data and all(is_table(part) for part in data.values()):
        raise DataError(
            f"data holds the parts {listed(data)} of a data set; give one of them: data=..[{next(iter(data))!r}]"
        )


def _columns(names: list[str], features: Any = None) -> tuple[str, str | None]:
    """The columns of the images and of the labels."""
    kinds = {name: type(feature).__name__ for name, feature in (features or {}).items()}
    images = [name for name in names if kinds.get(name) == "Image"] or [name for name in _PICTURES if name in names]
    if not images:
        raise DataError(
            f"data has the columns {listed(names)}, of which none is called `image`; rename that of the images"
        )
    labels = [name for name in _LABELS if name in names]
    labels = labels or [name for name in names if kinds.get(name) == "ClassLabel"]
    return images[0], labels[0] if labels else None


def items_of(data: Any, accepted: str) -> Iterable[object]:
    """What is in something that can be gone through; a data set of torch knows its length and its items only.

    Args:
        accepted: what may be given instead, for the error.

    Raises:
        DataError: it cannot be gone through, or is one string.
    """
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


def listed(names: Iterable[object]) -> str:
    """The first ten names, for an error."""
    return ", ".join(shown(name) for name in list(names)[:10]) or "(none)"


def sides(shape: Sequence[int]) -> str:
    """
    >>> sides((3, 8, 6))
    '3 x 8 x 6'
    """
    return " x ".join(str(side) for side in shape)
