"""What families are made of: what they know of their data, base classes, checks of settings. See `family.Family`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from edgeblocks.data.dataset import DataSet
from edgeblocks.data.images import ImageSet
from edgeblocks.data.latents import LatentSet
from edgeblocks.data.text import TextSet
from edgeblocks.diffusion.noise import NoiseDistribution, NoisePartition, NoiseRange
from edgeblocks.errors import ConfigError
from edgeblocks.files.tensor_file import TensorFile, Weights
from edgeblocks.planning.layer_costs import LARGEST_HEAP_BYTES
from edgeblocks.tasks import TASKS, Reads, Task

Batch = dict[str, Tensor]
BatchSpec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
ConditionSpec = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape of one sample's, dtype."""

NOISE_FEATURES = 256
NUM_LEVELS = 24


@dataclass(frozen=True, kw_only=True)
class Level:
    """Where evaluation looks: at noise levels in [low, high), cut into equal strata, or at one level, low == high.

    `share` is its part of the mean over all levels. It lies inside one block's range.
    """

    low: float
    high: float
    share: float
    strata: int = 1

    @classmethod
    def at(cls, level: float) -> "Level":
        """One noise level by itself."""
        return cls(low=level, high=level, share=1.0)

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def parts(self) -> "Iterator[Level]":
        """The strata, from high noise to low noise."""
        for part in reversed(range(self.strata)):
            ends = [self.low + (part + more) / self.strata * (self.high - self.low) for more in (0, 1)]
            yield Level(low=ends[0], high=ends[1], share=self.share / self.strata)


@dataclass(frozen=True, kw_only=True)
class TextInfo:
    """What a network must know of a text: how many different tokens it has, how many an example, and whether an example
    is packed of several texts."""

    vocabulary: int
    length: int
    packed: bool = False

    @property
    def example_bytes(self) -> int:
        """Of one example as a network's input."""
        return 8 * self.length


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What a network must know of an image set.

    Model space is x = (pixel/255 - mean) * scale, which has standard deviation sigma_data. `num_classes` is 0 when the
    set has no labels. `deep_range` are the values of grey of more than 8 bits that become 0 and 255, for pictures that
    are classified later; None where its upper eight bits of 16 are kept.

    Where the network sees latents, `autoencoder` is the sha256 of what makes them, x = (latent - mean) * scale, and
    `picture` the height, width and channels of the pictures that they become.
    """

    channels: int
    height: int
    width: int
    num_classes: int
    mean: float
    scale: float
    deep_range: tuple[int, int] | None = None
    autoencoder: str | None = None
    picture: tuple[int, int, int] | None = None

    @property
    def example_bytes(self) -> int:
        """Of one example as a network's input."""
        return 4 * self.channels * self.height * self.width

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a picture."""
        return (self.height, self.width, self.channels) if self.picture is None else self.picture

    def clean(self, examples: np.ndarray, generator: torch.Generator) -> Float[Tensor, "batch channels height width"]:
        """A data set's examples in model space: `to_model` of pixels; of means and deviations float32 [N, 2, C, h, w]
        latents that are drawn anew each time."""
        if self.autoencoder is None:
            return self.to_model(examples)
        mean, deviation = torch.from_numpy(examples).unbind(1)
        drawn = torch.randn(mean.shape, generator=generator).mul_(deviation).add_(mean)
        return drawn.sub_(self.mean).mul_(self.scale)

    def to_model(self, pixels: np.ndarray) -> Float[Tensor, "batch channels height width"]:
        """uint8 [N, H, W, C] to model space: zero mean, standard deviation sigma_data."""
        # [N, C, H, W] also in memory: as a permuted view the channels would stay last.
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.mul_(self.scale / 255).sub_(self.mean * self.scale)


DataInfo = ImageInfo | TextInfo
"""What a network must know of the data."""


class FamilySettings(Protocol):
    """The settings of every family: a frozen dataclass of plain values that all have defaults."""

    @property
    def depth(self) -> int:
        """Layers of the whole network."""
        ...

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        ...


class NoiseSettings(FamilySettings, Protocol):
    """Those of a family whose noise levels are log-normal."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    @property
    def p_mean(self) -> float: ...

    @property
    def p_std(self) -> float: ...


