"""The vit family: label diffusion. Its traps, its objective, its chain; trained, resumed and exported as dit is."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.blocks import fresh_block, random_block, seeded
from support.commands import invoke
from support.random_run import make_run, unlabelled_images
from torch import nn

import edgeblocks
from edgeblocks.cli.console import export_report
from edgeblocks.diffusion.classification import (
    CLASSIFIED_BYTES,
    classification_scores,
    classified_bytes,
    classified_together,
    classify,
)
from edgeblocks.diffusion.noise import partition_noise, sampler_levels
from edgeblocks.errors import ConfigError
from edgeblocks.export.open_export import open_chain
from edgeblocks.families.base import ImageInfo, Level
from edgeblocks.families.vit import Vit, VitSettings

SETTINGS = VitSettings(width=16, depth=3, heads=2, patch=2)
DATA = ImageInfo(channels=2, height=4, width=6, num_classes=5, mean=0.4, scale=1.7)
FAMILY = Vit(SETTINGS, DATA)
SMALL = {"family": "vit", "data": "digits", "depth": 6, "width": 32, "heads": 2, "patch": 4, "batch": 16, "blocks": 3}
SMALL |= {"hold_out": 0.02}


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, DATA.height, DATA.width, DATA.channels), dtype=np.uint8)
    return pixels, rng.integers(0, DATA.num_classes, count)


def partition(num_blocks, family=FAMILY):
    return partition_noise(family.noise, num_blocks=num_blocks, kind="equal-probability", overlap=0.05)


# The objective and its traps


def test_the_loss_is_the_unweighted_cross_entropy_of_each_sample():
    """Oracle: -log p of the right class, one number a sample, whatever the noise level (traps 2 and 3)."""
    block = random_block(FAMILY).eval()
    batch = FAMILY.draw(*pictures(6), partition(1).ranges[0], seeded())
    z, images = FAMILY.inputs(batch)
    probabilities = block(z, batch["sigma"], images)
    expected = -probabilities[torch.arange(6), batch["labels"]].log()
    loss = FAMILY.loss(block, batch)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(FAMILY.scores(block, batch)["loss"], expected)


def test_what_is_noised_is_a_row_of_unit_norm_and_what_is_fed_back_is_in_the_same_space():
    """The code-book is the identity (trap 4): z = row + sigma eps, and an estimate is a mean of rows."""
    batch = FAMILY.at_level(*pictures(5), Level.at(0.7), seeded())
    z, _ = FAMILY.inputs(batch)
    rows = z - 0.7 * batch["eps"]
    torch.testing.assert_close(rows, nn.functional.one_hot(batch["labels"], 5).float(), atol=1e-6, rtol=0)
    denoised = random_block(FAMILY)(z, batch["sigma"], batch["images"])
    assert denoised.shape == z.shape
    torch.testing.assert_close(denoised.sum(1), torch.ones(5))


def test_the_first_block_is_trained_where_inference_starts():
    """About two fifths of its samples, more than of their own accord, are at sigma_max (trap 5); others' never are."""
    first, second = partition(2).ranges
    pixels, labels = pictures(2000)
    at_top = FAMILY.draw(pixels, labels, first, seeded())["sigma"] == SETTINGS.sigma_max
    assert 0.36 < at_top.float().mean() < 0.45
    sigma = FAMILY.draw(pixels, labels, second, seeded())["sigma"]
    assert second.train_low <= sigma.min() and sigma.max() <= second.train_high + 1e-6


def test_the_answer_comes_from_the_hidden_state_at_every_noise_level():
    """The last block can change every answer (trap 7): at the lowest noise another image gives other probabilities."""
    block = random_block(FAMILY)
    z = torch.zeros(1, 5)
    sigma = torch.full((1,), SETTINGS.sigma_min)
    one, two = (DATA.to_model(pictures(1, seed)[0]) for seed in (1, 2))
    assert (block(z, sigma, one) - block(z, sigma, two)).abs().max() > 1e-3


