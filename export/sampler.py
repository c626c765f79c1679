"""Samples from an exported directory: numpy and onnxruntime, no torch.

The noise levels descend, so the blocks come in order: one session is loaded at a time, runs all samples at all of its
levels, and is released before the next one is loaded. The levels, the start noise, the solver and the routing of a
level to its block are the same code that torch's chain runs; only the network differs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError, RunError
from edgeblocks.export.manifest import DEFAULT_STEPS, Manifest, checked_path, read_manifest
from edgeblocks.noise import sampler_levels
from edgeblocks.pictures import to_uint8
from edgeblocks.randomness import start_noise
from edgeblocks.solver import Solver, check_request, class_number, classes_in_turn, guide, integrate

# As fast a sample as 64 at a time, at half of the memory (width 384, 4 layers, 64 tokens, 2 threads: 7.1 and 7.0 ms a
# sample, 159 and 321 MB).
DEFAULT_MICRO_BATCH = 16
_ERRORS_ONLY = 3

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


class Sampler:
    """An exported chain. Not thread-safe.

    manifest: given only while the directory is being written; else it is read.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """

    def __init__(self, directory: Path | str, *, manifest: Manifest | None = None) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory) if manifest is None else manifest
        self.partition = self.manifest.partition
        self.loads: list[int] = []
        """The blocks loaded, in order."""
        self._session: Any = None
        self._block: int | None = None

    @property
    def conditional(self) -> bool:
        return self.manifest.num_classes > 0

    def sample(
        self,
        n: int,
        *,
        steps: int = DEFAULT_STEPS,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Samples, uint8 [n, H, W, C]. The classes take turns unless one is chosen by number or name.

        Args:
            micro_batch: samples that go through a block together; it sets the memory, not the samples. None: 16.
            on_level: called with the number of noise levels done.

        Raises:
            ConfigError: an impossible argument.
            RunError: a block's file is missing or damaged.
        """
        x = self.sample_model_space(
            n,
            steps=steps,
            solver=solver,
            guidance=guidance,
            label=label,
            seed=seed,
            micro_batch=micro_batch,
            on_level=on_level,
        )
        return to_uint8(x, mean=self.manifest.mean, scale=self.manifest.scale)

    def sample_model_space(
        self,
        n: int,
        *,
        steps: int = DEFAULT_STEPS,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> Images:
        """As `sample`, before the conversion to pixels: float32 [n, C, H, W]."""
        check_request(n=n, steps=steps, guidance=guidance, conditional=self.conditional)
        if solver not in ("euler", "heun"):
            raise ConfigError(f"--solver {solver}: there are euler and heun")
        levels = sampler_levels(self.partition, num_steps=steps)
        num_classes = self.manifest.num_classes
        chosen = class_number(label, self.manifest.class_names)
        labels = classes_in_turn(n, num_classes=num_classes, chosen=chosen)
        no_class = np.full(n, num_classes, dtype=np.int64)

        def denoise(z: Images, sigma: float) -> Images:
            conditional = self.denoise(z, sigma, labels, micro_batch=micro_batch)
            if labels is None or guidance == 1.0:
                return conditional
            return guide(conditional, self.denoise(z, sigma, no_class, micro_batch=micro_batch), guidance)

        noise = start_noise(self.manifest.image_shape, num_samples=n, seed=seed)
        try:
            return integrate(denoise, noise, levels, solver=solver, on_level=on_level)
        finally:
            self.close()

    def denoise(self, z: Images, sigma: float, labels: Labels | None, *, micro_batch: int | None = None) -> Images:
        """D(z, sigma) for all samples [n, C, H, W], by the block that owns sigma; it stays loaded.

        Args:
            labels: class numbers, `num_classes` for "no class"; None exactly when the network is unconditional.

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
            denoised[part] = self.run_block(block, z[part], sigmas, None if labels is None else labels[part])
        return denoised

    def run_block(self, block: int, z: Images, sigma: NDArray[np.float32], labels: Labels | None) -> Images:
        """One block's graph on a micro-batch, whichever noise levels it owns: z [b, C, H, W], sigma [b], labels [b]."""
        feed: dict[str, NDArray[Any]] = {"z": z, "sigma": sigma}
        if labels is not None:
            feed["labels"] = labels
        denoised: Images = self._load(block).run(["denoised"], feed)[0]
        return denoised

    def close(self) -> None:
        """Release the loaded session."""
        self._session = self._block = None

    def _load(self, block: int) -> Any:
        if self._block != block:
            self.close()
            path = checked_path(self.directory, self.manifest.files[block])
            try:
                self._session = onnxruntime.InferenceSession(path, session_options(), ["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's errors have no common base
                raise RunError(
                    f"onnxruntime {onnxruntime.__version__} cannot load block {block} from {path}: {error}; the graph "
                    f"needs opset {self.manifest.opset}: try a newer onnxruntime"
                ) from error
            self._block = block
            self.loads.append(block)
        return self._session


def session_options() -> Any:
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
