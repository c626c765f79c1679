"""`--resume RUN --steps MORE`: a run that makes more steps than it was begun with."""

import json
import shutil

import pytest
import yaml
from support.commands import assert_refused, invoke
from support.equality import SMALL, StopAfter, assert_same_bits

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**SMALL, "width": 16, "depth": 4, "blocks": 2, "batch": 4, "steps": 4, "warmup": 2, "mem_budget": "4GB"}
TINY |= {"learning_rate": 0.01, "visit_steps": 2}


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module", params=["diffusion", "exact"])
def run(request, tmp_path_factory):
    """A finished run of four steps."""
    out = tmp_path_factory.mktemp("prolonged") / "run"
    return edgeblocks.train(out=out, method=request.param, clip=1e9, **TINY)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run.path, tmp_path / "copy")


def rates(path):
    """Of block 0, by step."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["learning_rate"] for record in records if record["block"] == 0}


def test_it_makes_them_with_a_new_cosine_and_everything_says_so(copy):
    """The rate rises from where it is over the warm-up and falls to zero; plan, summary and settings agree."""
    notes = Notes()
    run = edgeblocks.resume(copy, steps=9, listener=notes)
    found = rates(copy)
    assert set(found) == set(range(1, 10))
    assert found[4] < found[5] < found[6] == 0.01 and found[6] >= found[7] > found[8] > found[9] > 0
    said = [text for text in notes.texts if text.startswith("prolonged")]
    assert said == [
        "prolonged from 4 to 9 steps: the learning rate is 0.005 now, rises over 2 steps to 0.01 and falls to zero "
        "along a new cosine"
    ]
    assert run.summary["steps"] == 9 and run.summary["resumed_from"] == [4, 4]
    assert yaml.safe_load((copy / "config.yaml").read_text())["steps"] == 9
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["prolonged"] == [{"steps_before": 4, "began_at": [4, 4]}]
    told = json.loads(invoke("info", copy, "--json").stdout)
    assert told["finished"] and told["steps"] == [9, 9] and told["prolonged_from"] == [4]
    assert json.loads((copy / "plan.json").read_text())["layers_per_block"] == [2, 2]


def test_an_interruption_changes_no_bit(copy, tmp_path):
    """Prolonged twice; stopped in the middle of the second time, or never."""
    whole = shutil.copytree(copy, tmp_path / "whole")
    for path in (whole, copy):
        edgeblocks.resume(path, steps=6)
    edgeblocks.resume(whole, steps=12)
    blocks = 2 if edgeblocks.load(copy).directory.method.name == "diffusion" else 1
    with pytest.raises(InterruptedRunError, match="of 12"):
        edgeblocks.resume(copy, steps=12, listener=StopAfter(9 * blocks))
    assert not (copy / "summary.json").exists()
    edgeblocks.resume(copy)
    assert_same_bits(whole, copy, blocks=2)
    assert rates(whole) == rates(copy)


def test_an_unfinished_run_is_prolonged_from_each_blocks_own_step(tmp_path):
    """A block that has not begun has one cosine over all steps."""
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "run", listener=StopAfter(1), **{**TINY, "visit_steps": 4})
    run = edgeblocks.resume(tmp_path / "run", steps=8)
    assert run.directory.stretches(0) == [(0, 4), (1, 8)] and run.directory.stretches(1) == [(0, 4), (0, 8)]
    assert run.summary["steps"] == 8 and edgeblocks.load(run.path).directory.stretches(1) == [(0, 4), (0, 8)]


def test_a_process_that_is_killed_before_the_settings_are_written_changes_nothing(copy):
    """The manifest has the prolongation already: it is not in force, and the run is finished as before."""
    run = edgeblocks.load(copy).directory
    before = run.stretches(0)
    from dataclasses import replace

    from edgeblocks.runs.create import seal_run
    from edgeblocks.runs.schema import Prolongation

    seal_run(replace(run, prolonged=(Prolongation(steps_before=4, began_at=[4, 4]),)))
    assert edgeblocks.load(copy).directory.stretches(0) == before == [(0, 4)]
    edgeblocks.resume(copy, steps=6)
    assert edgeblocks.load(copy).directory.stretches(0) == [(0, 4), (4, 6)]


def test_fewer_steps_are_refused_with_the_numbers(copy):
    """As many are no prolongation; nothing is changed."""
    before = {path: path.read_bytes() for path in copy.glob("*.json")}
    refused = invoke("train", "--resume", copy, "--steps", "3")
    assert_refused(refused, 2, r"--steps 3: .* has made 4 of its 4 steps, .* give more than 4")
    with pytest.raises(ConfigError, match="steps"):
        edgeblocks.resume(copy, steps=0)
    assert invoke("train", "--resume", copy, "--steps", "4").exit_code == 0
    assert {path: path.read_bytes() for path in copy.glob("*.json")} == before
