"""manifest.json of an exported chain: everything that running it needs besides the graphs, as it stands in the file.

One class for each way in which chains are run; it writes the file and checks what is read. No torch: deployed machines
have neither it nor the run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from edgeblocks.data.tokenizer import Kind
from edgeblocks.diffusion import autoregression
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
from edgeblocks.diffusion.token_choice import HIGHEST_TEMPERATURE
from edgeblocks.errors import ConfigError
from edgeblocks.export.manifest_figures import ChainVerified, Rounding, Verified
from edgeblocks.files.checked import AnyText, Checked, DeepRange, ListOf, NotNegative, Positive, Sha256, Text
from edgeblocks.files.untrusted import shown
from edgeblocks.limits import (
    LONGEST_SEQUENCE,
    LONGEST_SIDE,
    MOST_CHANNELS,
    MOST_CLASSES,
    MOST_CODE_WIDTH,
    MOST_HEADS,
    MOST_IMAGE_VALUES,
    MOST_LAYERS,
    MOST_NOISE,
    MOST_PIXELS,
    MOST_TOKENS,
    MOST_WIDTH,
)
from edgeblocks.tasks import TASKS, Task

BLOCKS_FORMAT_VERSION: Literal[2] = 2
CHAIN_FORMAT_VERSION: Literal[3] = 3
"""Of an export whose chain is one file; a reader of version 2 would look for blocks."""
KIND: Literal["edgeblocks export"] = "edgeblocks export"

MOST_STEPS = 10_000
MOST_NOISES = 1000
MOST_OPSET = 1000
_MOST_NAME_CHARACTERS = 255
_LAST = ("noise", "sampler", "boundaries", "levels", "files", "chain", "verified", "rounding")
"""The keys that follow those of one kind of chain in the file."""


def _plain_name(name: str) -> str:
    """A name inside the directory: it can lead nowhere else, on any system."""
    if name.startswith(".") or any(bad in name for bad in "/\\:\0") or len(name) > _MOST_NAME_CHARACTERS:
        raise ValueError("the plain name of a file in the directory is needed")
    return name


FileName = Annotated[Text, AfterValidator(_plain_name)]
BlockNumber = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]


class GraphFile(Checked):
    """A graph. `data_file` holds its weights when they are not in the graph's file; `bytes` counts both."""

    file: FileName
    data_file: FileName | None
    sha256: Sha256
    data_sha256: Sha256 | None
    bytes: Annotated[int, Field(ge=1, le=2**63)]

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return "the chain"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.file,) if self.data_file is None else (self.file, self.data_file)

    @model_validator(mode="after")
    def _has_a_checksum_for_each_file(self) -> Self:
        if (self.data_file is None) != (self.data_sha256 is None):
            raise ValueError("data_sha256 is given exactly when data_file is")
        return self


class BlockFile(GraphFile):
    """One block's graph."""

    block: BlockNumber

    @property
    def title(self) -> str:
        return f"block {self.block}"


class ChainFile(GraphFile):
    """The whole chain's graph. verified: None only while the directory is being written."""

    verified: ChainVerified | None = None


class ModelFile(GraphFile):
    """The graph of a fine-tuned classifier."""

    @property
    def title(self) -> str:
        return "the model"


class SamplerSettings(Checked):
    """How the chain is run unless the caller says otherwise. `noises` are the chains whose mean gives the classes."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = TASKS["images"].steps
    solver: Solver = "heun"
    guidance: NotNegative = 1.0
    noises: Annotated[int, Field(ge=1, le=MOST_NOISES)] = 1


class WriterSettings(Checked):
    """How a chain that writes text is run unless the caller says otherwise."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = TASKS["text"].steps
    temperature: NotNegative = 1.0


