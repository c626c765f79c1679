"""Callbacks of a training: what they hear, and what their errors do."""

import json
import sys
import types

import numpy as np
import pytest
from support.equality import SMALL, StopAfter, assert_same_bits
from support.pages import code_after

import edgeblocks
from edgeblocks.callbacks import Callback, Evaluated, Finished, Planned, Sampled, Step
from edgeblocks.errors import ConfigError, InterruptedRunError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**SMALL, "width": 16, "depth": 4, "blocks": 2, "batch": 4, "steps": 4, "warmup": 0, "mem_budget": "4GB"}
TINY |= {"visit_steps": 2, "sample_grids": 1, "sample_steps": 2, "evaluations": 2}


class Heard(Callback):
    """Keeps all events, and fails at one where it is told to."""

    def __init__(self, fail_at=None, error=None):
        self.events, self.closed, self._fail_at, self._error = [], 0, fail_at, error

    def planned(self, event):
        self.events.append(event)
        if isinstance(event, self._fail_at or ()):
            raise self._error

    step = evaluated = sampled = finished = planned

    def close(self):
        self.closed += 1

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.mark.parametrize("method", ["diffusion", "exact"])
def test_they_hear_everything_in_its_order(tmp_path, method):
    """As plain values, which are those of the run's own files; nothing of the training changes."""
    heard = Heard()
    run = edgeblocks.train(out=tmp_path / "run", callbacks=[heard], method=method, **TINY)
    kinds = [type(event) for event in heard.events]
    parts = 2 if method == "diffusion" else 1
    assert kinds[0] is Planned and kinds[-2:] == [Evaluated, Finished] and heard.closed == 1
    assert kinds.count(Step) == 4 * parts and kinds.count(Evaluated) == 3 and kinds.count(Sampled) == 1
    planned, *_ = heard.events
    assert planned.run == run.path and planned.settings["steps"] == 4 and planned.resumed_from is None
    assert planned.plan["budget_bytes"] == 4_000_000_000
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(event.block or 0, event.step, event.loss, event.gradient_norm) for event in heard.of(Step)] == [
        (record["block"], record["step"], record["loss"], record["gradient_norm"]) for record in records
    ]
    last = heard.of(Step)[-1]
    assert last.steps == 4 and last.steps_done == last.steps_total == 4 * parts and last.used_bytes > 10**7
    quality = [json.loads(line) for line in (run.path / "quality.jsonl").read_text().splitlines()]
    figures = heard.of(Evaluated)
    assert [(one.step, one.value) for one in figures[:2]] == [(mark["step"], mark["value"]) for mark in quality]
    assert figures[2].value == run.summary["metrics"]["validation_loss"] and figures[2].measure == "validation loss"
    (sampled,) = heard.of(Sampled)
    assert sampled.path == run.path / "samples/step_0000004.png" and sampled.path.exists()
    assert sampled.grid.dtype == np.uint8 and sampled.grid.ndim == 3
    assert heard.events[-1].summary == run.summary
    shares = run.directory.summary.shares_of_time
    assert sum(shares.values()) == pytest.approx(run.summary["seconds"], abs=0.01)
    assert shares["samples"] > 0 and shares["evaluation"] > 0


def test_resuming_says_from_where(tmp_path):
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "run", listener=StopAfter(3), callbacks=[first := Heard()], **TINY)
    assert first.closed == 1 and not first.of(Finished)
    edgeblocks.resume(tmp_path / "run", callbacks=[again := Heard()])
    assert again.events[0].resumed_from == [2, 1] and len(again.of(Step)) == 5


@pytest.mark.parametrize("kind", [Planned, Step, Evaluated, Sampled, Finished])
def test_an_error_of_theirs_is_raised_as_it_is_and_the_run_goes_on(tmp_path, kind):
    """With a note of where it came from; resumed without it, the run has the bits of one that had no callback."""
    error = KeyError("a mistake of the user's")
    whole = tmp_path.parent / "whole_of_errors"
    if not whole.exists():
        edgeblocks.train(out=whole, **TINY)
    with pytest.raises(KeyError, match="a mistake of the user's") as raised:
        edgeblocks.train(out=tmp_path / "run", callbacks=[heard := Heard(kind, error)], **TINY)
    name = f"Heard.{kind.__name__.lower()}"
    assert raised.value is error and name in raised.value.__notes__[0] and heard.closed == 1
    run = edgeblocks.resume(tmp_path / "run")
    assert run.summary["steps"] == 4
    assert_same_bits(whole, run.path, blocks=2)


def test_what_is_no_callback_is_refused_before_anything_begins(tmp_path):
    with pytest.raises(ConfigError, match=r"<built-in function print> is no edgeblocks.Callback"):
        edgeblocks.train(out=tmp_path / "run", callbacks=[print], **TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "called"), [("wandb", "WandB"), ("mlflow", "MLflow")])
def test_the_trackers_of_the_docs_are_fed(tmp_path, monkeypatch, name, called):
    """Their lines as printed, with a library of that name that keeps what it is given."""
    given = []

    class Library(types.ModuleType):
        def __init__(self, name):
            super().__init__(name)
            self.summary = {}

        def __getattr__(self, function):
            if function.startswith("_"):
                raise AttributeError(function)
            return lambda *args, **kwargs: given.append((function, args, kwargs)) or self

    monkeypatch.setitem(sys.modules, name, library := Library(name))
    lines = {}
    exec(code_after(f"test: tracking, {name}"), lines)
    edgeblocks.train(out=tmp_path / "run", callbacks=[lines[called]()], **TINY)
    functions = [function for function, _, _ in given]
    assert functions[0] in ("init", "start_run") and functions[-1] in ("finish", "end_run")
    assert sum(function in ("log", "log_metrics") for function in functions) == 8
    assert "validation loss" in library.summary or "validation_loss" in str(given)


def test_a_callback_of_the_docs_ends_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = code_after("test: tracking, own")
    small = 'width=16, heads=2, depth=4, blocks=2, batch=4, sample_grids=0, mem_budget="4GB"'
    exec(code.replace('mem_budget="2GB"', small), {})
    assert capsys.readouterr().out.startswith("block 0 has reached")
    assert edgeblocks.load("runs/stopped").directory.summary is None
