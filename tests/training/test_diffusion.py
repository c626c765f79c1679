import math
import os
import signal
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.data.order import BatchOrder
from edgeblocks.optim.schedule import learning_rate_at
from edgeblocks.optim.update import clip_, ema_exponent
from edgeblocks.training.interruption import Interruption
from edgeblocks.training.loop import plan_visits


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 50))
def test_visits_cover_every_step_of_every_block_once(saved_steps, steps, visit_steps):
    """From any saved steps, the visits' steps are exactly the missing ones, in order, no visit longer than allowed."""
    made = [list(range(min(saved, steps))) for saved in saved_steps]
    for visit in plan_visits(saved_steps, steps=steps, visit_steps=visit_steps):
        assert 0 < visit.last - visit.first <= visit_steps
        assert visit.first == max(len(made[visit.block]), saved_steps[visit.block])
        made[visit.block] += range(visit.first, visit.last)
    assert made == [list(range(steps))] * len(saved_steps)


@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 30), st.data())
def test_a_resumed_run_goes_on_with_the_same_visits(num_blocks, steps, visit_steps, data):
    """After any number of whole visits, the visits planned from there are the rest of the original ones."""
    visits = list(plan_visits([0] * num_blocks, steps=steps, visit_steps=visit_steps))
    done = data.draw(st.integers(0, len(visits)))
    saved = [0] * num_blocks
    for visit in visits[:done]:
        saved[visit.block] = visit.last
    assert list(plan_visits(saved, steps=steps, visit_steps=visit_steps)) == visits[done:]


@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 30))
def test_blocks_take_turns(num_blocks, steps, visit_steps):
    """No block is ever more than one visit ahead of another."""
    saved = [0] * num_blocks
    for visit in plan_visits(saved, steps=steps, visit_steps=visit_steps):
        saved[visit.block] = visit.last
        assert max(saved) - min(saved) <= visit_steps


@given(st.integers(1, 300), st.integers(0, 300), st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_and_then_falls(steps, warmup, peak):
    """It is positive at every step, never above its peak, reaches it, and follows a line up and a cosine down."""
    rates = [learning_rate_at(step, steps=steps, warmup=warmup, peak=peak) for step in range(steps)]
    top = min(warmup, steps // 2)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert max(rates) == pytest.approx(peak)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    for step, rate in enumerate(rates):
        if step < top:
            assert rate == pytest.approx(peak * (step + 1) / top)
        else:
            assert rate == pytest.approx(peak * (1 + math.cos(math.pi * (step - top) / (steps - top))) / 2)


@given(st.floats(0.01, 0.28))
def test_the_ema_exponent_solves_edm2s_cubic(length):
    """gamma is the root of g^3 + 7 g^2 + (16 - t^2) g + (12 - t^2), t = 1/length, as numpy finds it."""
    t = 1 / length
    roots = np.roots([1, 7, 16 - t**2, 12 - t**2])
    expected = roots.real.max()
    assert ema_exponent(length) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_ema_profile_has_the_width_asked_for():
    """Over 4,000 steps, the weights that past steps end up with have a relative standard deviation of `length`."""
    steps, length = 4000, 0.1
    gamma = ema_exponent(length)
    profile = np.zeros(steps)
    for step in range(steps):
        decay = (1 - 1 / (step + 1)) ** (gamma + 1)
        profile *= decay
        profile[step] = 1 - decay
    assert profile.sum() == pytest.approx(1)
    times = np.arange(1, steps + 1) / steps
    mean = (profile * times).sum()
    assert math.sqrt((profile * (times - mean) ** 2).sum()) == pytest.approx(length, rel=0.01)


TRAIN = np.array([3, 5, 8, 13, 21, 34, 55])


@given(batch=st.integers(1, 20), seed=st.integers(0, 100), block=st.integers(0, 5))
def test_each_epoch_is_a_permutation(batch, seed, block):
    """Read in order, every stretch of one epoch's length holds each training image once."""
    order = BatchOrder(TRAIN, batch=batch, seed=seed, block=block)
    steps = math.ceil(4 * len(TRAIN) / batch)
    stream = np.concatenate([order.indices(step) for step in range(steps)])
    for epoch in range(4):
        np.testing.assert_array_equal(np.sort(stream[epoch * len(TRAIN) :][: len(TRAIN)]), TRAIN)


@given(batch=st.integers(1, 20), steps=st.lists(st.integers(0, 200), min_size=1, max_size=10))
def test_any_step_can_be_sought(batch, steps):
    """A step's batch is the same from a fresh order and after any other steps."""
    used = BatchOrder(TRAIN, batch=batch, seed=1, block=2)
    for step in steps:
        fresh = BatchOrder(TRAIN, batch=batch, seed=1, block=2)
        np.testing.assert_array_equal(used.indices(step), fresh.indices(step))


def test_seeds_blocks_and_epochs_have_orders_of_their_own():
    """Another seed, another block, or another epoch is another permutation."""
    train = np.arange(100)
    orders = [
        BatchOrder(train, batch=100, seed=seed, block=block).indices(epoch).tobytes()
        for seed in (0, 1)
        for block in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == len(orders)
    assert np.arange(100).tobytes() not in orders


def test_clipping_scales_only_what_is_too_long():
    """A longer gradient keeps its direction at the largest norm, a shorter one is unchanged; its norm is returned."""
    long, short = torch.tensor([3.0, -4.0]), torch.tensor([0.3, -0.4])
    assert clip_(long, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(long, torch.tensor([0.6, -0.8]))
    assert clip_(short, 1.0) == pytest.approx(0.5)
    assert torch.equal(short, torch.tensor([0.3, -0.4]))
    zero = torch.zeros(3)
    assert clip_(zero, 1.0) == 0.0
    assert torch.equal(zero, torch.zeros(3))


def test_a_signal_is_noted_and_handlers_are_restored():
    """SIGTERM within `listening` becomes a wish to stop; afterwards the former handler is back."""
    former = signal.getsignal(signal.SIGTERM)
    interruption = Interruption()
    with interruption.listening():
        assert interruption.signal_name is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_second_ctrl_c_stops_at_once():
    """The first Ctrl-C is answered and waits for the step, the second raises KeyboardInterrupt."""
    told = []
    interruption = Interruption(told.append)
    with interruption.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal_name == "SIGINT"
        assert len(told) == 1 and told[0].startswith("SIGINT: stopping after this step")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(told) == 1


def test_off_the_main_thread_no_handler_is_set():
    """Training in another thread works; signals stay with their owner."""
    former, errors = signal.getsignal(signal.SIGINT), []

    def listen():
        try:
            with Interruption().listening():
                assert signal.getsignal(signal.SIGINT) is former
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert errors == []
