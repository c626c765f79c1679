"""Runs on text: trained, streamed, resumed, written with, evaluated, exported and run as those on images are."""

import hashlib
import json
import math

import numpy as np
import pytest

import edgeblocks
from edgeblocks.data.tokenizer import train_pairs
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.export.opening import open_chain

WORDS = ["the", "white", "whale", "swims", "under", "a", "cold", "sea", "and", "sings", "to", "no", "ship"]
SMALL = {
    "family": "mdlm",
    "width": 32,
    "depth": 6,
    "heads": 2,
    "length": 24,
    "batch": 8,
    "blocks": 3,
    "sample_grids": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 6000)))
    return str(path)


@pytest.fixture(scope="module")
def resident(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("mdlm") / "run"
    edgeblocks.train(out=out, data=text, steps=12, mem_budget="4GB", tier="ram", visit_steps=12, **SMALL)
    return out


def test_evaluation_tells_bits_a_character(resident):
    """The bound in nats is the total, each level lies in its block's range, and the shares add up to one."""
    run = edgeblocks.load(resident)
    result = run.evaluate(samples=20)
    levels, bits = result["validation"]["levels"], result["text"]
    assert math.isclose(sum(level["share"] for level in levels), 1.0)
    assert bits["bits_per_token"] == pytest.approx(result["validation_loss"] / math.log(2))
    assert bits["bits_per_character"] == bits["bits_per_token"] and bits["sequences"] == 20
    assert 1 < bits["bits_per_character"] < 5 and bits["bits_per_character_error"] < 1
    for level in levels:
        assert run.directory.partition.block_of(level["sigma"]) == level["block"]


def test_gaps_are_filled_and_what_is_given_stays(resident):
    """As many characters as gaps, around the same words."""
    for made in edgeblocks.load(resident).sample_text(n=3, fill="the ____ sea", seed=1):
        assert made.startswith("the ") and made.endswith(" sea") and len(made) == len("the ____ sea")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fill": "the sea"}, "has no gap"),
        ({"fill": "_" * 25}, "has 25 tokens and the network was trained on texts of 24"),
        ({"n": 0}, "--n 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"steps": 2}, "2 sampling steps cannot visit 3 blocks"),
    ],
)
def test_what_cannot_be_written_is_refused(resident, asked, message):
    """With the number and what to do."""
    with pytest.raises(ConfigError, match=message):
        edgeblocks.load(resident).sample_text(**asked)


def test_a_run_on_text_makes_no_images(resident):
    """The message says what it does make."""
    with pytest.raises(ConfigError, match="writes text"):
        edgeblocks.load(resident).sample(n=2)


def test_settings_of_images_are_refused_for_text_and_the_other_way_round(text, tmp_path):
    """Named, instead of being passed over."""
    with pytest.raises(ConfigError, match="image_size=32: mdlm reads text"):
        edgeblocks.plan(data=text, image_size=32, mem_budget="4GB", **SMALL)
    with pytest.raises(ConfigError, match="length=64: dit reads images"):
        edgeblocks.plan(length=64, mem_budget="4GB")


def test_texts_are_written_during_training(resident):
    """One file a mark, four texts in it."""
    (path,) = (resident / "samples").iterdir()
    assert path.name == "step_0000012.txt" and path.read_text().count("----") == 3


def test_an_export_writes_what_torch_writes(resident, tmp_path):
    """Token for token, also where gaps are filled; and the verification says how far it is from torch."""
    run = edgeblocks.load(resident)
    manifest = run.export(tmp_path / "onnx")
    assert manifest["verified"]["real_inputs"] and manifest["verified"]["block_max_abs_error"] < 1e-5
    writer = open_chain(tmp_path / "onnx")
    assert writer.write(3, seed=5) == run.sample_text(n=3, seed=5)
    assert writer.write(2, fill="a cold ___", steps=7) == run.sample_text(n=2, fill="a cold ___", steps=7)
    assert writer.loads == [0, 1, 2, 0, 1, 2]


def test_a_vocabulary_that_was_trained_travels_with_the_run_and_its_export(text, tmp_path):
    """tokenizer.json lies in both; a changed one is refused, and so is another one under its checksum."""
    settings = {**SMALL, "tokenizer": "bpe", "vocab": 300}
    run = edgeblocks.train(out=tmp_path / "run", data=text, steps=2, mem_budget="4GB", **settings)
    run.export(tmp_path / "onnx")
    assert open_chain(tmp_path / "onnx").write(2, seed=1) == run.sample_text(n=2, seed=1)
    for folder in ("run", "onnx"):
        path = tmp_path / folder / "tokenizer.json"
        path.write_text(path.read_text().replace("Ġthe", "Ġxyz"))
    with pytest.raises(RunError, match=r"tokenizer.json does not match its checksum"):
        edgeblocks.load(tmp_path / "run")
    with pytest.raises(RunError, match=r"tokenizer.json does not match its checksum"):
        open_chain(tmp_path / "onnx").write(2)
    for definition, message in (
        (
            train_pairs(["a whale " * 9], 258).to_json(),
            r"its tokenizer has 258 tokens, manifest.json tells of \d+; copy",
        ),
        ("{}", r"onnx.tokenizer\.json cannot be used"),
    ):
        (tmp_path / "onnx" / "tokenizer.json").write_text(definition)
        manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
        manifest["tokenizer_sha256"] = hashlib.sha256(definition.encode()).hexdigest()
        (tmp_path / "onnx" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(RunError, match=message):
            open_chain(tmp_path / "onnx").write(2)
