"""Labels as numbers of classes from 0 without gaps.

A number that no image has would be a class that nobody can learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_NAMES_SHOWN = 10


class Labels(NamedTuple):
    """A number for each image, int64 [N], and what the numbers stand for; None: they are the classes' own numbers."""

    values: NDArray[np.int64]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of some labels.

    labels: of each part, int64 [N], from 0 to the number of classes - 1.
    names: one a class.
    notes: what to tell of how they were found.
    """

    labels: list[NDArray[np.int64]]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def number_classes(parts: Sequence[Labels], given: tuple[str, ...] | None) -> Classes:
    """The classes that the labels of all parts name together, in the order of their numbers, or of their names.

    Args:
        given: names of the classes in order; None: the labels say all.

    Raises:
        ValueError: a label is not among the given names, or some parts have numbers and some names.

    >>> found = number_classes([Labels(np.array([3, 1, 3]))], None)
    >>> found.names, found.labels[0].tolist()
    (('1', '3'), [1, 0, 1])
    >>> found = number_classes([Labels(np.array([0, 1, 0]), ("dog", "cat"))], None)
    >>> found.names, found.labels[0].tolist()
    (('cat', 'dog'), [1, 0, 1])
    """
    if len({part.names is None for part in parts}) > 1:
        raise ValueError("the labels of one part are numbers and those of the other names; save both alike")
    known = given or _all_names(parts)
    numbers = {name: number for number, name in enumerate(known)}
    placed = []
    for part in parts:
        largest = int(part.values.max())
        if part.names is None and largest >= len(known):
            raise ValueError(f"a label is {largest}, and `class_names` names 0 to {len(known) - 1}")
        if unknown := [name for name in part.names or () if name not in numbers]:
            raise ValueError(f"{len(unknown)} labels are not in `class_names`: {_listed(unknown)}")
        table = None if part.names is None else np.array([numbers[name] for name in part.names], dtype=np.int64)
        placed.append(part.values if table is None else table[part.values])
    used = np.unique(np.concatenate([np.unique(values) for values in placed]))
    if len(used) == len(known):
        return Classes(labels=placed, names=known)
    unused = np.setdiff1d(np.arange(len(known)), used)
    note = (
        f"no image has the label {_listed([known[number] for number in unused])}; the {len(used)} classes are those "
        f"that some have: {_listed([known[number] for number in used])}"
    )
    renumbered = [np.searchsorted(used, values).astype(np.int64) for values in placed]
    return Classes(labels=renumbered, names=tuple(known[number] for number in used), notes=(note,))


def _all_names(parts: Sequence[Labels]) -> tuple[str, ...]:
    named = sorted({name for part in parts for name in part.names or ()})
    return tuple(named) or tuple(map(str, range(max(int(part.values.max()) for part in parts) + 1)))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{', '.join(names[:_NAMES_SHOWN])}{more}"
