"""Runs on data that a program gave: as long as the cache has them they are like any other."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import invoke
from support.equality import StopAfter

import edgeblocks
from edgeblocks.errors import DataError, InterruptedRunError, RunError
from edgeblocks.settings.reading import read_yaml

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = ["cat", "dog"] * 20
SMALL = {
    "depth": 2,
    "width": 16,
    "heads": 2,
    "batch": 4,
    "steps": 3,
    "sample_grids": 0,
    "mem_budget": "4GB",
    "blocks": 2,
}


def test_a_run_on_arrays_goes_on_from_the_command_line_while_the_cache_has_them(tmp_path, monkeypatch):
    """Its config.yaml names the data in the cache; where they are gone it says so, and takes them again."""
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(data=(PIXELS, LABELS), out=out, listener=StopAfter(2), **SMALL)
    source = str(read_yaml(out / "config.yaml")["data"])
    assert source.startswith("python:") and len(source) == len("python:") + 64

    done = invoke("train", "--resume", out)
    assert done.exit_code == 0 and "read: 40 images in 2 classes of 20 each" in done.stderr
    assert edgeblocks.load(out).sample(n=2, label="dog").shape == (2, 8, 8, 3)
    assert invoke("eval", out, "--samples", 4).exit_code == 0

    shutil.rmtree(tmp_path / "cache" / source.replace(":", "-"))
    gone = invoke("eval", out, "--samples", 4)
    assert gone.exit_code == 2 and "give them again from Python" in gone.stderr
    with pytest.raises(RunError, match="is not the data that"):
        edgeblocks.load(out).evaluate(samples=0, data=(PIXELS[::-1], LABELS))
    assert edgeblocks.load(out).evaluate(samples=0, data=(PIXELS, LABELS))["validation_loss"] > 0


def test_a_path_object_is_a_path_and_one_string_no_list_of_texts(tmp_path):
    """As in every other place of the interface; and the wrong kind of data is told."""
    np.savez(tmp_path / "a.npz", images=PIXELS)
    prepared = edgeblocks.plan(data=Path(tmp_path / "a.npz"), **SMALL)
    assert prepared.settings.run.data == str(tmp_path / "a.npz")
    with pytest.raises(DataError, match="image 0 of the data is 'a'"):
        edgeblocks.plan(data=["a", "b"], **SMALL)
    with pytest.raises(DataError, match="text 0 of the data is"):
        edgeblocks.plan(family="mdlm", data=list(PIXELS), **SMALL)
