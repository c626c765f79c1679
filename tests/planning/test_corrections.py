"""The model of a step's time says what a block took here, or what a run's steps took."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.made_up_plans import GPU, MACHINE, REQUEST, costs

from edgeblocks.methods import EXACT
from edgeblocks.planning.corrections import (
    BLOCK_ERROR,
    RUN_ERROR,
    MeasuredSteps,
    TimedBlock,
    corrected_by_block,
    corrected_by_run,
)
from edgeblocks.planning.planner import make_plan
from edgeblocks.planning.plans import Correction, Cut
from edgeblocks.planning.step_times import predicted_step_s

TAKEN = MeasuredSteps(
    step_s=0.7,
    short_s=0.6,
    long_s=0.9,
    batch=64,
    blocks=3,
    micro_batch=16,
    checkpointing=False,
    optimizer="adamw8bit",
    trained=None,
)


def step_of(machine, *, layers, batch, micro_batch, request=REQUEST):
    """Predicted seconds of a step of a block of so many layers."""
    cut = Cut(
        costs=replace(costs(), num_layers=layers),
        machine=machine,
        request=replace(request, batch=batch),
        layers=(layers,),
        micro_batch=micro_batch,
        checkpointing=False,
        slots=1,
    )
    return predicted_step_s(cut)


@given(st.floats(0.5, 30.0), st.floats(0.01, 4.0), st.sampled_from([MACHINE, GPU]))
def test_two_micro_batches_tell_both_parts_of_the_model_apart(samples, passes, machine):
    """Times that a model with other factors makes give those factors back, and with them every other step's time."""
    true = replace(machine, correction=Correction(samples=samples, passes=passes), update_s_per_parameter=3e-9)
    free = replace(true, update_s_per_parameter=0.0)
    times = {count: step_of(free, layers=1, batch=count, micro_batch=count) for count in (1, 16)}
    timed = TimedBlock(num_layers=1, checkpointing=False, passes_s=times, update_s_per_parameter=3e-9, waited=0.0)
    found = corrected_by_block(machine, costs(), timed)
    assert found.correction.samples == pytest.approx(samples, rel=1e-6)
    assert found.correction.passes == pytest.approx(passes, rel=1e-6)
    shape = {"layers": 4, "batch": 64, "micro_batch": 8}
    assert step_of(found, **shape) == pytest.approx(step_of(true, **shape), rel=1e-6)


@pytest.mark.parametrize("times", [{1: 0.2, 16: 0.1}, {1: 0.2}])
def test_times_that_contradict_the_model_or_are_of_one_size_move_both_parts_alike(times):
    """One sample that took longer than sixteen is a busy moment: neither part may become negative."""
    timed = TimedBlock(num_layers=1, checkpointing=False, passes_s=times, update_s_per_parameter=0.0, waited=0.0)
    found = corrected_by_block(MACHINE, costs(), timed)
    assert found.correction.samples == found.correction.passes > 0
    most = max(times)
    assert step_of(found, layers=1, batch=most, micro_batch=most) == pytest.approx(times[most])


def test_the_range_is_wider_where_other_programs_had_the_processor():
    """They may end, or take as much again."""
    for waited in (0.0, 0.75):
        timed = TimedBlock(
            num_layers=1, checkpointing=False, passes_s={1: 0.1}, update_s_per_parameter=0.0, waited=waited
        )
        plan = make_plan(costs(), corrected_by_block(MACHINE, costs(), timed), REQUEST)
        ends = [end / plan.chosen.step_s for end in plan.step_range_s]
        assert ends == pytest.approx([(1 - waited) / BLOCK_ERROR, (1 + waited) * BLOCK_ERROR])


@pytest.mark.parametrize("request_", [REQUEST, replace(REQUEST, method=EXACT)], ids=["diffusion", "exact"])
def test_a_plan_like_a_run_takes_what_the_run_took(request_):
    """The very time, whatever else was measured; its range holds nine of ten of the run's steps."""
    asked = replace(request_, blocks=3, micro_batch=16, checkpointing=False)
    busy = replace(MACHINE, correction=Correction(samples=3.0, passes=7.0, steps=2.0))
    plan = make_plan(costs(), corrected_by_run(busy, costs(), request_, TAKEN), asked)
    assert plan.chosen.step_s == pytest.approx(TAKEN.step_s)
    assert plan.step_range_s == pytest.approx((TAKEN.short_s / RUN_ERROR, TAKEN.long_s * RUN_ERROR))
    twice = make_plan(costs(), corrected_by_run(busy, costs(), request_, TAKEN), replace(asked, batch=128))
    assert 1.5 < twice.chosen.step_s / plan.chosen.step_s < 2.1
    assert plan.machine.at_speeds_of(plan.machine) == plan.machine
    assert MACHINE.at_speeds_of(plan.machine).correction == plan.machine.correction
