"""Classes of images with an exported directory: numpy and onnxruntime, no torch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeblocks.diffusion.classification import classify, label_noise
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.errors import ConfigError
from edgeblocks.export.manifest_types import ImageManifest
from edgeblocks.export.onnx_chain import DEFAULT_MICRO_BATCH, ImageChain, Values, parts
from edgeblocks.export.picture_classes import PictureClassifier


class Classifier(PictureClassifier, ImageChain):
    """An exported chain that classifies images."""

    manifest: ImageManifest

    def classify(
        self,
        pixels: NDArray[np.uint8],
        *,
        steps: int | None = None,
        noises: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
    ) -> Values:
        """Probabilities of the classes, float32 [N, classes], of images uint8 [N, H, W, C] of the network's size.

        Args:
            steps: noise levels of a chain, at least one a block; None: as the manifest says.
            noises: chains whose mean is the answer; None: as the manifest says.

        Raises:
            ConfigError: the images have another size, or fewer steps than blocks.
            RunError: a block's file is missing or damaged.
        """
        self.taken.check(pixels)
        settings = self.manifest.sampler
        noises = settings.noises if noises is None else noises
        if noises < 1:
            raise ConfigError(f"--noises {noises}: at least one chain is needed")
        levels = sampler_levels(self.partition, num_steps=settings.steps if steps is None else steps)
        try:
            if self.in_one_file:
                return self._in_one_run(pixels, levels, noises, seed, micro_batch)
            images = self._to_model(pixels)
            return classify(
                lambda z, sigma: self.denoise(z, sigma, images, micro_batch=micro_batch),
                pixels=pixels,
                num_classes=self.manifest.num_classes,
                levels=levels,
                noises=noises,
                seed=seed,
            )
        finally:
            self.close()

    def _in_one_run(
        self, pixels: NDArray[np.uint8], levels: Sequence[float], noises: int, seed: int, micro_batch: int | None
    ) -> Values:
        """The chain's own graph, some images at a time: each of them goes through it once for each of its chains."""
        num_classes = self.manifest.num_classes
        probabilities = np.empty((len(pixels), num_classes), dtype=np.float32)
        together = max(1, (DEFAULT_MICRO_BATCH if micro_batch is None else micro_batch) // noises)
        for part in parts(len(pixels), together):
            noise = label_noise(pixels[part], num_classes=num_classes, noises=noises, seed=seed)
            feed: dict[str, NDArray[np.generic]] = {"pixels": pixels[part], "noise": noise, "levels": np.array(levels)}
            (probabilities[part],) = self.run_chain(feed, [(np.float32, probabilities[part].shape)])
        return probabilities

    def _to_model(self, pixels: NDArray[np.uint8]) -> Values:
        """float32 [N, C, H, W] with zero mean over the data that the network was trained on."""
        mean, scale = self.manifest.mean, self.manifest.scale
        # The operations of `ImageInfo.to_model` in their order, so that both round alike: [N, H, W, C] -> [N, C, H, W].
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
        images *= np.float32(scale / 255)
        images -= np.float32(mean * scale)
        return images
