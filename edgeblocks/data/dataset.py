"""What the runtime asks of a data set, whatever its examples are: images with labels, or windows of tokens."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and what it is."""


def silent(_done: int, _total: int, _what: str) -> None:
    """Progress for those who did not ask for it."""


@runtime_checkable
class Order(Protocol):
    """The order in which one block sees the examples of the training part."""

    def indices(self, step: int) -> NDArray[np.int64]:
        """Indices [batch] of the step that counts from 0; a function of seed, block and step alone."""
        ...


@runtime_checkable
class DataSet(Protocol):
    """Examples with their training and hold-out parts.

    source: where they are from, as the user named it.
    fingerprint: sha256 of all that a training run sees, in hexadecimal: the same wherever the data lie.
    reading: what was read and what was left out with its numbers, in one line; the same where it is from a cache.
    class_names: one name a class, () without classes.
    unreadable: the files that were skipped, relative to the folder.
    warnings: what the user should know of how the data are used, one sentence each.
    has_held_out: whether there is a hold-out part.
    train_examples: different examples that an order draws from.
    """

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def reading(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def unreadable(self) -> tuple[str, ...]: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    @property
    def has_held_out(self) -> bool: ...

    @property
    def train_examples(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """How text became the examples' tokens; None where they are no text."""
        ...

    def order(self, *, batch: int, seed: int, block: int) -> Order: ...

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
        """Copies of the examples [b, ...] at `indices`, and their labels [b]; leaves nothing else resident.

        Raises:
            StorageError: they cannot be read any more.
        """
        ...

    def evaluation_indices(self, most: int) -> NDArray[np.int64]:
        """At most so many examples of the hold-out part; of the training part where nothing is held out."""
        ...

    def batch_resident_bytes(self, batch: int) -> int:
        """What a call of `gather` with `batch` indices adds to the resident memory, in bytes."""
        ...

    def describe(self) -> str:
        """How much there is, for people."""
        ...
