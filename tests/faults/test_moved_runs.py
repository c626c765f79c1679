"""Runs that go on in other places, under other budgets, or with other data."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.child_processes import in_child
from support.faulty_runs import assert_goes_on, lay_out_resized, refused, resume, train
from support.watched_run import assert_equal_runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("budget", [pytest.param("3GB", marks=pytest.mark.thorough), "1GB"])
def test_a_moved_run_under_another_budget_gives_the_same_bits(half, campaign, tmp_path, budget):
    """In another folder, with its data and its cache elsewhere, planned again with the same micro-batch."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = Path(shutil.move(half, elsewhere / "moved"))
    data = shutil.copy(campaign.folder / "images.npz", elsewhere / "same.npz")
    in_child(resume, run, elsewhere / "cache", {"mem_budget": budget, "data": str(data)})
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["budget_bytes"], plan["micro_batch"]) == (int(budget[0]) * 10**9, 8)
    assert_equal_runs(run, campaign.reference)


def test_a_copy_under_the_smallest_budget_gives_the_same_weights_up_to_rounding(campaign, cache, tmp_path):
    """Too small a budget is refused with one that works, under which micro-batches shrink: only sums are reordered."""
    shape = {"micro_batch": 64, "checkpointing": False, "step_bytes": 300_000_000}
    changes = {
        "batch": 64,
        "steps": 4,
        "image_size": 28,
        "sample_grids": 0,
        "micro_batch": "auto",
        "checkpointing": "auto",
        "optimizer": "adamw",
        "family": {"depth": 2, "width": 64},
        "data": {"height": 28, "width": 28},
        "plan": {"layers_per_block": [1, 1], "blocks": 2, "micro_batch": 64, "shapes": [shape], "visit_steps": 4},
    }
    whole = tmp_path / "whole"
    in_child(lay_out_resized, whole, campaign.sealed_copy, cache, changes)
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    in_child(resume, whole, cache)
    config = (copy / "config.yaml").read_bytes()
    text = refused("DoesNotFitError", resume, copy, cache, {"mem_budget": "20MB"})
    assert "the run has 2 blocks, which were fixed when it was created, and they do not fit 20 MB here" in text
    assert (copy / "config.yaml").read_bytes() == config
    named = re.search(r"go on with --mem-budget (\d+MB) or more", text)
    in_child(resume, copy, cache, {"mem_budget": named[1]})
    assert json.loads((copy / "plan.json").read_text())["micro_batch"] < 64
    for name in ("block_000.safetensors", "block_001.safetensors"):
        one, two = load_file(whole / "blocks" / name), load_file(copy / "blocks" / name)
        for key in one:
            if key.startswith("weights."):
                np.testing.assert_allclose(one[key], two[key], rtol=0, atol=2e-4, err_msg=key)


REFUSED_CHANGES = {
    "other data": (
        {"data": "digits"},
        "RunError",
        r"the data of .* have changed: digits is not what the run was trained",
    ),
    "no such data": ({"data": "no/such.npz"}, "DataError", r"no/such.npz' does not exist"),
    "no such work directory": ({"work_dir": "no/such/disk"}, "StorageError", r"no/such/disk does not exist"),
    "another work directory": ({"work_dir": "."}, "RunError", r"block 0 is missing: there is no file .*edgeblocks-"),
}


@pytest.mark.parametrize("change", REFUSED_CHANGES)
def test_a_refused_change_is_not_kept(half_away, campaign, cache, change):
    """A mistyped --data or --work-dir on resume: refused, and the next resume without it goes on as before."""
    run, _ = half_away
    settings, kind, message = REFUSED_CHANGES[change]
    config = (run / "config.yaml").read_bytes()
    assert re.search(message, refused(kind, resume, run, cache, settings))
    assert (run / "config.yaml").read_bytes() == config
    assert_goes_on(run, campaign)


def test_a_run_knows_its_data_and_its_work_directory_from_everywhere(campaign, cache, tmp_path):
    """Trained with relative paths, a run is resumed from another working directory."""
    shutil.copy(campaign.folder / "images.npz", tmp_path / "images.npz")
    (tmp_path / "work").mkdir()
    settings = {**campaign.settings, "data": "images.npz", "work_dir": "work", "max_disk_writes": "3MB"}
    assert "Everything is saved" in refused("WriteLimitError", train, tmp_path / "run", cache, settings, tmp_path)
    assert_goes_on(tmp_path / "run", campaign, {"max_disk_writes": "1GB"})
