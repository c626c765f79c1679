"""What an autoencoder takes of memory, followed on shapes alone."""

from edgeblocks.data.pictures import pictures_together
from edgeblocks.families.base import DataInfo, ImageInfo
from edgeblocks.pretrained.autoencoder import Autoencoder, Decoder, Encoder, autoencoder
from edgeblocks.profiling.step_trace import traced_forward
from edgeblocks.settings.fields import RunSettings
from edgeblocks.tasks import TASKS

SCRATCH_SHARE = 0.35
"""Beside its tensors, of the library of convolutions: with Stable Diffusion's autoencoder measured 0.1 of them in the
encoder, 0.26 in the decoder, on pictures of 64 to 512 pixels a side."""
SLACK_BYTES = 25_000_000
"""Code that is first run then, measured 19 MB."""
PICTURE_COPIES = 4
"""Of pictures as bytes: as they are made, as one grid, and on the way to its file."""


def encoding_bytes(network: Autoencoder, height: int, width: int) -> int:
    """Of the encoder and of the pictures that go through it together."""
    shape = pictures_together(height, width), network.picture_channels, height, width
    return _half_bytes(network.encoder("meta"), shape)


def decoding_bytes(run: RunSettings, data: DataInfo, samples: int) -> int:
    """Of the decoder, of what goes through it together, and of so many pictures; 0 where samples are pictures."""
    if not isinstance(data, ImageInfo) or data.autoencoder is None:
        return 0
    assert run.vae is not None
    height, width, channels = data.picture_shape
    shape = min(samples, pictures_together(height, width)), data.channels, data.height, data.width
    pictures_bytes = PICTURE_COPIES * samples * height * width * channels
    return _half_bytes(autoencoder(run.vae).decoder("meta"), shape) + pictures_bytes


def grid_decoding_bytes(run: RunSettings, data: DataInfo) -> int:
    """The same for the grids that are made during training."""
    return decoding_bytes(run, data, TASKS["images"].grid_samples) if run.sample_grids else 0


def _half_bytes(half: Encoder | Decoder, shape: tuple[int, ...]) -> int:
    weights_bytes = sum(4 * parameter.numel() for parameter in half.parameters())
    return weights_bytes + int((1 + SCRATCH_SHARE) * traced_forward(half, shape).peak_bytes) + SLACK_BYTES
