"""Graphs of an exported directory in onnxruntime, inside a memory budget: numpy in, numpy out, no torch.

A folder may come from anywhere: each file is compared with the manifest's checksums before onnxruntime parses it, and
what a graph gives must be what the manifest says.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError, DoesNotFitError, OutOfBudgetError, RunError
from edgeblocks.export.manifest import checked_path
from edgeblocks.export.manifest_types import GraphFile
from edgeblocks.onnx_runtime import CODE_BYTES, PROCESSOR, Hardware, Kept, Session, onnxruntime, prepare
from edgeblocks.registry import build_target
from edgeblocks.units import advised_budget, format_bytes, parse_size

DEFAULT_BUDGET = "50%"
_REFUSED = ("bad_alloc", "Failed to allocate memory", "bad allocation", "Cannot allocate memory")
"""What onnxruntime says where the system refuses memory."""

Given = NDArray[np.generic]
"""What a graph takes or gives."""


def budget_of_a_run(mem_budget: str | None) -> int:
    """Bytes that a process which runs an export may take; None: half of the machine's memory.

    Raises:
        ConfigError: not a size.
    """
    try:
        return parse_size(mem_budget or DEFAULT_BUDGET, whole_bytes=build_target("cpu").total_bytes())
    except ValueError as error:
        raise ConfigError(f"--mem-budget {error}") from error


class LoadedGraphs(ABC):
    """The graphs of an exported directory, each loaded when it is needed. Not thread-safe."""

    keeps_all = False
    """Whether graphs stay loaded beside each other; else one gives way to the next. Where memory does not hold all,
    this is False for a while."""

    def __init__(
        self, directory: Path, files: Sequence[GraphFile], *, opset: int, hardware: Hardware = PROCESSOR
    ) -> None:
        self.directory = directory
        self._files, self._opset, self._hardware = files, opset, hardware
        self._sessions: dict[str, Session] = {}
        """By the names of the graphs' files."""
        self._checked: dict[str, Path] = {}
        """Files that were compared with the manifest since `close`: one that comes again is not read twice for it."""
        self._on_giving_way: Callable[[], None] | None = None
        """Tells that graphs give way to one another."""

    @abstractmethod
    def held_bytes(self, n: int) -> int:
        """What `n` images or texts keep in memory at least, beside the graphs."""

    @contextlib.contextmanager
    def within(self, mem_budget: str | None, *, n: int, on_note: Callable[[str], None] | None = None) -> Iterator[None]:
        """Keep the process inside a memory budget while `n` images or texts are made; a graph may come from anywhere.

        Graphs that would stay loaded beside each other give way to one another where the budget does not hold all.

        Args:
            mem_budget: a size, or a share of the machine's memory; None: half of it.
            on_note: called with a sentence where graphs give way to one another.

        Raises:
            ConfigError: not a size.
            DoesNotFitError: what the manifest describes cannot fit.
            OutOfBudgetError: memory was refused at the budget.
        """
        target = build_target("cpu")
        budget_bytes = budget_of_a_run(mem_budget)
        sizes = [file.bytes for file in self._files if file.file not in self._sessions]
        largest = max(sizes, default=0)
        beside_bytes = target.used_bytes() + self.held_bytes(n)
        least = beside_bytes + largest
        if least > budget_bytes:
            titles = [file.title for file in self._files if file.bytes == largest]
            of_it = f": {titles[0]} has {format_bytes(largest)}" if titles else ""
            raise DoesNotFitError(
                f"{self.directory} takes at least {format_bytes(least)} for {n} at a time, by its manifest{of_it}; the "
                f"budget is {format_bytes(budget_bytes)}. Ask for fewer with --n, or give --mem-budget "
                f"{advised_budget(least)} or more",
                least,
            )
        prepare()
        keeps_all = self.keeps_all
        # While the last graph is read it is there twice.
        whole_bytes = beside_bytes + CODE_BYTES + sum(sizes) + largest
        if on_note is not None:
            enough = advised_budget(max(whole_bytes, budget_bytes + largest))
            self._on_giving_way = partial(
                on_note,
                f"the budget of {format_bytes(budget_bytes)} does not hold all blocks: each is read again for every "
                f"token, which is slow; --mem-budget {enough} keeps them",
            )
        try:
            if keeps_all and len(sizes) > 1 and whole_bytes > budget_bytes:
                self._give_way()
            # A graph that is given up must be free for the next one, not a gap in the heap.
            heap = target.without_gaps() if keeps_all else contextlib.nullcontext()
            # numpy's first product takes OpenBLAS's buffer, which ends the process where it is refused.
            np.dot(np.ones((64, 64), np.float32), np.ones((64, 64), np.float32))
            with heap, target.capped(budget_bytes - CODE_BYTES):
                yield
        except MemoryError as error:
            raise OutOfBudgetError(
                f"memory was refused at the budget of {format_bytes(budget_bytes)}; ask for fewer with --n or give "
                f"more with --mem-budget. If {self.directory} came from elsewhere, it may be made to fill the memory"
            ) from error
        finally:
            self.keeps_all, self._on_giving_way = keeps_all, None

    def _give_way(self) -> None:
        """From now on one graph is loaded at a time."""
        self.keeps_all = False
        if self._on_giving_way is not None:
            self._on_giving_way()

    def run_file(
        self,
        file: GraphFile,
        feed: Mapping[str, Given | Kept],
        needed: Sequence[tuple[np.dtype[Any], tuple[int, ...]]],
        *,
        keep: str | None = None,
    ) -> list[Any]:
        """The outputs of a graph, which is loaded where it is not yet; it stays.

        Args:
            needed: the type and the shape that each output must have.
            keep: an output that stays in onnxruntime's memory. Its numbers are not looked at.

        Raises:
            RunError: the graph cannot be run, or gives something else than is needed, or values that are no numbers.
            MemoryError: the system refused memory.
        """
        if file.file not in self._sessions:
            self._load(file)
        try:
            found = self._sessions[file.file].run(feed, keep=keep)
        except Exception as error:  # onnxruntime's errors have no common base
            raise _explained(error, f"onnxruntime cannot run {file.title} of {self.directory}") from error
        kinds = [(getattr(values, "dtype", None), getattr(values, "shape", None)) for values in found]
        if kinds != list(needed):
            given, wanted = (", ".join(f"{kind} {shape}" for kind, shape in some) for some in (kinds, needed))
            raise RunError(
                f"{file.title} of {self.directory} is of another network than its manifest describes: it gives "
                f"{given}, and {wanted} is needed; export the run again"
            )
        for values in (values for values in found if not isinstance(values, Kept)):
            if values.dtype.kind == "f" and values.size and not np.isfinite([values.min(), values.max()]).all():
                raise RunError(
                    f"{file.title} of {self.directory} gives values that are not finite numbers (NaN or infinite): "
                    f"its network is damaged or its training diverged; train again with a smaller learning rate"
                )
        return found

    def close(self) -> None:
        """Release what is loaded."""
        self._sessions.clear()
        self._checked.clear()

    def _load(self, file: GraphFile) -> None:
        if file.file not in self._checked:
            # Compared with the manifest's checksums before onnxruntime parses it.
            self._checked[file.file] = checked_path(self.directory, file)
        path = self._checked[file.file]
        try:
            self._sessions[file.file] = Session(path, self._hardware)
        except ConfigError:
            raise
        except Exception as error:  # onnxruntime's errors have no common base
            what = f"onnxruntime {onnxruntime().__version__} cannot load {file.title} from {path}"
            cure = f"the graph needs opset {self._opset}: try a newer onnxruntime"
            raise _explained(error, what, cure) from error


def _explained(error: Exception, what: str, cure: str = "export the run again") -> Exception:
    """An error of onnxruntime's in our words; memory that the system refused is a MemoryError whatever it says."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or any(sign in text for sign in _REFUSED):
        return MemoryError(text)
    return RunError(f"{what}: {text}; {cure}")
