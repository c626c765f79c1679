"""A small autoencoder as a folder, as diffusers writes it, and pictures that it can be used for."""

import numpy as np
import pytest

SIDE = 16


def diffusers():
    pytest.importorskip("diffusers")
    from edgeblocks.pretrained.autoencoder import library

    return library()


def write_autoencoder(folder, *, seed=0, **config):
    """AutoencoderKL: latents of 4 channels, each of 2x2 pixels; random weights."""
    import torch

    torch.manual_seed(seed)
    usual = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    network = diffusers().AutoencoderKL(**{**usual, **config})
    with torch.no_grad():  # as of a trained one: pictures with contrast, little noise in the latents
        network.decoder.conv_out.weight.mul_(8)
        network.quant_conv.bias[4:] -= 4
    network.save_pretrained(folder)
    return str(folder)


def write_pictures(path, *, count=24, side=SIDE, channels=3):
    """An .npz of three classes: a bright square each on its place, and noise."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = random.integers(0, 100, (count, side, side, channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 6, 3:9] += 150
    np.savez(path, images=images, labels=labels)
    return str(path)
