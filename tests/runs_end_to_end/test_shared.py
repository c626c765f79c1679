"""Blocks that begin as one denoiser: the same bits however they are trained, one schedule, a network on the way."""

import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.commands import assert_refused, invoke
from support.equality import StopAfter, assert_same_bits

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.optim.schedule import learning_rate_at
from edgeblocks.report.facts import read_facts
from edgeblocks.report.run_page import run_page
from edgeblocks.runs.create import create_blocks
from edgeblocks.runs.shared import is_split, shared_run, split

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"data": "digits", "depth": 6, "width": 16, "heads": 2, "batch": 8, "blocks": 3, "steps": 10, "shared": 0.7}
WANTED |= {"mem_budget": "4GB", "sample_grids": 0, "hold_out": 0.005, "warmup": 4, "visit_steps": 4}
SHARED, ALL = 3 * 7, 3 * 10
"""Steps of the one denoiser, and of both phases."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped, all blocks in memory."""
    return edgeblocks.train(out=tmp_path_factory.mktemp("shared") / "run", tier="ram", **WANTED)


@pytest.mark.parametrize("stop", [10, SHARED, SHARED + 5], ids=["while they are one", "at the split", "after it"])
def test_streamed_stopped_and_resumed_it_gives_the_same_bits(whole, tmp_path, stop):
    """Stopped in either phase, with blocks on disk: all tensors of all blocks, and of what they began as."""
    with pytest.raises(InterruptedRunError, match=re.escape(f"train --resume {tmp_path / 'run'}")):
        edgeblocks.train(out=tmp_path / "run", tier="disk", listener=StopAfter(stop), **WANTED)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(whole.path, again.path, blocks=3)
    assert_same_bits(whole.path / "shared", again.path / "shared", blocks=1)
    assert again.summary["metrics"]["validation"] == whole.summary["metrics"]["validation"]


def test_one_schedule_goes_over_both_phases(whole):
    """A step of each block counts as one of the shared denoiser's for each block; the rate goes on where it was."""
    first = [record["learning_rate"] for record in edgeblocks.load(whole.path / "shared").directory.metrics()]
    assert first == [learning_rate_at(step, steps=ALL, warmup=4, peak=1e-3) for step in range(SHARED)]
    own = [record["learning_rate"] for record in whole.directory.metrics() if record["block"] == 1]
    assert own == [learning_rate_at(step, steps=10, warmup=4, peak=1e-3) for step in range(7, 10)]
    assert whole.directory.saved_steps(whole.directory.store()) == [10, 10, 10]


def test_blocks_begin_with_all_that_the_shared_denoiser_has(whole, tmp_path):
    """Weights, average and moments; a block that is made again begins as it, too, and comes to the same bits."""
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "run", listener=StopAfter(SHARED + 5), **WANTED)
    run = edgeblocks.load(tmp_path / "run").directory
    create_blocks(run, only=[1])
    assert not is_split(run)
    assert split(run, shared_run(run))[1] == 7
    source, block = load_file(run.path / "shared/blocks/block_000.safetensors"), load_file(run.store().path(1))
    assert source.keys() == block.keys() and any(name.startswith("optimizer.") for name in block)
    for name, value in source.items():
        np.testing.assert_array_equal(block[name], value, err_msg=name)
    again = edgeblocks.resume(tmp_path / "run", reinit_blocks=[2])
    assert_same_bits(whole.path, again.path, blocks=3)


def test_while_they_are_one_the_run_is_that_of_one_denoiser(tmp_path):
    """It samples, is evaluated and exported as a network of one block; it cannot be prolonged yet."""
    with pytest.raises(InterruptedRunError, match=f"step 9 of the denoiser that all blocks begin as, of {SHARED}"):
        edgeblocks.train(out=tmp_path / "run", listener=StopAfter(9), **WANTED)
    one = edgeblocks.load(tmp_path / "run")
    assert one.path == tmp_path / "run/shared" and one.directory.layers == (2,)
    assert f"9 of {SHARED} steps" in invoke("info", tmp_path / "run").stdout
    assert one.sample(n=2, steps=4).shape == (2, 8, 8, 1)
    assert one.evaluate(samples=2)["blocks"] == 1
    with pytest.raises(ConfigError, match="still one denoiser"):
        edgeblocks.resume(tmp_path / "run", steps=20)


