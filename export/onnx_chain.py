"""An exported chain of blocks in onnxruntime: numpy in, numpy out, no torch.

The noise levels descend, so the blocks come in order: one session is loaded at a time, runs all samples at all of its
levels, and is released before the next one is loaded. The levels, the start noise, the solver and the routing of a
level to its block are the same code that torch's chain runs; only the network differs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError, RunError
from edgeblocks.export.manifest import checked_path, read_manifest
from edgeblocks.export.manifest_types import ImageManifest, Manifest

# As fast a sample as 64 at a time, at half of the memory (width 384, 4 layers, 64 tokens, 2 threads: 7.1 and 7.0 ms a
# sample, 159 and 321 MB).
DEFAULT_MICRO_BATCH = 16
_ERRORS_ONLY = 3

Values = NDArray[np.float32]
Condition = NDArray[Any]
"""What a block sees beside z: class numbers int64 [b], or images float32 [b, C, H, W] in model space."""


class ExportedChain:
    """An exported chain. Not thread-safe.

    manifest: given only while the directory is being written; else it is read.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """

    keeps_all = False
    """Whether blocks stay loaded beside each other; else one gives way to the next."""

    def __init__(self, directory: Path | str, *, manifest: Manifest | None = None) -> None:
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(self.directory) if manifest is None else manifest
        self.partition = self.manifest.partition
        self.loads: list[int] = []
        """The blocks loaded, in order."""
        self._sessions: dict[int, Any] = {}

    def run_graph(self, block: int, feed: dict[str, NDArray[np.generic]]) -> list[Values]:
        """The outputs of one block's graph on a micro-batch, whichever noise levels it owns; it stays loaded."""
        found: list[Values] = self._load(block).run(None, feed)
        return found

    def close(self) -> None:
        """Release what is loaded."""
        self._sessions.clear()

    def _load(self, block: int) -> Any:
        if block not in self._sessions:
            if not self.keeps_all:
                self.close()
            # Compared with the manifest's checksums before onnxruntime parses it.
            path = checked_path(self.directory, self.manifest.files[block])
            try:
                self._sessions[block] = onnxruntime.InferenceSession(path, session_options(), ["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's errors have no common base
                raise RunError(
                    f"onnxruntime {onnxruntime.__version__} cannot load block {block} from {path}: {error}; the graph "
                    f"needs opset {self.manifest.opset}: try a newer onnxruntime"
                ) from error
            self.loads.append(block)
        return self._sessions[block]


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
        micro_batch = DEFAULT_MICRO_BATCH if micro_batch is None else micro_batch
        if micro_batch < 1:
            raise ConfigError(f"micro_batch {micro_batch}: at least one sample must go through a block at a time")
        block = self.partition.block_of(sigma)
        denoised = np.empty_like(z)
        for start in range(0, len(z), micro_batch):
            part = slice(start, start + micro_batch)
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
        return self.run_graph(block, feed)[0]


def session_options() -> object:
    """Options for little memory that cost no speed.

    Measured on a block of 11M parameters (45 MB), 64 samples of 64 tokens, 2 threads; peak resident set and run time:
    as onnxruntime sets them 456 MB, 402 ms; without memory pattern 295 MB, 407 ms; without prepacking (a second copy of
    each weight) 25 MB less while loading; without the arena 321 MB, 440 ms, so the arena stays. Threads that spin while
    they wait slow down whatever else runs (455 against 435 ms on two shared cores).
    """
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
