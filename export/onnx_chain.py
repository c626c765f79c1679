"""An exported chain of blocks in onnxruntime: numpy in, numpy out, no torch.

The noise levels descend, so the blocks come in order: one session is loaded at a time, runs all samples at all of its
levels, and is released before the next one is loaded. The levels, the start noise, the solver and the routing of a
level to its block are the same code that torch's chain runs; only the network differs. Where the whole chain is one
file, its graph does all of that, and the levels and random numbers alone are made here.
"""

import contextlib
import gc
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError, DoesNotFitError, OutOfBudgetError, RunError
from edgeblocks.export.manifest import checked_path, read_manifest
from edgeblocks.export.manifest_types import GraphFile, ImageManifest, Manifest
from edgeblocks.onnx_runtime import CODE_BYTES, PROCESSOR, Hardware, Kept, Session, onnxruntime, prepare
from edgeblocks.registry import build_target
from edgeblocks.units import advised_budget, format_bytes, parse_size

# As fast a sample as 64 at a time, at half of the memory (width 384, 4 layers, 64 tokens, 2 threads: 7.1 and 7.0 ms a
# sample, 159 and 321 MB).
DEFAULT_MICRO_BATCH = 16
DEFAULT_BUDGET = "50%"
_REFUSED = ("bad_alloc", "Failed to allocate memory", "bad allocation", "Cannot allocate memory")
"""What onnxruntime says where the system refuses memory."""

Values = NDArray[np.float32]
Given = NDArray[np.generic]
"""What a graph takes or gives."""
Condition = NDArray[Any]
"""What a block sees beside z: class numbers int64 [b], or images float32 [b, C, H, W] in model space."""


def budget_of_a_run(mem_budget: str | None) -> int:
    """Bytes that a process which runs an export may take; None: half of the machine's memory.

    Raises:
        ConfigError: not a size.
    """
    try:
        return parse_size(mem_budget or DEFAULT_BUDGET, whole_bytes=build_target("cpu").total_bytes())
    except ValueError as error:
        raise ConfigError(f"--mem-budget {error}") from error


