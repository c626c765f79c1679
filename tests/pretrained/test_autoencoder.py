"""An autoencoder's folder: the numbers of diffusers itself, and refusals in words of what cannot be used."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_autoencoder import SIDE, diffusers, write_autoencoder

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.autoencoder import CONFIG, WEIGHTS, Autoencoder, autoencoder, decoded, encoded
from edgeblocks.profiling.latents import encoding_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
PIXELS = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


def both_ways(folder, pixels=PIXELS):
    """Latents of pictures, and what is made of their means."""
    network = Autoencoder(Path(folder))
    rows = encoded(network.encoder("cpu"), pixels, channels=network.picture_channels, device="cpu")
    return rows, decoded(network.decoder("cpu"), np.ascontiguousarray(rows[:, 0]), device="cpu")


def theirs(folder, kind="AutoencoderKL", pixels=PIXELS):
    """The same by the library: means, deviations, pictures."""
    network = getattr(diffusers(), kind).from_pretrained(folder, local_files_only=True)
    shift, scale = network.config.shift_factor or 0.0, network.config.scaling_factor
    with torch.no_grad():
        found = network.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        drawn = getattr(found, "latent_dist", None)
        mean, std = (found.latents, torch.zeros_like(found.latents)) if drawn is None else (drawn.mean, drawn.std)
        made = network.decode(mean).sample / 2 + 0.5
    return ((mean - shift) * scale).numpy(), (std * scale).numpy(), made.numpy()


@pytest.mark.parametrize("shift", [None, 0.25])
def test_both_halves_give_what_the_library_gives(tmp_path, shift):
    folder = write_autoencoder(tmp_path / "vae", scaling_factor=0.5, shift_factor=shift)
    rows, made = both_ways(folder)
    for found, expected in zip((rows[:, 0], rows[:, 1], made), theirs(folder), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-5)


def test_the_small_kind_has_latents_without_deviation(tmp_path):
    network = diffusers().AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    network.save_pretrained(tmp_path)
    rows, made = both_ways(tmp_path)
    assert Autoencoder(tmp_path).factor == 2
    assert not rows[:, 1].any()
    for found, expected in zip((rows[:, 0], rows[:, 1], made), theirs(tmp_path, "AutoencoderTiny"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-5)


def test_files_with_the_attention_s_former_names_are_read(vae, tmp_path):
    """As those that were written before 2023, in half precision too."""
    folder = tmp_path / "former"
    shutil.copytree(vae, folder)
    tensors = load_file(folder / WEIGHTS)
    renamed = {}
    for name, tensor in tensors.items():
        former = name
        for now, then in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            former = former.replace(f".{now}.", f".{then}.")
        renamed[former] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / WEIGHTS)
    for found, expected in zip(both_ways(folder), both_ways(vae), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_grey_pictures_become_three_equal_colours(vae):
    grey = PIXELS[..., :1]
    rows, made = both_ways(vae, grey)
    np.testing.assert_array_equal(rows, both_ways(vae, grey.repeat(3, axis=3))[0])
    assert made.shape == (3, 3, SIDE, SIDE)


def test_how_much_encoding_takes_goes_with_the_picture(vae):
    """Pictures go through a few at a time: as many pixels, whatever their size, until one alone has more."""
    sizes = [encoding_bytes(autoencoder(vae), side, side) for side in (128, 256, 512)]
    assert sizes[0] == sizes[1]
    assert sizes[2] - sizes[1] > 2.9 * 4 * 256 * 256 * 8


def test_a_name_on_a_hub_is_refused_with_how_to_download_it():
    with pytest.raises(ConfigError, match="hf download someone/sd-vae --local-dir sd-vae"):
        Autoencoder(Path("someone/sd-vae"))


def _config(**changed):
    def break_(folder):
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return break_


def _weights(change):
    def break_(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return break_


def _cut(folder):
    os.truncate(folder / WEIGHTS, 20_000)


def _as_bin(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (shutil.rmtree, "there is no folder"),
        (lambda folder: (folder / CONFIG).unlink(), "has no config.json"),
        (_config(_class_name="UNet2DModel"), "of the class UNet2DModel; .* AutoencoderKL or AutoencoderTiny"),
        (_as_bin, "has no diffusion_pytorch_model.safetensors.*It has diffusion_pytorch_model.bin"),
        (_cut, "cut short"),
        (_weights(lambda tensors: tensors.pop("decoder.conv_in.weight")), "lacks decoder.conv_in.weight"),
        (
            _weights(lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(6)})),
            r"quant_conv.bias has the shape \[6\], and of its config it is \[8\]",
        ),
        (_config(latent_channels=8), "of its config it is"),
        (_config(latent_channels="many"), "latent_channels is 'many'"),
        (_config(block_out_channels="wide"), "diffusers makes no AutoencoderKL of its config.json"),
        (_config(scaling_factor=0), "scaling_factor 0.0 are no scale"),
        (_config(out_channels=1), "of its config it is|come back as"),
        (_weights(lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int8)})), "of I8"),
    ],
)
def test_what_cannot_be_used_is_refused(vae, tmp_path, break_, words):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    break_(folder)
    with pytest.raises(ConfigError, match=words):
        assert Autoencoder(folder).factor


def test_pictures_that_are_not_divided_are_refused_with_a_size_that_is(vae):
    with pytest.raises(ConfigError, match=r"2x2 pixels, which does not divide them; use --set image_size=14"):
        autoencoder(vae).latent_shape(15, 16)


def test_its_digest_is_of_both_files(vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    assert Autoencoder(folder).sha256() == autoencoder(vae).sha256()
    _config(scaling_factor=0.3)(folder)
    assert Autoencoder(folder).sha256() != autoencoder(vae).sha256()
