"""The ar and looped families: their objective and its traps, who sees what, kept keys and values, costs, export."""

import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from support import blocks
from support.blocks import seeded
from support.live_memory import live_peak_bytes
from torch import nn

from edgeblocks.diffusion.codebook import code_rows
from edgeblocks.diffusion.noise import partition_noise, sampler_levels
from edgeblocks.errors import ConfigError
from edgeblocks.families import causal_layers, token_loss
from edgeblocks.families.ar import Ar, PlainAr
from edgeblocks.families.base import Level, TextInfo
from edgeblocks.families.looped import Looped
from edgeblocks.families.token_denoiser import TokenDenoiserSettings
from edgeblocks.profiling.step_trace import traced_step
from edgeblocks.profiling.trace import trace

SETTINGS = TokenDenoiserSettings(width=16, depth=4, heads=2, code_width=16)
DATA = TextInfo(vocabulary=7, length=12)
AR, LOOPED = Ar(SETTINGS, DATA), Looped(SETTINGS, DATA)
random_block = partial(blocks.random_block, num_layers=4)  # so that each part of looped has some
fresh_block = partial(blocks.fresh_block, num_layers=4)
both = pytest.mark.parametrize("family", [AR, LOOPED], ids=["ar", "looped"])
SLIDING = replace(SETTINGS, sliding_window=3)
with_sliding_ones = pytest.mark.parametrize(
    "family",
    [AR, LOOPED, Ar(SLIDING, DATA), Looped(SLIDING, DATA), PlainAr(SLIDING, DATA)],
    ids=["ar", "looped", "ar, sliding", "looped, sliding", "end to end, sliding"],
)


pytestmark = pytest.mark.usefixtures("one_thread")


def texts(count, seed=0, data=DATA):
    return np.random.default_rng(seed).integers(0, data.vocabulary, (count, data.length))


def partition(num_blocks, overlap=0.05):
    return partition_noise(AR.noise, num_blocks=num_blocks, kind="equal-probability", overlap=overlap)


# The objective and its traps


@both
def test_the_loss_is_the_unweighted_cross_entropy_of_each_sequence(family):
    """Oracle: the mean of -log p of the right tokens, one number a sequence, whatever the level (traps 2 and 3)."""
    block = random_block(family)
    batch = family.draw(texts(6), None, partition(1).ranges[0], seeded())
    assert len(set(batch["sigma"].tolist())) > 3
    z, before = family.inputs(batch)
    logits, _ = block(z, batch["sigma"], before)
    expected = F.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none").mean(1)
    right = (logits.argmax(-1) == batch["tokens"]).float().mean(1)
    loss, scores = family.loss(block, batch), family.scores(block, batch)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(scores["loss"], expected)
    torch.testing.assert_close(scores["accuracy"], right)


@both
def test_inputs_are_noised_unit_rows_and_the_tokens_before(family):
    """z = row + sigma eps with the same rows as the deployed chain's (trap 4); the first token has the begin id."""
    tokens = texts(5)
    batch = family.at_level(tokens, None, Level.at(0.7), seeded())
    z, before = family.inputs(batch)
    rows = code_rows(DATA.vocabulary, SETTINGS.code_width)
    np.testing.assert_allclose(z.numpy() - np.float32(0.7) * batch["eps"].numpy(), rows[tokens], atol=1e-6)
    np.testing.assert_array_equal(random_block(family).codes.numpy(), rows)
    np.testing.assert_array_equal(before[:, 1:].numpy(), tokens[:, :-1])
    assert set(before[:, 0].tolist()) == {family.begin} == {DATA.vocabulary}


def test_what_the_network_reads_of_z_has_unit_variance():
    """c_in is that of codes whose features are 1 / sqrt(code_width) each, at the lowest and at the highest noise."""
    block = random_block(AR)
    seen = []
    block.code_embedding.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    for sigma in (SETTINGS.sigma_min, AR.sigma_data, SETTINGS.sigma_max):
        batch = AR.at_level(texts(300), None, Level.at(sigma), seeded())
        AR.scores(block, batch)
        assert seen[-1].square().mean().item() == pytest.approx(1, rel=0.02)


@both
def test_the_first_block_is_trained_where_inference_starts(family):
    """Two fifths of its samples are at sigma_max (trap 5), others' never are; all inside the widened range."""
    first, second = partition(2).ranges
    at_top = family.draw(texts(2000), None, first, seeded())["sigma"] == SETTINGS.sigma_max
    assert 0.399 <= at_top.float().mean() < 0.402
    sigma = family.draw(texts(2000), None, second, seeded())["sigma"]
    assert second.train_low - 1e-6 <= sigma.min() and sigma.max() <= second.train_high + 1e-6
    assert sigma.max() < SETTINGS.sigma_max


