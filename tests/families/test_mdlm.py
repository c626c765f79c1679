"""The mdlm family: its bound, its traps, what it draws; traced, checkpointed and exported as other families are."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from support.blocks import random_block, seeded
from support.live_memory import live_peak_bytes
from torch import nn

from edgeblocks.diffusion.noise import NoiseRange, partition_noise, unmasking_steps
from edgeblocks.errors import ConfigError
from edgeblocks.families import token_loss
from edgeblocks.families.base import Level, TextInfo
from edgeblocks.families.mdlm import Mdlm, MdlmBlock, MdlmSettings
from edgeblocks.profiling.step_trace import traced_step
from edgeblocks.profiling.trace import trace

SETTINGS = MdlmSettings(width=16, depth=3, heads=2)
DATA = TextInfo(vocabulary=7, length=12)
FAMILY = Mdlm(SETTINGS, DATA)


pytestmark = pytest.mark.usefixtures("one_thread")


def texts(count, seed=0, data=DATA):
    return np.random.default_rng(seed).integers(0, data.vocabulary, (count, data.length))


def partition(num_blocks, overlap=0.0):
    return partition_noise(FAMILY.noise, num_blocks=num_blocks, kind="equal-probability", overlap=overlap)


# The objective and its traps


def test_the_loss_is_written_out_position_by_position():
    """Oracle: (1/t) times the sum of -log p over masked positions, by the length; one number a sequence (trap 2)."""
    block = random_block(FAMILY)
    batch = FAMILY.draw(texts(6), None, partition(1).ranges[0], seeded())
    z, condition = FAMILY.inputs(batch)
    assert condition is None
    log_p = block(z, batch["t"]).log_softmax(-1)
    expected, right = torch.zeros(6), torch.zeros(6)
    for sample, place in itertools.product(range(6), range(DATA.length)):
        if z[sample, place] == DATA.vocabulary:
            answer = batch["tokens"][sample, place]
            weight = 1 / batch["t"][sample] / DATA.length
            expected[sample] -= weight * log_p[sample, place, answer]
            right[sample] += weight * (log_p[sample, place].argmax() == answer)
    loss, scores = FAMILY.loss(block, batch), FAMILY.scores(block, batch)
    assert loss.shape == (6,)
    for found in (loss, scores["loss"]):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scores["accuracy"], right)


class TableBlock(MdlmBlock):
    """A block whose hidden states are looked up: log p(token | visible tokens) by a table over all partial sequences.

    `table` is [sequences, length, vocabulary] in the order of z read as a number of base vocabulary + 1.
    """

    def hidden(self, z, t):
        base = self.token_embedding.num_embeddings ** torch.arange(z.shape[1] - 1, -1, -1)
        return self.table[(z * base).sum(1)]


HALF = Level(low=0.25, high=0.75, share=0.5)
BITS = Mdlm(MdlmSettings(width=2, depth=1, heads=1), TextInfo(vocabulary=2, length=3))
SEQUENCES = np.array(list(itertools.product(range(2), repeat=3)))
PROBABILITIES = np.array([0.25, 0.02, 0.08, 0.15, 0.05, 0.2, 0.24, 0.01])


def table_block(table):
    block = TableBlock(settings=BITS.settings, data=BITS.data, num_layers=1, checkpointing=False)
    with torch.no_grad():
        block.readout.weight.copy_(torch.eye(2))
        block.readout.bias.zero_()
    block.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))
    return block


def perfect_table():
    """log p(token | visible tokens) of three dependent bits; the mask is 2."""
    table = np.zeros((27, 3, 2))
    for number, z in enumerate(itertools.product(range(3), repeat=3)):
        fits = [all(v in (2, w) for v, w in zip(z, sequence, strict=True)) for sequence in SEQUENCES]
        agree = PROBABILITIES * fits
        for place, value in itertools.product(range(3), range(2)):
            joint = sum(p for p, sequence in zip(agree, SEQUENCES, strict=True) if sequence[place] == value)
            table[number, place, value] = math.log(max(joint / sum(agree), 1e-30))
    return table


def expected_loss(block, low, high):
    """E of the loss over all sequences, all masks and t uniform in [low, high]: exact, by Gauss's rule."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        t = (low + high) / 2 + (high - low) / 2 * node
        masks = np.tile(SEQUENCES, (8, 1)).astype(bool)
        tokens = np.repeat(SEQUENCES, 8, axis=0)
        chances = np.repeat(PROBABILITIES, 8) * t ** masks.sum(1) * (1 - t) ** (~masks).sum(1)
        batch = {
            "tokens": torch.from_numpy(tokens),
            "masked": torch.from_numpy(masks),
            "t": torch.full((64,), t, dtype=torch.float32),
        }
        total += weight / 2 * float(BITS.loss(block, batch).detach().double() @ torch.from_numpy(chances))
    return total


