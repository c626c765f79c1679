"""What a manifest tells of an exported chain: everything that running it needs besides the graphs.

One class for each way in which chains are run. Plain Python: deployed machines have neither torch nor the run.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from edgeblocks.data.tokenizer import Kind
from edgeblocks.diffusion.autoregression import CachesPer
from edgeblocks.diffusion.noise import (
    LevelDistribution,
    MaskingSchedule,
    NoiseDistribution,
    NoisePartition,
    NoiseRange,
    sampler_levels,
    unmasking_steps,
)
from edgeblocks.diffusion.solver import Solver
from edgeblocks.tasks import TASKS, Task

EXPORT_FORMAT_VERSION = 2
KIND = "edgeblocks export"


@dataclass(frozen=True, kw_only=True)
class BlockFile:
    """One block's graph. `data_file` holds its weights when they are not in the graph's file; `bytes` counts both."""

    block: int
    file: str
    data_file: str | None
    sha256: str
    data_sha256: str | None
    bytes: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.file,) if self.data_file is None else (self.file, self.data_file)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How the chain is run unless the caller says otherwise. `noises` are the chains whose mean gives the classes."""

    steps: int = TASKS["images"].steps
    solver: Solver = "heun"
    guidance: float = 1.0
    noises: int = 1


@dataclass(frozen=True, kw_only=True)
class Verified:
    """How far onnxruntime was from torch when the directory was written.

    output_max_abs_error: of `outputs` final images in model space, or of the classes' probabilities of as many images.
    output_equal_share: the share of pixel values that were the same after rounding, or of images with the same class.
    real_inputs: whether the blocks also saw images of the run's data, not only random ones.
    """

    block_max_abs_error: float
    block_limit: float
    output_max_abs_error: float
    output_limit: float
    output_equal_share: float
    outputs: int
    real_inputs: bool


@dataclass(frozen=True, kw_only=True)
class WriterSettings:
    """How a chain that writes text is run unless the caller says otherwise."""

    steps: int = TASKS["text"].steps
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ContinuerSettings:
    """How a chain that writes token by token is run unless the caller says otherwise."""

    steps: int = TASKS["continuation"].steps
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Keys and values that the graphs take and give, [num_caches, b, heads, positions, head_width].

    per: whether noise levels share those of their `block`, or each `step` of the chain has its own.
    num_caches: of each block.
    """

    per: CachesPer
    num_caches: tuple[int, ...]
    heads: int
    head_width: int


@dataclass(frozen=True, kw_only=True)
class Manifest(ABC):
    """An exported chain of blocks.

    task: what the chain makes: `images`, the probabilities of an image's `classes`, `text` by filling gaps, or the
        `continuation` of a text.
    boundaries: block b owns the noise levels [boundaries[b+1], boundaries[b]).
    sampler: how the chain is run unless the caller says otherwise.
    verified: None only while the directory is being written.
    """

    edgeblocks: str
    family: str
    task: Task
    opset: int
    boundaries: tuple[float, ...]
    files: tuple[BlockFile, ...]
    sampler: SamplerSettings | WriterSettings | ContinuerSettings
    verified: Verified | None = None

    @property
    @abstractmethod
    def distribution(self) -> LevelDistribution:
        """Of the noise levels."""

    def levels(self) -> list[dict[str, Any]]:
        """The default chain's noise levels, descending, each with the block that owns it."""
        levels = sampler_levels(self.partition, num_steps=self.sampler.steps)
        return [{"sigma": sigma, "block": self.partition.block_of(sigma)} for sigma in levels]

    @abstractmethod
    def own_json(self) -> dict[str, Any]:
        """What only such a chain has."""

    @property
    def partition(self) -> NoisePartition:
        """Which block owns which noise level. Its training ranges are not widened: nothing is trained here."""
        ends = pairwise(self.boundaries)
        ranges = tuple(NoiseRange(low=low, high=high, train_low=low, train_high=high) for high, low in ends)
        return NoisePartition(distribution=self.distribution, boundaries=self.boundaries, ranges=ranges)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "format_version": EXPORT_FORMAT_VERSION,
            "edgeblocks": self.edgeblocks,
            "family": self.family,
            "task": self.task,
            "opset": self.opset,
            **self.own_json(),
            "boundaries": list(self.boundaries),
            "levels": self.levels(),
            "files": [asdict(file) for file in self.files],
            "verified": None if self.verified is None else asdict(self.verified),
        }


