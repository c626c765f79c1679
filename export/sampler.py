"""Images from an exported directory: numpy and onnxruntime, no torch."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.pictures import to_uint8
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.diffusion.solver import Solver, check_request, class_number, classes_in_turn, guide, integrate
from edgeblocks.errors import ConfigError
from edgeblocks.export.onnx_chain import ImageChain, Values
from edgeblocks.seeds import start_noise


class Sampler(ImageChain):
    """An exported chain that makes images."""

    def held_bytes(self, n: int) -> int:
        """Noise, and what the solver keeps of each sample: six copies."""
        return 4 * 6 * n * math.prod(self.manifest.image_shape)

    @property
    def conditional(self) -> bool:
        return self.manifest.num_classes > 0

    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Samples, uint8 [n, H, W, C]. The classes take turns unless one is chosen by number or name.

        Args:
            steps: noise levels of the chain, at least one a block; None: as exported.
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
        steps: int | None = None,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_level: Callable[[int], None] | None = None,
    ) -> Values:
        """As `sample`, before the conversion to pixels: float32 [n, C, H, W]."""
        steps = self.manifest.sampler.steps if steps is None else steps
        check_request(n=n, steps=steps, guidance=guidance, conditional=self.conditional)
        if solver not in ("euler", "heun"):
            raise ConfigError(f"--solver {solver}: there are euler and heun")
        levels = sampler_levels(self.partition, num_steps=steps)
        num_classes = self.manifest.num_classes
        chosen = class_number(label, self.manifest.class_names)
        labels = classes_in_turn(n, num_classes=num_classes, chosen=chosen)
        # The embedding's last row, which training uses where it drops a label.
        no_class = np.full(n, num_classes, dtype=np.int64)

        def denoise(z: Values, sigma: float) -> Values:
            conditional = self.denoise(z, sigma, labels, micro_batch=micro_batch)
            if labels is None or guidance == 1.0:
                return conditional
            return guide(conditional, self.denoise(z, sigma, no_class, micro_batch=micro_batch), guidance)

        noise = start_noise(self.manifest.image_shape, samples=range(n), seed=seed)
        try:
            return integrate(denoise, noise, levels, solver=solver, on_level=on_level)
        finally:
            self.close()
