"""What the runtime asks of a family: `Family`, and what it asks besides of the families of each task.

The base classes in `base` and `denoiser` have most of it. A new family is one file: a subclass of one of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.autoregression import CachesPer
from edgeblocks.diffusion.noise import LevelDistribution, NoiseDistribution, NoisePartition, NoiseRange
from edgeblocks.families.base import (
    Batch,
    BatchSpec,
    ConditionSpec,
    DataInfo,
    FamilySettings,
    ImageInfo,
    Level,
    TextInfo,
)
from edgeblocks.families.block import Block
from edgeblocks.files.tensor_file import Weights
from edgeblocks.tasks import Reads, Task


@runtime_checkable
class Family(Protocol):
    """A kind of model and its objective. A family is built from an instance of `settings_type` and one of `data_type`.

    Raises `ConfigError` where it is built, with everything that is impossible.
    """

    name: str
    reads: Reads
    """What kind of data set it is trained on."""
    settings_type: type
    """A frozen dataclass of plain values that all have defaults; see `FamilySettings`."""
    data_type: type
    """What the network must know of the data: a frozen dataclass of plain values."""
    preferred_blocks: int
    one_stage: bool
    """Whether all layers are needed together, so that a network trained end to end cannot be cut."""
    always_checkpointed: bool
    """Whether layers are run again on the way back, whatever is asked."""
    layer_period: int
    """Layers after which the structure repeats."""
    unrolled: bool
    """Whether some layers are run several times in a pass, so that passes differ in their number."""
    writes_text: bool
    """Of a family on text, whether its networks can be sampled here."""
    only_exact: bool
    """Whether its networks are trained end to end alone."""
    largest_heap_bytes: int
    """Of tensors that share the heap of a process while it is trained on a processor; larger ones have pages of their
    own."""
    own_parts: tuple[str, ...]
    """Parts of a pretrained network that no file has, and start from the seed."""
    library_bytes: int
    """Of memory that its library takes in every process, where a plan is not made in one that has loaded it."""

    def uniform(self) -> Sequence[Self]:
        """The same, all layers of one kind, for each kind of layers that a network has."""
        ...

    @property
    def architecture(self) -> str:
        """What of the network's shape is not in the settings: the content of a file that they name."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Of what a network keeps in memory beside its parameters, and training does not change."""
        ...

    def check_network(self) -> None:
        """Look at the network before it is planned for; raises ConfigError where it cannot be trained."""
        ...

    def opened(self, path: Path) -> Weights:
        """Weights that a network starts from; raises OSError and MalformedFileError as `TensorFile`."""
        ...

    def name_in_file(self, name: str) -> str:
        """What a parameter of the whole network is called in a file of weights."""
        ...

    @property
    def tied_parameters(self) -> tuple[str, str] | None:
        """A parameter of the first stage and one of the last that are copies of each other; None where none are."""
        ...

    @property
    def tied_bytes(self) -> int:
        """Of one of `tied_parameters`, as float32."""
        ...

    @property
    def gap_bytes(self) -> int:
        """That the allocator keeps in a step beyond the share that plans count, measured."""
        ...

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of a file of weights is used and is no parameter."""
        ...

    def fresh_parts(self, class_names: Sequence[str]) -> Sequence[str]:
        """Parts of a pretrained network that do not fit these classes, and start from the seed."""
        ...

    def class_rows(self, class_names: Sequence[str]) -> Mapping[str, Sequence[int]]:
        """Of a file's tensors that have these classes in another order: the number of the file's row for each."""
        ...

    @classmethod
    def data_info(cls, data: DataSet) -> DataInfo:
        """The `data_type` of a data set of the kind that the family reads."""
        ...

    @property
    def task(self) -> Task:
        """What a chain of its blocks makes."""
        ...

    @property
    def settings(self) -> FamilySettings: ...

    @property
    def data(self) -> DataInfo: ...

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the clean target, per component."""
        ...

    @property
    def num_layers(self) -> int: ...

    @property
    def noise(self) -> LevelDistribution: ...

    @property
    def chain_steps(self) -> int:
        """Levels of a chain where the user asks for no number."""
        ...

    @property
    def conditional(self) -> bool:
        """Whether samples are asked for by class."""
        ...

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a sample's z."""
        ...

    @property
    def condition_spec(self) -> ConditionSpec | None:
        """A block's input besides z and sigma; None where it has no other."""
        ...

    def block(self, *, num_layers: int, checkpointing: bool) -> Block:
        """A block on torch's default device, parameters not initialised."""
        ...

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives."""
        ...

    def draw(
        self, examples: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator, /
    ) -> Batch:
        """One training step's batch."""
        ...

    def at_level(
        self, examples: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator, /
    ) -> Batch:
        """A batch at a noise level, drawn within it where it is a stratum; for evaluation, nothing augmented."""
        ...

    def evaluation_levels(self, partition: NoisePartition) -> Sequence[Level]:
        """Where evaluation looks, descending; the shares add up to 1."""
        ...

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """z and the condition with which a block is called on a batch."""
        ...

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]: ...

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """What evaluation reports of each sample: `loss`, and more where the family knows more."""
        ...


