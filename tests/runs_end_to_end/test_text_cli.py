"""The command on a user's text, from the file to what onnxruntime writes, for a family of each way of writing.

In this process: one of its own is three seconds of imports for each command.
"""

import json
import re

import numpy as np
import pytest
from support.commands import assert_refused, invoke

SMALL = {"width": 32, "heads": 2, "depth": 3, "length": 16, "batch": 8, "micro_batch": 4, "sample_grids": 1}
SMALL |= {"learning_rate": 0.01, "hold_out": 0.02}
FLAGS = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
GIVEN = {"mdlm": ("--fill", "a ____ sea"), "ar": ("--prompt", "a cold")}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = np.random.default_rng(0).choice(["the", "white", "whale", "swims", "under", "a", "cold", "sea"], 6000)
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module", params=GIVEN)
def trained(request, text, tmp_path_factory):
    """The family, where its run is, and what training printed."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    command = ["train", request.param, "--data", text, "--mem-budget", "4GB", "--steps", 40]
    done = invoke(*command, *FLAGS, "--out", out)
    assert done.exit_code == 0, done.stderr
    return request.param, out, done


def test_a_text_becomes_a_deployed_network(trained, tmp_path):
    """Every command that one command names as the next works; standard output has what was asked for and no more."""
    family, out, done = trained
    assert "bits a character" in done.stdout + done.stderr and f"next: edgeblocks sample {out}" in done.stdout
    told = invoke("eval", out, "--samples", 8, "--json")
    bits = json.loads(told.stdout)["text"]["bits_per_character"]
    assert 0 < bits < np.log2(27)

    exported = invoke("export", out, "-o", tmp_path / "onnx")
    assert exported.exit_code == 0 and "verified against torch" in exported.stdout
    flag, given = GIVEN[family]
    asked = [flag, given, "--n", 2, "--seed", 1]
    by_torch = invoke("sample", out, *asked)
    deployed = invoke("run", tmp_path / "onnx", *asked)
    assert by_torch.exit_code == deployed.exit_code == 0
    first, line, second = deployed.stdout.splitlines()
    assert deployed.stdout == by_torch.stdout and line == "----"
    assert all(
        len(written) >= len(given) and written.startswith(given.partition("_")[0]) for written in (first, second)
    )

    saved = invoke("run", tmp_path / "onnx", *asked, "-o", tmp_path / "texts.txt")
    assert saved.exit_code == 0 and (tmp_path / "texts.txt").read_text() == deployed.stdout
    as_json = invoke("run", tmp_path / "onnx", *asked, "--json")
    assert json.loads(as_json.stdout) == [first, second]
    short = [invoke(*made, "--length", 7, "--n", 1).stdout for made in (("sample", out), ("run", tmp_path / "onnx"))]
    assert short[0] == short[1] and len(short[0]) == len("1234567\n")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--mem-budget", "4GB", "--preset", "dit-tiny"], 2, "dit-tiny"),
        (["--mem-budget", "4GB", "--tokenizer", "letters"], 2, "letters"),
        (["--mem-budget", "4GB", "--set", "heads=3"], 2, "heads"),
        (["--mem-budget", "100MB", *FLAGS], 3, r"no plan fits"),
        (["--mem-budget", "4GB", "--set", "length=100000"], 2, "length"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(text, tmp_path, arguments, exit_code, message):
    """One line of reason, exit status not 0, and no run directory."""
    done = invoke("train", "mdlm", "--data", text, *arguments, "--out", tmp_path / "run")
    assert_refused(done, exit_code, f"error: .*{message}")
    assert not (tmp_path / "run").exists()


def test_letters_that_are_left_out_are_told_once(tmp_path):
    """On standard error, with what keeps them; what keeps them says nothing."""
    (tmp_path / "text.txt").write_text("Война и мир, eh bien, mon prince. " * 200, encoding="utf-8")
    command = ["plan", "mdlm", "--data", tmp_path / "text.txt", "--mem-budget", "4GB", *FLAGS, "--batch", 1]
    done = invoke(*command)
    assert done.exit_code == 0 and "--tokenizer bytes" in done.stderr and "left out" not in done.stdout
    assert done.stderr.count("note: 1,800 of the text's 4,800 letters (37.5%) are left out, most often") == 1
    assert "left out" not in invoke(*command, "--tokenizer", "bytes").stderr


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        (["--vocab", "300"], "'chars', which has 27 tokens of its own"),
        (["--vocab", "4096"], "'chars', which has 27 tokens of its own"),
        (["--set", "vocab=300", "--tokenizer", "bytes"], "'bytes', which has 256 tokens of its own"),
        (["--vocab", "300", "--tokenizer", "TOKENIZER"], "tokenizer.json', which has the tokens in that file"),
        (["--config", "FILE"], "'chars', which has 27 tokens of its own"),
    ],
)
def test_a_number_of_byte_pairs_is_refused_where_none_are_learned(text, tmp_path, monkeypatch, arguments, own):
    """Wherever it was written: with the tokens that there are, the cure, and nothing made, not even in the cache."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "settings.yaml").write_text("vocab: 300\n")
    named = {"TOKENIZER": tmp_path / "tokenizer.json", "FILE": tmp_path / "settings.yaml"}
    made = ["--steps", 1, "--out", tmp_path / "run"]
    command = ["train", "mdlm", "--data", text, *(named.get(argument, argument) for argument in arguments), *made]
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    done = invoke(*command)
    assert_refused(done, 2, re.escape(own))
    assert "--tokenizer bpe" in done.stderr and "leave vocab out" in done.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_file_may_hold_a_vocab_for_the_tokenizer_that_the_command_replaces(text, tmp_path):
    """And a run's own config.yaml, in which every setting stands, is accepted as --config."""
    (tmp_path / "pairs.yaml").write_text("tokenizer: bpe\nvocab: 300\n")
    (tmp_path / "characters.yaml").write_text("tokenizer: chars\nvocab: 4096\n")
    for given in (
        ["--config", tmp_path / "pairs.yaml", "--tokenizer", "bytes"],
        ["--config", tmp_path / "characters.yaml"],
    ):
        done = invoke("plan", "mdlm", "--data", text, "--mem-budget", "4GB", *FLAGS, *given)
        assert done.exit_code == 0, done.stderr