class ContinuerSettings(Checked):
    """How a chain that writes token by token is run unless the caller says otherwise."""

    steps: Annotated[int, Field(ge=1, le=autoregression.MOST_STEPS)] = TASKS["continuation"].steps
    temperature: Annotated[float, Field(ge=0, le=HIGHEST_TEMPERATURE)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class CacheShape(Checked):
    """Keys and values that the graphs take and give, [num_caches, b, heads, positions, head_width].

    per: whether noise levels share those of their `block`, or each `step` of the chain has its own.
    num_caches: of each block.
    """

    per: CachesPer
    num_caches: ListOf[Annotated[int, Field(ge=1, le=2 * MOST_LAYERS)]]
    heads: Annotated[int, Field(ge=1, le=MOST_HEADS)]
    head_width: Annotated[int, Field(ge=1, le=MOST_WIDTH)]


class ImageSize(Checked):
    """Of what a chain makes, or is given."""

    channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
    height: Side
    width: Side

    @model_validator(mode="after")
    def _fits_into_memory(self) -> Self:
        if self.height * self.width > MOST_PIXELS:
            raise ValueError(f"{self.height} x {self.width} pixels are more than {MOST_PIXELS}")
        if self.channels * self.height * self.width > MOST_IMAGE_VALUES:
            raise ValueError(f"{self.channels} x {self.height} x {self.width} values are more than {MOST_IMAGE_VALUES}")
        return self


class Decoding(Checked):
    """What makes pictures of a chain's samples, where these are latents.

    graph: takes latents float32 [b, channels, height, width] and gives pictures of about 0 to 1; its number follows
        those of the blocks. None where it is part of the graph of the whole chain.
    picture: the pictures' size.
    """

    graph: BlockFile | None
    picture: ImageSize


class Noise(Checked):
    """A `NoiseDistribution`."""

    sigma_min: Annotated[float, Field(ge=1 / MOST_NOISE)]
    sigma_max: Annotated[float, Field(gt=0, le=MOST_NOISE)]
    p_mean: float
    p_std: Positive


class NoiseLevel(Checked):
    """A level of Gaussian noise and the block that owns it."""

    sigma: Positive
    block: BlockNumber


class MaskingLevel(Checked):
    """A time at which tokens are masked and the block that owns it."""

    t: Positive
    block: BlockNumber


def noise_levels(partition: NoisePartition, *, num_steps: int) -> tuple[NoiseLevel, ...]:
    """The levels that a sampler takes, descending."""
    levels = sampler_levels(partition, num_steps=num_steps)
    return tuple(NoiseLevel(sigma=sigma, block=partition.block_of(sigma)) for sigma in levels)


def masking_levels(partition: NoisePartition, *, num_steps: int) -> tuple[MaskingLevel, ...]:
    """The middles of the steps in which text is unmasked, descending."""
    middles = [(high + low) / 2 for high, low in unmasking_steps(partition, num_steps=num_steps)]
    return tuple(MaskingLevel(t=t, block=partition.block_of(t)) for t in middles)


def _numbers(levels: Sequence[NoiseLevel] | Sequence[MaskingLevel]) -> list[float]:
    return [number for level in levels for number in level.model_dump().values()]


def _close(some: list[float], others: list[float]) -> bool:
    return len(some) == len(others) and all(map(partial(math.isclose, rel_tol=1e-9), some, others))


class Manifest(Checked, ABC):
    """An exported chain of blocks.

    task: what the chain makes: `images`, the probabilities of an image's `classes`, `text` by filling gaps, or the
        `continuation` of a text.
    sampler: how the chain is run unless the caller says otherwise.
    boundaries: block b owns the noise levels [boundaries[b+1], boundaries[b]).
    levels: those of `sampler`, for a reader that cannot make them; what is read must be what would be written.
    files: the blocks; none where `chain` is there, which holds them all.
    verified: None only while the directory is being written.
    rounding: None where the weights are float32.
    """

    kind: Literal["edgeblocks export"] = KIND
    format_version: Literal[2, 3] = BLOCKS_FORMAT_VERSION
    edgeblocks: Text
    family: Text
    task: Task
    opset: Annotated[int, Field(ge=1, le=MOST_OPSET)]
    sampler: SamplerSettings | WriterSettings | ContinuerSettings
    boundaries: Annotated[
        ListOf[Annotated[float, Field(ge=0, le=MOST_NOISE)]], Field(min_length=2, max_length=MOST_LAYERS + 1)
    ]
    levels: ListOf[NoiseLevel] | ListOf[MaskingLevel]
    files: ListOf[BlockFile]
    chain: ChainFile | None = None
    verified: Verified | None = None
    rounding: Rounding | None = None

    @property
    @abstractmethod
    def distribution(self) -> LevelDistribution:
        """Of the noise levels."""

    @abstractmethod
    def own_levels(self) -> tuple[NoiseLevel, ...] | tuple[MaskingLevel, ...]:
        """What `levels` must be."""

    @property
    def num_blocks(self) -> int:
        return len(self.boundaries) - 1

    @property
    def graphs(self) -> tuple[GraphFile, ...]:
        """What is in the directory beside the manifest."""
        return self.files if self.chain is None else (self.chain,)

    @property
    def partition(self) -> NoisePartition:
        """Which block owns which noise level. Its training ranges are not widened: nothing is trained here."""
        ends = pairwise(self.boundaries)
        ranges = tuple(NoiseRange(low=low, high=high, train_low=low, train_high=high) for high, low in ends)
        return NoisePartition(distribution=self.distribution, boundaries=self.boundaries, ranges=ranges)

    def to_json(self) -> dict[str, object]:
        absent = {name for name in ("chain", "rounding") if getattr(self, name) is None}
        content = self.model_dump(mode="json", exclude=absent)
        last = {name: content.pop(name) for name in _LAST if name in content}
        return {**content, **last}

    @model_validator(mode="after")
    def _routes_each_level_to_a_block(self) -> Self:
        """Boundaries, blocks and levels tell the same story."""
        boundaries, num_blocks = self.boundaries, self.num_blocks
        top, bottom = self.distribution.top, self.distribution.bottom
        if (boundaries[0], boundaries[-1]) != (top, bottom) or any(high <= low for high, low in pairwise(boundaries)):
            needed = f"noise levels from {top:g} to {bottom:g}, strictly descending, are needed"
            raise ValueError(f"boundaries={shown(boundaries)}: {needed}")
        if (self.chain is None) != (self.format_version == BLOCKS_FORMAT_VERSION):
            raise ValueError(f"chain is given exactly in format version {CHAIN_FORMAT_VERSION}")
        expected_files = num_blocks if self.chain is None else 0
        if len(self.files) != expected_files:
            raise ValueError(f"files lists {len(self.files)} blocks where {expected_files} belong")
        verified = None if self.chain is None else self.chain.verified
        if verified is not None and (verified.torch_difference is None) != (self.rounding is not None):
            raise ValueError("chain.verified.torch_difference is missing exactly where weights are rounded")
        numbers = [file.block for file in self.graphs if isinstance(file, BlockFile)]
        if numbers != list(range(len(numbers))):
            raise ValueError("the blocks of files are not listed in order")
        names = [name for file in self.graphs for name in file.names]
        if len(set(names)) != len(names):
            raise ValueError("two of its files have the same name")
        if self.sampler.steps < num_blocks:
            raise ValueError(f"sampler.steps={self.sampler.steps} are fewer than {num_blocks}, the number of blocks")
        try:
            expected = self.own_levels()
        except (ValueError, ArithmeticError, ConfigError) as error:
            raise ValueError(f"no levels can be made from sampler.steps and boundaries ({error})") from error
        if not _close(_numbers(self.levels), _numbers(expected)):
            raise ValueError("levels are not those of sampler.steps and boundaries")
        return self


class NoiseManifest(Manifest):
    """A chain along Gaussian noise."""

    noise: Noise
    levels: ListOf[NoiseLevel]

    @property
    def distribution(self) -> NoiseDistribution:
        return NoiseDistribution(**self.noise.model_dump())

    def own_levels(self) -> tuple[NoiseLevel, ...]:
        return noise_levels(self.partition, num_steps=self.sampler.steps)


class ImageManifest(NoiseManifest):
    """A chain that makes images, or classifies them.

    image: the size of what goes through the chain.
    mean, scale: model space is x = (pixel/255 - mean) * scale, with standard deviation sigma_data; of latents
        x = (latent - mean) * scale.
    decoding: what makes pictures of latents; None where samples are pictures.
    deep_range: values of grey of more than 8 bits that become pixels of 0 and 255; None: its upper eight bits of 16 do.
    class_names: () for an unconditional network; a graph takes class numbers, and `num_classes` for "no class".
    """

    image: ImageSize
    mean: float
    scale: Positive
    deep_range: DeepRange | None = None
    sigma_data: Positive
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)]
    class_names: ListOf[AnyText]
    decoding: Decoding | None = None
    sampler: SamplerSettings

    @property
    def graphs(self) -> tuple[GraphFile, ...]:
        """What is in the directory beside the manifest, the blocks first."""
        decoder = None if self.decoding is None else self.decoding.graph
        return super().graphs if decoder is None else (*self.files, decoder)

    @property
    def picture(self) -> ImageSize:
        """The size of a picture."""
        return self.image if self.decoding is None else self.decoding.picture

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.image.channels, self.image.height, self.image.width

    @property
    def condition_name(self) -> str | None:
        """The graphs' input beside z and sigma; None where there is none."""
        if self.task == "classes":
            return "images"
        return "labels" if self.num_classes else None

    @model_validator(mode="after")
    def _names_every_class(self) -> Self:
        if self.num_classes != len(self.class_names):
            raise ValueError(f"num_classes={self.num_classes}: the number of class_names is {len(self.class_names)}")
        if self.task == "classes" and self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes}: a classifier has at least two")
        if self.task == "classes" and (self.sampler.solver, self.sampler.guidance) != ("euler", 1.0):
            raise ValueError("sampler must be euler without guidance for a classifier")
        if self.decoding is not None and self.task == "classes":
            raise ValueError("decoding is of a chain that makes images")
        if self.decoding is not None and (self.decoding.graph is None) != (self.chain is not None):
            raise ValueError("decoding.graph is missing exactly where chain is given, which holds it")
        return self


