"""hf-vision: a pretrained image classifier of Hugging Face's transformers, trained end to end stage by stage.

Layers are the library's own modules (`vision_shell`), and are trained, as is the head: the model's own where it is of
the data's classes, else a new one that begins as zeros. Patch embedding, positions and the last norm stay as they are.
Pictures are made what the model's preprocessor_config.json says.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from edgeblocks.data.augment import Augmentation, augmented
from edgeblocks.diffusion.noise import NoiseDistribution, NoisePartition, NoiseRange
from edgeblocks.errors import ConfigError
from edgeblocks.families.base import Batch, BatchSpec, ConditionSpec, ImageFamily, ImageInfo, Level
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.layers import init_zero_, run_layers
from edgeblocks.families.settings import FamilySettings, Flip
from edgeblocks.pretrained.layer import LARGEST_HEAP_BYTES, TrainedLayer
from edgeblocks.pretrained.model_folder import ModelFolder, model_folder
from edgeblocks.pretrained.named_tensors import NamedTensors
from edgeblocks.pretrained.shell import UnsupportedModelError
from edgeblocks.pretrained.vision_folder import class_names, of_pictures, pictures_of, vision_config
from edgeblocks.pretrained.vision_gate import check_classifier, refused_classifier
from edgeblocks.pretrained.vision_shell import VisionShell, vision_shell

READOUT = "readout"
_NOISE = NoiseDistribution(sigma_min=0.1, sigma_max=10.0, p_mean=0.0, p_std=1.2)
"""Nothing is noised: one level stands for all."""


@dataclass(frozen=True, kw_only=True)
class VisionSettings(FamilySettings):
    """Where the model is, and how training pictures are changed at random."""

    model: Annotated[
        str, Field(max_length=4096, description="folder of the model: config.json, .safetensors files")
    ] = ""
    flip: Flip = False
    crop: Annotated[
        int, Field(ge=0, le=1024, description="pixels that a picture is padded with before its own size is cut out")
    ] = 0

    @property
    def depth(self) -> int:
        """Layers of the model; 1 where none is named."""
        if not self.model:
            return 1
        told = getattr(of_pictures(vision_config(self.model)), "num_hidden_layers", None)
        if not isinstance(told, int) or told < 1:
            raise refused_classifier(self.model, "its config.json does not say how many layers it has")
        return told


class VisionBlock(Block):
    """Some layers of a model, and the head."""

    readout_parts = (READOUT,)

    def __init__(
        self, *, model: str, side: int, num_classes: int, layers: Iterable[nn.Module], checkpointing: bool
    ) -> None:
        super().__init__()
        self.model, self.side, self.checkpointing = model, side, checkpointing
        self.layers = nn.ModuleList(layers)
        self.readout = nn.Linear(vision_shell(model, "meta", side).head_width, num_classes)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """The head as zeros. Weights of layers are those of the files; these are for a network whose speed is
        measured."""
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)
        if self.readout is not None:
            init_zero_(self.readout)

    def begin_at(self, layer: int) -> None:
        """The layers are those from this one on: what a model calls them with may differ."""
        count = len(self.layers)
        self.layers = nn.ModuleList(
            TrainedLayer(self.model, number, self.side) for number in range(layer, layer + count)
        )

    def reset_tables_(self) -> None:
        """Make the fixed tables inside layers, which are not stored, on torch's default device."""
        shell = self._shell(torch.get_default_device())
        for layer in self.layers:
            assert isinstance(layer, TrainedLayer)
            shell.restore_tables_(layer.hf, layer.number)

    def forward(self, z: Tensor, sigma: Tensor, images: Tensor) -> Float[Tensor, "batch classes"]:
        """The probabilities of the classes, whatever z and sigma are."""
        return self.logits(images).softmax(dim=-1)

    def logits(self, images: Tensor) -> Float[Tensor, "batch classes"]:
        """The logarithms of the classes' probabilities, but for a constant."""
        hidden, nothing = self.enter(images)
        return self.leave(run_layers(self.layers, hidden, nothing, checkpointing=self.checkpointing))

    def enter(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden values of the pictures, and a condition that says nothing."""
        hidden = self._shell(images.device).pictures_as_hidden(images)
        # With a gradient, without which the first layer would not be checkpointed.
        return hidden.requires_grad_(torch.is_grad_enabled()), hidden.new_zeros(len(images), 1)

    def leave(self, hidden: Tensor) -> Float[Tensor, "batch classes"]:
        """The classes' logits."""
        return self._shell(hidden.device).classes_of(hidden, self.readout)

    def _shell(self, device: torch.device) -> VisionShell:
        return vision_shell(self.model, device.type, self.side)


class Vision(ImageFamily, EndToEnd):
    """The family: what a training step needs of a model and pictures."""

    name = "hf-vision"
    task: Literal["classes"] = "classes"
    preferred_blocks = 1
    settings_type: type = VisionSettings
    settings: VisionSettings  # type: ignore[assignment]  # there are no noise levels
    chain_steps = 1
    sigma_data = 1.0
    only_exact = True
    largest_heap_bytes = LARGEST_HEAP_BYTES
    library_bytes = 190_000_000
    """transformers and the model without weights, measured with a ViT-B."""

    def __init__(self, settings: VisionSettings, data: ImageInfo) -> None:
        """
        Raises:
            ConfigError: with everything that is impossible.
        """
        if not settings.model:
            raise ConfigError(
                "the family hf-vision fine-tunes a model: name its folder with edgeblocks finetune FOLDER"
            )
        super().__init__(settings, data)  # type: ignore[arg-type]  # as above
        self.pictures = pictures_of(settings.model)
        self.shell("meta")

    def data_problems(self, data: ImageInfo) -> list[str]:
        """Whether there are classes to tell apart, in pictures as the model takes them."""
        found = pictures_of(self.settings.model).colour_problems(data.channels)
        if data.height != data.width:
            found.append(f"the pictures are {data.height} x {data.width} pixels, and the model takes squares; leave "
                         f"image_size out, which then is the model's own")  # fmt: skip
        if data.num_classes < 2:
            count = "one class" if data.num_classes else "no classes"
            found.append(
                f"the data have {count} and the model is a classifier: it needs at least two; give a folder with one "
                f"sub-folder of images per class, or an .npz with labels"
            )
        return found

    def shell(self, device: str) -> VisionShell:
        """The model around its layers.

        Raises:
            ConfigError: it cannot be trained layer by layer.
        """
        try:
            return vision_shell(self.settings.model, device, self.data.height)
        except UnsupportedModelError as error:
            raise refused_classifier(self.settings.model, str(error)) from error

    @property
    def noise(self) -> NoiseDistribution:
        """Of nothing."""
        return _NOISE

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a sample's z, which nothing is made of."""
        return (self.data.num_classes,)

    @property
    def condition_spec(self) -> ConditionSpec:
        """The picture as the model takes it."""
        return "images", (self.pictures.channels, self.data.height, self.data.width), torch.float32

    @property
    def architecture(self) -> str:
        """The model's config.json, as one text."""
        return json.dumps(model_folder(self.settings.model).config, sort_keys=True)

    @property
    def resident_bytes(self) -> int:
        """Patch embedding, positions and the last norm."""
        return self.shell("meta").resident_bytes

    def check_network(self) -> None:
        """Compare a small network of this architecture, layer by layer, with the library's own forward pass.

        Raises:
            ConfigError: they differ.
        """
        check_classifier(self.settings.model)

    def fresh_parts(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """The head, where the model has none of these classes."""
        return () if self._rows_of(class_names) is not None else (self.shell("meta").head_name,)

    def class_rows(self, class_names: Sequence[str]) -> Mapping[str, Sequence[int]]:
        """Where the model has the same classes in another order, its row for each of the data's."""
        rows = self._rows_of(class_names)
        if rows is None or rows == list(range(len(rows))):
            return {}
        return {self.name_in_file(f"{READOUT}.{part}"): rows for part in ("weight", "bias")}

    def _rows_of(self, wanted: Sequence[str]) -> list[int] | None:
        """The number that each class has in the model's own head; None where that is of other classes."""
        own = [_plain(name) for name in class_names(self.settings.model)]
        names = [_plain(name) for name in wanted]
        there = self.shell("meta").stored.tensors.get(self.name_in_file(f"{READOUT}.weight"))
        if there is None or there.shape[0] != len(own) or sorted(own) != sorted(names) or len({*own}) < len(own):
            return None
        return [own.index(name) for name in names]

    def opened(self, path: Path) -> NamedTensors:
        """The model's tensors, as its files are now."""
        return NamedTensors(ModelFolder(path), self.shell("meta").model)

    def name_in_file(self, name: str) -> str:
        """What a parameter of the whole network is called in the library's model."""
        shell, (part, _, rest) = self.shell("meta"), name.partition(".")
        if part == READOUT:
            return f"{shell.head_name}.{rest}"
        number, _, own = rest.split(".", 2)
        return f"{shell.layers_name}.{number}.{own}"

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of the model's files is used as it is, or of a part that a classifier does not have."""
        shell = self.shell("meta")
        return not name.startswith(f"{shell.layers_name}.")

    def block(self, *, num_layers: int, checkpointing: bool) -> VisionBlock:
        """Some layers and the head, without weights."""
        return VisionBlock(
            model=self.settings.model,
            side=self.data.height,
            num_classes=self.data.num_classes,
            layers=(TrainedLayer(self.settings.model, number, self.data.height) for number in range(num_layers)),
            checkpointing=checkpointing,
        )

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives."""
        _, shape, dtype = self.condition_spec
        return {"images": ((batch, *shape), dtype), "labels": ((batch,), torch.int64)}

    def draw(
        self, pixels: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch, its pictures changed at random where that is asked for."""
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        wanted = Augmentation(flip=self.settings.flip, crop=self.settings.crop)
        return self._batch(augmented(pixels, wanted, rng), labels)

    def at_level(
        self, pixels: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> Batch:
        """A batch for evaluation: pictures as they are."""
        return self._batch(pixels, labels)

    def _batch(self, pixels: np.ndarray, labels: np.ndarray | None) -> Batch:
        assert labels is not None
        return {"images": self.condition(pixels), "labels": torch.from_numpy(labels)}

    def condition(self, pixels: np.ndarray) -> Float[Tensor, "batch channels height width"]:
        """Pictures as the model takes them, of uint8 [N, H, W, C]."""
        return self.pictures.normalised(pixels)

    def evaluation_levels(self, partition: NoisePartition) -> tuple[Level, ...]:
        """One, as nothing is noised."""
        return (Level.at(_NOISE.sigma_max),)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nothing noised, and the pictures."""
        images = batch["images"]
        return images.new_zeros(len(images), self.data.num_classes), images

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the first layer is given, and a condition that says nothing."""
        assert isinstance(block, VisionBlock)
        return block.enter(batch["images"])

    def loss_after(self, block: nn.Module, hidden: Tensor, condition: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """Cross-entropy of each picture, in nats, from what the last layer gives."""
        assert isinstance(block, VisionBlock)
        return F.cross_entropy(block.leave(hidden), batch["labels"], reduction="none")

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """The same, from the picture on."""
        assert isinstance(block, VisionBlock)
        return F.cross_entropy(block.logits(batch["images"]), batch["labels"], reduction="none")

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss, and whether the likeliest class is the right one."""
        assert isinstance(block, VisionBlock)
        logits = block.logits(batch["images"])
        right = logits.argmax(dim=-1) == batch["labels"]
        return {"loss": F.cross_entropy(logits, batch["labels"], reduction="none"), "top1": right.float()}


def _plain(name: str) -> str:
    """A name as it is compared: systems differ in how they write letters with accents."""
    return unicodedata.normalize("NFC", name)
