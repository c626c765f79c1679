"""Images from an exported directory: numpy and onnxruntime, no torch."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.pictures import pictures_together, to_uint8
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.diffusion.solver import Solver, check_request, class_number, classes_in_turn, guide, integrate
from edgeblocks.errors import ConfigError
from edgeblocks.export.onnx_chain import ImageChain, Values, parts
from edgeblocks.seeds import start_noise


class Sampler(ImageChain):
    """An exported chain that makes images."""

    def held_bytes(self, n: int) -> int:
        """Noise, and what the solver keeps of each sample: six copies; and pictures that are made of latents."""
        picture = self.manifest.picture
        pictures_bytes = n * picture.height * picture.width * picture.channels
        return 4 * 6 * n * math.prod(self.manifest.image_shape) + (pictures_bytes if self.manifest.decoding else 0)

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
        on_picture: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Samples, uint8 [n, H, W, C]. The classes take turns unless one is chosen by number or name.

        Args:
            steps: noise levels of the chain, at least one a block; None: as exported.
            micro_batch: samples that go through a block together; it sets the memory, not the samples. None: 16.
            on_level: called with the number of noise levels done.
            on_picture: where samples are latents, called with the pictures that are decoded, and how many there will
                be.

        Raises:
            ConfigError: an impossible argument.
            RunError: a block's file is missing or damaged.
        """
        x, pictures = self.sample_both(
            n,
            steps=steps,
            solver=solver,
            guidance=guidance,
            label=label,
            seed=seed,
            micro_batch=micro_batch,
            on_level=on_level,
        )
        return self.pictures(x, on_picture=on_picture) if pictures is None else pictures

    def pictures(self, x: Values, *, on_picture: Callable[[int, int], None] | None = None) -> NDArray[np.uint8]:
        """Pixels uint8 [n, H, W, C] of samples in model space; a graph decodes latents, a few at a time.

        Raises:
            RunError: as of `sample`.
        """
        manifest = self.manifest
        if manifest.decoding is None:
            return to_uint8(x, mean=manifest.mean, scale=manifest.scale)
        picture = manifest.decoding.picture
        made = np.empty((len(x), picture.height, picture.width, picture.channels), dtype=np.uint8)
        together = pictures_together(picture.height, picture.width)
        try:
            for start in range(0, len(x), together):
                some = slice(start, start + together)
                made[some] = to_uint8(self.decode(x[some] / manifest.scale + manifest.mean), mean=0.0, scale=1.0)
                if on_picture is not None:
                    on_picture(min(some.stop, len(x)), len(x))
        finally:
            self.close()
        return made

    def decode(self, latents: Values) -> Values:
        """Pictures float32 [n, C, H, W] of about 0 to 1, of latents [n, c, h, w]."""
        assert self.manifest.decoding is not None and self.manifest.decoding.graph is not None
        graph, picture = self.manifest.decoding.graph, self.manifest.decoding.picture
        shape = len(latents), picture.channels, picture.height, picture.width
        return self.run_graph(graph.block, {"latents": latents.astype(np.float32, copy=False)}, [shape])[0]

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
        return self.sample_both(
            n,
            steps=steps,
            solver=solver,
            guidance=guidance,
            label=label,
            seed=seed,
            micro_batch=micro_batch,
            on_level=on_level,
        )[0]

    def sample_both(
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
    ) -> tuple[Values, NDArray[np.uint8] | None]:
        """Samples in model space, and where a graph of the whole chain makes them the pictures that it gives."""
        steps = self.manifest.sampler.steps if steps is None else steps
        check_request(n=n, steps=steps, guidance=guidance, conditional=self.conditional)
        if solver not in ("euler", "heun"):
            raise ConfigError(f"--solver {solver}: there are euler and heun")
        levels = sampler_levels(self.partition, num_steps=steps)
        num_classes = self.manifest.num_classes
        chosen = class_number(label, self.manifest.class_names)
        labels = classes_in_turn(n, num_classes=num_classes, chosen=chosen)
        noise = start_noise(self.manifest.image_shape, samples=range(n), seed=seed)
        if self.in_one_file:
            return self._in_one_run(noise, levels, solver, guidance, labels, micro_batch, on_level)
        # The embedding's last row, which training uses where it drops a label.
        no_class = np.full(n, num_classes, dtype=np.int64)

        def denoise(z: Values, sigma: float) -> Values:
            conditional = self.denoise(z, sigma, labels, micro_batch=micro_batch)
            if labels is None or guidance == 1.0:
                return conditional
            return guide(conditional, self.denoise(z, sigma, no_class, micro_batch=micro_batch), guidance)

        try:
            return integrate(denoise, noise, levels, solver=solver, on_level=on_level), None
        finally:
            self.close()

    def _in_one_run(
        self,
        noise: Values,
        levels: Sequence[float],
        solver: Solver,
        guidance: float,
        labels: NDArray[np.int64] | None,
        micro_batch: int | None,
        on_level: Callable[[int], None] | None,
    ) -> tuple[Values, NDArray[np.uint8]]:
        """The chain's own graph, some samples at a time, so that memory does not grow with their number."""
        common: dict[str, NDArray[np.generic]] = {
            "levels": np.array(levels, dtype=np.float64),
            "heun": np.array(solver == "heun"),
        }
        if labels is not None:
            common["guidance"] = np.array(guidance, dtype=np.float32)
        picture = self.manifest.picture
        pictures = np.empty((len(noise), picture.height, picture.width, picture.channels), dtype=np.uint8)
        kinds: tuple[type[np.generic], ...] = (np.float32, np.uint8)
        try:
            for part in parts(len(noise), micro_batch):
                own: dict[str, NDArray[np.generic]] = {"noise": noise[part]}
                if labels is not None:
                    own["labels"] = labels[part]
                needed = list(zip(kinds, (noise[part].shape, pictures[part].shape), strict=True))
                noise[part], pictures[part] = self.run_chain(common | own, needed)
                if on_level is not None:
                    on_level(len(levels) * min(part.stop, len(noise)) // len(noise))
            return noise, pictures
        finally:
            self.close()
