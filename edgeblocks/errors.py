"""The errors a user can meet. Each message says what failed with the numbers, why, and what to do."""

import difflib
import errno
from collections.abc import Iterable
from typing import ClassVar

_REFUSALS = (
    *("allocate memory", "not enough memory", "out of memory", "bad_alloc", "can't start new thread"),
    *("could not create a primitive", "could not execute a primitive"),  # oneDNN, of bfloat16 matrices
)
_LOST_REFUSAL = "without exception set"
"""What Python says where its own code was refused memory and lost the error, as in an import."""
MAY_BE_REFUSALS = (MemoryError, RuntimeError, OSError, SystemError)
"""The kinds of errors among which `is_refusal` finds those that mean it."""


class EdgeblocksError(Exception):
    """Base of all errors that edgeblocks raises on purpose; the command line prints the message without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *problems: str) -> None:
        """
        Args:
            problems: every one found, a line each, so that they are mended in one go.
        """
        self.problems = problems
        super().__init__("\n".join(problems))


class ConfigError(EdgeblocksError):
    """Wrong settings or arguments."""

    exit_code = 2


class DataError(EdgeblocksError):
    """The user's data cannot be trained on."""

    exit_code = 2


class RunError(EdgeblocksError):
    """A run directory or an exported directory cannot be used: missing, damaged, of another version or another run."""


class StorageError(EdgeblocksError):
    """The disk refused a read or a write: full, read-only, or gone."""


class DoesNotFitError(EdgeblocksError):
    """No plan fits the budget.

    `smallest_bytes` is the smallest budget that would work, `as_fixed_bytes` the smallest with everything that the user
    fixed (blocks, micro-batch, checkpointing, tier), `flag` the budget's flag.
    """

    exit_code = 3

    def __init__(
        self, message: str, smallest_bytes: int, as_fixed_bytes: int | None = None, flag: str = "--mem-budget"
    ) -> None:
        self.smallest_bytes, self.flag = smallest_bytes, flag
        self.as_fixed_bytes = smallest_bytes if as_fixed_bytes is None else as_fixed_bytes
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Raised in one process and caught in another, it is the same."""
        return type(self), (str(self), self.smallest_bytes, self.as_fixed_bytes, self.flag)


class NoRoomToReadError(EdgeblocksError):
    """A picture or a text takes more memory to read than is free. `what` says which.

    `taken_bytes` is what the process that reads holds already; None where it is this one. `cure` is what else would do.
    """

    exit_code = 3

    def __init__(
        self, what: str, needed_bytes: int, taken_bytes: int | None = None, cure: str = "make it smaller"
    ) -> None:
        self.what, self.needed_bytes, self.taken_bytes, self.cure = what, needed_bytes, taken_bytes, cure
        super().__init__(f"{what}: reading it takes up to {needed_bytes} bytes")


class OutOfBudgetError(EdgeblocksError):
    """A run reached its memory budget and nothing was left to shrink; it ended instead of passing it."""


class WriteLimitError(EdgeblocksError):
    """The run has written as much to disk as the user allows; everything is saved."""


class InterruptedRunError(EdgeblocksError):
    """The user stopped the run; everything up to the last optimizer step is saved."""

    exit_code = 130


def is_refusal(error: BaseException) -> bool:
    """Whether an error means that memory was refused: Python's and numpy's own, torch's allocators', the threads', the
    system's.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, SystemError):
        return _LOST_REFUSAL in str(error)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message on an unknown word: the known one that is most like it; empty where none is.

    >>> did_you_mean("corse", ["cores", "name"])
    "; did you mean 'cores'?"
    """
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