def test_the_loss_of_a_perfect_denoiser_is_the_entropy():
    """So the loss is a true bound (trap 13): exact over all masks; any other denoiser has more."""
    entropy = -(PROBABILITIES * np.log(PROBABILITIES)).sum() / 3
    assert expected_loss(table_block(perfect_table()), 0, 1) == pytest.approx(entropy, abs=1e-6)
    worse = perfect_table() + np.random.default_rng(0).normal(0, 0.3, (27, 3, 2))
    assert expected_loss(table_block(worse), 0, 1) > entropy + 0.001


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
def test_blocks_shares_of_the_bound_sum_to_the_whole(num_blocks):
    """Over strict ranges, the width of each range times its mean loss; exact, with one network for all blocks."""
    block = table_block(np.random.default_rng(0).normal(0, 1, (27, 3, 2)))
    ranges = partition(num_blocks).ranges
    shares = [(found.high - found.low) * expected_loss(block, found.low, found.high) for found in ranges]
    assert sum(shares) == pytest.approx(expected_loss(block, 0, 1), abs=1e-6)


@pytest.mark.parametrize("source", ["draw", "at_level"])
def test_what_is_drawn_estimates_the_bound_without_bias(source):
    """The mean of many drawn losses is the exact expectation, to four standard errors, in training and evaluation."""
    block = table_block(np.random.default_rng(0).normal(0, 1, (27, 3, 2)))
    count = 20_000
    tokens = np.random.default_rng(1).choice(8, count, p=PROBABILITIES)
    low, high = 1 / 3, 2 / 3
    if source == "draw":
        whole = NoiseRange(low=0.4, high=0.6, train_low=low, train_high=high)
        batch = BITS.draw(SEQUENCES[tokens], None, whole, seeded())
    else:
        batch = BITS.at_level(SEQUENCES[tokens], None, Level(low=low, high=high, share=1.0), seeded())
    loss = BITS.loss(block, batch).detach()
    assert loss.mean().item() == pytest.approx(
        expected_loss(block, low, high), abs=4 * loss.std().item() / math.sqrt(count)
    )


def test_visible_tokens_have_no_loss():
    """The gradient of what is said about a visible position is exactly zero; about a masked one it is not."""
    block = table_block(np.random.default_rng(0).normal(0, 1, (27, 3, 2)))
    batch = BITS.at_level(SEQUENCES, None, Level.at(0.5), seeded())
    said = block.hidden(BITS.inputs(batch)[0], batch["t"]).detach().requires_grad_()
    block.hidden = lambda z, t: said
    BITS.loss(block, batch).sum().backward()
    assert torch.equal(said.grad.abs().sum(-1) > 0, batch["masked"])


def test_where_nothing_is_masked_the_loss_is_zero():
    """No mask is forced, and a t as small as float32 can hold gives no infinity."""
    batch = FAMILY.at_level(texts(4), None, Level.at(1e-30), seeded())
    assert not batch["masked"].any()
    assert torch.equal(FAMILY.loss(random_block(FAMILY), batch), torch.zeros(4))


# What is drawn


def test_times_are_stratified_within_the_widened_range():
    """One t in each of as many equal parts as sequences, from one random start; never zero (arXiv 2107.00630)."""
    for number, found in enumerate(partition(3, overlap=0.1).ranges):
        t = FAMILY.draw(texts(50), None, found, seeded(number))["t"].double().sort().values
        assert found.train_low < t.min() and t.max() <= found.train_high + 1e-7
        gap = (found.train_high - found.train_low) / 50
        torch.testing.assert_close(t.diff(), torch.full((49,), gap, dtype=torch.float64), atol=1e-6, rtol=0)


