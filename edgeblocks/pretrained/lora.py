"""hf-lora: a pretrained decoder whose layers are frozen, with a small trained product beside each of their matrices.
What image classifiers have in common with it (`vision_lora`) is here as well.

A matrix W is used as W + (alpha / r) B A, where A is [r, in] and B [out, r]; A begins with random values and B with
zeros, so that the model begins as it is. Only A and B of all layers are trained, and are all in memory. The layers are
frozen, in 8 or 4 bits or as they are, one in memory at a time (`frozen_layers`): each is expanded for its forward pass
and again for its backward pass, in which it is run once more from its input.

Source: Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1; on quantized layers Dettmers et al. 2023, arXiv 2305.14314.
"""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgeblocks.errors import ConfigError
from edgeblocks.families.block import Block
from edgeblocks.families.layers import run_layers
from edgeblocks.methods import Frozen
from edgeblocks.pretrained.decoder import Decoder, DecoderBlock, DecoderSettings
from edgeblocks.pretrained.frozen_layers import LAYERS_READING_BYTES, FrozenLayer, frozen_layers
from edgeblocks.pretrained.keys import as_key, from_key
from edgeblocks.pretrained.shells import any_shell

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."
"""Before a module's name in PEFT's files."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What is trained beside a model's layers, and as what these are read."""

    lora_rank: Annotated[int, Field(ge=1, le=4096, description="rank of what is added to a matrix")] = 16
    lora_alpha: Annotated[float, Field(gt=0, description="it is multiplied with alpha / rank")] = 32.0
    lora_targets: Annotated[
        str, Field(min_length=1, max_length=1000, description="matrices: all-linear, or endings of names with commas")
    ] = ALL_LINEAR
    quantize: Annotated[Frozen, Field(description="as what frozen layers are read")] = "int8"

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.lora_alpha / self.lora_rank


@dataclass(frozen=True, kw_only=True)
class LoraSettings(AdapterSettings, DecoderSettings):
    """Where the model is, what is trained beside it, and as what its layers are read."""


