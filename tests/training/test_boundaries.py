"""What enters each stage of end-to-end training, in memory or on disk, as float32 or bfloat16."""

import json

import numpy as np
import pytest
import torch
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS, trained, whole_weights

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.offload.slots import StreamTimes
from edgeblocks.training.boundaries import InMemory, OnDisk

pytestmark = pytest.mark.usefixtures("one_thread")

MADE = {"blocks": 4, "tier": "ram", "micro_batch": 8, "optimizer": "adamw", "steps": 12}


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    return trained("dit", tmp_path_factory.mktemp("ram") / "run", boundaries="ram", **MADE)


def on_disk(out, **settings):
    return trained("dit", out, boundaries="disk", **MADE, **settings)


def test_where_they_wait_changes_no_bit(in_memory, tmp_path):
    """Interrupted on the way as well; the plan and the meter tell what is written, and nothing is left behind."""
    run = on_disk(tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        on_disk(tmp_path / "run", listener=StopAfter(9))
    again = edgeblocks.resume(tmp_path / "run")
    for other in (run, again):
        assert_same_bits(in_memory.path, other.path, blocks=4)
        assert not list((other.path / "blocks").glob(".*"))
    step_bytes = run.directory.plan.boundary_disk_bytes
    tokens = (8 // 2) ** 2 if in_memory.directory.settings.family.patch == 2 else 64
    assert step_bytes == 3 * 16 * tokens * 32 * 4
    written = [one.summary["disk_bytes_written"] for one in (in_memory, run)]
    assert written[1] - written[0] == 12 * step_bytes


def test_half_the_bytes_are_nearly_the_same_training(in_memory, tmp_path):
    """bfloat16 gives other bits, the same on disk and in memory, and weights that are close."""
    runs = [
        trained("dit", tmp_path / tier, boundaries=tier, boundary_dtype="bfloat16", **MADE) for tier in ("ram", "disk")
    ]
    assert_same_bits(runs[0].path, runs[1].path, blocks=4)
    exact, rounded = whole_weights(in_memory), whole_weights(runs[0])
    assert any(not np.array_equal(exact[name], rounded[name]) for name in exact)
    told = [[record["loss"] for record in run.directory.metrics()] for run in (in_memory, runs[0])]
    np.testing.assert_allclose(*told, rtol=0.02)


def test_the_plan_takes_the_disk_where_memory_does_not_hold_them():
    """And says so; every form takes the memory that is planned for it, less with each."""
    wanted = {**KINDS["dit"], "method": "exact", "width": 256, "heads": 4, "depth": 12, "batch": 256, "blocks": 12}
    wanted |= {"micro_batch": 4, "tier": "disk", "checkpointing": True, "patch": 1}
    ample = edgeblocks.plan(**wanted, mem_budget="4GB").plan
    kept = ample.chosen.breakdown["boundaries"]
    assert ample.boundary_disk_bytes == 0 and kept > 12 * 256 * 64 * 256 * 4
    half = edgeblocks.plan(**wanted, mem_budget="4GB", boundary_dtype="bfloat16").plan.chosen.breakdown["boundaries"]
    least = edgeblocks.plan(**wanted, mem_budget="4GB", boundaries="disk").plan
    assert kept > half > least.chosen.breakdown["boundaries"] > 2 * 256 * 64 * 256 * 4
    budget = str((ample.chosen.predicted_peak_bytes + least.chosen.predicted_peak_bytes) // 2)
    tight = edgeblocks.plan(**wanted, mem_budget=budget).plan
    assert tight.boundary_disk_bytes == 11 * 256 * 64 * 256 * 4
    assert any("kept on disk" in warning for warning in tight.warnings)
    assert json.loads(json.dumps(least.warnings))


def test_block_wise_training_has_none():
    with pytest.raises(ConfigError, match="no gradient goes from part to part"):
        edgeblocks.plan(family="dit", boundaries="disk")
    with pytest.raises(ConfigError, match="boundary_dtype"):
        edgeblocks.plan(family="dit", boundary_dtype="float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_put_is_what_comes_back(tmp_path, dtype):
    """In parts of any size, written again and again; rounded as torch rounds."""
    times = StreamTimes()
    keepers = InMemory(10, dtype=dtype), OnDisk(10, tmp_path, times, dtype=dtype)
    for step in range(2):
        hidden = torch.randn(3, 10, 5, 7, generator=torch.Generator().manual_seed(step))
        expected = hidden.bfloat16().float() if dtype == "bfloat16" else hidden
        for keeper in keepers:
            for stage in (1, 2):
                for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
                    keeper.put(stage, part, hidden[stage, part])
            for stage in (2, 1):
                for part in (slice(0, 6), slice(6, 12)):
                    assert torch.equal(keeper.of(stage, part), expected[stage, part])
                keeper.forget(stage)
    assert times.load_s > 0 and times.store_s > 0
    assert not list(tmp_path.iterdir())