def test_tokens_are_masked_with_probability_t():
    """Independently of each other; other tokens are as they were."""
    tokens = texts(4000)
    batch = FAMILY.at_level(tokens, None, Level.at(0.3), seeded())
    assert batch["masked"].float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert batch["masked"].float().sum(1).var().item() == pytest.approx(DATA.length * 0.3 * 0.7, rel=0.1)
    z, _ = FAMILY.inputs(batch)
    np.testing.assert_array_equal(z.numpy(), np.where(batch["masked"].numpy(), DATA.vocabulary, tokens))


def test_a_draw_comes_from_its_generator():
    """The same seed gives the same batch, another one another; shapes and dtypes are those that are planned with."""
    one, same, other = (FAMILY.draw(texts(5), None, partition(1).ranges[0], seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["masked"], other["masked"])
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in one.items()} == dict(FAMILY.batch_spec(5))


def test_evaluation_does_not_depend_on_how_sequences_are_grouped():
    """Ten at once are the same as four, four and two; times lie strictly inside the interval."""
    tokens = texts(10)
    whole = FAMILY.at_level(tokens, None, HALF, seeded())
    generator = seeded()
    parts = [FAMILY.at_level(tokens[i : i + 4], None, HALF, generator) for i in (0, 4, 8)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))
    times = whole["t"].tolist()
    assert all(0.25 < t <= 0.75 for t in times) and len(set(times)) == 10


def test_intervals_of_evaluation_are_the_same_for_all_partitions():
    """12 intervals of 1, 2 or 3 blocks are the same times: block-wise and whole bounds are compared on equal terms."""
    grids = [unmasking_steps(partition(num_blocks), num_steps=12) for num_blocks in (1, 2, 3)]
    for grid in grids[1:]:
        np.testing.assert_allclose(grid, grids[0], atol=1e-12)


# The network


def test_a_fresh_block_thinks_all_tokens_equally_likely():
    """So the loss starts at the bound of no knowledge."""
    block = FAMILY.block(num_layers=2, checkpointing=False)
    block.reset_tables_()
    block.init_(seeded())
    z = torch.randint(0, 8, (3, 12), generator=seeded())
    assert torch.equal(block(z, torch.rand(3)), torch.zeros(3, 12, 7))


def test_a_few_steps_learn_which_token_follows_which():
    """Sequences that count up modulo 7 from a random start: the bound falls below half of that of no knowledge."""
    block = FAMILY.block(num_layers=2, checkpointing=False)
    block.reset_tables_()
    block.init_(seeded())
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        starts = np.random.default_rng(step).integers(0, 7, (32, 1))
        tokens = (starts + np.arange(DATA.length)) % 7
        loss = FAMILY.loss(block, FAMILY.draw(tokens, None, partition(1).ranges[0], seeded(step))).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    assert np.mean(losses[:5]) == pytest.approx(math.log(7), rel=0.2)
    assert np.mean(losses[-20:]) < math.log(7) / 2


def test_a_network_knows_order_and_sees_both_sides():
    """An answer depends on tokens before and after it, and on where they stand."""
    block = random_block(FAMILY)
    z = torch.from_numpy(texts(1))
    z[:, 5] = DATA.vocabulary
    t = torch.full((1,), 0.5)
    answer = block(z, t)[0, 5]
    for place in (4, 6):
        changed = z.clone()
        changed[0, place] = (changed[0, place] + 1) % DATA.vocabulary
        assert (block(changed, t)[0, 5] - answer).abs().max() > 1e-4
    assert (block(z[:, [1, 0, *range(2, 12)]], t)[0, 5] - answer).abs().max() > 1e-4