class Adapter(nn.Module):
    """What is added to a matrix: B A, scaled."""

    def __init__(self, matrix: nn.Linear, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, matrix.in_features, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(matrix.out_features, rank, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """B A x."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B)


class LoraLayer(FrozenLayer):
    """A frozen layer with adapters."""

    def __init__(self, model: str, settings: AdapterSettings, number: int, side: int | None = None) -> None:
        super().__init__(model, number, settings.quantize, side)
        self.adapters = nn.ModuleDict()
        for name in targets_of(model, settings.lora_targets, side)[self.number]:
            matrix = self._frozen[0].get_submodule(name)
            assert isinstance(matrix, nn.Linear)
            adapter = self.adapters[as_key(name)] = Adapter(matrix, settings.lora_rank)
            vars(matrix)["forward"] = _Beside(matrix, adapter, settings.scale)


class _Beside:
    """A matrix' own product, and the adapter's."""

    def __init__(self, matrix: nn.Linear, adapter: Adapter, scale: float) -> None:
        # Weakly, since the matrix holds this: a circle would keep what the adapter lies in until garbage is collected.
        self._matrix, self._adapter, self._scale = weakref.ref(matrix), adapter, scale

    def __call__(self, x: Tensor) -> Tensor:
        matrix = self._matrix()
        assert matrix is not None
        beside: Tensor = self._adapter(x)
        return F.linear(x, matrix.weight, matrix.bias) + self._scale * beside


class AdaptedBlock(Block):
    """A block all layers of which are frozen and have adapters."""

    model: str
    side: int | None = None
    quantize: Frozen

    def init_adapters_(self, generator: torch.Generator) -> None:
        """A between minus and plus 1 / sqrt(in), B zero."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Adapter):
                    bound = module.lora_A.shape[1] ** -0.5
                    module.lora_A.uniform_(-bound, bound, generator=generator)
                    module.lora_B.zero_()

    def held_elsewhere(self) -> tuple[Tensor, ...]:
        """What frozen layers are read into."""
        return frozen_layers(self.model, self.quantize, torch.get_default_device().type, self.side).tables

    def begin_at(self, layer: int) -> None:
        """All layers are one stage."""
        assert layer == 0

    def bind_layers_(self) -> None:
        """Use the memory for frozen layers on torch's default device."""
        device = torch.get_default_device()
        for layer in self.layers:
            assert isinstance(layer, LoraLayer)
            layer.bind_(device)

    def through_stage(self, hidden: Tensor, condition: Tensor, *, checkpointing: bool) -> Tensor:
        """Each layer is run again on the way back, because its weights are no longer there."""
        return run_layers(self.layers, hidden, condition, checkpointing=True)


class LoraBlock(AdaptedBlock, DecoderBlock):
    """All layers of a decoder with their adapters."""

    reading_bytes = LAYERS_READING_BYTES

    def __init__(self, *, settings: LoraSettings, numbers: Sequence[int], checkpointing: bool) -> None:
        nn.Module.__init__(self)
        self.model, self.checkpointing, self.quantize = settings.model, checkpointing, settings.quantize
        self.layers = nn.ModuleList(LoraLayer(settings.model, settings, number) for number in numbers)

    def init_(self, generator: torch.Generator) -> None:
        """As `init_adapters_`."""
        self.init_adapters_(generator)

    def reset_tables_(self) -> None:
        """Use the memory for frozen layers on torch's default device."""
        self.count_reading_()
        self.bind_layers_()


class LoraDecoder(Decoder):
    """The family; see `Decoder`."""

    name = "hf-lora"
    one_stage = always_checkpointed = True
    settings_type: type = LoraSettings
    settings: LoraSettings

    def block(self, *, num_layers: int, checkpointing: bool) -> LoraBlock:
        """The network, without weights."""
        return LoraBlock(settings=self.settings, numbers=self._numbers(num_layers), checkpointing=checkpointing)

    @property
    def reads_layers_as(self) -> Frozen:
        """As the settings say."""
        return self.settings.quantize

    @property
    def resident_bytes(self) -> int:
        """One layer as float32, and its codes."""
        frozen = frozen_layers(self.settings.model, self.settings.quantize, "meta", None)
        return sum(table.nbytes for table in frozen.tables)

    def check_network(self) -> None:
        """As `Decoder.check_network`; and that there are matrices of the names that are wanted."""
        super().check_network()
        targets_of(self.settings.model, self.settings.lora_targets)

    def name_in_file(self, name: str) -> str:
        """What an adapter is called in PEFT's files."""
        return peft_name(self.shell("meta").layers_name, name)

    def _through(self, block: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert isinstance(block, LoraBlock)
        hidden, nothing = self.enter(block, batch)
        return block.through_stage(hidden, nothing, checkpointing=True), nothing


def peft_name(layers_name: str, name: str) -> str:
    """What an adapter of a network is called in PEFT's files.

    >>> peft_name("model.layers", "layers.3.adapters.mlp-up_proj.lora_A")
    'base_model.model.model.layers.3.mlp.up_proj.lora_A.weight'
    """
    _, number, _, key, part = name.split(".")
    return f"{PEFT_PREFIX}{layers_name}.{number}.{from_key(key)}.{part}.weight"


def peft_targets(model: str, lora_targets: str, side: int | None = None, *, saved: str | None = None) -> list[str]:
    """Endings of names by which PEFT finds the matrices that have adapters, and no other module of the model.

    They are as short as that allows: the last part of a name, its name in a layer, or the whole name.

    Args:
        saved: a module that is trained as it is, which PEFT leaves out.
    """
    shell = any_shell(model, "meta", side)
    targets = targets_of(model, lora_targets, side)
    whole = [f"{shell.layers_name}.{number}.{name}" for number, names in enumerate(targets) for name in names]
    known = {name for name, _ in shell.model.named_modules() if name != saved}
    for endings in (
        {name.rpartition(".")[2] for name in whole},
        {name for names in targets for name in names},
    ):
        ends = tuple(f".{ending}" for ending in endings)
        if {name for name in known if f".{name}".endswith(ends)} == set(whole):
            return sorted(endings)
    return whole


@functools.lru_cache(maxsize=8)
def targets_of(model: str, lora_targets: str, side: int | None = None) -> list[list[str]]:
    """Names of the matrices that get an adapter, of each layer.

    Args:
        lora_targets: as in `AdapterSettings`.

    Raises:
        ConfigError: there is none.
    """
    layers = any_shell(model, "meta", side).layers
    matrices = [[name for name, module in layer.named_modules() if isinstance(module, nn.Linear)] for layer in layers]
    there = list(dict.fromkeys(name for names in matrices for name in names))
    if not there:
        raise ConfigError(f"{model}: its layers have no matrix that an adapter could stand beside")
    if lora_targets == ALL_LINEAR:
        return matrices
    wanted = tuple(f".{ending.strip()}" for ending in lora_targets.split(",") if ending.strip())
    if not wanted:
        raise ConfigError(f"lora_targets={lora_targets} names no matrix; there are {', '.join(there)}, or {ALL_LINEAR}")
    missing = [ending[1:] for ending in wanted if not any(f".{name}".endswith(ending) for name in there)]
    if missing:
        raise ConfigError(
            f"lora_targets={lora_targets}: no matrix of a layer ends with {', '.join(missing)}; there are "
            f"{', '.join(there)}, or {ALL_LINEAR}"
        )
    return [[name for name in names if f".{name}".endswith(wanted)] for names in matrices]