def test_noise_is_not_seen_before_it_is_learnt():
    """z's projection starts at zero (trap 15), and all classes start as likely as each other."""
    block = fresh_block(FAMILY)
    images = DATA.to_model(pictures(2)[0])
    sigma = torch.full((2,), SETTINGS.sigma_max)
    assert torch.equal(block.logits(torch.zeros(2, 5), sigma, images), block.logits(torch.randn(2, 5), sigma, images))
    torch.testing.assert_close(block(torch.randn(2, 5), sigma, images), torch.full((2, 5), 0.2))


def test_labels_are_smoothed_while_training_only():
    """Smoothing is a wish of training; evaluation reports the cross-entropy itself."""
    family = Vit(replace(SETTINGS, label_smoothing=0.2), DATA)
    block = random_block(family)
    batch = family.at_level(*pictures(4), Level.at(1.0), seeded())
    plain = FAMILY.loss(block, batch)
    assert not torch.allclose(family.loss(block.train(), batch), plain)
    assert torch.equal(family.loss(block.eval(), batch), plain)


def test_checkpointing_changes_no_bit():
    """Loss and gradients with and without keeping activations."""
    batch = FAMILY.draw(*pictures(3), partition(1).ranges[0], seeded())
    gradients = []
    for checkpointing in (False, True):
        block = random_block(FAMILY, checkpointing=checkpointing)
        FAMILY.loss(block, batch).sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop": 2}, "shifted"),
        ({"flip": True}, "mirrored"),
        ({"randaugment": 2, "randaugment_strength": 1.0}, "changed"),
    ],
)
def test_training_images_are_augmented_as_asked(change, words):
    """Some images change and all keep their size; the same generator gives the same images; evaluation changes none."""
    data = replace(DATA, channels=3)
    family = Vit(replace(SETTINGS, **change), data)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 4, 6, 3), dtype=np.uint8)
    labels, whole = np.zeros(16, np.int64), partition(1).ranges[0]
    plain = data.to_model(pixels)
    drawn = [family.draw(pixels, labels, whole, seeded(seed))["images"] for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    changed = (drawn[0] != plain).flatten(1).any(1)
    assert changed.any() and drawn[0].shape == plain.shape, words
    assert torch.equal(family.at_level(pixels, labels, Level.at(1.0), seeded())["images"], plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: input should be less than 1"),
        ({"top_share": -0.1}, "top_share=-0.1: input should be greater than or equal to 0"),
        ({"crop": -1}, "crop=-1: input should be greater than or equal to 0"),
        ({"randaugment_strength": 2.0}, "randaugment_strength=2.0: input should be less than or equal to 1"),
        ({"sigma_min": 20.0}, "sigma_min=20.0, and sigma_min < sigma_max is needed"),
        ({"patch": 3}, "patch=3 does not divide the image height 4"),
    ],
)
def test_impossible_settings_are_named(change, message):
    """Each with its value and what it may be."""
    with pytest.raises(ConfigError, match=message):
        Vit(replace(SETTINGS, **change), DATA)


def test_data_without_classes_are_refused(tmp_path):
    """There is nothing to tell apart; the message says how data have classes."""
    data = unlabelled_images(tmp_path / "set.npz", height=8, width=8)
    with pytest.raises(ConfigError, match=r"the data have no classes .* sub-folder of images per class"):
        edgeblocks.train(out=tmp_path / "run", **{**SMALL, "data": data}, mem_budget="4GB", steps=1)


# The chain


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_perfect_denoiser_gives_the_class_and_every_block_is_run(num_blocks):
    """Whatever the noise; each level goes to its block (trap 1), and each block is asked for once."""
    labels = np.array([3, 0, 4])
    routed = partition(num_blocks)
    seen = []

    def denoise(z, sigma):
        seen.append(routed.block_of(sigma))
        return np.eye(5, dtype=np.float32)[labels]

    levels = sampler_levels(routed, num_steps=4)
    found = classify(denoise, pixels=pictures(3)[0], num_classes=5, levels=levels, noises=2, seed=0)
    np.testing.assert_array_equal(found, np.eye(5, dtype=np.float32)[labels])
    assert set(seen) == set(range(num_blocks)) and seen == sorted(seen)