def test_checkpointing_changes_no_bit():
    """Loss and gradients with and without keeping activations, into gradients that exist already."""
    batch = FAMILY.draw(texts(3), None, partition(1).ranges[0], seeded())
    gradients = []
    for checkpointing in (False, True):
        block = random_block(FAMILY, checkpointing=checkpointing)
        for parameter in block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        FAMILY.loss(block, batch).sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
    assert all(one.abs().sum() > 0 for one in gradients[0])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_gradients_are_autograds():
    """Adding into existing gradients gives what autograd gives for the plain formula."""
    batch = FAMILY.draw(texts(4), None, partition(1).ranges[0], seeded())
    ours, plain = random_block(FAMILY), random_block(FAMILY)
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    FAMILY.loss(ours, batch).sum().backward()
    logits = plain(FAMILY.inputs(batch)[0], batch["t"])
    losses = F.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none")
    ((losses * batch["masked"]).sum(1) / batch["t"] / DATA.length).sum().backward()
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-4)


def test_the_table_of_positions_is_shared_and_never_stored():
    """One table for all layers, and no state but parameters."""
    block = random_block(FAMILY, num_layers=3)
    assert len({layer.attention.rotary.data_ptr() for layer in block.layers}) == 1
    assert set(block.state_dict()) == {name for name, _ in block.named_parameters()}


# Planning


LARGE = Mdlm(MdlmSettings(width=16, depth=3, heads=2), TextInfo(vocabulary=50_000, length=64))


@pytest.mark.parametrize("kind", ["plain", "checkpointed"])
def test_memory_of_a_step_does_not_hold_the_logits(kind):
    """8 more sequences of 64 cost far less than their logits, and the growth is a straight line."""
    peaks = [traced_step(LARGE, 2, samples, kind).peak_bytes for samples in (8, 16, 24)]
    logits_bytes = 8 * 64 * 50_000 * 4
    assert 0 < peaks[1] - peaks[0] < logits_bytes / 20
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0]


@pytest.mark.parametrize("family", [FAMILY, LARGE], ids=["small", "large"])
def test_the_traced_peak_is_that_of_a_real_step(family, monkeypatch):
    """torch's own count of live bytes in a step on the processor, where the rows fill the buffer of their logits."""
    monkeypatch.setattr(token_loss, "MOST_CHUNK_ROWS", 4)
    block = random_block(family)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = family.draw(texts(4, data=family.data), None, partition(1).ranges[0], seeded())
    peak = live_peak_bytes(lambda: family.loss(block, batch).sum().backward())
    traced = traced_step(family, 2, 4, "plain").peak_bytes
    assert 0.98 * peak <= traced <= 1.05 * peak + 4096


def test_the_readout_counts_in_flops():
    """Twice its weights a position, so a large vocabulary is seen by the planner."""
    families = [Mdlm(SETTINGS, replace(DATA, vocabulary=vocabulary)) for vocabulary in (100, 1100)]
    small, large = (trace(family, (1,)).stem_readout_flops_per_sample for family in families)
    assert large - small == 2 * 1000 * SETTINGS.width * DATA.length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width=0: input should be greater than or equal to 1"),
        ({"heads": 3}, "heads=3: width=16 is not divisible by twice it"),
        ({"heads": 16}, "rotary positions"),
        ({"depth": 10**9}, "depth=1000000000: input should be less than or equal to 4096"),
    ],
)
def test_impossible_settings_are_named(change, message):
    """Each with its value and what it may be."""
    with pytest.raises(ConfigError, match=message):
        Mdlm(replace(SETTINGS, **change), DATA)


# Export


def test_an_exported_block_gives_torchs_logits(tmp_path):
    """One block as ONNX of opset 20, with any batch size."""
    block = random_block(FAMILY).eval()
    batch = torch.export.Dim("batch", min=1)
    example = (torch.zeros(2, DATA.length, dtype=torch.int64), torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            block, example, dynamo=True, opset_version=20, verbose=False, dynamic_shapes=({0: batch}, {0: batch})
        )
    program.save(str(tmp_path / "block.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "block.onnx"))
    z, t = torch.randint(0, 8, (5, DATA.length), generator=seeded()), torch.rand(5, generator=seeded())
    names = [node.name for node in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (z.numpy(), t.numpy()), strict=True)))
    np.testing.assert_allclose(found, block(z, t).detach().numpy(), atol=1e-4)
