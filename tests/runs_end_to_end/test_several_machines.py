"""Blocks of one run on several machines, in copies that are gathered: the bits of one machine, or a refusal."""

import json
import platform
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.commands import TINY, assert_refused, invoke
from support.equality import StopAfter, assert_same_bits

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError, RunError
from edgeblocks.report.facts import read_facts
from edgeblocks.report.run_page import run_page

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"data": "digits", "depth": 6, "width": 16, "heads": 2, "batch": 8, "blocks": 3, "steps": 10, "shared": 0}
WANTED |= {"mem_budget": "4GB", "sample_grids": 0, "hold_out": 0.005, "warmup": 4, "visit_steps": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one machine trains."""
    return edgeblocks.train(out=tmp_path_factory.mktemp("one") / "run", **WANTED)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was begun and copied twice; each of the three machines, `pc0` to `pc2`, has trained a block."""
    folder = tmp_path_factory.mktemp("several")
    begun = edgeblocks.train(out=folder / "run", blocks_here=[], **WANTED)
    assert begun.left == {0: 10, 1: 10, 2: 10} and begun.summary is None
    for copy in ("copy1", "copy2"):
        shutil.copytree(folder / "run", folder / copy)
    changes = {"run": {}, "copy1": {"mem_budget": "3GB"}, "copy2": {"ram_budget": None}}
    with pytest.MonkeyPatch.context() as patch:
        for block, (name, changed) in enumerate(changes.items()):
            patch.setattr(platform, "node", lambda block=block: f"pc{block}")
            run = edgeblocks.resume(folder / name, blocks_here=[block], **changed)
            assert run.summary is None and block not in run.left and len(run.left) == 2
    return folder


@pytest.fixture
def several(trained, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "several"))


def files_of(folder):
    """What is in a run directory, but its lock."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rewrite(run, block, change):
    """Write a block again with its weights changed, and a sound checksum."""
    store = edgeblocks.load(run).directory.store()
    buffer = store.buffer()
    step = store.read(block, buffer)
    change(buffer.flat("weights"))
    store.write(block, buffer, step)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def test_three_machines_give_the_bits_and_the_losses_of_one(several, whole):
    """Weights, average, moments, all figures of the evaluation; times are added, and who trained what is told."""
    found = edgeblocks.gather(several / "run", [several / "copy1", str(several / "copy2")])
    assert [(one["block"], one["step_before"], one["step"]) for one in found["taken"]] == [(1, 0, 10), (2, 0, 10)]
    assert found["left"] == {} and found["steps"] == [10, 10, 10]
    run = edgeblocks.resume(several / "run")
    assert_same_bits(whole.path, run.path)
    assert run.summary["metrics"] == whole.summary["metrics"]
    assert None not in run.summary["metrics"]["train_loss_by_block"]
    spans = run.summary["trained_on"]
    assert [(one["block"], one["machine"], one["first_step"], one["last_step"]) for one in spans] == [
        (block, f"pc{block}", 0, 10) for block in range(3)
    ]
    assert run.summary["trained_s"] == pytest.approx(sum(one["seconds"] for one in spans), abs=0.01)
    records, others = (list(one.directory.records()) for one in (run, whole))
    ours, theirs = (
        [(one.block, one.step, one.loss, one.smoothed_loss, one.learning_rate) for one in found]
        for found in (records, others)
    )
    assert ours == sorted(theirs)
    assert all(one.seconds <= other.seconds for one, other in pairwise(records))
    assert "steps 0 to 10 on pc2" in invoke("plan", "--resume", run.path).stdout
    assert "0 to 10 on pc1" in invoke("info", run.path).stdout
    assert "pc1" in run_page(read_facts(run.path))


def test_a_block_goes_from_machine_to_machine(several, whole):
    """Stopped in one copy, gathered, gone on with in another: the same bits, and the steps of each are told."""
    shutil.rmtree(several / "copy1")
    shutil.copytree(several / "run", several / "copy1")  # at block 1 nothing is trained here
    with pytest.raises(InterruptedRunError, match="--blocks-here 1"):
        edgeblocks.resume(several / "copy1", blocks_here=[1], listener=StopAfter(5))
    found = edgeblocks.gather(several / "copy2", [several / "run", several / "copy1"])
    assert found["steps"] == [10, 5, 10] and found["left"] == {1: 5}
    done = edgeblocks.resume(several / "copy2")
    assert_same_bits(whole.path, done.path)
    assert done.summary["metrics"] == whole.summary["metrics"]


def test_what_is_no_copy_of_the_run_is_refused(several, whole, tmp_path):
    """Another run with the same settings, other steps, the run itself; nothing is changed."""
    before = files_of(several / "run")
    for copy, kind, message in (
        (whole.path, RunError, "copy of another run"),
        (several / "run", ConfigError, "the run itself"),
        (tmp_path / "nowhere", RunError, "no run directory"),
    ):
        with pytest.raises(kind, match=message):
            edgeblocks.gather(several / "run", [several / "copy1", copy])
    edgeblocks.resume(several / "copy1", steps=12, blocks_here=[])
    with pytest.raises(RunError, match=r"steps 12, here 10"):
        edgeblocks.gather(several / "run", [several / "copy1"])
    (several / "copy2/blocks/block_001.safetensors").unlink()
    with pytest.raises(RunError, match="block 1 is missing"):
        edgeblocks.gather(several / "run", [several / "copy2"])
    assert files_of(several / "run") == before


def test_a_damaged_block_is_named_and_nothing_is_replaced(several):
    """Found on the way, after a sound block was copied already; nothing of that one stays."""
    before = files_of(several / "run")
    damage(several / "copy2/blocks/block_002.safetensors")
    refused = invoke("gather", several / "run", several / "copy1", several / "copy2")
    assert_refused(refused, 1, r"block 2 is damaged.*copy2")
    assert files_of(several / "run") == before
    assert edgeblocks.gather(several / "run", [several / "copy1"])["steps"] == [10, 10, 0]


def test_a_block_that_was_trained_twice_must_have_the_same_bits(several):
    """The same ones are taken quietly, others are refused with both places; the run's own counts as a copy."""
    shutil.copytree(several / "copy1", several / "again")
    rewrite(several / "again", 1, lambda weights: weights.add_(0.5))
    before = files_of(several / "run")
    with pytest.raises(RunError, match=r"block 1 is at step 10 in .*copy1 and in .*again, with other bits"):
        edgeblocks.gather(several / "run", [several / "copy1", several / "again"])
    assert files_of(several / "run") == before
    shutil.copytree(several / "copy1", several / "equal")
    found = edgeblocks.gather(several / "run", [several / "copy1", several / "equal"])
    assert [taken["copy"] for taken in found["taken"]] == [str(several / "copy1")]
    assert edgeblocks.gather(several / "run", [several / "copy1"])["taken"] == []
    with pytest.raises(RunError, match=r"in .*run and in .*again, with other bits"):
        edgeblocks.gather(several / "run", [several / "again"])


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_stopped_while_it_gathers_nothing_is_lost(several, whole, monkeypatch, stopped_at):
    """Before the first block has its name, or between the two: gathering again completes it, its records too."""
    replace, seen = Path.replace, []

    def stopping(path, target):
        if path.name.endswith(".arrived.tmp"):
            seen.append(path)
            if len(seen) == stopped_at:
                raise KeyboardInterrupt
        return replace(path, target)

    copies = [several / "copy1", several / "copy2"]
    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        edgeblocks.gather(several / "run", copies)
    monkeypatch.undo()
    run = edgeblocks.load(several / "run")
    assert len(run.left) == 3 - stopped_at and run.left.keys() <= {1, 2}
    assert len(edgeblocks.gather(run.path, copies)["taken"]) == 3 - stopped_at
    assert not list(run.path.rglob("*.tmp"))
    assert_same_bits(whole.path, run.path)
    assert {span.block for span in _spans(run)} == {0, 1, 2}