def test_sigmas_are_evenly_spread_over_the_probability():
    """One in each of as many equal shares of the training distribution as sequences, beside those at the top."""
    for number, found in enumerate(partition(3).ranges):
        sigma = AR.draw(texts(50), None, found, seeded(number))["sigma"]
        q = torch.tensor([AR.noise.quantile(level) for level in sigma[sigma < 10].double().tolist()]).sort().values
        gap = (AR.noise.quantile(found.train_high) - AR.noise.quantile(found.train_low)) / (30 if number == 0 else 50)
        torch.testing.assert_close(q.diff(), torch.full((len(q) - 1,), gap), atol=1e-5, rtol=0)
    settings = replace(SETTINGS, top_share=0.0)
    plain = Ar(settings, DATA).draw(texts(50), None, partition(1).ranges[0], seeded())["sigma"]
    assert (plain == SETTINGS.sigma_max).sum() == 0


@both
def test_the_answer_comes_from_the_hidden_state_at_every_noise_level(family):
    """The last block can change every answer (trap 7): at the lowest noise other tokens before give other logits."""
    block = random_block(family)
    z, sigma = torch.zeros(1, 12, 16), torch.full((1,), SETTINGS.sigma_min)
    one, two = (block(z, sigma, torch.from_numpy(texts(1, seed)))[0] for seed in (1, 2))
    assert (one - two).abs().max() > 1e-3


@both
def test_logits_need_no_scale(family):
    """The readout is its own map and not the codes (trap 6): its logits pass any size, so p can come near 1."""
    block = random_block(family)
    with torch.no_grad():
        block.readout.weight.mul_(100)
        batch = family.at_level(texts(2), None, Level.at(1.0), seeded())
        z, before = family.inputs(batch)
        assert block(z, batch["sigma"], before)[0].softmax(-1).amax() > 0.999
    assert block.readout.weight.data_ptr() != block.codes.data_ptr() and "codes" not in block.state_dict()


@both
def test_noise_is_not_seen_before_it_is_learnt(family):
    """z's projection starts at zero (trap 15), and all tokens start as likely as each other."""
    block = fresh_block(family)
    sigma, before = torch.full((2,), SETTINGS.sigma_max), torch.from_numpy(texts(2))
    with torch.no_grad():
        nn.init.normal_(block.readout.weight, generator=seeded())
        one, two = (block(torch.randn(2, 12, 16, generator=seeded(seed)), sigma, before)[0] for seed in (1, 2))
    assert torch.equal(one, two)
    batch = family.draw(texts(3), None, partition(1).ranges[0], seeded())
    torch.testing.assert_close(family.loss(fresh_block(family), batch), torch.full((3,), math.log(7)))


@both
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_every_block_is_run_in_a_chain_and_owns_the_levels_it_is_evaluated_at(family, num_blocks):
    """Trap 1: the one routing sends a chain of 8 levels through all blocks, in order; evaluation starts at the top."""
    routed = partition_noise(family.noise, num_blocks=num_blocks, kind="equal-probability", overlap=0.05)
    seen = [routed.block_of(sigma) for sigma in sampler_levels(routed, num_steps=8)]
    assert seen == sorted(seen) and set(seen) == set(range(num_blocks))
    levels = family.evaluation_levels(routed)
    assert levels[0].middle == SETTINGS.sigma_max and levels[0].share == 0
    assert sum(level.share for level in levels) == pytest.approx(1)
    assert {routed.block_of(level.middle) for level in levels[1:]} == set(range(num_blocks))
    assert levels == family.evaluation_levels(partition(1))


# Who sees what


def differing(block, change, *, at=5):
    """Positions whose logits change when `change` is applied to (z, tokens before) at a position."""
    batch = AR.at_level(texts(1), None, Level.at(1.0), seeded())
    z, before = AR.inputs(batch)
    changed = z.clone(), before.clone()
    change(*changed, at)
    with torch.no_grad():
        one, two = (
            block(*inputs)[0] for inputs in ((z, batch["sigma"], before), (changed[0], batch["sigma"], changed[1]))
        )
    return ((one - two).abs().amax(-1)[0] > 1e-6).tolist()


