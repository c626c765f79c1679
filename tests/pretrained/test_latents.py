"""dit on latents: the cache, training, resuming, samples that are decoded."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from support.equality import StopAfter, assert_same_bits
from support.outside import measured_script
from support.random_run import torch_runner
from support.small_autoencoder import diffusers, write_autoencoder, write_pictures

import edgeblocks
from edgeblocks.data.cache import cache_folder
from edgeblocks.data.latents import LatentSet
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.diffusion.solver import integrate
from edgeblocks.errors import (
    ConfigError,
    DoesNotFitError,
    InterruptedRunError,
    RunError,
    StorageError,
)
from edgeblocks.export import verify
from edgeblocks.inference.block_runner import class_labels, guided
from edgeblocks.pretrained.autoencoder import autoencoder, encoded
from edgeblocks.registry import family_type, open_exported
from edgeblocks.runs.describe import describe
from edgeblocks.runs.open_data import data_of
from edgeblocks.seeds import start_noise
from edgeblocks.settings.reading import resolve_settings

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"depth": 3, "width": 32, "heads": 2, "batch": 8, "steps": 4, "warmup": 0, "mem_budget": "4GB"}
SMALL |= {"sample_grids": 1, "sample_steps": 3, "hold_out": 0.25, "shared": 0}


def latents(pictures, vae, **settings):
    """The data set, and its family."""
    resolved = resolve_settings(
        {"data": pictures, "vae": vae, **settings}, family_settings=lambda name: family_type(name).settings_type
    )
    found = data_of(resolved.run, lambda *_: None)
    assert isinstance(found, LatentSet)
    kind = family_type("dit")
    return found, kind(resolved.family, kind.data_info(found))


@pytest.fixture(scope="module")
def trained(vae, pictures, tmp_path_factory):
    """A run that nothing stopped, all blocks in memory."""
    out = tmp_path_factory.mktemp("latents") / "run"
    return edgeblocks.train(data=pictures, vae=vae, out=out, tier="ram", **SMALL)


def test_examples_are_what_the_encoder_makes_of_the_pictures(vae, pictures):
    data, _ = latents(pictures, vae)
    rows, labels = data.gather(data.train)
    pixels, network = data.pixels(data.train), autoencoder(vae)
    encoder = network.encoder("cpu")
    np.testing.assert_allclose(rows, encoded(encoder, pixels, channels=3, device="cpu"), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(labels, data.labels[data.train])
    assert data.describe().endswith("as latents of 8x8x4")


def test_each_step_draws_anew_by_its_generator_alone_and_model_space_has_sigma_data(vae, pictures):
    data, family = latents(pictures, vae)
    rows, _ = data.gather(data.train)
    one, again, other = (family.data.clean(rows, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    whole = torch.stack([family.data.clean(rows, torch.Generator().manual_seed(seed)) for seed in range(40)])
    assert whole.mean().item() == pytest.approx(0, abs=0.01)
    assert whole.std().item() == pytest.approx(family.sigma_data, rel=0.01)
    mean, deviation = (
        (torch.from_numpy(rows[:, part]) - shift) * family.data.scale for part, shift in ((0, data.mean), (1, 0))
    )
    torch.testing.assert_close(((whole - mean) / deviation).std(), torch.tensor(1.0), rtol=0.02, atol=0)


def test_streamed_stopped_and_resumed_it_gives_the_same_bits(trained, vae, pictures, tmp_path):
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(data=pictures, vae=vae, out=tmp_path / "run", tier="disk", listener=StopAfter(5), **SMALL)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(trained.path, again.path)
    assert trained.summary["metrics"]["validation"] == again.summary["metrics"]["validation"]


def test_samples_are_decoded_latents(trained, vae):
    """The chain walked in model space, its end through the library's own decoder."""
    directory, data = trained.directory, trained.directory.data
    made = trained.sample(n=5, steps=3, seed=1)
    assert made.shape == (5, 16, 16, 3) and made.dtype == np.uint8
    runner = torch_runner(trained)
    x = integrate(
        guided(runner.denoise, class_labels(5, num_classes=3, chosen=None), guidance=1.0, no_class=3),
        torch.from_numpy(start_noise(directory.family().state_shape, samples=range(5), seed=1)),
        sampler_levels(directory.partition, num_steps=3),
        solver="heun",
    )
    network = diffusers().AutoencoderKL.from_pretrained(vae, local_files_only=True)
    with torch.no_grad():
        expected = network.decode((x / data.scale + data.mean) / network.config.scaling_factor).sample
    pixels = (127.5 * (expected + 1)).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert (np.abs(pixels - made) <= 1).all() and (pixels == made).mean() > 0.99
    assert made.std() > 1


