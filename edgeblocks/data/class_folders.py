"""Which sub-folders of a folder of pictures are its classes, and which are something else.

A folder around the classes, or the parts of a data set in its place, would train a network to tell `train` from `test`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeblocks.data.picture_files import entries_of, listed, printable
from edgeblocks.errors import DataError
from edgeblocks.limits import MOST_CLASSES

_FEWEST_IN_COMMON = 2
_PART = re.compile(
    r"(train|training|trn|trainval|test|testing|tst|val|valid|validation|eval|evaluation|dev|holdout)"
    r"(?:set|sets|data|images?|imgs?)?"
)
_BESIDE_A_PART = frozenset(
    {
        "data",
        "dataset",
        "image",
        "images",
        "img",
        "imgs",
        "of",
        "part",
        "pictures",
        "samples",
        "set",
        "sets",
        "split",
        "subset",
    }
)
_PAIRED = frozenset(
    {
        "annotation",
        "annotations",
        "depth",
        "gt",
        "image",
        "images",
        "img",
        "imgs",
        "label",
        "labels",
        "mask",
        "masks",
        "segmentation",
        "segmentations",
    }
)


@dataclass(frozen=True, kw_only=True)
class ClassFolders:
    """What the sub-folders of a folder are.

    root: the folder that holds the classes, which may lie in the one that was given.
    names: of the classes, in order; () for a flat folder.
    above: the folders in which the classes lie, from the one that was given to `root`; () for a flat folder.
    warnings: what to tell of the choice.
    """

    root: Path
    names: tuple[str, ...]
    above: Sequence[Path]
    warnings: tuple[str, ...] = ()


def find_classes(root: Path) -> ClassFolders:
    """The classes of a folder of pictures.

    Raises:
        DataError: too many, pictures beside them, or they are parts of a data set.
    """
    above = _unwrapped(root)
    inside = above[-1]
    warnings: tuple[str, ...] = ()
    if inside != root:
        warnings = (f"{printable(str(inside.relative_to(root)))} is the one folder in {root}: the classes are in it",)
    here = entries_of(inside)
    names = tuple(entry.name for entry in here.folders)
    if len(names) > MOST_CLASSES:
        raise DataError(
            f"data folder {inside} has {len(names)} sub-folders, each a class, and at most {MOST_CLASSES} classes are "
            "accepted; put the images into fewer"
        )
    if names and here.pictures:
        raise DataError(
            f"data folder {inside} has {len(here.pictures)} images beside {len(names)} sub-folders ({listed(names)}); "
            "each sub-folder is a class: move the images into one, or move the sub-folders elsewhere"
        )
    _refuse_parts(inside, names)
    in_common = _common_folders(inside, names)
    if in_common and all(map(_part_of_a_set, in_common)):
        warnings += (
            f"each class has the folders {listed(in_common)}: the pictures of all of them are read as one set; to "
            "train on one of them, give a folder in which the classes hold that one alone",
        )
    elif in_common:
        raise DataError(
            f"data folder {inside} holds {listed(names)}, and these hold the same {len(in_common)} sub-folders "
            f"({listed(in_common)}), as parts of a data set do, not classes; give one of them, for example "
            f"{inside / names[0]}; where they are the classes, put their pictures straight into them"
        )
    if len(names) > 1 and _PAIRED.issuperset(name.lower() for name in names):
        warnings += (
            f"the classes are called {listed(names)}: every sub-folder is a class; to train on the pictures of one of "
            f"them alone, give that folder",
        )
    if len(names) == 1 and _around_pictures(names[0]):
        warnings += (
            f"{listed(names)} is the one sub-folder, and so the one class of all pictures; to train without classes, "
            f"give {inside / names[0]}",
        )
    return ClassFolders(root=inside, names=names, above=above if names else (), warnings=warnings)


def _unwrapped(root: Path) -> list[Path]:
    """The folder, and where it holds nothing but one folder that holds several, the way to that one."""
    way, seen = [root], set()
    here = entries_of(root)
    while len(here.folders) == 1 and not here.pictures and here.identity not in seen:
        seen.add(here.identity)
        way.append(way[-1] / here.folders[0].name)
        here = entries_of(way[-1])
    return way if len(here.folders) > 1 and not here.pictures else [root]


def _refuse_parts(root: Path, names: Sequence[str]) -> None:
    """Refuse folders that are called as the parts of a data set are."""
    words = [_words(name) for name in names]
    in_common = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    kinds = {name: _kind(word for word in own if word not in in_common) for name, own in zip(names, words, strict=True)}
    parts = [name for name in names if kinds[name]]
    if len({kinds[name] for name in parts}) > 1:
        chosen = next((name for name in parts if str(kinds[name]).startswith("tr")), parts[0])
        raise DataError(
            f"data folder {root} holds {listed(parts)}, parts of a data set, not classes; give one of them, for "
            f"example {root / chosen}; hold_out sets the share kept for validation"
        )


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.casefold())


def _kind(words: Iterable[str]) -> str | None:
    """Which part of a data set is called so; None where it may be anything.

    >>> _kind(["training", "images"]), _kind(["trainset"]), _kind(["train", "station"])
    ('training', 'train', None)
    """
    told = [word for word in words if word not in _BESIDE_A_PART]
    part = _PART.fullmatch(told[0]) if len(told) == 1 else None
    return part and part[1]


def _around_pictures(name: str) -> bool:
    """Whether a folder that is called so says nothing of what its pictures show."""
    words = _words(name)
    return _part_of_a_set(name) or (bool(words) and (_BESIDE_A_PART | _PAIRED).issuperset(words))


def _part_of_a_set(name: str) -> bool:
    return _kind(_words(name)) is not None


def _common_folders(root: Path, names: Sequence[str]) -> list[str]:
    """Sub-folders that all of these folders have, if they hold no pictures beside them; [] where they are too few.

    Where one has no such sub-folders the others are not looked at, so that classes cost one look.
    """
    in_common: set[str] = set()
    for number, name in enumerate(names):
        here = entries_of(root / name)
        own = {entry.name for entry in here.folders}
        in_common = in_common & own if number else own
        if here.pictures or len(in_common) < _FEWEST_IN_COMMON or 2 * len(in_common) < len(own):
            return []
    return sorted(in_common) if len(names) > 1 else []
