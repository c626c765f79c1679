"""Clipping by the norm of the whole network's gradient, of which one stage is in memory at a time."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS, SLOTS, plain_training, trained, whole_weights, with_slots
from support.made_up_plans import MACHINE, REQUEST, costs

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError, OutOfBudgetError, WriteLimitError
from edgeblocks.methods import EXACT
from edgeblocks.planning.planner import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

MADE = {"blocks": 4, "tier": "ram", "optimizer": "adamw", "clip_by": "network", "clip": 0.05, "steps": 8}
CASES = {"dit": {}, "vit": {"train_blocks": "1,3"}, "mdlm": {}}
STREAMED = {"tier": "disk", "visit_steps": 3}


def made_of(kind):
    return {**MADE, **CASES[kind]}


@pytest.fixture(scope="module", params=["dit", "vit", pytest.param("mdlm", marks=pytest.mark.thorough)])
def resident(request, tmp_path_factory):
    """A run of four stages that are all in memory; of `vit` two are trained."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, trained(request.param, out, **made_of(request.param))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A run in which all four stages are trained, saved at the end."""
    return trained("vit", tmp_path_factory.mktemp("vit") / "run", **MADE)


def test_it_is_plain_pytorch_with_clip_grad_norm(resident):
    """torch.nn.utils.clip_grad_norm_ over all parameters and torch.optim.AdamW: losses and weights, bit for bit.

    Every step is clipped, or the test would say nothing.
    """
    _, run = resident
    named, losses = plain_training(run, steps=8)
    records = list(run.directory.metrics())
    assert [record["loss"] for record in records] == losses
    assert all(record["gradient_norm"] > MADE["clip"] for record in records)
    weights = whole_weights(run)
    for name, parameter in named.items():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy(), err_msg=name)


def test_streamed_stages_give_the_bits_of_resident_ones(resident, tmp_path):
    """With checkpoints every three steps, at which updates that wait are made, and one after an interruption.

    One, two or three stages are in memory: with one family all numbers, with each other one of them (`SLOTS`).
    """
    kind, run = resident
    with pytest.raises(InterruptedRunError):
        trained(kind, tmp_path / "begun", listener=StopAfter(1), **{**made_of(kind), **STREAMED})
    for slots in SLOTS[kind]:
        again = edgeblocks.resume(with_slots(tmp_path / "begun", run, slots))
        assert_same_bits(run.path, again.path, blocks=4)
        assert again.summary["metrics"]["validation"] == run.summary["metrics"]["validation"]
        assert not list((again.path / "blocks").glob(".*"))


def after_backward_passes(monkeypatch, count, do):
    """Have something happen in the middle of a step: when so many micro-batches have gone backward."""
    usual, calls = torch.Tensor.backward, []

    def backward(tensor, *args, **kwargs):
        calls.append(tensor)
        if len(calls) > count:
            do(len(calls))
        return usual(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("passes", [35, 37, 40])
def test_a_run_that_is_killed_in_the_middle_of_a_step_resumes_bit_for_bit(vit, tmp_path, monkeypatch, passes):
    """kill -9 in the fifth step, four stages and two micro-batches each, when the last checkpoint was the third."""
    child = os.fork()
    if child == 0:
        try:
            after_backward_passes(monkeypatch, passes, lambda _: os.kill(os.getpid(), signal.SIGKILL))
            trained("vit", tmp_path / "run", **{**MADE, **STREAMED})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    store = edgeblocks.load(tmp_path / "run").directory.store()
    assert [store.header(stage).step for stage in range(4)] == [3] * 4
    edgeblocks.resume(tmp_path / "run")
    assert_same_bits(vit.path, tmp_path / "run", blocks=4)


def refuse(_):
    raise MemoryError


def test_memory_that_is_refused_ends_the_run_saved_at_the_step_before(vit, tmp_path, monkeypatch):
    """No stage has changed when the way back begins, so not one whole step is lost; what waits is made and saved."""
    with monkeypatch.context() as patched:
        after_backward_passes(patched, 36, refuse)
        with pytest.raises(OutOfBudgetError):
            trained("vit", tmp_path / "run", **MADE)
    store = edgeblocks.load(tmp_path / "run").directory.store()
    assert [store.header(stage).step for stage in range(4)] == [4] * 4
    edgeblocks.resume(tmp_path / "run")
    assert_same_bits(vit.path, tmp_path / "run", blocks=4)


def test_memory_that_is_refused_once_makes_steps_smaller(vit, tmp_path, monkeypatch):
    """The same mathematics: the weights differ by the order of sums only."""
    with monkeypatch.context() as patched:
        after_backward_passes(patched, 36, lambda calls: refuse(calls) if calls == 37 else None)
        run = trained("vit", tmp_path / "run", **MADE)
    assert [change["micro_batch"] for change in run.summary["memory_changes"]] == [4]
    expected = whole_weights(vit)
    for name, value in whole_weights(run).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, err_msg=name)


def test_gradients_that_wait_are_counted_as_written(vit, tmp_path):
    """Four bytes a parameter and step; and the limit of writes holds."""
    store = vit.directory.store()
    files = sum(store.path(stage).stat().st_size for stage in range(4))
    gradients = 8 * 4 * vit.directory.plan.parameters
    assert 0 <= vit.summary["disk_bytes_written"] - gradients - 2 * files < 4000  # headers tell steps of other lengths
    with pytest.raises(WriteLimitError, match="Everything is saved"):
        trained("vit", tmp_path / "run", **{**MADE, "steps": 200}, max_disk_writes="8MB")
    store = edgeblocks.load(tmp_path / "run").directory.store()
    headers = [store.header(stage) for stage in range(4)]
    assert len({header.step for header in headers}) == 1 and 0 < headers[0].step < 200
    assert 4e6 < max(header.run_bytes_written for header in headers) <= 8e6


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_plan_counts_what_waits(tier):
    """On disk, in what is written, and in time."""
    request = replace(REQUEST, method=EXACT, blocks=4, tier=tier, budget_bytes=4_000_000_000, visit_steps=100)
    own, whole = (make_plan(costs(), MACHINE, replace(request, clip_by=one)).chosen for one in ("stage", "network"))
    largest = max(costs().parameters(3, ends) for ends in ("first", "middle", "last"))
    waiting_bytes = 4 * largest * 4
    assert own.slots == whole.slots
    assert whole.bytes_written - own.bytes_written >= waiting_bytes * request.steps
    assert whole.disk_bytes - own.disk_bytes >= waiting_bytes
    assert whole.streaming_s > own.streaming_s
    assert whole.predicted_peak_bytes == own.predicted_peak_bytes


def test_blocks_that_are_trained_alone_have_no_common_norm():
    with pytest.raises(ConfigError, match=r"clip_by=network .* what is trained is clipped by its own"):
        edgeblocks.plan(**KINDS["vit"], clip_by="network", mem_budget="4GB")
