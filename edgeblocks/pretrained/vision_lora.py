"""hf-vision-lora: a pretrained image classifier whose layers are frozen, with an adapter beside each of their matrices.

As `lora` has it for decoders; the head is trained as well, as in `vision`, since it may be of other classes.
"""

from dataclasses import dataclass

import torch

from edgeblocks.families.layers import init_zero_
from edgeblocks.methods import Frozen
from edgeblocks.pretrained.frozen_layers import LAYERS_READING_BYTES, frozen_layers
from edgeblocks.pretrained.lora import PEFT_PREFIX, AdaptedBlock, AdapterSettings, LoraLayer, peft_name, targets_of
from edgeblocks.pretrained.vision import READOUT, Vision, VisionBlock, VisionSettings


@dataclass(frozen=True, kw_only=True)
class VisionLoraSettings(AdapterSettings, VisionSettings):
    """Where the model is, what is trained beside it, and as what its layers are read."""


class VisionLoraBlock(AdaptedBlock, VisionBlock):
    """All layers of a classifier with their adapters, and the head."""

    side: int

    def __init__(self, *, settings: VisionLoraSettings, side: int, num_classes: int, num_layers: int) -> None:
        self.quantize: Frozen = settings.quantize
        super().__init__(
            model=settings.model,
            side=side,
            num_classes=num_classes,
            layers=(LoraLayer(settings.model, settings, number, side) for number in range(num_layers)),
            checkpointing=True,
        )

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Adapters that change nothing, and the head as zeros."""
        self.init_adapters_(generator)
        init_zero_(self.readout)

    def reset_tables_(self) -> None:
        """Use the memory for frozen layers on torch's default device; plans count what reading leaves in memory."""
        if torch.get_default_device().type == "meta":
            self.register_buffer("reading", torch.empty(LAYERS_READING_BYTES, dtype=torch.uint8), persistent=False)
        self.bind_layers_()


class VisionLora(Vision):
    """The family; see `Vision`."""

    name = "hf-vision-lora"
    one_stage = True
    own_parts = (PEFT_PREFIX.rstrip("."),)
    settings_type: type = VisionLoraSettings
    settings: VisionLoraSettings

    def block(self, *, num_layers: int, checkpointing: bool) -> VisionLoraBlock:
        """The network, without weights."""
        return VisionLoraBlock(
            settings=self.settings,
            side=self.data.height,
            num_classes=self.data.num_classes,
            num_layers=num_layers,
        )

    @property
    def resident_bytes(self) -> int:
        """As of `Vision`; one layer as float32, and its codes."""
        frozen = frozen_layers(self.settings.model, self.settings.quantize, "meta", self.data.height)
        return super().resident_bytes + sum(table.nbytes for table in frozen.tables)

    def check_network(self) -> None:
        """As `Vision.check_network`; and that there are matrices of the names that are wanted."""
        super().check_network()
        targets_of(self.settings.model, self.settings.lora_targets, self.data.height)

    def name_in_file(self, name: str) -> str:
        """What an adapter is called in PEFT's files, and the head in the library's model."""
        if name.startswith(f"{READOUT}."):
            return super().name_in_file(name)
        return peft_name(self.shell("meta").layers_name, name)

    def is_frozen(self, name: str) -> bool:
        """All tensors of the model's files but those of the head."""
        return True
