"""Classes of images with an exported directory: numpy and onnxruntime, no torch."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.decoding import UnreadableImageError, decode
from edgeblocks.data.deep_grey import GreyRange
from edgeblocks.diffusion.classification import classify, label_noise
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.errors import ConfigError, DataError
from edgeblocks.export.onnx_chain import DEFAULT_MICRO_BATCH, ImageChain, Values, parts

MOST_SHOWN = 5
_TOGETHER = 64
"""Images that go through the chain together."""


class Likely(TypedDict):
    """A class and how likely it is."""

    name: str
    probability: float


class Answer(TypedDict):
    """An image file and its likeliest classes, likeliest first."""

    path: str
    classes: list[Likely]


class Classifier(ImageChain):
    """An exported chain that classifies images."""

    def held_bytes(self, n: int) -> int:
        """The images that go through together: as bytes and as numbers."""
        return 5 * min(n, _TOGETHER) * math.prod(self.manifest.image_shape)

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
        channels, height, width = self.manifest.image_shape
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels):
            raise ConfigError(
                f"images are {pixels.dtype} {pixels.shape[1:]}; the network takes uint8 {(height, width, channels)}"
            )
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

    def classify_files(
        self,
        paths: Sequence[Path],
        *,
        steps: int | None = None,
        noises: int | None = None,
        seed: int = 0,
        on_unreadable: Callable[[DataError], None] | None = None,
        on_image: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """For each image file its likeliest classes: {path, classes: [{name, probability}, ..]}, likeliest first.

        An image is cut to its central square and resized where the network's images are square.

        Args:
            on_unreadable: called with the error of each file that cannot be read; None: it is raised.
            on_image: called with the files that are done, and how many there are, where they are more than go through
                the chain together.

        Raises:
            DataError: a file is no image that can be read, or has another size than a network takes that is not square.
            ConfigError, RunError: as `classify`.
        """
        found: list[Answer] = []
        # A group at a time, as pictures are decoded before they go through the chain.
        for start in range(0, len(paths), _TOGETHER):
            read: list[tuple[Path, NDArray[np.uint8]]] = []
            for path in paths[start : start + _TOGETHER]:
                try:
                    read.append((path, self._read(path)))
                except DataError as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(error)
            if read:
                pixels = np.stack([image for _, image in read])
                probabilities = self.classify(pixels, steps=steps, noises=noises, seed=seed)
                found += [self._answer(path, row) for (path, _), row in zip(read, probabilities, strict=True)]
            if on_image is not None and len(paths) > _TOGETHER:
                on_image(min(start + _TOGETHER, len(paths)), len(paths))
        return found

    def _answer(self, path: Path, probabilities: Values) -> Answer:
        order = np.argsort(-probabilities, kind="stable")[:MOST_SHOWN]
        names = self.manifest.class_names
        classes: list[Likely] = [
            {"name": names[number], "probability": float(probabilities[number])} for number in order
        ]
        return {"path": str(path), "classes": classes}

    def _read(self, path: Path) -> NDArray[np.uint8]:
        channels, height, width = self.manifest.image_shape
        if path.is_dir():
            raise DataError(f"{path} is a folder; name the images in it (`edgeblocks run` takes folders)")
        if not path.exists():
            raise DataError(f"there is no image {path}")
        try:
            pixels = decode(
                path,
                image_size=height if height == width else None,
                grey=channels == 1,
                deep_range=None if self.manifest.deep_range is None else GreyRange(*self.manifest.deep_range),
            )
        except UnreadableImageError as error:
            raise DataError(f"{path} is no image that can be read: {error}") from error
        if pixels.shape != (height, width, channels):
            raise DataError(
                f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels; the network takes {width} x {height}"
            )
        return pixels

    def _to_model(self, pixels: NDArray[np.uint8]) -> Values:
        """float32 [N, C, H, W] with zero mean over the data that the network was trained on."""
        mean, scale = self.manifest.mean, self.manifest.scale
        # The operations of `ImageInfo.to_model` in their order, so that both round alike: [N, H, W, C] -> [N, C, H, W].
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
        images *= np.float32(scale / 255)
        images -= np.float32(mean * scale)
        return images