def other_token(z, before, at):
    before[0, at] = (before[0, at] + 1) % DATA.vocabulary


def other_code(z, before, at):
    z[0, at] += 1


@both
def test_a_token_is_seen_after_it_and_nowhere_before(family):
    """Trap 11. The answer at position i is token i, which is read at i + 1: changing what is read at 5, token 4,
    changes the answers from 5 on, which is the control, and none of the answers up to token 4 itself."""
    assert differing(random_block(family), other_token) == [False] * 5 + [True] * 7


def test_a_noised_code_is_seen_at_its_own_position_only_by_ar():
    """Trap 11: other positions' answers do not change by a bit; its own does, which is the control."""
    assert differing(random_block(AR), other_code) == [False] * 5 + [True] + [False] * 6


def test_a_noised_code_is_seen_at_its_position_and_later_by_looped():
    """Trap 11: later positions know the token itself anyway; those before see nothing of it."""
    assert differing(random_block(LOOPED), other_code) == [False] * 5 + [True] * 7


def test_a_mask_that_lets_a_code_see_the_next_token_is_found(monkeypatch):
    """The control of the controls: with a mask that is one position too wide the answers leak and the test sees it."""
    usual = causal_layers.visible
    monkeypatch.setattr(
        causal_layers,
        "visible",
        lambda queries, keys, window: usual(queries, F.pad(keys, (0, 0, 0, 1)), window)[:, : keys.shape[2]],
    )
    assert differing(random_block(AR), other_token)[4]


@pytest.mark.parametrize("kind", [Ar, Looped, PlainAr])
@pytest.mark.parametrize(("num_layers", "window", "answers"), [(1, 1, 1), (1, 3, 3), (3, 3, 7), (1, 12, 7)])
def test_a_sliding_window_ends_what_a_layer_sees(kind, num_layers, window, answers):
    """What is read at 5 changes the answers of as many positions as layers see: one of a window of 3 that and the next
    two, three of them two more each; a window as long as the text all that follow."""
    family = kind(replace(SETTINGS, sliding_window=window), DATA)
    found = differing(random_block(family, num_layers=num_layers), other_token)
    assert found == [False] * 5 + [True] * answers + [False] * (7 - answers)


def test_a_sliding_window_as_long_as_the_text_is_no_window():
    """The same numbers up to rounding, whatever attention kernel computes them."""
    z, before = AR.inputs(batch := AR.at_level(texts(2), None, Level.at(1.0), seeded()))
    one, two = (
        random_block(Ar(replace(SETTINGS, sliding_window=window), DATA))(z, batch["sigma"], before)[0]
        for window in (0, DATA.length)
    )
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_a_text_is_scored_as_it_would_be_written_with_a_sliding_window():
    """Both streams of a reading pass see as far as the one of a writing pass does: where later positions' codes are
    known, each position's answer is that of its own chain."""
    family = Looped(SLIDING, DATA)
    block, batch = random_block(family), family.at_level(texts(2), None, Level.at(0.5), seeded())
    known, before = family.inputs(batch)
    z = torch.randn(known.shape, generator=seeded(1))
    with torch.no_grad():
        states = block.reading_states(z, known, batch["sigma"], before)
        for position in (0, 5, 11):
            alone = known.clone()
            alone[:, position] = z[:, position]
            expected = block.window_states(alone, batch["sigma"], before)[:, position]
            torch.testing.assert_close(states[:, position], expected, atol=1e-5, rtol=1e-5)


def test_the_clean_stream_of_ar_does_not_know_the_noise_level():
    """Keys and values kept for later are the same bits at every level and for every z: one cache a block."""
    before = torch.from_numpy(texts(2))
    block = random_block(AR)
    kept = [block(torch.randn(2, 12, 16), torch.full((2,), sigma), before)[1] for sigma in (0.1, 10.0)]
    assert torch.equal(*kept)
    looped = random_block(LOOPED)
    kept = [looped(torch.zeros(2, 12, 16), torch.full((2,), sigma), before)[1] for sigma in (0.1, 10.0)]
    assert not torch.allclose(*kept)
    assert (AR.caches_per, LOOPED.caches_per) == ("block", "step")