class ExportedChain:
    """An exported chain. Not thread-safe.

    manifest: given only while the directory is being written; else it is read.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """

    keeps_all = False
    """Whether blocks stay loaded beside each other; else one gives way to the next. Where memory does not hold all,
    this is False for a while."""

    def __init__(
        self, directory: Path | str, *, manifest: Manifest | None = None, hardware: Hardware = PROCESSOR
    ) -> None:
        self.directory = Path(directory)
        self._hardware = hardware
        self.manifest: Manifest = read_manifest(self.directory) if manifest is None else manifest
        self.partition = self.manifest.partition
        self.loads: list[int] = []
        """The blocks loaded, in order."""
        self._sessions: dict[str, Session] = {}
        """By the names of the graphs' files."""
        self._checked: dict[str, Path] = {}
        """Files that were compared with the manifest since `close`: one that comes again is not read twice for it."""
        self._on_giving_way: Callable[[], None] | None = None
        """Tells that blocks give way to one another."""

    @property
    def in_one_file(self) -> bool:
        """Whether there is one graph for the whole chain; else there is one a block."""
        return self.manifest.chain is not None

    @abstractmethod
    def held_bytes(self, n: int) -> int:
        """What `n` images or texts keep in memory at least, beside the blocks."""

    @contextlib.contextmanager
    def within(self, mem_budget: str | None, *, n: int, on_note: Callable[[str], None] | None = None) -> Iterator[None]:
        """Keep the process inside a memory budget while `n` images or texts are made; a graph may come from anywhere.

        Blocks that would stay loaded beside each other give way to one another where the budget does not hold all.

        Args:
            mem_budget: a size, or a share of the machine's memory; None: half of it.
            on_note: called with a sentence where blocks give way to one another.

        Raises:
            ConfigError: not a size.
            DoesNotFitError: what the manifest describes cannot fit.
            OutOfBudgetError: memory was refused at the budget.
        """
        target = build_target("cpu")
        budget_bytes = budget_of_a_run(mem_budget)
        sizes = [file.bytes for file in self.manifest.graphs]
        beside_bytes = target.used_bytes() + self.held_bytes(n)
        least = beside_bytes + max(sizes)
        if least > budget_bytes:
            largest = "chain" if self.in_one_file else "largest block"
            raise DoesNotFitError(
                f"{self.directory} takes at least {format_bytes(least)} for {n} at a time, by its manifest: its "
                f"{largest} has {format_bytes(max(sizes))}; the budget is {format_bytes(budget_bytes)}. Ask for "
                f"fewer with --n, or give --mem-budget {advised_budget(least)} or more",
                least,
            )
        prepare()
        keeps_all = self.keeps_all
        # While the last block is read it is there twice.
        whole_bytes = beside_bytes + CODE_BYTES + sum(sizes) + max(sizes)
        if on_note is not None:
            enough = advised_budget(max(whole_bytes, budget_bytes + max(sizes)))
            self._on_giving_way = partial(
                on_note,
                f"the budget of {format_bytes(budget_bytes)} does not hold all blocks: each is read again for every "
                f"token, which is slow; --mem-budget {enough} keeps them",
            )
        try:
            if keeps_all and len(sizes) > 1 and whole_bytes > budget_bytes:
                self._give_way()
            # A block that is given up must be free for the next one, not a gap in the heap.
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
        """From now on one block is loaded at a time."""
        self.keeps_all = False
        if self._on_giving_way is not None:
            self._on_giving_way()

    def run_graph(
        self, block: int, feed: dict[str, NDArray[np.generic]], shapes: Sequence[tuple[int, ...]]
    ) -> list[Values]:
        """The outputs of one block's graph on a micro-batch, whichever noise levels it owns; it stays loaded.

        Args:
            shapes: those that the outputs must have.

        Raises:
            RunError: the graph cannot be run, or gives something else than float32 numbers of these shapes.
            MemoryError: the system refused memory.
        """
        needed = [(np.dtype(np.float32), shape) for shape in shapes]
        try:
            return self._run_block(block, feed, needed)
        except MemoryError:
            if not self._sessions.keys() - {self.manifest.graphs[block].file}:
                raise
        # What graphs take beside their files is known once it is refused.
        self._sessions.clear()
        gc.collect()  # the error refers to the block that was half loaded
        self._give_way()
        return self._run_block(block, feed, needed)

    def _run_block(
        self, block: int, feed: Mapping[str, Given], needed: Sequence[tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> list[Values]:
        file = self.manifest.graphs[block]
        if file.file not in self._sessions:
            if not self.keeps_all:
                self._sessions.clear()
            self._sessions[file.file] = self._loaded(file)
            self.loads.append(block)
        return self._run(file, feed, needed)

    def run_chain(
        self,
        feed: Mapping[str, Given | Kept],
        needed: Sequence[tuple[type[np.generic], tuple[int, ...]]],
        *,
        keep: str | None = None,
    ) -> list[Any]:
        """The outputs of the graph of the whole chain; it stays loaded.

        Args:
            needed: the type and the shape that each output must have.
            keep: an output that stays in onnxruntime's memory. Its numbers are not looked at.

        Raises:
            RunError, MemoryError: as `run_graph`.
        """
        file = self.manifest.chain
        assert file is not None
        if file.file not in self._sessions:
            self._sessions[file.file] = self._loaded(file)
        return self._run(file, feed, [(np.dtype(kind), shape) for kind, shape in needed], keep=keep)

    def _run(
        self,
        file: GraphFile,
        feed: Mapping[str, Given | Kept],
        needed: Sequence[tuple[np.dtype[Any], tuple[int, ...]]],
        *,
        keep: str | None = None,
    ) -> list[Any]:
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

    def _loaded(self, file: GraphFile) -> Session:
        if file.file not in self._checked:
            # Compared with the manifest's checksums before onnxruntime parses it.
            self._checked[file.file] = checked_path(self.directory, file)
        path = self._checked[file.file]
        try:
            return Session(path, self._hardware)
        except ConfigError:
            raise
        except Exception as error:  # onnxruntime's errors have no common base
            what = f"onnxruntime {onnxruntime().__version__} cannot load {file.title} from {path}"
            cure = f"the graph needs opset {self.manifest.opset}: try a newer onnxruntime"
            raise _explained(error, what, cure) from error


class ImageChain(ExportedChain):
    """An exported chain that denoises: images, or their labels."""

    manifest: ImageManifest

    def denoise(
        self, z: Values, sigma: float, condition: Condition | None, *, micro_batch: int | None = None
    ) -> Values:
        """D(z, sigma) for all samples [n, ...], by the block that owns sigma; it stays loaded.

        Args:
            condition: one a sample; of class numbers, `num_classes` is "no class". None exactly when there is none.
            micro_batch: samples that go through a block together; it sets the memory, not the samples. None: 16.

        Raises:
            ConfigError: micro_batch is below 1.
            ValueError: sigma lies outside the network's noise levels.
        """
        block = self.partition.block_of(sigma)
        denoised = np.empty_like(z)
        for part in parts(len(z), micro_batch):
            sigmas = np.full(len(z[part]), sigma, dtype=np.float32)
            seen = None if condition is None else condition[part]
            denoised[part] = self.run_block(block, z[part], sigmas, seen)
        return denoised

    def run_block(self, block: int, z: Values, sigma: Values, condition: Condition | None) -> Values:
        """One block's graph on a micro-batch z [b, ...], sigma [b], whichever noise levels it owns."""
        feed: dict[str, NDArray[Any]] = {"z": z, "sigma": sigma}
        if condition is not None:
            assert self.manifest.condition_name is not None
            feed[self.manifest.condition_name] = condition
        return self.run_graph(block, feed, [z.shape])[0]


def parts(n: int, micro_batch: int | None) -> Iterator[slice]:
    """The samples that go through a graph together. None: 16.

    Raises:
        ConfigError: micro_batch is below 1.
    """
    micro_batch = DEFAULT_MICRO_BATCH if micro_batch is None else micro_batch
    if micro_batch < 1:
        raise ConfigError(f"micro_batch {micro_batch}: at least one sample must go through a block at a time")
    return (slice(start, min(start + micro_batch, n)) for start in range(0, n, micro_batch))


def _explained(error: Exception, what: str, cure: str = "export the run again") -> Exception:
    """An error of onnxruntime's in our words; memory that the system refused is a MemoryError whatever it says."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or any(sign in text for sign in _REFUSED):
        return MemoryError(text)
    return RunError(f"{what}: {text}; {cure}")
