"""looped trained end to end: its core unrolled, gradients through the last iterations."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import EXACT, plain_training, whole_weights

import edgeblocks
from edgeblocks.diffusion.noise import partition_noise
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.families.base import TextInfo
from edgeblocks.families.looped import MOST_ITERATIONS, LoopedSettings, PlainLooped
from edgeblocks.profiling.step_trace import traced_step
from edgeblocks.profiling.trace import trace
from edgeblocks.progress import Silent
from edgeblocks.seeds import generator_at

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = LoopedSettings(width=32, heads=2, depth=4, code_width=16, iterations=3, truncation=2)
FAMILY = PlainLooped(SETTINGS, TextInfo(vocabulary=27, length=12))
RANGE = partition_noise(FAMILY.noise, num_blocks=1, kind="equal-probability", overlap=0.0).ranges[0]
RUN = {"family": "looped", "data": "moby-dick", "width": 32, "heads": 2, "depth": 4, "length": 16, "batch": 4}
RUN |= {"hold_out": 0.00005, "iterations": 3, "truncation": 2, "optimizer": "adamw", "clip": 1e9, "micro_batch": 2}


def trained(out, listener=None):
    return edgeblocks.train(out=out, listener=listener or Silent(), **{**RUN, **EXACT})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("looped") / "run")


def random_block(family=FAMILY):
    block = family.block(num_layers=family.num_layers, checkpointing=False)
    block.reset_tables_()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return block


def drawn(count=4, *, step=0):
    tokens = np.random.default_rng(step).integers(0, 27, (count, 12))
    return FAMILY.draw(tokens, None, RANGE, generator_at(0, step))


def test_losses_and_weights_are_those_of_plain_pytorch(run):
    """After 20 steps bit for bit, with other numbers of iterations in each."""
    named, losses = plain_training(run, steps=20)
    assert [record["loss"] for record in run.directory.metrics()] == losses
    weights = whole_weights(run)
    assert weights.keys() == named.keys()
    for name, parameter in named.items():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy(), err_msg=name)


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(run, tmp_path):
    with pytest.raises(InterruptedRunError):
        trained(tmp_path / "run", listener=StopAfter(9))
    edgeblocks.resume(tmp_path / "run")
    assert_same_bits(run.path, tmp_path / "run", blocks=1)


@pytest.mark.thorough
def test_it_is_evaluated_and_exported(run, tmp_path):
    """`eval` tells what iterations are worth; the exported graph answers as torch does, which `export` compares."""
    rows = run.evaluate(samples=2)["curve"]
    assert [row["steps"] for row in rows] == [1, 2, 4, 8, 16, 32]
    assert len({row["bits_per_character"] for row in rows}) > 1  # from some number on none changes
    run.export(tmp_path / "onnx")
    (path,) = (tmp_path / "onnx").glob("*.onnx")
    stored = sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
    assert stored < 1.05 * run.directory.plan.parameters  # the core's weights once, not once an iteration


def test_gradients_go_back_through_the_last_iterations_alone():
    """Those of a core that is given the state before them as a constant; and its own loss, whatever is followed."""
    block, batch = random_block(), FAMILY.with_iterations(drawn(), 4)
    FAMILY.loss(block, batch).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    block.zero_grad()
    x, told = FAMILY.enter(block, batch)
    read = block.run(range(1), x, told, None, None)
    state = torch.zeros_like(read)
    for iteration in range(4):
        if iteration == 2:
            state = state.detach()
        state = block.state_norm(block.run(range(1, 3), block.adapter(torch.cat([state, read], -1)), told, None, None))
    out = block.run(range(3, 4), state, told, None, None)
    FAMILY.loss_after(block, out, told, batch).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    block.zero_grad()
    followed = PlainLooped(replace(SETTINGS, truncation=4), FAMILY.data)
    whole = random_block(followed)
    followed.loss(whole, batch).sum().backward()
    assert not torch.allclose(whole.adapter.weight.grad, found["adapter.weight"], rtol=1e-3)


def test_checkpointing_changes_no_bit():
    batch = FAMILY.with_iterations(drawn(), 3)
    gradients = []
    for checkpointing in (False, True):
        block = random_block()
        out = block.through_stage(*FAMILY.enter(block, batch), checkpointing=checkpointing)
        FAMILY.loss_after(block, out, batch["iterations"], batch).sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_is_kept_changes_no_answer_and_nobody_sees_what_follows():
    """Keys and values of every iteration: a text in two parts is answered as in one; a later token changes later
    answers alone."""
    block, tokens = random_block().eval(), drawn()["tokens"]
    z, sigma = torch.zeros(4, 12, 16), torch.ones(4)
    with torch.no_grad():
        whole, kept = block(z, sigma, tokens)
        first, past = block(z[:, :5], sigma, tokens[:, :5])
        rest, _ = block(z[:, 5:], sigma, tokens[:, 5:], past)
        changed = tokens.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 27
        other, _ = block(z, sigma, changed)
    assert len(kept) == FAMILY.num_caches(4) == 2 * (2 + 2 * 3)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(other[:, :7], whole[:, :7])
    assert not torch.allclose(other[:, 7:], whole[:, 7:])


def test_the_number_of_iterations_is_drawn_anew_in_each_step():
    """One and a Poisson number whose mean is the setting; never more than there is a limit for."""
    counts = [drawn(1, step=step)["iterations"].shape[1] for step in range(600)]
    assert min(counts) >= 1 and max(counts) <= MOST_ITERATIONS
    assert np.mean(counts) == pytest.approx(1 + 3, abs=0.4) and len(set(counts)) > 6


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.thorough), "checkpointed", "forward"])
def test_costs_are_those_of_whole_networks(kind):
    """Traced at 4, 8 and 12 layers they hold for 16; a core that is run again keeps its activations again."""
    (cost,) = getattr(trace(FAMILY, (3,)), kind)
    for num_layers in (8, 12, 16):
        found = traced_step(FAMILY, num_layers, 3, kind)
        assert cost.peak_bytes.at(num_layers) == pytest.approx(found.peak_bytes, rel=0.002)
    more = PlainLooped(replace(SETTINGS, truncation=4), FAMILY.data)
    if kind == "plain":
        assert traced_step(more, 8, 3, kind).peak_bytes > 1.2 * traced_step(FAMILY, 8, 3, kind).peak_bytes


def test_what_it_cannot_be_is_refused():
    """Layers that are no multiple of four, stages, and numbers of iterations out of bounds."""
    wanted = {"family": "looped", "method": "exact", "mem_budget": "4GB"}
    with pytest.raises(ConfigError, match="multiple of 4"):
        edgeblocks.plan(**wanted, depth=6)
    with pytest.raises(ConfigError, match="one stage"):
        edgeblocks.plan(**wanted, blocks=2)
    with pytest.raises(ConfigError, match=r"iterations=0.*\n.*truncation=99"):
        edgeblocks.plan(**wanted, iterations=0, truncation=99)