def test_the_answer_is_the_mean_over_noises_and_levels():
    """Two chains from different noises and three levels: the mean of the six denoised labels."""
    answers = []

    def denoise(z, sigma):
        answers.append(np.exp(z / sigma) / np.exp(z / sigma).sum(1, keepdims=True))
        return answers[-1]

    found = classify(denoise, pixels=pictures(4)[0], num_classes=5, levels=(10.0, 3.0, 0.5), noises=2, seed=1)
    assert len(answers) == 6 and not np.array_equal(answers[0], answers[1])
    np.testing.assert_allclose(found, np.mean(answers, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_an_image_has_the_same_noise_wherever_it_stands():
    """Its place and its neighbours do not count; its pixels and the seed do."""
    images = pictures(3)[0]

    def starts(pixels, seed=0):
        seen = []

        def denoise(z, sigma):
            seen.append(z.copy())
            return np.full_like(z, 1 / z.shape[1])

        classify(denoise, pixels=pixels, num_classes=5, levels=(10.0,), noises=2, seed=seed)
        return seen[0]

    former = starts(images)
    assert np.array_equal(starts(images[[2, 0, 2]]), former[[2, 0, 2]])
    assert not np.isclose(former[0], former[1]).any()
    assert not np.isclose(former, starts(images, seed=1)).any()


def test_classes_are_asked_for_in_groups_that_a_bound_holds():
    """Few classes: more images than are usual together; 5,000 classes of large images: a few, within 16 MB."""
    assert classified_together(num_classes=10, noises=4, values_per_image=32 * 32 * 3) >= 1024
    many = {"num_classes": 5000, "noises": 4, "values_per_image": 256 * 256 * 3}
    assert 1 < classified_together(**many) < 64
    assert classified_bytes(1024, **many) <= CLASSIFIED_BYTES
    assert classified_bytes(2, **many) == 2 * classified_bytes(1, **many)


def test_scores_against_a_slow_count():
    """Oracle for top-1, top-5 and the calibration error."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(8), size=200).astype(np.float32)
    labels = rng.integers(0, 8, 200)
    found = classification_scores([(probabilities[:60], labels[:60]), (probabilities[60:], labels[60:])])
    ranks = [int((row > row[label]).sum()) for row, label in zip(probabilities, labels, strict=True)]
    assert found["top1"] == pytest.approx(np.mean([rank == 0 for rank in ranks]))
    assert found["top5"] == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    error = 0.0
    for low in range(15):
        inside = [i for i, row in enumerate(probabilities) if min(int(row.max() * 15), 14) == low]
        if inside:
            sure = np.mean([probabilities[i].max() for i in inside])
            error += len(inside) * abs(sure - np.mean([ranks[i] == 0 for i in inside]))
    assert found["calibration_error"] == pytest.approx(error / 200, abs=1e-6)
    nats = [-math.log(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    assert found["cross_entropy"] == pytest.approx(np.mean(nats), rel=1e-5)


# Runs


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    out = tmp_path_factory.mktemp("vit") / "run"
    edgeblocks.train(out=out, steps=12, mem_budget="4GB", tier="ram", visit_steps=12, **SMALL)
    return out


def test_a_run_tells_classes_and_makes_no_images(resident):
    """Evaluation per level, per block and of the chain; sampling is refused with what to do instead."""
    run = edgeblocks.load(resident)
    result = run.evaluate(samples=30)
    assert {"sigma", "block", "share", "loss", "top1"} == set(result["validation"]["levels"][0])
    assert len(result["top1_by_block"]) == 3
    assert result["classification"]["images"] == 30 and 0 <= result["classification"]["top1"] <= 1
    assert not list((resident / "samples").iterdir())
    with pytest.raises(ConfigError, match="edgeblocks eval"):
        run.sample(n=2)
    with pytest.raises(ConfigError, match=r"the run takes uint8 \(8, 8, 1\)"):
        run.classify(np.zeros((2, 9, 8, 1), np.uint8))


@pytest.mark.thorough
def test_training_learns_the_digits(tmp_path):
    """300 steps of two small blocks tell most digits, far above the tenth of guessing, and loss falls in each block."""
    settings = {**SMALL, "blocks": 2, "depth": 4, "patch": 2, "batch": 32, "learning_rate": 2e-3, "hold_out": 0.1}
    run = edgeblocks.train(out=tmp_path / "run", steps=300, mem_budget="4GB", **settings)
    assert run.evaluate()["classification"]["top1"] > 0.75
    assert max(run.summary["metrics"]["validation_loss_by_block"]) < 0.8 * math.log(10)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    run = make_run(folder / "run", layers=(2, 2), family="vit", width=32, heads=2, patch=4)
    manifest = run.export(folder / "onnx")
    return run, folder / "onnx", manifest


def test_exported_probabilities_are_those_of_torch(exported):
    """Equality to rounding on random images, block by block and of the chain; the manifest says what was verified."""
    run, folder, manifest = exported
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    found = open_chain(folder).classify(pixels)
    np.testing.assert_allclose(found, run.classify(pixels, mem_budget="4GB"), atol=1e-5)
    np.testing.assert_allclose(found[::-1], open_chain(folder).classify(pixels[::-1]), atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert manifest["task"] == "classes" and manifest["verified"]["real_inputs"]
    assert manifest["verified"]["output_max_abs_error"] < 1e-5
    assert manifest["verified"]["output_equal_share"] == 1.0
    assert "probabilities by" in export_report(manifest, folder)
    assert f"next: edgeblocks run {folder} picture.png" in export_report(manifest, folder)


def test_a_folder_stands_for_the_pictures_in_it(exported, tmp_path):
    """In the order of their names, those below it as well; what is no picture is left out, what is broken is named."""
    _, folder, _ = exported
    random = np.random.default_rng(0)
    names = [f"{number:03d}.png" for number in range(66)] + ["more/a.png"]
    (tmp_path / "new/more").mkdir(parents=True)
    for name in names:
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "new" / name)
    (tmp_path / "new/notes.txt").write_text("no picture")
    files = [tmp_path / "new" / name for name in names]
    named, found = invoke("run", folder, *files), invoke("run", folder, tmp_path / "new")
    assert found.exit_code == 0, found.stderr
    assert found.stdout == named.stdout and len(found.stdout.splitlines()) == 67
    assert "classifying: 64/67\n" in found.stderr and "classifying: 67/67\n" in found.stderr
    files[1].write_bytes(b"broken")
    found = invoke("run", folder, tmp_path / "new")
    assert found.exit_code == 2 and len(found.stdout.splitlines()) == 66
    assert "001.png is no image that can be read" in found.stderr and "1 of 67 images have no answer" in found.stderr


def test_run_prints_classes_of_image_files(exported, tmp_path):
    """Text and JSON of a colour photograph of another size, and a file of answers; wrong uses are told."""
    _, folder, _ = exported
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[::-1].copy()).save(tmp_path / "b.jpg")
    text = invoke("run", folder, tmp_path / "a.png", tmp_path / "b.jpg")
    assert text.exit_code == 0, text.stderr
    lines = text.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{tmp_path}/a.png: ") and lines[0].count("%") == 5
    found = json.loads(invoke("run", folder, tmp_path / "a.png", "--json").stdout)
    assert found[0]["path"] == str(tmp_path / "a.png")
    shares = [one["probability"] for one in found[0]["classes"]]
    assert shares == sorted(shares, reverse=True) and {one["name"] for one in found[0]["classes"]} <= set("0123456789")
    written = invoke("run", folder, tmp_path / "a.png", "-o", tmp_path / "answers.json")
    assert written.exit_code == 0 and json.loads((tmp_path / "answers.json").read_text()) == found
    some = invoke("run", folder, tmp_path / "none.png", tmp_path / "a.png", "--json")
    assert some.exit_code == 2 and json.loads(some.stdout) == found  # one bad file takes no other's answer
    assert "none.png" in some.stderr and "1 of 2 images have no answer" in some.stderr
    (tmp_path / "empty").mkdir()
    for wrong, words in (
        ([], "name images, or a folder of them"),
        ([tmp_path / "none.png"], "there is no image"),
        ([tmp_path / "a.png", tmp_path / "empty"], "empty holds no picture: looked for"),
        ([tmp_path / "a.png", "--n", "3"], "so --n means nothing to it"),
        ([folder / "manifest.json"], "its content is of no kind of picture"),
        ([tmp_path / "a.png", "-o", tmp_path / "grid.png"], "ends in .json"),
    ):
        done = invoke("run", folder, *wrong)
        assert done.exit_code in (1, 2) and words in done.stderr, done.stderr