@pytest.mark.parametrize("family", ["vit", "mdlm", "ar", "looped"])
def test_every_family_begins_so(tmp_path, family):
    """Each has a network of a block's depth that learns all noise levels."""
    wanted = {**WANTED, "family": family, "depth": 4, "blocks": 2, "steps": 4}
    if family != "vit":
        wanted |= {"data": "moby-dick", "length": 16, "batch": 2, "hold_out": 0.00005}
    run = edgeblocks.train(out=tmp_path / "run", **wanted)
    one, other = (load_file(run.directory.store().path(block)) for block in range(2))
    assert any((one[name] != other[name]).any() for name in one)
    assert edgeblocks.load(tmp_path / "run/shared").summary["steps"] == 2 * 3


def test_quality_and_bytes_written_are_of_both_phases(tmp_path):
    """Figures of quality stand at the steps of a block; bytes written are counted on from the first phase."""
    run = edgeblocks.train(out=tmp_path / "run", **{**WANTED, "evaluations": 5})
    assert [one.step for one in run.directory.quality()] == [3, 6, 7, 8, 10]
    one = edgeblocks.load(tmp_path / "run/shared")
    assert (
        run.summary["disk_bytes_written"] > one.summary["disk_bytes_written"] > 3 * run.directory.store().file_bytes(0)
    )
    seconds = [one.seconds for one in run.directory.quality()]
    assert seconds == sorted(seconds)


def test_the_report_and_info_say_how_blocks_began(whole):
    """The page names the first phase and its own report; both directories are told apart."""
    remark = "The blocks began as one denoiser of 2 layers"
    assert remark in run_page(read_facts(whole.path)) and "begin as." in run_page(read_facts(whole.path / "shared"))
    assert "begun_as_one" in invoke("info", whole.path).stdout
    assert f"the 3 blocks of {whole.path}" in invoke("info", whole.path / "shared").stdout.replace("\n", "")


def test_what_cannot_begin_as_one_is_refused(tmp_path):
    """One network that is trained end to end, a file to begin with, blocks of unequal depth; each says what to do."""
    small = ["--set", "depth=6", "--set", "width=16", "--set", "heads=2", "--mem-budget", "4GB", "--set", "shared=0.5"]
    assert_refused(invoke("plan", *small, "--method", "exact"), 2, "shared=0.5 is of blocks that are trained alone")
    torch.save({}, tmp_path / "a.pt")
    assert_refused(invoke("plan", *small, "--init", tmp_path / "a.pt"), 2, "leave one out")
    assert_refused(invoke("plan", *small, "--blocks", "4"), 2, "use 2 or 3 or 6 blocks")
    planned = invoke("plan", *small, "--blocks", "3", "--steps", "10")
    assert "begun as one: one block's layers learn all noise levels for 15 steps" in planned.stdout, planned.output


def test_unless_it_is_said_otherwise_blocks_begin_as_one(tmp_path):
    """In a run of 100 steps and more; what was decided stands in its settings, which another run can begin with."""
    small = ["--set", "depth=4", "--set", "width=16", "--set", "heads=2", "--mem-budget", "4GB", "--blocks", "2"]
    for steps, shared in ((100, 0.8), (99, 0.0)):
        planned = edgeblocks.plan(**{**WANTED, "shared": "auto", "steps": steps})
        assert planned.settings.run.shared == shared and planned.plan.begins_as_one == (shared > 0)
    (tmp_path / "one.yaml").write_text(planned.settings.to_yaml())
    assert invoke("plan", "--config", tmp_path / "one.yaml", "--method", "exact", "--blocks", "2").exit_code == 0
    for wrong in ("1", "half", "-0.1", "yes"):
        assert_refused(invoke("plan", *small, "--set", f"shared={wrong}"), 2, "from 0 to less than 1, or auto")