def test_only_the_core_of_looped_knows_the_noise_level():
    """With the core's layers made the identity nothing of the level is left but in the readout's modulation."""
    block = random_block(LOOPED, num_layers=8)
    with torch.no_grad():
        for parameter in (*block.readout_modulation.parameters(), *block.code_embedding.parameters()):
            parameter.zero_()
        before, z = torch.from_numpy(texts(2)), torch.zeros(2, 12, 16)
        answers = []
        for core_is_identity in (False, True):
            if core_is_identity:
                for layer in block.layers[2:6]:
                    layer.modulation.weight.zero_()
                    layer.modulation.bias.zero_()
            answers.append([block(z, torch.full((2,), sigma), before)[0] for sigma in (0.1, 10.0)])
    assert not torch.allclose(*answers[0]) and torch.equal(*answers[1])


# Kept keys and values


@with_sliding_ones
@pytest.mark.parametrize("cuts", [[12], [5, 7], [1] * 12, [3, 1, 8]])
def test_pieces_with_what_was_kept_equal_one_pass(family, cuts):
    """Logits and keys and values within 1e-5, however a window is cut; an empty past is no past."""
    block = random_block(family)
    batch = family.at_level(texts(3), None, Level.at(0.8), seeded())
    z, before = family.inputs(batch)
    with torch.no_grad():
        whole, whole_kept = block(z, batch["sigma"], before)
        assert whole_kept.shape == (family.num_caches(4), 3, 2, 12, family.head_width)
        kept, found = whole_kept[:, :, :, :0], []
        for start, count in zip(np.cumsum([0, *cuts[:-1]]), cuts, strict=True):
            piece = slice(start, start + count)
            logits, present = block(z[:, piece], batch["sigma"], before[:, piece], kept)
            kept = torch.cat([kept, present], dim=3)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept, whole_kept, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        block.readout(block.window_states(z, batch["sigma"], before)), whole, atol=1e-6, rtol=1e-6
    )


# Training


@both
def test_a_few_steps_learn_which_token_follows_which(family):
    """Sequences that count up modulo 7 from a random start: the loss at the top falls below a fifth of guessing."""
    block = fresh_block(family, num_layers=2)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    for step in range(100):
        starts = np.random.default_rng(step).integers(0, 7, (32, 1))
        tokens = (starts + np.arange(DATA.length)) % 7
        family.loss(block, family.draw(tokens, None, partition(1).ranges[0], seeded(step))).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    batch = family.at_level((np.arange(7)[:, None] + np.arange(DATA.length)) % 7, None, Level.at(10.0), seeded())
    assert family.scores(block, batch)["loss"].mean() < math.log(7) / 5


@both
def test_checkpointing_changes_no_bit(family):
    """Loss and gradients with and without keeping activations, into gradients that exist already."""
    batch = family.draw(texts(3), None, partition(1).ranges[0], seeded())
    gradients = []
    for checkpointing in (False, True):
        block = random_block(family, checkpointing=checkpointing)
        for parameter in block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        family.loss(block, batch).sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
    names = [name for name, _ in block.named_parameters()]
    without = {name for name, grad in zip(names, gradients[0], strict=True) if not grad.any()}
    steady = (0, 3) if family is LOOPED else ()  # prelude and coda are modulated by their biases alone
    assert without == {f"layers.{number}.modulation.weight" for number in steady}
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@both
def test_gradients_are_autograds(family):
    """Adding into existing gradients gives what autograd gives for the plain formula."""
    batch = family.draw(texts(4), None, partition(1).ranges[0], seeded())
    ours, plain = random_block(family), random_block(family)
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    family.loss(ours, batch).sum().backward()
    z, before = family.inputs(batch)
    logits, _ = plain(z, batch["sigma"], before)
    F.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none").mean(1).sum().backward()
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-4)


@both
def test_a_draw_comes_from_its_generator(family):
    """The same seed gives the same batch, another one another; shapes and dtypes are those that are planned with."""
    whole = partition(1).ranges[0]
    one, same, other = (family.draw(texts(5), None, whole, seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["eps"], other["eps"])
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in one.items()} == dict(family.batch_spec(5))


# Planning


LARGE_DATA = TextInfo(vocabulary=50_000, length=64)
LARGE_SETTINGS = replace(SETTINGS, code_width=64)


@pytest.mark.parametrize("kind", ["plain", "checkpointed"])
@pytest.mark.parametrize(
    "large", [Ar(LARGE_SETTINGS, LARGE_DATA), Looped(LARGE_SETTINGS, LARGE_DATA)], ids=["ar", "looped"]
)
def test_memory_of_a_step_does_not_hold_the_logits(large, kind):
    """8 more sequences of 64 cost far less than their logits (trap 10), and the growth is a straight line."""
    peaks = [traced_step(large, 2, samples, kind).peak_bytes for samples in (8, 16, 24)]
    logits_bytes = 8 * 64 * 50_000 * 4
    assert 0 < peaks[1] - peaks[0] < logits_bytes / 15
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0]


