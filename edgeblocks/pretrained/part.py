"""hf-part: a pretrained decoder of which some layers that follow each other are trained, and the others are frozen.

Trained layers are stages of the network as in `decoder`. Those below them belong to what a text enters by, and are only
run forward; those above to the readout, through which gradients go down. Frozen layers are read in 8 or 4 bits or as
they are, one in memory at a time (`frozen_layers`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from edgeblocks.errors import ConfigError
from edgeblocks.families.base import Batch, TextInfo
from edgeblocks.families.layers import run_layers
from edgeblocks.methods import Frozen
from edgeblocks.pretrained.decoder import Decoder, DecoderBlock, DecoderSettings
from edgeblocks.pretrained.frozen_layers import LAYERS_READING_BYTES, FrozenLayer, frozen_layers
from edgeblocks.pretrained.shell import shell_of


@dataclass(frozen=True, kw_only=True)
class PartSettings(DecoderSettings):
    """Where the model is, which of its layers are trained, and as what the others are read."""

    first_layer: Annotated[int, Field(ge=0, description="the first layer that is trained")] = 0
    trained_layers: Annotated[int, Field(ge=0, description="how many are trained from there on; 0: all")] = 0
    quantize: Annotated[Frozen, Field(description="as what frozen layers are read")] = "int8"

    @property
    def depth(self) -> int:
        """Layers that are trained."""
        return self.trained_layers or max(1, super().depth - self.first_layer)


class PartBlock(DecoderBlock):
    """Some of the trained layers."""

    reading_bytes = LAYERS_READING_BYTES

    def __init__(self, *, settings: PartSettings, numbers: Sequence[int], checkpointing: bool) -> None:
        self._settings = settings
        super().__init__(model=settings.model, numbers=numbers, checkpointing=checkpointing)

    def held_elsewhere(self) -> tuple[Tensor, ...]:
        """What frozen layers are read into."""
        return frozen_layers(self.model, self._settings.quantize, torch.get_default_device().type, None).tables

    def begin_at(self, layer: int) -> None:
        """The layers are those from this one of the trained ones on."""
        super().begin_at(self._settings.first_layer + layer)


class PartDecoder(Decoder):
    """The family; see `Decoder`."""

    name = "hf-part"
    settings_type: type = PartSettings
    settings: PartSettings

    def __init__(self, settings: PartSettings, data: TextInfo) -> None:
        """
        Raises:
            ConfigError: with everything that is impossible.
        """
        super().__init__(settings, data)
        count, last = len(self.shell("meta").layers), settings.first_layer + settings.depth
        if last > count:
            raise ConfigError(
                f"layers {settings.first_layer} to {last - 1} are to be trained, and {settings.model} has layers 0 to "
                f"{count - 1}"
            )

    @property
    def first_layer(self) -> int:
        """Of those that are trained."""
        return self.settings.first_layer

    def block(self, *, num_layers: int, checkpointing: bool) -> PartBlock:
        """Some of the trained layers, without weights."""
        return PartBlock(settings=self.settings, numbers=self._numbers(num_layers), checkpointing=checkpointing)

    @property
    def reads_layers_as(self) -> Frozen:
        """As the settings say."""
        return self.settings.quantize

    @property
    def resident_bytes(self) -> int:
        """One layer as float32, and its codes."""
        frozen = frozen_layers(self.settings.model, self.settings.quantize, "meta", None)
        return sum(table.nbytes for table in frozen.tables)

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of the model's files is used as it is."""
        layers = self.shell("meta").layers_name
        if not name.startswith(f"{layers}."):
            return super().is_frozen(name)
        number = int(name.removeprefix(f"{layers}.").split(".")[0])
        return not 0 <= number - self.settings.first_layer < self.settings.depth

    def _named(self, layers: str, name: str) -> str:
        _, number, _, own = name.split(".", 3)
        return f"{layers}.{int(number) + self.settings.first_layer}.{own}"

    def called_layers(self, network: Callable[[], nn.Module], device: torch.device) -> list[Callable[..., Any]]:
        """All of the model, as `Decoder.called_layers`."""
        trained = super().called_layers(network, device)
        below, above = ([layer.called for layer in part] for part in self._frozen(device))
        return [*below, *trained, *above]

    def _frozen(self, device: torch.device) -> tuple[Sequence[FrozenLayer], Sequence[FrozenLayer]]:
        """The layers below those that are trained, and those above."""
        layers = _bound_layers(self.settings.model, self.settings.quantize, device.type)
        return layers[: self.settings.first_layer], layers[self.settings.first_layer + self.settings.depth :]

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the first trained layer is given, and the conditioning."""
        hidden, condition = super().enter(block, batch)
        with torch.no_grad():
            for layer in self._frozen(hidden.device)[0]:
                hidden = layer(hidden, condition)
        return hidden.requires_grad_(torch.is_grad_enabled()), condition

    def _above(self, hidden: Tensor, condition: Tensor) -> Tensor:
        # Each is run again on the way back, because its weights are no longer there.
        return run_layers(self._frozen(hidden.device)[1], hidden, condition, checkpointing=True)


@functools.lru_cache(maxsize=4)
def _bound_layers(model: str, kind: Frozen, device: str) -> tuple[FrozenLayer, ...]:
    layers = tuple(FrozenLayer(model, number, kind) for number in range(len(shell_of(model, "meta").layers)))
    for layer in layers:
        layer.bind_(torch.device(device))
    return layers
