"""Batches that are drawn while the device computes: each step's own, once, and none that nobody will ask for."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.equality import SMALL, assert_same_bits

import edgeblocks
from edgeblocks.errors import StorageError
from edgeblocks.training import batches as drawn
from edgeblocks.training.batches import Batches

ANSWER_S = 30


@pytest.fixture
def helper():
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool


class Drawing:
    """Draws steps' numbers and tells which were drawn."""

    def __init__(self, *, fails_at=None):
        self.steps, self.fails_at, self.began = [], fails_at, {step: threading.Event() for step in range(5)}

    def __call__(self, step):
        self.steps.append(step)
        self.began[step].set()
        if step == self.fails_at:
            raise StorageError(f"step {step} cannot be read")
        return {"step": torch.tensor(step)}


def test_the_next_batch_is_drawn_while_nobody_waits(helper):
    """After step 0 was given, step 1 is drawn unasked; a step that is made again has its batch still."""
    drawing = Drawing()
    batches = Batches(drawing, last=3, helper=helper)
    assert batches.of(0)["step"] == 0
    assert drawing.began[1].wait(ANSWER_S)
    assert [int(batches.of(step)["step"]) for step in (0, 1, 1, 2, 2)] == [0, 1, 1, 2, 2]
    batches.close()
    assert drawing.steps == [0, 1, 2]


def test_without_a_helper_nothing_is_drawn_early():
    """Each batch is drawn when it is asked for, by the caller."""
    drawing = Drawing()
    batches = Batches(drawing, last=3, helper=None)
    assert int(batches.of(0)["step"]) == 0
    assert drawing.steps == [0]
    batches.close()


def test_what_fails_is_raised_at_its_step(helper):
    """The step before is made; closing asks no more."""
    batches = Batches(Drawing(fails_at=1), last=3, helper=helper)
    batches.of(0)
    with pytest.raises(StorageError, match="step 1 cannot be read"):
        batches.of(1)
    batches.close()


@pytest.mark.parametrize("method", ["diffusion", "exact"])
def test_training_with_batches_drawn_ahead_makes_the_same_bits(tmp_path, monkeypatch, method):
    """Three blocks, visits of three steps: the files are those of a run that draws each batch when it needs it.

    The thread that drew is gone afterwards.
    """
    settings = {**SMALL, "steps": 8, "visit_steps": 3, "mem_budget": "4GB", "method": method}
    usual = edgeblocks.train(out=tmp_path / "usual", **settings)
    began = []
    monkeypatch.setattr(drawn, "draws_ahead", lambda device: began.append(device) or True)
    ahead = edgeblocks.train(out=tmp_path / "ahead", **settings)
    assert began
    assert_same_bits(usual.path, ahead.path)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("edgeblocks-data")]