@both
def test_costs_grow_linearly_with_layers(family):
    """From two layers on, also where looped gets its prelude and coda: what three traces promise of 4 to 8 holds.

    To a thousandth: a prelude keeps its condition, one row of zeros a sequence.
    """
    costs = trace(family, (3,))
    for kind in ("plain", "checkpointed", "forward"):
        (cost,) = getattr(costs, kind)
        for num_layers in (1, 2, 4, 8):
            traced = traced_step(family, num_layers, 3, kind)
            assert cost.peak_bytes.at(num_layers) == pytest.approx(traced.peak_bytes, rel=0.001)
    assert costs.parameters(5) == sum(
        parameter.numel() for parameter in random_block(family, num_layers=5).parameters()
    )


@with_sliding_ones
def test_the_traced_peak_is_that_of_a_real_step(family, monkeypatch):
    """torch's own count of live bytes in a step on the processor, where the rows fill the buffer of their logits."""
    monkeypatch.setattr(token_loss, "MOST_CHUNK_ROWS", 4)
    block = random_block(family)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = family.draw(texts(4), None, partition(1).ranges[0], seeded())
    peak = live_peak_bytes(lambda: family.loss(block, batch).sum().backward())
    traced = traced_step(family, 4, 4, "plain").peak_bytes
    assert 0.98 * peak <= traced <= 1.05 * peak + 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width=0: input should be greater than or equal to 1"),
        ({"heads": 3}, "heads=3: width=16 is not divisible by twice it"),
        ({"sliding_window": -1}, "sliding_window=-1: input should be greater than or equal to 0"),
        ({"code_width": 20}, "code_width=20: input should be a multiple of 8"),
        ({"top_share": 1.0}, "top_share=1.0: input should be less than 1"),
        ({"sigma_min": 20.0}, "sigma_min=20.0, and sigma_min < sigma_max is needed"),
    ],
)
def test_impossible_settings_are_named(change, message):
    """Each with its value and what it may be."""
    with pytest.raises(ConfigError, match=message):
        Ar(replace(SETTINGS, **change), DATA)


def test_codes_that_are_too_short_for_the_vocabulary_are_refused():
    """When the data are known, before anything is trained."""
    with pytest.raises(ConfigError, match="code_width=8 gives two of 300 tokens the same code"):
        Looped(replace(SETTINGS, code_width=8), replace(DATA, vocabulary=300))


# Export


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "num_layers"),
    [
        pytest.param(AR, 2, id="ar"),
        pytest.param(LOOPED, 4, id="looped"),
        pytest.param(Ar(SLIDING, DATA), 2, id="ar, sliding"),
    ],
)
def test_an_exported_block_gives_torchs_logits_with_and_without_a_past(tmp_path, family, num_layers):
    """One graph of opset 20 for any batch, any number of tokens and any past, none included."""
    block = random_block(family, num_layers=num_layers).eval()
    tokens, past_tokens = torch.export.Dim("tokens", min=1, max=12), torch.export.Dim("past", min=0, max=11)
    batch = torch.export.Dim("batch", min=1)
    z, before = torch.zeros(2, 3, 16), torch.zeros(2, 3, dtype=torch.int64)
    past = torch.zeros(family.num_caches(num_layers), 2, 2, 4, family.head_width)
    shapes = ({0: batch, 1: tokens}, {0: batch}, {0: batch, 1: tokens}, {1: batch, 3: past_tokens})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            block, (z, torch.ones(2), before, past), dynamo=True, opset_version=20, verbose=False, dynamic_shapes=shapes
        )
    program.save(str(tmp_path / "block.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "block.onnx"))
    names = [node.name for node in session.get_inputs()]
    whole = family.at_level(texts(5), None, Level.at(0.5), seeded())
    z, before = family.inputs(whole)
    kept = torch.zeros(family.num_caches(num_layers), 5, 2, 0, family.head_width)
    for piece in (slice(0, 7), slice(7, 8), slice(8, 12)):
        values = (z[:, piece], whole["sigma"], before[:, piece], kept)
        logits, present = session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True)))
        expected = block(*values)
        np.testing.assert_allclose(logits, expected[0].detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(present, expected[1].detach().numpy(), atol=1e-4)
        kept = torch.cat([kept, torch.from_numpy(present)], dim=3)
