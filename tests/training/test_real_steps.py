"""What a run's first steps took is held against its plan, kept for the run, and known to the next plan."""

import json
from dataclasses import replace

import pytest
from support.equality import StopAfter

import edgeblocks
from edgeblocks import prepare
from edgeblocks.errors import InterruptedRunError
from edgeblocks.planning.plan_text import banner
from edgeblocks.planning.plans import Correction
from edgeblocks.progress import Progress, Silent
from edgeblocks.training import real_steps

SETTINGS = {"width": 16, "heads": 2, "depth": 3, "batch": 4, "steps": 6, "hold_out": 0.005, "sample_grids": 0}


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Nothing is known of any network, and eight steps say how long they take."""
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(real_steps, "WARM_STEPS", 1)
    monkeypatch.setattr(real_steps, "FEWEST_STEPS", 8)


@pytest.fixture
def far_too_fast(monkeypatch):
    """The plan says that steps take a millionth of what the model says."""

    def corrected(settings, data, costs, machine, target, *, budget_bytes):
        return replace(machine, correction=Correction(steps=1e-6, least=0.8, most=1.25, origin="block"))

    monkeypatch.setattr(prepare, "with_timed_block", corrected)


def test_steps_outside_the_plans_range_are_told_once_and_the_next_plan_has_their_time(tmp_path, kept, far_too_fast):
    """The note has both times and the run's; plan.json keeps the measured one; the next plan says where it has it."""
    listener = Notes()
    run = edgeblocks.train(out=tmp_path / "run", listener=listener, **SETTINGS)
    (told,) = [note for note in listener.notes if "where the plan said" in note]
    assert told.startswith("note: steps take ") and told.endswith(" in all")
    plan = json.loads((run.path / "plan.json").read_text())
    least, most = plan["predicted_step_range_s"]
    assert least < plan["predicted_step_s"] < most < 1e-3 * plan["measured_step_s"]
    prepared = edgeblocks.plan(**SETTINGS)
    # The kept time is of all steps that were seen, the run's own of the first eight.
    assert prepared.plan.chosen.step_s == pytest.approx(plan["measured_step_s"], rel=0.9)
    assert " (as steps took in a run on this machine), " in banner(prepared)
    assert prepared.plan.machine.correction.origin == "run"
    for path in (tmp_path / "cache").glob("steps-*"):
        path.write_text(path.read_text().replace("1", "2"))
    damaged = edgeblocks.plan(**SETTINGS)
    assert damaged.plan.machine.correction.origin == "block" and damaged.plan.chosen.step_s < 1e-3


def test_a_resumed_run_knows_what_its_steps_took(tmp_path, kept, far_too_fast):
    """It says so where it goes on, and the note does not come again."""
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "run", listener=StopAfter(12), **{**SETTINGS, "steps": 8, "visit_steps": 4})
    listener = Notes()
    edgeblocks.resume(tmp_path / "run", listener=listener)
    resuming = [note for note in listener.notes if note.startswith("resuming ")]
    assert len(resuming) == 1 and "; a step took " in resuming[0] and ", and 12 are left: about " in resuming[0]
    assert not [note for note in listener.notes if "where the plan said" in note]


def test_steps_as_planned_are_no_note(tmp_path, kept):
    """Inside the range nothing is said, and the time is kept all the same."""
    listener = Notes()
    run = edgeblocks.train(out=tmp_path / "run", listener=listener, **SETTINGS)
    assert not [note for note in listener.notes if "where the plan said" in note]
    assert json.loads((run.path / "plan.json").read_text())["measured_step_s"] > 0
    assert len(list((tmp_path / "cache").glob("steps-*"))) == 1


def test_the_time_left_has_what_loading_and_saving_took(monkeypatch):
    """Of 10 seconds, 4 were spent on moving blocks and 2 on a preview: the 30 steps to come take 24 and not 12."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    progress = Progress(steps_done=10, steps_total=40, started=now - 10, compute_s=4.0, stall_s=4.0, previews_s=2.0)
    assert progress.left_s == pytest.approx(24.0)
