"""Classes of picture files, whatever network tells them: how a file becomes pixels, and what an answer is. No torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.decoding import UnreadableImageError, decode
from edgeblocks.data.deep_grey import GreyRange
from edgeblocks.errors import ConfigError, DataError

MOST_SHOWN = 5
TOGETHER = 64
"""Pictures that are read before they go through a network."""

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]


class Likely(TypedDict):
    """A class and how likely it is."""

    name: str
    probability: float


class Answer(TypedDict):
    """An image file and its likeliest classes, likeliest first."""

    path: str
    classes: list[Likely]


@dataclass(frozen=True, kw_only=True)
class TakenPictures:
    """The pictures that a network takes.

    shape: (channels, height, width).
    deep_range: values of grey of more than 8 bits that become 0 and 255; None: its upper eight bits of 16 do.
    """

    shape: tuple[int, int, int]
    deep_range: tuple[int, int] | None

    def held_bytes(self, n: int) -> int:
        """Pictures that are read together: as bytes and as numbers."""
        return 5 * min(n, TOGETHER) * math.prod(self.shape)

    def check(self, pixels: Pixels) -> None:
        """That they are uint8 [N, H, W, C] of the network's size.

        Raises:
            ConfigError: they are not.
        """
        channels, height, width = self.shape
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels):
            raise ConfigError(
                f"images are {pixels.dtype} {pixels.shape[1:]}; the network takes uint8 {(height, width, channels)}"
            )

    def read(self, path: Path) -> Pixels:
        """A file's pixels, [H, W, C]: cut to the central square and resized where the network's images are square.

        Raises:
            DataError: it is no image that can be read, or has another size than a network takes that is not square.
        """
        channels, height, width = self.shape
        if path.is_dir():
            raise DataError(f"{path} is a folder; name the images in it (`edgeblocks run` takes folders)")
        if not path.exists():
            raise DataError(f"there is no image {path}")
        try:
            pixels = decode(
                path,
                image_size=height if height == width else None,
                grey=channels == 1,
                deep_range=None if self.deep_range is None else GreyRange(*self.deep_range),
            )
        except UnreadableImageError as error:
            raise DataError(f"{path} is no image that can be read: {error}") from error
        if pixels.shape != (height, width, channels):
            raise DataError(
                f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels; the network takes {width} x {height}"
            )
        return pixels


class PictureClassifier(ABC):
    """What classifies picture files, given how it classifies pixels."""

    manifest: Any
    """Of an export; it has `image_shape`, `deep_range` and `class_names`."""

    @property
    def taken(self) -> TakenPictures:
        """The pictures that it takes."""
        return TakenPictures(shape=self.manifest.image_shape, deep_range=self.manifest.deep_range)

    def held_bytes(self, n: int) -> int:
        """What `n` pictures keep in memory at least, beside the graphs."""
        return self.taken.held_bytes(n)

    @abstractmethod
    def classify(
        self,
        pixels: Pixels,
        *,
        steps: int | None = None,
        noises: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
    ) -> Values:
        """Probabilities of the classes, float32 [N, classes], of pictures uint8 [N, H, W, C] of the network's size."""

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
        """For each picture file its likeliest classes, likeliest first.

        Args:
            steps, noises, seed: as of `classify`.
            on_unreadable: called with the error of each file that cannot be read; None: it is raised.
            on_image: called with the files that are done, and how many there are, where they are more than are read
                together.

        Raises:
            DataError: as `TakenPictures.read`.
            ConfigError, RunError: as `classify`.
        """
        found: list[Answer] = []
        # A group at a time, as pictures are decoded before they go through the network.
        for start in range(0, len(paths), TOGETHER):
            read: list[tuple[Path, Pixels]] = []
            for path in paths[start : start + TOGETHER]:
                try:
                    read.append((path, self.taken.read(path)))
                except DataError as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(error)
            if read:
                pixels, names = np.stack([image for _, image in read]), self.manifest.class_names
                probabilities = self.classify(pixels, steps=steps, noises=noises, seed=seed)
                found += [_answer(path, row, names) for (path, _), row in zip(read, probabilities, strict=True)]
            if on_image is not None and len(paths) > TOGETHER:
                on_image(min(start + TOGETHER, len(paths)), len(paths))
        return found


def _answer(path: Path, probabilities: Values, class_names: Sequence[str]) -> Answer:
    order = np.argsort(-probabilities, kind="stable")[:MOST_SHOWN]
    classes: list[Likely] = [
        {"name": class_names[number], "probability": float(probabilities[number])} for number in order
    ]
    return {"path": str(path), "classes": classes}
