"""Whether an image classifier can be trained layer by layer: measured as `gate` does for decoders, bit for bit."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.gate import filled_layers, shrunk, why_not
from edgeblocks.pretrained.library import library
from edgeblocks.pretrained.model_folder import CONFIG, ModelFolder, model_folder
from edgeblocks.pretrained.shell import UnsupportedModelError
from edgeblocks.pretrained.vision_folder import PART, read_vision_config, vision_config
from edgeblocks.pretrained.vision_shell import VisionShell

_PATCH, _PATCHES = 4, 4
"""Of a small picture: pixels of a patch, and patches, of a side."""
_BACKBONE = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
"""Names of layers of the large model, which a classifier does not use."""


def check_classifier(model: str) -> None:
    """Compare.

    Raises:
        ConfigError: the two differ, or nothing small can be built of this architecture.
    """
    why = _why_not(json.dumps(vision_config(model).to_dict(), sort_keys=True, default=str))
    if why is not None:
        raise refused_classifier(model, why)


def refused_classifier(model: str, why: str) -> ConfigError:
    """The error for a model that cannot be trained."""
    return ConfigError(
        f"{model}: an image classifier of the type {model_folder(model).config['model_type']} cannot be trained layer "
        f"by layer: {why}. Transformers such as vit, dinov2, dinov2_with_registers, deit and siglip can"
    )


@functools.lru_cache(maxsize=8)
def _why_not(config: str) -> str | None:
    """What is wrong; None where the two are equal."""

    def compare(folder: Path) -> str | None:
        whole, side = _small_network(json.loads(config), folder)
        return _difference(whole, VisionShell(ModelFolder(folder), torch.device("cpu"), side))

    return why_not(compare)


def shrunk_classifier(config: dict[str, Any]) -> dict[str, Any]:
    """A config of the same architecture: few layers and heads, little width, small pictures.

    >>> shrunk_classifier({"hidden_size": 768, "patch_size": 16, "image_size": 224, "num_hidden_layers": 12})
    {'hidden_size': 64, 'patch_size': 4, 'image_size': 16, 'num_hidden_layers': 4}
    """
    if any(isinstance(config.get(name), list) for name in ("num_attention_heads", "hidden_size", "hidden_sizes")):
        raise UnsupportedModelError("its layers are of several widths")
    small = shrunk({name: value for name, value in config.items() if name not in _BACKBONE})
    for name, size in (("patch_size", _PATCH), ("image_size", _PATCH * _PATCHES)):
        if small.get(name) is not None:
            small[name] = [size] * len(small[name]) if isinstance(small[name], list) else size
    for part in (PART, "text_config"):
        if isinstance(small.get(part), dict):
            small[part] = shrunk_classifier(small[part])
    return small


def _small_network(config: dict[str, Any], folder: Path) -> tuple[Any, int]:
    """The architecture with few small layers, saved into a folder; and the side of its pictures."""
    transformers = library()
    (folder / CONFIG).write_text(json.dumps(shrunk_classifier(config)))
    small = read_vision_config(ModelFolder(folder))
    torch.manual_seed(0)
    problems = []
    for attention in ("sdpa", "eager"):
        try:
            kind = transformers.AutoModelForImageClassification
            network = kind.from_config(small, attn_implementation=attention).float().train()
        except (ValueError, ImportError) as error:
            problems.append(error)
            continue
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 1:  # norms begin as ones, which would hide one that is left out
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        network.save_pretrained(folder)
        return network, _PATCH * _PATCHES
    raise problems[0]


def _difference(whole: Any, shell: VisionShell) -> str | None:
    """In what the library's whole network and the layers one by one differ; None where they do not."""
    layers = filled_layers(shell)
    side = _PATCH * _PATCHES
    images = torch.randn(2, shell.channels, side, side, generator=torch.Generator().manual_seed(1))
    hidden = shell.pictures_as_hidden(images)
    for layer, (args, kwargs) in zip(layers, shell.calls(hidden), strict=True):
        out = layer(hidden, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    last: list[Tensor] = []
    modules = dict(whole.named_modules())
    end, head = modules[shell.layers_name][len(layers) - 1], modules[shell.head_name]
    hook = end.register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    logits = whole(pixel_values=images).logits
    hook.remove()
    if not torch.equal(hidden, last[0]):
        return f"its hidden values are others, by up to {(hidden - last[0]).abs().max():.2g}"
    answered = shell.classes_of(hidden, head)
    if not torch.equal(answered, logits):
        return f"its logits are others, by up to {(answered - logits).abs().max():.2g}"
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (answered * weights).sum().backward()  # type: ignore[no-untyped-call]
    of_head = [parameter.grad for parameter in head.parameters()]
    whole.zero_grad(set_to_none=True)
    (logits * weights).sum().backward()
    theirs = dict(whole.named_parameters())
    pairs = [
        (f"{name} of layer {number}", parameter.grad, theirs[f"{shell.layers_name}.{number}.{name}"].grad)
        for number, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    ]
    pairs += [("the head", own, parameter.grad) for own, parameter in zip(of_head, head.parameters(), strict=True)]
    for name, found, expected in pairs:
        if (found is None) != (expected is None):
            return f"{name} has a gradient in one of them alone"
        if found is not None and expected is not None and not torch.equal(found, expected):
            return f"the gradient of {name} is another one"
    return None
