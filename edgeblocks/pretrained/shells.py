"""The model around its layers, of either kind: what is common to layers of decoders and of image classifiers."""

from edgeblocks.pretrained.shell import Shell, shell_of
from edgeblocks.pretrained.vision_shell import vision_shell


def any_shell(model: str, device: str, side: int | None = None) -> Shell:
    """The shell of a model's folder on a kind of device; one a process.

    Args:
        side: pixels of a side of the pictures that an image classifier takes; None for a decoder.

    Raises:
        ConfigError, UnsupportedModelError: as of `Shell`.
    """
    return shell_of(model, device) if side is None else vision_shell(model, device, side)
