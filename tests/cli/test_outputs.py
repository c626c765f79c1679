"""What the verbs write, and what they leave alone: files of the user, and the run that they read."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import assert_refused, invoke
from support.random_run import make_run

from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.runs.create import check_apart


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two blocks with random weights."""
    return make_run(tmp_path_factory.mktemp("outputs") / "run", layers=(1, 1), width=16, heads=2, hold_out=0.005).path


@pytest.fixture(scope="module")
def exported(run):
    before = everything(run)
    assert invoke("export", run, "-o", run.parent / "onnx").exit_code == 0
    assert everything(run) == before
    return run.parent / "onnx"


def everything(folder):
    """All bytes and times in a folder; its own time changes when a name in it comes or goes."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.is_file() and path.read_bytes(), path.lstat().st_mtime_ns) for path in paths}


def test_a_run_that_is_read_is_not_written(run, exported, tmp_path):
    """By no verb that uses it (`export`: in the fixture), not even for a moment: its medium may be read-only."""
    before = everything(run)
    for verb, *arguments in (
        ("sample", "-o", tmp_path / "grid.png", "--n", "1", "--steps", "2"),
        ("eval", "--samples", "2", "--steps", "2"),
        ("weights", "-o", tmp_path / "w.safetensors"),
        ("report", "-o", tmp_path / "report.html"),
        ("info",),
    ):
        result = invoke(verb, run, *arguments)
        assert result.exit_code == 0, (verb, result.stderr)
        assert everything(run) == before, verb


def test_a_file_of_the_user_is_replaced_only_when_asked(run, exported, tmp_path, monkeypatch):
    """By `sample`, `run`, `weights` and `report`; also under the name that nobody gave. --overwrite was its name."""
    monkeypatch.chdir(tmp_path)
    commands = {
        "grid.png": ("sample", run, "--n", "1", "--steps", "2"),
        "grid2.png": ("run", exported, "--n", "1", "--steps", "2", "-o", "grid2.png"),
        "w.safetensors": ("weights", run, "-o", "w.safetensors"),
        "page.html": ("report", run, "-o", "page.html"),
    }
    for name, command in commands.items():
        Path(name).write_text("mine")
        assert_refused(invoke(*command), 2, f"-o {name} is there already; add --force to replace it, or choose")
        assert Path(name).read_text() == "mine"
        assert invoke(*command, "--overwrite" if name == "page.html" else "--force").exit_code == 0
        assert Path(name).read_bytes() != b"mine"


def test_weights_that_are_no_numbers_are_refused(run, tmp_path):
    """With how many they are, in which block, and what to do; nothing is written."""
    copy = Path(shutil.copytree(run, tmp_path / "my run"))
    import edgeblocks

    store = edgeblocks.load(copy).directory.store()
    buffer = BlockBuffer(max(store.layouts, key=lambda layout: layout.num_bytes))
    step = store.read(1, buffer)
    name, tensor = next((name, tensor) for name, tensor in buffer.tensors("ema") if tensor.numel() >= 3)
    tensor.view(-1)[:3] = torch.tensor([np.nan, np.inf, -np.inf])
    store.write(1, buffer, step=step)
    words = rf"block 1 of .*my run holds 3 values of \d+ that are not finite numbers .*, the first in {name}: its .*"
    words += "train it again: edgeblocks train --resume '.*my run' --reinit-block 1"
    assert_refused(invoke("weights", copy, "-o", tmp_path / "w.safetensors"), 1, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my run"]
    assert invoke("weights", copy, "-o", tmp_path / "w.safetensors", "--last").exit_code == 0


TAKEN = {
    "a user's folder": (lambda out: (out / "thesis.txt").write_text(""), r"files that are not of a run \(thesis.txt\)"),
    "a user's samples": (lambda out: (out / "samples/a").mkdir(parents=True), r"not of a run \(samples\)"),
    "a settings file": (lambda out: (out / "config.yaml").write_text(""), r"not of a run \(config.yaml\)"),
    "a file": (lambda out: (out.rmdir(), out.write_text("")), r"out is a file, not a folder; choose another --out"),
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_run_is_not_mixed_with_what_is_there(what, tmp_path):
    """The folder stays as it is, and the way out is named."""
    make, words = TAKEN[what]
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    before = everything(tmp_path)
    assert_refused(invoke("train", "--out", tmp_path / "out", "--steps", "1"), 2, words)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("out", ["runs/pets", "cat/run", "../pets/run"])
def test_a_run_is_not_put_among_its_own_data(out, tmp_path, monkeypatch):
    """When it goes on it would be a class or a text; so would one in its usual place with `--data .`."""
    (tmp_path / "pets/cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pets")
    words = re.escape(f"--out {out} lies in the folder of the data, {tmp_path}/pets: ") + r".* such as --out /.*run"
    for data in (".", str(tmp_path / "pets")):
        for family in ("vit", "ar"):
            assert_refused(invoke("train", family, "--data", data, "--out", out), 2, words)
    assert [path.name for path in tmp_path.rglob("*")] == ["pets", "cat"]
    check_apart(Path("pets/.edgeblocks/run"), str(tmp_path / "pets"))  # what is hidden is not read
    check_apart(Path("pets"), "digits")


def test_a_name_that_no_file_can_have_is_refused_in_words(run, tmp_path):
    """Longer than a file system takes, or below a file."""
    (tmp_path / "file").write_text("")
    assert_refused(invoke("train", "--out", tmp_path / "file/run"), 2, "file is a file, not a folder")
    assert_refused(invoke("train", "--out", tmp_path / ("x" * 300)), 2, "File name too long; choose another --out")
    assert_refused(invoke("weights", run, "-o", tmp_path / f"{'x' * 300}.safetensors"), 2, "File name too long")


def test_what_a_killed_creation_left_is_used_again(run, tmp_path):
    """Its lock, its empty folders and its first files are ours."""
    from edgeblocks.runs.create import check_free

    (tmp_path / "out/samples").mkdir(parents=True)
    (tmp_path / "out/lock").write_text("")
    check_free(tmp_path / "out")
    for name in ("env.json", "config.yaml"):
        shutil.copy(run / name, tmp_path / "out" / name)
    env = json.loads((run / "env.json").read_text())
    assert len(env["run_id"]) == 32
    check_free(tmp_path / "out")