def _spans(run):
    from edgeblocks.runs.history import trained_on

    return trained_on(run.directory)


def test_blocks_that_begin_as_one_are_parted_before_they_are_spread(tmp_path):
    """One machine trains what they begin as; the rest goes as without it. A phase that was trained twice is refused."""
    wanted = {**WANTED, "shared": 0.5, "steps": 6, "blocks": 2, "depth": 2}
    one = edgeblocks.train(out=tmp_path / "one", **wanted)
    with pytest.raises(InterruptedRunError, match="--blocks-here none"):
        edgeblocks.train(out=tmp_path / "run", listener=StopAfter(2), blocks_here=(), **wanted)
    standing = json.loads(invoke("plan", "--resume", tmp_path / "run", "--json").stdout)
    assert standing["begins"] == [2, 6] and standing["left"] == [0, 1]
    early = Path(shutil.copytree(tmp_path / "run", tmp_path / "early"))
    begun = edgeblocks.resume(tmp_path / "run", blocks_here=[])
    assert begun.left == {0: 3, 1: 3} and (begun.path / "shared/summary.json").exists()
    copy = Path(shutil.copytree(begun.path, tmp_path / "copy"))
    edgeblocks.resume(begun.path, blocks_here=[0])
    edgeblocks.resume(copy, blocks_here=[1])

    # A copy from before: it takes the first phase as well as the blocks.
    found = edgeblocks.gather(early, [begun.path, copy])
    assert [taken["block"] for taken in found["taken"]] == [None, 0, 1] and found["left"] == {}
    done = edgeblocks.resume(early)
    assert_same_bits(one.path, done.path, blocks=2)
    assert_same_bits(one.path / "shared", done.path / "shared", blocks=1)
    assert done.summary["metrics"] == one.summary["metrics"]
    assert done.summary["trained_s"] > sum(span["seconds"] for span in done.summary["trained_on"])

    # One without it takes its whole folder; one that has trained it otherwise is refused.
    bare = Path(shutil.copytree(copy, tmp_path / "bare", ignore=shutil.ignore_patterns("shared")))
    edgeblocks.gather(bare, [begun.path])
    assert_same_bits(one.path / "shared", bare / "shared", blocks=1)
    rewrite(copy / "shared", 0, lambda weights: weights.add_(0.5))
    with pytest.raises(RunError, match=r"denoiser that all blocks begin as is at step 6 .* with other bits"):
        edgeblocks.gather(begun.path, [copy])