class WordedManifest(Manifest):
    """A chain that makes text.

    tokenizer_sha256: of tokenizer.json, which is there exactly for a bpe.
    """

    vocabulary: Annotated[int, Field(ge=2, le=MOST_TOKENS)]
    length: Annotated[int, Field(ge=1, le=LONGEST_SEQUENCE)]
    tokenizer: Kind
    tokenizer_sha256: Sha256 | None

    @model_validator(mode="after")
    def _has_a_checksum_of_its_tokenizer(self) -> Self:
        if (self.tokenizer_sha256 is None) != (self.tokenizer != "bpe"):
            raise ValueError(f"tokenizer={self.tokenizer}: tokenizer_sha256 is given exactly for a bpe")
        return self


class TextManifest(WordedManifest):
    """A chain that writes text by unmasking. A graph takes tokens int64 [b, length], the mask being `vocabulary`."""

    levels: ListOf[MaskingLevel]
    sampler: WriterSettings

    @property
    def distribution(self) -> MaskingSchedule:
        return MaskingSchedule()

    def own_levels(self) -> tuple[MaskingLevel, ...]:
        return masking_levels(self.partition, num_steps=self.sampler.steps)


class ContinuationManifest(WordedManifest, NoiseManifest):
    """A chain that writes text token by token.

    A graph takes noised codes z [b, n, code_width], sigma [b], the token before each position int64 [b, n] (at the
    beginning the id `vocabulary`), and the keys and values of the positions before; it gives logits and the positions'
    own keys and values. The codes are those of `codebook.code_rows`.
    """

    code_width: Annotated[int, Field(ge=8, le=MOST_CODE_WIDTH, multiple_of=8)]
    caches: CacheShape
    sampler: ContinuerSettings

    @model_validator(mode="after")
    def _has_caches_for_each_block(self) -> Self:
        if len(self.caches.num_caches) != self.num_blocks:
            raise ValueError(f"caches.num_caches must be a number for each of the {self.num_blocks} blocks")
        return self


AnyManifest = ImageManifest | TextManifest | ContinuationManifest
MANIFESTS: dict[str, type[AnyManifest]] = {
    "images": ImageManifest,
    "classes": ImageManifest,
    "text": TextManifest,
    "continuation": ContinuationManifest,
}
"""By what the chain makes."""