class BaseFamily:
    """What all families share, unless they say otherwise; see `family.Family`."""

    name = ""
    task: Task
    settings_type: type
    data_type: type
    one_stage = False
    always_checkpointed = False
    layer_period = 1
    unrolled = False
    writes_text = True
    """Of a family on text, whether its networks can be sampled here."""
    only_exact = False
    """Whether its networks are trained end to end alone."""
    largest_heap_bytes = LARGEST_HEAP_BYTES
    """Of tensors that share the heap of a process while it is trained on a processor; larger ones have pages of their
    own."""
    library_bytes = 0
    """Of memory that its library takes in every process, where a plan is not made in one that has loaded it."""
    settings: FamilySettings

    @property
    def num_layers(self) -> int:
        return self.settings.depth

    def uniform(self) -> Sequence[Self]:
        """The same, all layers of one kind, for each kind of layers that a network has."""
        return [self]

    @property
    def architecture(self) -> str:
        """What of the network's shape is not in the settings: the content of a file that they name."""
        return ""

    @property
    def resident_bytes(self) -> int:
        """Of what a network keeps in memory beside its parameters, and training does not change."""
        return 0

    def check_network(self) -> None:
        """Look at the network before it is planned for; raises ConfigError where it cannot be trained."""

    def opened(self, path: Path) -> Weights:
        """Weights that a network starts from; raises OSError and MalformedFileError as `TensorFile`."""
        return TensorFile(path)

    def name_in_file(self, name: str) -> str:
        """What a parameter of the whole network is called in a file of weights."""
        return name

    @property
    def tied_parameters(self) -> tuple[str, str] | None:
        """A parameter of the first stage and one of the last that are copies of each other; None where none are."""
        return None

    @property
    def tied_bytes(self) -> int:
        """Of one of `tied_parameters`, as float32."""
        return 0

    @property
    def gap_bytes(self) -> int:
        """That the allocator keeps in a step beyond the share that plans count, measured."""
        return 0

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of a file of weights is used and is no parameter."""
        return False

    own_parts: tuple[str, ...] = ()
    """Parts of a pretrained network that no file has, and start from the seed."""

    def fresh_parts(self, class_names: Sequence[str]) -> Sequence[str]:
        """Parts of a pretrained network that do not fit these classes, and start from the seed."""
        return ()

    def class_rows(self, class_names: Sequence[str]) -> Mapping[str, Sequence[int]]:
        """Of a file's tensors that have these classes in another order: the number of the file's row for each."""
        return {}

    @property
    def conditional(self) -> bool:
        return False

    @property
    def chain_steps(self) -> int:
        """What is usual for the task."""
        return TASKS[self.task].steps


class TextFamily(BaseFamily):
    """What families on text share."""

    reads: Reads = "text"
    data_type: type = TextInfo
    data: TextInfo

    @classmethod
    def data_info(cls, data: DataSet) -> TextInfo:
        """What the network must know of a text."""
        assert isinstance(data, TextSet)
        return TextInfo(vocabulary=data.vocabulary, length=data.length, packed=data.packed)

    def __init__(self, settings: FamilySettings, data: TextInfo) -> None:
        """A family of these settings on this text.

        Raises:
            ConfigError: with everything that is impossible.
        """
        self.settings, self.data = settings, data
        problems = settings.problems()
        if problems:
            raise ConfigError(*problems)


class ImageFamily(BaseFamily):
    """What families on images share: a log-normal distribution of noise levels."""

    reads: Reads = "images"
    data_type: type = ImageInfo
    data: ImageInfo
    sigma_data: float
    settings: NoiseSettings

    @classmethod
    def data_info(cls, data: DataSet) -> ImageInfo:
        """What the network must know of an image set; model space has the standard deviation `sigma_data`."""
        assert isinstance(data, ImageSet)
        height, width, channels = data.example_shape
        latents = data if isinstance(data, LatentSet) else None
        return ImageInfo(
            channels=channels,
            height=height,
            width=width,
            num_classes=len(data.class_names),
            mean=data.mean,
            scale=cls.sigma_data / data.std,
            deep_range=data.deep_range,
            autoencoder=None if latents is None else latents.autoencoder,
            picture=None if latents is None else latents.picture_shape,
        )

    def __init__(self, settings: NoiseSettings, data: ImageInfo) -> None:
        """A family of these settings on these images.

        Raises:
            ConfigError: with everything that is impossible.
        """
        self.settings, self.data = settings, data
        problems = settings.problems() or self.data_problems(data)
        if problems:
            raise ConfigError(*problems)

    def data_problems(self, data: ImageInfo) -> list[str]:
        """What of the data is impossible for these settings."""
        return []

    @property
    def noise(self) -> NoiseDistribution:
        s = self.settings
        return NoiseDistribution(sigma_min=s.sigma_min, sigma_max=s.sigma_max, p_mean=s.p_mean, p_std=s.p_std)

    def evaluation_levels(self, partition: NoisePartition) -> tuple[Level, ...]:
        """Quantiles of the training distribution, the same for every partition."""
        # So that runs with other numbers of blocks are compared on the same noise.
        levels = quantile_levels(self.noise)
        return tuple(Level(low=sigma, high=sigma, share=1 / len(levels)) for sigma in levels)


def quantile_levels(distribution: NoiseDistribution, num_levels: int = NUM_LEVELS) -> tuple[float, ...]:
    """Noise levels at the middles of `num_levels` equal shares of the training distribution, descending.

    A plain mean over them estimates the loss under the training distribution, whatever the partition.
    """
    low, high = distribution.quantile(distribution.sigma_min), distribution.quantile(distribution.sigma_max)
    shares = [(index + 0.5) / num_levels for index in range(num_levels)]
    return tuple(distribution.sigma_at(high + share * (low - high)) for share in shares)


def spread_shares(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Probabilities in [0, 1), float64, evenly spaced from one random start.

    Source: low-discrepancy sampling, arXiv 2107.00630 (VDM), appendix I.1.
    """
    # Evenly spaced, because that lowers the variance of the loss.
    start = torch.rand((), dtype=torch.float64, generator=generator)
    return (start + torch.arange(count, dtype=torch.float64) / count).remainder(1.0)


def draw_sigmas(
    noise: NoiseDistribution, noise_range: NoiseRange, count: int, generator: torch.Generator
) -> Float[Tensor, " count"]:
    """Noise levels of a training batch: uniform in q between the widened ends of a block's range."""
    low, high = (noise.quantile(sigma) for sigma in (noise_range.train_low, noise_range.train_high))
    q = low + (high - low) * torch.rand(count, dtype=torch.float64, generator=generator)
    # sigma = exp(P_mean + P_std Phi^-1(q)) (arXiv 2506.14202, section 3); float64, as Phi^-1 is steep at both ends.
    sigma = torch.exp(noise.p_mean + noise.p_std * torch.special.ndtri(q))
    # The quantile and its inverse round: a level just outside would belong to a neighbour.
    return sigma.clamp(noise_range.train_low, noise_range.train_high).float()


def patch_problems(patch: int, data: ImageInfo) -> list[str]:
    """Whether patches cover an image."""
    return [
        f"patch={patch} does not divide the image {side} {size}; use --set patch=... or --set image_size=..."
        for side, size in (("height", data.height), ("width", data.width))
        if size % patch
    ]