class EndToEnd(ABC):
    """A family that has an end-to-end form as well, derives from this: its network can be trained stage by stage.

    What goes from stage to stage are hidden values and a condition, which the stem makes once and every layer is given.
    """

    @abstractmethod
    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the first layer is given, and the condition of all layers."""

    @abstractmethod
    def loss_after(self, block: nn.Module, hidden: Tensor, condition: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """`Family.loss` from what the last layer gives."""


@runtime_checkable
class FamilyOfImages(Family, Protocol):
    """What is asked of a family whose chain makes images."""

    task: Literal["images"]

    @property
    def data(self) -> ImageInfo: ...

    @property
    def noise(self) -> NoiseDistribution: ...


@runtime_checkable
class FamilyOfClasses(Family, Protocol):
    """What is asked of a family whose chain makes the probabilities of an image's classes."""

    task: Literal["classes"]

    @property
    def data(self) -> ImageInfo: ...

    @property
    def noise(self) -> NoiseDistribution: ...

    def condition(self, pixels: np.ndarray) -> Tensor:
        """A chain's input besides z, of images uint8 [N, H, W, C]."""
        ...


@runtime_checkable
class FamilyOfText(Family, Protocol):
    """What is asked of a family whose chain fills masked tokens of a text."""

    task: Literal["text"]

    @property
    def data(self) -> TextInfo: ...

    @property
    def mask(self) -> int:
        """The id that stands at masked positions."""
        ...

    def logits(self, block: nn.Module, z: Tensor, t: Tensor, wanted: Tensor) -> Float[Tensor, "answers vocabulary"]:
        """Logits at the wanted places, bool [batch, length], of partly masked tokens z [batch, length] at times t."""
        ...


@runtime_checkable
class FamilyOfContinuations(Family, Protocol):
    """What is asked of a family whose chain writes text token by token, each token by denoising its code.

    Of former positions a block sees keys and values that were kept, `num_caches` tensors [batch, heads, positions,
    head_width].
    """

    task: Literal["continuation"]

    @property
    def data(self) -> TextInfo: ...

    @property
    def noise(self) -> NoiseDistribution: ...

    @property
    def code_width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def head_width(self) -> int: ...

    @property
    def caches_per(self) -> CachesPer:
        """Whether all levels of a block share keys and values, or each step of a chain has its own."""
        ...

    def num_caches(self, num_layers: int) -> int:
        """Tensors of keys and of values that a block of `num_layers` layers keeps."""
        ...

    def next_logits(
        self, block: nn.Module, z: Tensor, sigma: Tensor, tokens: Tensor, past: Tensor
    ) -> tuple[Float[Tensor, "batch vocabulary"], Tensor]:
        """Logits of the last position's token, and keys and values of all positions; see `TokenDenoiserBlock`."""
        ...

    def estimates(
        self, block: nn.Module, z: Tensor, known: Tensor, sigma: Tensor, tokens: Tensor, answers: Tensor, codes: Tensor
    ) -> tuple[Float[Tensor, "batch tokens code"], Float[Tensor, "batch tokens"]]:
        """Of a known text, at each position as if it were to be written: the denoised code, and log p(its token).

        Args:
            z: states that do not know the token at their position.
            known: its noised code, which later positions may see.
            tokens: the token before each position.
            answers: the token at each position.
            codes: the code-book.
        """
        ...

    def with_iterations(self, batch: Batch, count: int) -> Batch:
        """The batch, with the iterations to run of the core of a network that is `unrolled`."""
        ...


AnyFamily = FamilyOfImages | FamilyOfClasses | FamilyOfText | FamilyOfContinuations
"""By `task`."""
FamilyType = type[FamilyOfImages] | type[FamilyOfClasses] | type[FamilyOfText] | type[FamilyOfContinuations]