@dataclass(frozen=True, kw_only=True)
class ImageManifest(Manifest):
    """A chain that makes images, or tells their classes.

    image_shape: (channels, height, width) of what it makes, or is given.
    mean, scale: model space is x = (pixel/255 - mean) * scale, with standard deviation sigma_data.
    class_names: () for an unconditional network; a graph takes class numbers, and `num_classes` for "no class".
    """

    image_shape: tuple[int, int, int]
    mean: float
    scale: float
    sigma_data: float
    class_names: tuple[str, ...]
    noise: NoiseDistribution
    sampler: SamplerSettings

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def condition_name(self) -> str | None:
        """The graphs' input beside z and sigma; None where there is none."""
        if self.task == "classes":
            return "images"
        return "labels" if self.num_classes else None

    @property
    def distribution(self) -> NoiseDistribution:
        return self.noise

    def own_json(self) -> dict[str, Any]:
        channels, height, width = self.image_shape
        return {
            "image": {"channels": channels, "height": height, "width": width},
            "mean": self.mean,
            "scale": self.scale,
            "sigma_data": self.sigma_data,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "noise": asdict(self.noise),
            "sampler": asdict(self.sampler),
        }


@dataclass(frozen=True, kw_only=True)
class WordedManifest(Manifest):
    """A chain that makes text.

    tokenizer_sha256: of tokenizer.json, which is there exactly for a bpe.
    """

    vocabulary: int
    length: int
    tokenizer: Kind
    tokenizer_sha256: str | None

    def own_json(self) -> dict[str, Any]:
        return {
            "vocabulary": self.vocabulary,
            "length": self.length,
            "tokenizer": self.tokenizer,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


@dataclass(frozen=True, kw_only=True)
class TextManifest(WordedManifest):
    """A chain that writes text by unmasking. A graph takes tokens int64 [b, length], the mask being `vocabulary`."""

    sampler: WriterSettings

    @property
    def distribution(self) -> MaskingSchedule:
        return MaskingSchedule()

    def levels(self) -> list[dict[str, Any]]:
        partition = self.partition
        middles = [(high + low) / 2 for high, low in unmasking_steps(partition, num_steps=self.sampler.steps)]
        return [{"t": t, "block": partition.block_of(t)} for t in middles]

    def own_json(self) -> dict[str, Any]:
        return {**super().own_json(), "sampler": asdict(self.sampler)}


@dataclass(frozen=True, kw_only=True)
class ContinuationManifest(WordedManifest):
    """A chain that writes text token by token.

    A graph takes noised codes z [b, n, code_width], sigma [b], the token before each position int64 [b, n] (at the
    beginning the id `vocabulary`), and the keys and values of the positions before; it gives logits and the positions'
    own keys and values. The codes are those of `codebook.code_rows`.
    """

    code_width: int
    caches: CacheShape
    noise: NoiseDistribution
    sampler: ContinuerSettings

    @property
    def distribution(self) -> NoiseDistribution:
        return self.noise

    def own_json(self) -> dict[str, Any]:
        return {
            **super().own_json(),
            "code_width": self.code_width,
            "caches": {**asdict(self.caches), "num_caches": list(self.caches.num_caches)},
            "noise": asdict(self.noise),
            "sampler": asdict(self.sampler),
        }


AnyManifest = ImageManifest | TextManifest | ContinuationManifest
