"""A pretrained image classifier's folder: whether it is one, the names of its classes, and the pictures it takes."""

import functools
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from edgeblocks.errors import ConfigError
from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json
from edgeblocks.pretrained.library import library, read_config, without_dropout
from edgeblocks.pretrained.model_folder import ModelFolder, model_folder

PROCESSOR = "preprocessor_config.json"
PART = "vision_config"
"""Of the config of a model of text and pictures, what concerns pictures."""
_MOST_BYTES = 2**20
_HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation where no file names any: those of ViT's own pictures."""


def is_vision(folder: ModelFolder) -> bool:
    """Whether transformers classifies images with a model of this type.

    Raises:
        ConfigError: the library is missing, or the model is of images and has no classifier there.
    """
    library()
    known, kind = importlib.import_module("transformers.models.auto.modeling_auto"), folder.config["model_type"]
    if kind in known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return True
    if "image_size" in folder.config and "vocab_size" not in folder.config:
        raise ConfigError(
            f"{folder.path}: a model of the type {kind} has no image classifier in transformers, so there is none to "
            f"fine-tune; take a vit, dinov2 or siglip"
        )
    return False


@functools.lru_cache(maxsize=8)
def vision_config(model: str) -> Any:
    """As `read_vision_config`, once a process."""
    return read_vision_config(model_folder(model))


def read_vision_config(folder: ModelFolder) -> Any:
    """The config as the library reads it, without dropout.

    Raises:
        ConfigError: it does not.
    """
    config = read_config(folder)
    without_dropout(of_pictures(config))
    config.architectures = config.architectures or []  # where a type has two classifiers the library goes through them
    return config


def of_pictures(config: Any) -> Any:
    """What of a config concerns pictures."""
    return getattr(config, PART, None) or config


def class_names(model: str) -> list[str]:
    """Of the model's own head, in its order."""
    labels = vision_config(model).id2label or {}
    return [str(labels[number]) for number in sorted(labels)]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a model makes of a picture before its first layer.

    A picture is a square of `side` pixels with `channels` colours; a value x of 0 to 255 becomes (x factor - mean) /
    std, with a mean and a standard deviation for each colour.
    """

    side: int
    channels: int
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, pixels: np.ndarray) -> Float[Tensor, "batch channels height width"]:
        """What the model is given for uint8 [N, H, W, C]; one grey becomes all colours."""
        return self.of_tensor(torch.from_numpy(pixels))

    def of_tensor(self, pixels: Tensor) -> Float[Tensor, "batch channels height width"]:
        """The same of a tensor."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images = images.mul_(self.factor)
        if images.shape[1] < self.channels:
            images = images.repeat(1, self.channels, 1, 1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def as_processor(self) -> dict[str, object]:
        """The content of a preprocessor_config.json that says the same."""
        return {
            "do_resize": True,
            "size": {"height": self.side, "width": self.side},
            "do_rescale": True,
            "rescale_factor": self.factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def colour_problems(self, channels: int) -> list[str]:
        """Whether pictures have the colours that the model knows; grey ones can be given any."""
        if channels in (1, self.channels):
            return []
        return [
            f"the pictures have {channels} channels and the model takes {self.channels}; convert them (to grey, where "
            f"it takes one), or take a model that was trained on such pictures"
        ]


@functools.lru_cache(maxsize=8)
def pictures_of(model: str) -> Pictures:
    """As the folder's preprocessor_config.json says; the config's size and 0.5 for the rest where it does not.

    Raises:
        ConfigError: the file cannot be read, or names something that is not done here.
    """
    folder, told = model_folder(model), of_pictures(vision_config(model))
    path = folder.path / PROCESSOR
    asked = _processor(path)
    channels = int(getattr(told, "num_channels", 3))
    has_own_size = asked.get("do_center_crop", True) and asked.get("crop_size") is not None
    size = asked["crop_size"] if has_own_size else asked.get("size")
    side = _side(path, size) or _side(path, getattr(told, "image_size", None))
    if side is None:
        raise ConfigError(f"{folder.path}: neither {PROCESSOR} nor its config names the size of its pictures")
    mean, std = asked.get("image_mean") or _HALF, asked.get("image_std") or _HALF
    if not asked.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    factor = asked.get("rescale_factor", 1 / 255) if asked.get("do_rescale", True) else 1.0
    return Pictures(
        side=side,
        channels=channels,
        factor=_numbers(path, "rescale_factor", [factor], 1)[0],
        mean=_numbers(path, "image_mean", mean, channels),
        std=_numbers(path, "image_std", std, channels),
    )


def _processor(path: Path) -> dict[str, Any]:
    """Content of the file; empty where there is none."""
    try:
        with open_regular(path) as file:
            asked = parse_json(file.read(_MOST_BYTES).decode("utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, MalformedFileError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); download the model again") from error
    if not isinstance(asked, dict):
        raise ConfigError(f"{path} is no table; download the model again")
    return asked


def _side(path: Path, size: object) -> int | None:
    """Of a square: libraries write a number, a pair, or a table of height and width or of the shortest edge."""
    if isinstance(size, dict):
        size = [size[name] for name in ("height", "width", "shortest_edge") if size.get(name) is not None]
    sides: Sequence[Any] = size if isinstance(size, list | tuple) else [size]
    if not sides or sides[0] is None:
        return None
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(
            f"{path.parent}: the size of its pictures is {json.dumps(size)}, which is no number of pixels"
        )
    if len(set(sides)) > 1:
        raise ConfigError(f"{path.parent}: its pictures are {sides[0]} x {sides[1]} pixels, and here they are squares")
    return int(sides[0])


def _numbers(path: Path, name: str, values: object, count: int) -> tuple[float, ...]:
    """As many as there are colours; one is that of each."""
    found: Sequence[object] = values if isinstance(values, list | tuple) else [values]
    if not all(isinstance(value, int | float) for value in found):
        raise ConfigError(f"{path}: {name} is {json.dumps(values)[:100]}, which are no numbers; download it again")
    numbers = tuple(float(value) for value in found)  # type: ignore[arg-type]  # looked at above
    if len(set(numbers)) == 1:
        return numbers[:1] * count
    if len(numbers) != count:
        raise ConfigError(f"{path}: {name} has {len(numbers)} values, and the model takes pictures of {count} colours")
    return numbers
