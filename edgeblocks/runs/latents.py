"""A run's autoencoder: whether it can be used, the latents that it makes of images, and that it stays the same."""

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import cache_folder
from edgeblocks.data.dataset import Progress
from edgeblocks.data.images import ImageSet
from edgeblocks.data.latents import Encode, Latents, LatentSet, open_latents
from edgeblocks.errors import ConfigError, NoRoomToReadError, RunError
from edgeblocks.families.base import ImageInfo
from edgeblocks.pretrained.autoencoder import Autoencoder, autoencoder, encoded, library
from edgeblocks.profiling.latents import encoding_bytes
from edgeblocks.registry import build_target, family_type
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.settings.fields import RunSettings


def check_vae(run: RunSettings) -> None:
    """That an autoencoder is asked for where latents can be trained on, and is there.

    Raises:
        ConfigError: it is not.
    """
    if run.vae is None:
        return
    kind = family_type(run.family)
    if kind.task != "images":
        does = "reads text" if kind.reads == "text" else "classifies pictures"
        raise ConfigError(
            f"--vae {run.vae}: {run.family} {does}, and latents are for dit, which makes pictures of them"
        )
    autoencoder(run.vae)


def latents_of(images: ImageSet, run: RunSettings, *, progress: Progress, room_bytes: int | None) -> LatentSet:
    """The latents of a run's images, encoded when the cache does not have them.

    Args:
        room_bytes: memory that encoding may take in this process; None does not bound it.

    Raises:
        ConfigError: the autoencoder cannot be used for these pictures.
        NoRoomToReadError: to encode them takes more than `room_bytes`.
        StorageError: the cache cannot be written or read.
    """
    assert run.vae is not None
    network = autoencoder(run.vae)
    _, height, width, channels = images.images.shape
    if channels not in (1, network.picture_channels):
        raise ConfigError(
            f"pictures have {channels} channels, and the autoencoder in {network.path} takes "
            f"{network.picture_channels}; convert the pictures, or take another autoencoder"
        )
    return open_latents(
        images,
        autoencoder=network.sha256(),
        picture_channels=network.picture_channels,
        latent_shape=network.latent_shape(height, width),
        encoder=lambda: _encoder(network, height, width, run.target, room_bytes),
        cache_dir=cache_folder(),
        progress=progress,
    )


def _encoder(network: Autoencoder, height: int, width: int, target_name: str, room_bytes: int | None) -> Encode:
    """What encodes a piece of pictures, after a look at the room for it."""
    target = build_target(target_name)
    needed_bytes = encoding_bytes(network, height, width)
    if room_bytes is not None and needed_bytes > room_bytes:
        what = f"a picture of {height}x{width} pixels, by the encoder of {network.path},"
        raise NoRoomToReadError(what, needed_bytes, cure="make the pictures smaller with --set image_size=..")
    encoder = network.encoder(target.torch_device)

    def encode(pixels: NDArray[np.uint8]) -> Latents:
        with target.without_gaps():
            return encoded(encoder, pixels, channels=network.picture_channels, device=target.torch_device)

    return encode


def autoencoder_of(run: RunDirectory) -> Autoencoder | None:
    """The autoencoder of a run on latents, after a look that it is the one that made them; None of another run.

    Its library is imported: what is measured of the memory afterwards has it.

    Raises:
        RunError: it is not there, or has changed.
    """
    data = run.data
    if not isinstance(data, ImageInfo) or data.autoencoder is None:
        return None
    if run.settings.run.vae is None:
        raise RunError(f"{run.path} is damaged: it is trained on latents, and its config.yaml names no vae")
    where = f"the autoencoder of {run.path} was in {run.settings.run.vae}"
    cure = "put it back there"
    try:
        network = autoencoder(run.settings.run.vae)
        found = network.sha256()
    except ConfigError as error:
        raise RunError(
            f"{where}, and {error}; {cure}, or name its new place: edgeblocks train --resume RUN --vae DIR"
        ) from error
    if found != data.autoencoder:
        raise RunError(
            f"{where}, and what is there now is another one (sha256 {found[:16]}.., and {data.autoencoder[:16]}.. made "
            f"the latents); {cure}, or start a new run with --out"
        )
    library()
    return network