def test_images_as_the_network_gets_them_are_means_of_latents(trained, vae, pictures):
    data, family = latents(pictures, vae, hold_out=0.25)
    rows, _ = data.gather(data.train)
    rows[:, 1] = 0
    expected = family.data.clean(rows, torch.Generator())
    torch.testing.assert_close(trained.images(data.pixels(data.train)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"the run takes uint8 \(16, 16, 3\)"):
        trained.images(np.zeros((1, 8, 8, 4), dtype=np.uint8))


def test_grids_and_the_frechet_distance_are_of_pictures(trained):
    from PIL import Image

    (grid,) = (trained.path / "samples").glob("*.png")
    assert Image.open(grid).mode == "RGB"
    found = trained.evaluate(samples=6, steps=3)
    assert found["frechet"]["samples"] == 6 and found["frechet"]["floor"] > 0


def test_pictures_are_encoded_once_and_ctrl_c_leaves_nothing_of_it(vae, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    pictures = write_pictures(tmp_path / "large.npz", count=6, side=128)
    told = []

    def stop_at(done, total, what):
        told.append((done, total, what))
        if what == "encoding" and done == 4:
            raise KeyboardInterrupt

    run = resolve_settings(
        {"data": pictures, "vae": vae}, family_settings=lambda name: family_type(name).settings_type
    ).run
    with pytest.raises(KeyboardInterrupt):
        data_of(run, stop_at)
    assert (0, 6, "encoding") in told
    assert not list((tmp_path / "cache").glob("latents*"))
    data, _ = latents(pictures, vae)
    assert len(list((tmp_path / "cache").glob("latents*"))) == 1
    told.clear()
    again = data_of(run, lambda *told_now: told.append(told_now))
    assert not any(what == "encoding" for *_, what in told)
    assert again.fingerprint == data.fingerprint


def test_damaged_latents_are_found_when_they_are_read(vae, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    data, _ = latents(write_pictures(tmp_path / "some.npz"), vae)
    path = next(cache_folder().glob("latents*")) / "latents.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.raises(StorageError, match="latents of image 23 are not what was encoded"):
        data.gather(np.array([0, 23]))


def test_the_plan_counts_the_library_and_the_decoder(vae, pictures, tmp_path):
    plan = edgeblocks.plan(data=pictures, vae=vae, out=tmp_path, **{**SMALL, "blocks": 3}).plan
    without = edgeblocks.plan(data=pictures, vae=vae, out=tmp_path, **{**SMALL, "blocks": 3, "sample_grids": 0}).plan
    more = plan.chosen.breakdown["evaluation"] - without.chosen.breakdown["evaluation"]
    assert more > 25_000_000


def test_encoding_that_does_not_fit_is_refused_with_the_budget_that_does(vae, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    pictures = write_pictures(tmp_path / "large.npz", count=6, side=256)
    with pytest.raises(
        DoesNotFitError, match=r"256x256 pixels, by the encoder of .* takes up to .* to read"
    ) as refused:
        edgeblocks.plan(data=pictures, vae=vae, out=tmp_path, **{**SMALL, "mem_budget": "100MB"})
    assert refused.value.as_fixed_bytes > 100_000_000


def test_another_autoencoder_in_its_place_is_refused(trained, vae, pictures, tmp_path):
    own = tmp_path / "vae"
    shutil.copytree(vae, own)
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(data=pictures, vae=own, out=tmp_path / "run", listener=StopAfter(2), **SMALL)
    write_autoencoder(own, seed=1)
    with pytest.raises(RunError, match=r"what is there now is another one \(sha256"):
        edgeblocks.resume(tmp_path / "run")
    with pytest.raises(RunError, match="what is there now is another one"):
        edgeblocks.load(tmp_path / "run").sample(n=1, steps=3)
    shutil.rmtree(own)
    with pytest.raises(RunError, match="name its new place: edgeblocks train --resume RUN --vae DIR"):
        edgeblocks.load(tmp_path / "run").sample(n=1, steps=3)
    again = edgeblocks.resume(tmp_path / "run", vae=vae)
    assert_same_bits(trained.path, again.path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vae": "someone/sd-vae"}, "hf download someone/sd-vae"),
        ({"family": "vit"}, "vit classifies pictures, and latents are for dit"),
        ({"family": "mdlm", "data": "moby-dick"}, "mdlm reads text, and latents are for dit"),
        ({"flip": True}, "flip=true mirrors latents"),
        ({"patch": 3}, "patch=3 does not divide"),
        ({"data": "digits", "image_size": 9}, "does not divide them; use --set image_size=8"),
        ({"vae": " "}, "it must not be empty"),
    ],
)
def test_what_latents_are_not_for_is_refused(vae, pictures, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        edgeblocks.plan(**{"data": pictures, "vae": vae, "out": tmp_path, "mem_budget": "4GB", **settings})


def test_pictures_of_other_channels_are_refused(tmp_path, pictures):
    grey = write_autoencoder(tmp_path / "grey", in_channels=1, out_channels=1)
    with pytest.raises(ConfigError, match=r"pictures have 3 channels, and the autoencoder in .* takes 1"):
        latents(pictures, grey)


def test_without_its_library_it_is_refused_with_what_brings_it(vae, pictures, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'edgeblocks\[vae\]'"):
        edgeblocks.plan(data=pictures, vae=vae, out=tmp_path, **SMALL)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "onnx"
    manifest = trained.export(out)
    assert manifest["decoding"]["graph"] == {**manifest["decoding"]["graph"], "block": 3, "file": "decoder.onnx"}
    assert manifest["verified"]["real_inputs"] and manifest["verified"]["output_equal_share"] > 0.99
    return out


def test_an_export_makes_the_pictures_with_onnxruntime_alone(trained, exported, tmp_path):
    script = f"""
import sys
import numpy as np
from edgeblocks.registry import open_exported
told = []
made = open_exported({str(exported)!r}).sample(5, steps=3, seed=1, on_picture=lambda *now: told.append(now))
assert told == [(5, 5)], told
assert not {{"torch", "diffusers", "transformers"}} & sys.modules.keys()
np.save({str(tmp_path / "made.npy")!r}, made)
"""
    done = measured_script(script, cwd=tmp_path)
    assert done["code"] == 0, done["err"]
    made, expected = np.load(tmp_path / "made.npy").astype(int), trained.sample(n=5, steps=3, seed=1)
    assert (np.abs(made - expected) <= 1).all() and (made == expected).mean() > 0.99


@pytest.fixture(scope="module")
def in_one_file(trained, exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "one"
    manifest = trained.export(out, single_file=True)
    assert {path.name for path in out.iterdir()} == {"chain.onnx", "manifest.json", "USE.md"}
    assert manifest["decoding"]["graph"] is None and manifest["chain"]["verified"]["walk_difference"] < 1e-3
    return out


def test_one_file_makes_the_pictures_and_decodes_them(exported, in_one_file):
    """Those of the chain block by block, whose last graph is in it."""
    walk, chain = (edgeblocks.open_export(folder) for folder in (exported, in_one_file))
    for asked in ({"n": 3, "guidance": 2.0}, {"n": 1, "solver": "euler"}):
        made, expected = (one.sample(steps=3, seed=1, **asked).astype(int) for one in (chain, walk))
        assert made.shape == expected.shape == (asked["n"], 16, 16, 3)
        assert (np.abs(made - expected) <= 1).all() and (made == expected).mean() > 0.99
    facts = describe(in_one_file)
    assert (facts["image"], facts["latents"], facts["graphs"]) == ("16x16x3", "8x8x4", 1)


@pytest.mark.parametrize("form", ["exported", "in_one_file"])
def test_the_python_of_use_md_decodes_its_pictures(form, request, monkeypatch):
    """With onnxruntime alone, as the page beside the graphs says."""
    folder = request.getfixturevalue(form)
    monkeypatch.chdir(folder)
    (code,) = re.findall("```python\\n(.*?)```", (folder / "USE.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["pixels"].shape == (4, 16, 16, 3)


def test_an_export_tells_both_sizes_and_its_decoder_is_checked_before_use(exported, tmp_path):
    facts = describe(exported)
    assert (facts["image"], facts["latents"]) == ("16x16x3", "8x8x4")
    copied = tmp_path / "copied"
    shutil.copytree(exported, copied)
    content = bytearray((copied / "decoder.onnx").read_bytes())
    content[-9] ^= 1
    (copied / "decoder.onnx").write_bytes(content)
    with pytest.raises(RunError, match=r"block 3 is damaged: .*decoder.onnx does not match its checksum"):
        open_exported(copied).sample(1, steps=3)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["decoding"]["graph"]["block"] = 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="not listed in order"):
        open_exported(copied)


def test_a_decoder_that_gives_other_numbers_in_onnxruntime_is_seen(trained, exported, vae):
    """Torch's is changed by 0.01 before its output, from -1 to 1, becomes one from 0 to 1."""
    data, _ = latents(trained.directory.data_source, vae, hold_out=0.25)
    decoder, sampler = autoencoder(vae).decoder("cpu"), open_exported(exported)
    assert verify.decoder_difference(trained.directory, decoder, sampler, data)[0] < 5e-5
    with torch.no_grad():
        decoder.decoder.conv_out.bias.add_(0.01)
    difference, where = verify.decoder_difference(trained.directory, decoder, sampler, data)
    assert difference == pytest.approx(0.005, rel=0.01) and "latents" in where
