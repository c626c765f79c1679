"""The keystones: streaming, resuming and checkpointing never change a number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support.commands import invoke
from support.equality import SMALL, StopAfter, assert_same_bits, block_tensors
from support.shapes import checked_shapes

import edgeblocks
from edgeblocks.errors import InterruptedRunError

STEPS, VISIT_STEPS = 24, 5
WRITING = {"data": "moby-dick", "depth": 3, "width": 32, "heads": 2, "length": 16, "batch": 4, "sample_grids": 0}
WRITING |= {"hold_out": 0.00005}
TELLING = {**SMALL, "width": 32}
KINDS = {"vit": TELLING, "mdlm": WRITING, "ar": WRITING, "looped": {**WRITING, "depth": 8}}


def flags(settings):
    """Settings as the command takes them."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """A run of 24 steps with all blocks in memory, and visits as long as the run."""
    out = tmp_path_factory.mktemp("resident") / "run"
    run = edgeblocks.train(out=out, steps=STEPS, mem_budget="4GB", tier="ram", visit_steps=STEPS, **SMALL)
    assert run.directory.plan.slots == 3
    return out


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_streamed_training_equals_resident_training_bit_for_bit(resident, tmp_path, edgeblocks_command, slots):
    """Blocks on disk with one or two in memory, in visits of 7 steps, give the resident run's weights.

    In a process of its own: so close to the cap, whatever else lives in this one would be refused memory too.
    """
    plan = json.loads((resident / "plan.json").read_text())
    part = plan["breakdown"]
    one_slot = (part["weights"] + part["ema"] + part["optimizer"]) // 3
    budget = plan["predicted_peak_bytes"] - (3 - slots) * one_slot + 30_000_000
    wanted = {**SMALL, "tier": "disk", "visit_steps": 7, "micro_batch": plan["micro_batch"]}
    arguments = [*flags(wanted), "--set", f"checkpointing={str(plan['checkpointing']).lower()}"]
    out = tmp_path / "run"
    done = edgeblocks_command("train", "--steps", STEPS, "--mem-budget", budget, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "plan.json").read_text())["slots"] <= 2
    assert_same_bits(resident, out)


@pytest.mark.thorough
def test_a_small_budget_alone_streams_and_gives_the_same_weights(tmp_path, edgeblocks_command):
    """The same B under a budget that streams, and under a large one: equal weights bit for bit after 4 steps."""
    common = ["train", "--steps", "4", "--batch", "8", "--blocks", "4", "--seed", "3", "--json"]
    for setting in ("depth=4", "width=512", "heads=8", "sample_grids=0", "patch=4", "hold_out=0.005"):
        common += ["--set", setting]
    large = edgeblocks_command(*common, "--mem-budget", "4GB", "--out", tmp_path / "large")
    assert large.returncode == 0, large.stderr
    plan = json.loads((tmp_path / "large/plan.json").read_text())
    assert plan["slots"] == 4
    one_slot = (plan["breakdown"]["weights"] + plan["breakdown"]["ema"] + plan["breakdown"]["optimizer"]) // 4
    budget = plan["predicted_peak_bytes"] - int(1.5 * one_slot)
    small = edgeblocks_command(*common, "--mem-budget", f"{budget}", "--out", tmp_path / "small")
    assert small.returncode == 0, small.stderr
    summary = json.loads(small.stdout)
    streamed = json.loads((tmp_path / "small/plan.json").read_text())
    assert streamed["slots"] == 2
    assert streamed["micro_batch"] == plan["micro_batch"]
    assert summary["peak_bytes"] <= summary["budget_bytes"]
    names = sorted(path.name for path in (tmp_path / "large/blocks").iterdir())
    assert len(names) == 4
    for name in names:
        one, two = load_file(tmp_path / "large/blocks" / name), load_file(tmp_path / "small/blocks" / name)
        assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_checkpointing_changes_no_bit(tmp_path):
    """Training with activation checkpointing gives the weights of training without."""
    for name, checkpointing in (("on", True), ("off", False)):
        edgeblocks.train(
            out=tmp_path / name, steps=6, mem_budget="4GB", checkpointing=checkpointing, micro_batch=16, **SMALL
        )
    assert_same_bits(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        *(("vit", 2), ("ar", 2), ("looped", 1)),
        *(pytest.param(family, 2, marks=pytest.mark.thorough) for family in ("mdlm", "looped")),
    ],
)
def test_every_family_streams_resumes_and_checkpoints_without_changing_a_bit(tmp_path, family, blocks):
    """Resident blocks in one visit; blocks on disk in visits of 3 steps; that stopped and resumed, or checkpointed."""
    wanted = {**KINDS[family], "family": family, "blocks": blocks, "mem_budget": "4GB"}
    wanted |= {
        "micro_batch": wanted["batch"] // 2,
        "steps": 8,
        "checkpointing": False,
        "tier": "disk",
        "visit_steps": 3,
    }
    edgeblocks.train(out=tmp_path / "resident", **{**wanted, "tier": "ram", "visit_steps": 8})
    edgeblocks.train(out=tmp_path / "streamed", **wanted)
    with checked_shapes():
        edgeblocks.train(out=tmp_path / "checkpointed", **{**wanted, "checkpointing": True})
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        edgeblocks.train(out=tmp_path / "resumed", listener=StopAfter(3 * blocks + 2), **wanted)
    assert 0 < sum(edgeblocks.resume(tmp_path / "resumed").summary["resumed_from"]) < 8 * blocks
    assert len(block_tensors(tmp_path / "resident", blocks)) > 10
    for name in ("streamed", "resumed", "checkpointed"):
        assert_same_bits(tmp_path / "resident", tmp_path / name, blocks)


def test_accumulation_gives_the_same_weights_up_to_rounding(tmp_path):
    """Four micro-batches of 4 train like one of 16: only the order of sums differs."""
    for micro_batch in (16, 4):
        edgeblocks.train(
            out=tmp_path / str(micro_batch),
            steps=6,
            mem_budget="4GB",
            micro_batch=micro_batch,
            optimizer="adamw",
            **SMALL,
        )
    one, two = block_tensors(tmp_path / "16"), block_tensors(tmp_path / "4")
    for name in one:
        if name[1].startswith("weights."):
            assert abs(one[name] - two[name]).max() < 2e-4, name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(resident, tmp_path, number):
    """Stopped by Ctrl-C or kill -9 in the middle and resumed, the run ends with the same bits.

    (SIGTERM stops runs of every family above.)
    """
    out = tmp_path / "run"
    settings = {**SMALL, "visit_steps": VISIT_STEPS, "tier": "disk"}
    arguments = ["train", "--steps", STEPS, "--mem-budget", "4GB", "--out", out, *flags(settings)]
    command = [str(Path(sys.executable).with_name("edgeblocks")), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2 * VISIT_STEPS):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, output
        assert f"edgeblocks train --resume {out}" in output
    assert not (out / "summary.json").exists()
    resumed = invoke("train", "--resume", out, "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert sum(json.loads(resumed.stdout)["resumed_from"]) < 3 * STEPS
    assert_same_bits(resident, out)
    seen = [(record["block"], record["step"]) for record in map(json.loads, metrics.read_text().splitlines())]
    assert sorted(seen) == [(block, step) for block in range(3) for step in range(1, STEPS + 1)]


def test_a_stopped_run_says_how_to_go_on(tmp_path):
    """The API raises InterruptedRunError with the command when a signal arrives during training."""
    with pytest.raises(InterruptedRunError, match=r"stopped by SIGTERM; saved at steps 3, 0, 0 of 10.*--resume"):
        edgeblocks.train(out=tmp_path / "run", steps=10, mem_budget="4GB", listener=StopAfter(3), **SMALL)
