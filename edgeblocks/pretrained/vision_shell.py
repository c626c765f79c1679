"""A pretrained image classifier around its layers; see `shell`.

Patch embedding, positions and the last norm are the library's, frozen, and in memory: they are small. The head is a
matrix from elsewhere.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.library import built, library, replaced
from edgeblocks.pretrained.model_folder import ModelFolder, model_folder
from edgeblocks.pretrained.shell import (
    Shell,
    UnsupportedModelError,
    _StopError,
)
from edgeblocks.pretrained.vision_folder import PART, of_pictures, read_vision_config

_CLASSES = 3
"""Of the head that the model is built with; the one that is used comes from elsewhere."""


class VisionShell(Shell):
    """A classifier without its layers' weights, on one kind of device, for pictures of one size."""

    def __init__(self, folder: ModelFolder, device: torch.device, side: int) -> None:
        """
        Raises:
            ConfigError: the library is missing, or does not know the model; it takes pictures of another size; its
                files lack a tensor.
            UnsupportedModelError: it is no classifier of layers of one kind.
        """
        config = read_vision_config(folder)
        config.num_labels = _CLASSES
        kind = library().AutoModelForImageClassification
        self._take_(folder, device, built(folder, kind, config, "no image classifier"), part=PART)
        unlike = next((number for number, kind in enumerate(self.kind_of) if kind), None)
        if unlike is not None:
            raise UnsupportedModelError(f"its layers are not alike: layer {unlike} has other weights than layer 0")
        self._side = side
        self.channels = int(getattr(of_pictures(config), "num_channels", 3))
        self.head_name, self._head = self._only_head()
        self.head_width: int = self._head.in_features
        kept = self.model.state_dict()
        if any(f"{self.layers_name}.0.{name}" in kept for name, _ in self.layers[0].named_buffers()):
            raise UnsupportedModelError("its layers have tables in its files")
        for module in self.model.modules():
            self._restore_(module)
        for name, value in kept.items():
            if not name.startswith((f"{self.layers_name}.", f"{self.head_name}.")):
                self._set_(name, value)
        if device.type == "meta":
            self._look_at_size()

    def _only_head(self) -> tuple[str, nn.Linear]:
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and module.out_features == _CLASSES
            and not name.startswith(f"{self.layers_name}.")
        ]
        if len(found) != 1 or found[0][1].bias is None:
            raise UnsupportedModelError("it has no head that is one matrix")
        return found[0]

    def _set_(self, name: str, shaped: Tensor) -> None:
        """Give a tensor outside of the layers its value from the files."""
        is_meta = self.device.type == "meta"
        value = (torch.empty(shaped.shape) if is_meta else self._read(name, shaped.shape)).to(self.device)
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value.to(shaped.dtype)
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _look_at_size(self) -> None:
        try:
            self.pictures_as_hidden(self._blank(1))
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"{self.stored.path}: it does not take pictures of {self._side} x {self._side} pixels "
                f"({first[:200]}); leave image_size out, which then is the model's own"
            ) from error

    @property
    def resident_bytes(self) -> int:
        """Of what it holds in memory: all tensors but those of the layers and the head."""
        return sum(
            value.nbytes
            for name, value in self.model.state_dict().items()
            if not name.startswith((f"{self.layers_name}.", f"{self.head_name}."))
        )

    def name_of_classifier(self, stored: str) -> str:
        """What a tensor of the files is called in those of the classifier's class, in which none lacks the prefix."""
        return f"{self.model.base_model_prefix}.{stored}" if stored in self.stored.prefixed else stored

    def pictures_as_hidden(self, images: Tensor) -> Tensor:
        """What the first layer is given: hidden values [batch, tokens, width] of images [batch, channels, side, side],
        without a gradient."""
        found: list[Tensor] = []

        def first(*args: Any, **kwargs: Any) -> Any:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _StopError

        with torch.no_grad(), self._layers_as([first] * len(self.layers)):
            self._run(pixel_values=images)
        return found[0]

    def classes_of(self, hidden: Tensor, readout: nn.Module) -> Tensor:
        """Logits [batch, classes], float32, that a head gives for what the last layer gives."""
        last = len(self.layers) - 1

        def passing(number: int) -> Any:
            def skip(*args: Any, **kwargs: Any) -> Any:
                given = hidden if number == last else (args[0] if args else kwargs["hidden_states"])
                return (given,) if self._is_tuple else given

            return skip

        self.calls(hidden)  # tells whether layers give a tuple
        with (
            self._layers_as([passing(number) for number in range(last + 1)]),
            replaced(self._head.__dict__, "forward", readout.forward),
        ):
            logits: Tensor = self._run(inputs_embeds=hidden).logits
        return logits.float()

    def _run(self, **inputs: Any) -> Any:
        """The model's forward pass; of hidden values that come from elsewhere, on as many blank pictures."""
        embedded: Tensor | None = inputs.pop("inputs_embeds", None)
        if embedded is not None:
            inputs["pixel_values"] = self._blank(len(embedded))
        try:
            return self.model(**inputs)
        except _StopError:
            return None

    def _blank(self, count: int) -> Tensor:
        one = torch.zeros(1, self.channels, self._side, self._side, device=self.device)
        return one.expand(count, -1, -1, -1)


@functools.lru_cache(maxsize=8)
def vision_shell(path: str, device: str, side: int) -> VisionShell:
    """The shell of a model's folder on a kind of device; one a process.

    Raises:
        ConfigError, UnsupportedModelError: as `VisionShell`.
    """
    return VisionShell(model_folder(path), torch.device(device), side)
