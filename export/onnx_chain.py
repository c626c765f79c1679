"""An exported chain of blocks in onnxruntime: numpy in, numpy out, no torch.

The noise levels descend, so the blocks come in order: one session is loaded at a time, runs all samples at all of its
levels, and is released before the next one is loaded. The levels, the start noise, the solver and the routing of a
level to its block are the same code that torch's chain runs; only the network differs. Where the whole chain is one
file, its graph does all of that, and the levels and random numbers alone are made here.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError
from edgeblocks.export.loaded_graphs import Given, LoadedGraphs
from edgeblocks.export.manifest import read_manifest
from edgeblocks.export.manifest_types import ImageManifest, Manifest
from edgeblocks.onnx_runtime import PROCESSOR, Hardware, Kept

# As fast a sample as 64 at a time, at half of the memory (width 384, 4 layers, 64 tokens, 2 threads: 7.1 and 7.0 ms a
# sample, 159 and 321 MB).
DEFAULT_MICRO_BATCH = 16
Values = NDArray[np.float32]
Condition = NDArray[Any]
"""What a block sees beside z: class numbers int64 [b], or images float32 [b, C, H, W] in model space."""


class ExportedChain(LoadedGraphs):
    """An exported chain. Not thread-safe.

    manifest: given only while the directory is being written; else it is read.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """

    def __init__(
        self, directory: Path | str, *, manifest: Manifest | None = None, hardware: Hardware = PROCESSOR
    ) -> None:
        self.manifest: Manifest = read_manifest(Path(directory)) if manifest is None else manifest
        super().__init__(Path(directory), self.manifest.graphs, opset=self.manifest.opset, hardware=hardware)
        self.partition = self.manifest.partition
        self.loads: list[int] = []
        """The blocks loaded, in order."""

    @property
    def in_one_file(self) -> bool:
        """Whether there is one graph for the whole chain; else there is one a block."""
        return self.manifest.chain is not None

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
            self._load(file)
            self.loads.append(block)
        return self.run_file(file, feed, needed)

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
        return self.run_file(file, feed, [(np.dtype(kind), shape) for kind, shape in needed], keep=keep)


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