def test_a_copy_with_a_work_directory_and_moved_data(tmp_path):
    """Its blocks come home when those that are trained there are done; stopped before, they are asked for."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 256, (64, 8, 8), dtype=np.uint8))
    wanted = {**WANTED, "data": str(tmp_path / "a.npz"), "blocks": 2, "depth": 2, "hold_out": 0.1, "steps": 5}
    (tmp_path / "work").mkdir()
    wanted["work_dir"] = str(tmp_path / "work")
    run = edgeblocks.train(out=tmp_path / "run", blocks_here=[], **wanted)
    assert not list((tmp_path / "work").iterdir()) and (run.path / "blocks").is_dir()
    copy = Path(shutil.copytree(run.path, tmp_path / "copy"))
    moved = Path(shutil.move(tmp_path / "a.npz", tmp_path / "b.npz"))
    edgeblocks.resume(copy, blocks_here=[1], data=str(moved))
    away = Path(shutil.move(copy / "blocks", tmp_path / "work" / f"edgeblocks-{run.directory.run_id[:12]}"))
    away.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"not in it but in the work directory"):
        edgeblocks.gather(run.path, [copy])
    (tmp_path / "elsewhere").rename(copy / "blocks")
    assert edgeblocks.gather(run.path, [copy])["left"] == {0: 5}
    done = edgeblocks.resume(run.path, data=str(moved))
    one = edgeblocks.train(out=tmp_path / "one", **{**wanted, "data": str(moved), "work_dir": None})
    assert_same_bits(one.path, done.path, blocks=2)


def test_the_command_says_what_is_left_and_what_to_do(tmp_path):
    """Where others are left it ends with 0, without an evaluation; also with --json. gather tells what came."""
    small = [*TINY, "--mem-budget", "4GB", "--blocks", "3"]
    begun = invoke("train", *small, "--out", tmp_path / "run", "--blocks-here", "none")
    assert begun.exit_code == 0 and "block 2: step 0 of 2" in begun.stdout, begun.output
    assert "evaluating" not in begun.stderr and not (tmp_path / "run/summary.json").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    here = invoke("train", "--resume", tmp_path / "copy", "--blocks-here", "0, 2", "--json")
    told = json.loads(here.stdout)
    assert here.exit_code == 0 and told["left"] == [1] and told["finished"] is False
    assert [one["step"] for one in told["blocks"]] == [2, 0, 2]
    assert f"--resume {tmp_path / 'copy'}" in told["next"][0]
    again = invoke("train", "--resume", tmp_path / "copy", "--blocks-here", "2")
    assert again.exit_code == 0 and "resuming" not in again.stderr
    gathered = invoke("gather", tmp_path / "run", tmp_path / "copy", tmp_path / "copy")
    assert re.search(r"block 0: step 0 -> 2, from .*copy\nblock 2", gathered.stdout), gathered.output
    assert json.loads(invoke("gather", tmp_path / "run", tmp_path / "copy", "--json").stdout)["taken"] == []
    last = invoke("train", "--resume", tmp_path / "run", "--blocks-here", "1", "--json")
    assert json.loads(last.stdout)["metrics"]["validation_loss"] > 0  # it was the last one: the run is finished
    assert json.loads(invoke("plan", "--resume", tmp_path / "run", "--json").stdout)["finished"] is True


def test_wrong_blocks_are_refused(several, tmp_path):
    """Stages that depend on each other, numbers that there are not, what is no number, other flags of plan."""
    small = [*TINY, "--mem-budget", "4GB", "--out", tmp_path / "new", "--blocks-here"]
    for method in ("exact", "greedy"):
        assert_refused(invoke("train", "--method", method, *small, "0"), 2, f"with --method {method} each")
    assert_refused(invoke("train", "--blocks", "3", *small, "1,3"), 2, "no block 3; the run has the blocks 0 to 2")
    assert_refused(invoke("train", *small, "first"), 2, "numbers of blocks with commas")
    assert not (tmp_path / "new").exists()
    resume = ["train", "--resume", several / "run", "--blocks-here"]
    assert_refused(invoke(*resume, "5"), 2, "no block 5; the run has the blocks 0 to 2")
    assert_refused(invoke("plan", "--resume", several / "run", "--steps", "3"), 2, "leave everything else out")
    assert_refused(invoke("train", "--resume", several / "run", "--dry-run"), 2, "plan --resume")
