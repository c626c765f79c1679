"""What the runtime asks of a family. A new family is one file that satisfies `Family`, plus presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from edgeblocks.noise import NoiseDistribution, NoiseRange

Batch = dict[str, Tensor]
BatchSpec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What a network must know of an image set.

    Model space is x = (pixel/255 - mean) * scale, which has standard deviation sigma_data. `num_classes` is 0 when the
    set has no labels.
    """

    channels: int
    height: int
    width: int
    num_classes: int
    mean: float
    scale: float


class BlockNetwork(Protocol):
    """A block as a module: callable, with parameters, initialised from a generator."""

    def init_(self, generator: torch.Generator) -> None: ...

    def reset_tables_(self) -> None: ...


class Family(Protocol):
    """A kind of model and its objective."""

    name: str
    preferred_blocks: int
    sigma_data: float
    """Standard deviation of the clean target, per component."""
    settings: Any
    data: Any

    @property
    def num_layers(self) -> int: ...

    @property
    def noise(self) -> NoiseDistribution: ...

    @property
    def conditional(self) -> bool: ...

    def block(self, *, num_layers: int, checkpointing: bool) -> nn.Module: ...

    def batch_spec(self, batch: int) -> BatchSpec: ...

    def draw(
        self, pixels: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch: ...

    def at_level(
        self, pixels: np.ndarray, labels: np.ndarray | None, sigma: float, generator: torch.Generator
    ) -> Batch: ...

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]: ...
