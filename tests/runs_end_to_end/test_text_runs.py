"""Runs on text: trained, streamed, resumed, written with, evaluated, exported and run as those on images are."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
from support.equality import StopAfter

import edgeblocks
from edgeblocks.data.tokenizer import train_pairs
from edgeblocks.errors import ConfigError, DataError, DoesNotFitError, InterruptedRunError, RunError
from edgeblocks.export.open_export import open_chain
from edgeblocks.targets.cpu import CpuTarget
from edgeblocks.units import advised_budget

WORDS = ["the", "white", "whale", "swims", "under", "a", "cold", "sea", "and", "sings", "to", "no", "ship"]
SMALL = {
    "family": "mdlm",
    "width": 32,
    "depth": 3,
    "heads": 2,
    "length": 16,
    "batch": 8,
    "micro_batch": 4,
    "blocks": 3,
    "sample_grids": 1,
    "hold_out": 0.02,
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


@pytest.fixture(scope="module")
def exported(resident, tmp_path_factory):
    """Where it was exported to, and the manifest."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    return folder, edgeblocks.load(resident).export(folder)


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
        ({"fill": "_" * 17}, "has 17 tokens and the network was trained on texts of 16"),
        ({"n": 0}, "--n 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"length": 17}, r"--length 17: .* texts of 16 tokens; 1 to 16 are possible"),
        ({"length": 9, "fill": "a ____ sea"}, r"--length 9 .* --fill, .* leave --length out"),
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


def test_an_export_writes_what_torch_writes(resident, exported):
    """Token for token, also where gaps are filled; a shorter text is the beginning of the whole one."""
    run, (folder, manifest) = edgeblocks.load(resident), exported
    assert manifest["verified"]["real_inputs"] and manifest["verified"]["block_max_abs_error"] < 1e-5
    writer = open_chain(folder)
    assert writer.write(3, seed=5) == run.sample_text(n=3, seed=5)
    assert writer.write(2, fill="a cold ___", steps=7) == run.sample_text(n=2, fill="a cold ___", steps=7)
    assert writer.loads == [0, 1, 2, 0, 1, 2]
    whole = run.sample_text(n=3, seed=5)
    assert writer.write(3, seed=5, length=10) == run.sample_text(n=3, seed=5, length=10) == [a[:10] for a in whole]


def test_a_vocabulary_that_was_trained_travels_with_the_run_and_its_export(text, tmp_path):
    """tokenizer.json lies in both; a changed one is refused, and so is another one under its checksum."""
    settings = {**SMALL, "tokenizer": "bpe", "vocab": 280}
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
            r"its tokenizer has 258 tokens, manifest.json says \d+; copy",
        ),
        ("{}", r"onnx.tokenizer\.json cannot be used"),
    ):
        (tmp_path / "onnx" / "tokenizer.json").write_text(definition)
        manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
        manifest["tokenizer_sha256"] = hashlib.sha256(definition.encode()).hexdigest()
        (tmp_path / "onnx" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(RunError, match=message):
            open_chain(tmp_path / "onnx").write(2)


def test_a_tokenizer_that_was_given_is_not_needed_again(text, tmp_path):
    """The run's own copy serves when it goes on, is evaluated and exported after the file, and the data, have moved."""
    given = tmp_path / "tokenizer.json"
    given.write_text(train_pairs(["a cold whale swims under the white sea " * 20], 280).to_json())
    moved = tmp_path / "moved.txt"
    shutil.copy(text, tmp_path / "text.txt")
    settings = {**SMALL, "tokenizer": str(given), "mem_budget": "4GB", "steps": 4, "visit_steps": 2}
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "run", data=str(tmp_path / "text.txt"), listener=StopAfter(3), **settings)
    given.unlink()
    (tmp_path / "text.txt").rename(moved)
    with pytest.raises(DataError, match="does not exist"):
        edgeblocks.load(tmp_path / "run").evaluate(samples=2)
    assert edgeblocks.load(tmp_path / "run").evaluate(samples=2, data=str(moved))["steps"] != [4, 4, 4]
    run = edgeblocks.resume(tmp_path / "run", data=str(moved))
    assert run.evaluate(samples=2)["steps"] == [4, 4, 4]
    assert run.export(tmp_path / "onnx")["verified"]["real_inputs"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"samples": 1}, "--samples 1: at least 2"),
        (
            {"samples": -1, "steps": 5},
            r"(?s)--samples -1.*--steps 5: the bound of a text that is filled in has no chain",
        ),
        ({"steps": 0}, "--steps 0: a chain has at least one"),
    ],
)
def test_an_evaluation_that_is_impossible_is_refused(resident, asked, message):
    with pytest.raises(ConfigError, match=message):
        edgeblocks.load(resident).evaluate(**asked)


def test_text_of_which_nothing_is_known_is_refused(resident, exported, tmp_path):
    """In the data, where another tokenizer would do, and in what is to be filled in, by the run and by its export."""
    (tmp_path / "japanese.txt").write_text("鯨は白い。" * 3000)
    with pytest.raises(DataError, match=r"is too short: .* not a to z, .*: --tokenizer bytes keeps all"):
        edgeblocks.plan(data=str(tmp_path / "japanese.txt"), **SMALL)
    for write in (edgeblocks.load(resident).sample_text, open_chain(exported[0]).write):
        with pytest.raises(
            ConfigError, match=r"--fill '鯨' has no character that this network knows; .* a to z and space"
        ):
            write(n=1, fill="鯨_")


def test_the_budget_that_is_advised_holds_what_the_program_has(text, tmp_path, monkeypatch):
    """More than what is in use already, and where it is more than libraries take, it is called the program's."""
    held = np.ones(50_000_000)
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DoesNotFitError, match="this process already holds") as refused:
        edgeblocks.plan(data=text, mem_budget="100MB", **SMALL)
    assert refused.value.smallest_bytes > CpuTarget().used_bytes() > held.nbytes


def test_an_export_is_not_taken_for_a_run(exported):
    with pytest.raises(RunError, match="is an exported network, not a run; use it with: edgeblocks run"):
        edgeblocks.load(exported[0])


def test_the_budget_that_a_refusal_to_read_advises_is_enough_to_train(text, tmp_path, monkeypatch, traced_apart):
    """Not for reading alone: the training that follows is planned for as many byte pairs as are asked for."""
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    settings = {**SMALL, "data": text, "tokenizer": "bpe", "vocab": 20_000}
    with pytest.raises(DoesNotFitError, match="after the interpreter that reads it") as refused:
        edgeblocks.plan(**settings, mem_budget="100MB")
    advised = refused.value.smallest_bytes
    assert advised > CpuTarget().used_bytes()
    edgeblocks.plan(**settings, mem_budget=advised_budget(advised))
