"""Stochastic rounding, and updates of weights that are bfloat16."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_blocks import Small

from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.rounding import SEGMENT, draw_bits_, halves_, round_
from edgeblocks.optim.update import update_

UPDATE = {"learning_rate": 1e-3, "weight_decay": 0.1, "exponent": 6.94}


def bits_of(numel, *, first=0, position=(0, "round", 0, 0)):
    return draw_bits_(torch.empty((numel + 1) // 2, dtype=torch.int64), numel, first=first, position=position)


def rounded(values, bits):
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_(out, values.clone(), bits.clone())
    return out.float()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127))
def test_a_value_is_rounded_to_its_neighbours_alone_and_not_away_on_average(value):
    """Over all 65,536 draws: only the two bfloat16 numbers around it (or itself), whose mean it is exactly."""
    values = torch.full((2**16,), value, dtype=torch.float32)
    found = rounded(values, torch.arange(2**16, dtype=torch.int32)).double()
    low = (values[:1].view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    high = ((values[:1].view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double()
    assert ((found == low) | (found == high)).all()
    assert found.mean().item() == pytest.approx(values[0].item(), rel=1e-12, abs=1e-60)
    if low == values[0]:
        assert (found == low).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_stays_none(value):
    """A diverged weight reaches the loss: it is not rounded into a number."""
    found = rounded(torch.full((2**16,), value), torch.arange(2**16, dtype=torch.int32))
    torch.testing.assert_close(found, torch.full_like(found, value), equal_nan=True)


def test_bits_are_uniform_and_those_of_their_place():
    """Each of 32 bits is set in half of the values, no two alike; a segment is drawn alone, others differ."""
    whole = bits_of(3 * SEGMENT)
    lower, upper = halves_(whole.clone(), lower=torch.empty_like(whole))
    assert min(lower.min(), upper.min()) >= 0 and max(lower.max(), upper.max()) < 2**16
    each = torch.stack([half >> bit & 1 for half in (lower, upper) for bit in range(16)]).double()
    assert ((each.mean(1) - 0.5).abs() < 0.01).all()  # 6 standard errors
    assert (torch.corrcoef(each) - torch.eye(32)).abs().max() < 0.02
    assert torch.equal(bits_of(SEGMENT + 5, first=SEGMENT)[:SEGMENT], whole[SEGMENT : 2 * SEGMENT])
    for other in ((1, "round", 0, 0), (0, "round", 1, 0), (0, "round", 0, 1)):
        assert (bits_of(SEGMENT, position=other) != whole[:SEGMENT]).float().mean() > 0.99


class Wide(Small):
    """With a matrix of more than two segments, whose moments are kept in 8 bits, and others that are not."""

    def __init__(self):
        super().__init__(width=600)


def updated(optimizer, workspace, *, master="bf16", steps=3):
    """A block after some updates with gradients of very different sizes."""
    layout = BlockLayout.of(Wide(), optimizer, master=master)
    buffer = BlockBuffer(layout).touched()
    generator = torch.Generator().manual_seed(0)
    for part in ("weights", "ema"):
        buffer.flat(part).copy_(torch.randn(layout.num_parameters, generator=generator))
    for step in range(steps):
        gradients = torch.randn(layout.num_parameters, generator=generator) ** 5
        update_(buffer, gradients, step=step, workspace=workspace, position=(7, "round", 2, step), **UPDATE)
    return buffer


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_neither_chunks_nor_threads_change_a_bit(optimizer):
    """Chunks of one segment, of two, and the usual ones; one thread and three."""
    expected = updated(optimizer, Workspace(num_threads=1, rounds=True)).content
    for num_threads, segments in ((1, 1), (3, 1), (2, 2)):
        workspace = Workspace(num_threads=num_threads, chunk_size=segments * SEGMENT, rounds=True)
        assert torch.equal(updated(optimizer, workspace).content, expected)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_one_update_is_that_of_float32_rounded(optimizer):
    """Weights, EMA and moments: the weights are within one step of bfloat16, the moments equal bit for bit."""
    workspace = Workspace(num_threads=1, rounds=True)
    near = updated(optimizer, workspace, steps=1)
    exact = BlockBuffer(BlockLayout.of(Wide(), optimizer)).touched()
    start = updated(optimizer, workspace, steps=0)
    for part in ("weights", "ema"):
        exact.flat(part).copy_(start.flat(part))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        torch.randn(exact.layout.num_parameters, generator=generator)
    gradients = torch.randn(exact.layout.num_parameters, generator=generator) ** 5
    update_(exact, gradients, step=0, workspace=workspace, position=(), **UPDATE)
    assert torch.equal(near.part_bytes("optimizer"), exact.part_bytes("optimizer"))
    for part in ("weights", "ema"):
        off = (near.flat(part).float() - exact.flat(part)).abs() / exact.flat(part).abs().clamp(min=1e-30)
        assert 1e-3 < off.max() <= 2**-7


def test_updates_below_the_distance_of_two_numbers_add_up():
    """200 updates of a hundredth of that distance each, which rounding to the nearest would lose, and the EMA's too."""
    layout = BlockLayout.of(Wide(), "adamw", master="bf16")
    buffer, workspace = BlockBuffer(layout).touched(), Workspace(num_threads=1, rounds=True)
    buffer.flat("weights").fill_(1)
    gradients = torch.ones(layout.num_parameters)
    for step in range(200):
        small = {**UPDATE, "learning_rate": 2**-7 / 100, "weight_decay": 0.0}
        update_(buffer, gradients, step=step, workspace=workspace, position=(0, "round", 0, step), **small)
    # Below 1 numbers are 2^-8 apart, so the mean has a standard error of 1e-5 over 80,000 weights.
    expected = 1 - 200 * 2**-7 / 100
    assert buffer.flat("weights").float().mean().item() == pytest.approx(expected, abs=2e-4)
    assert expected < buffer.flat("ema").float().mean().item() < expected + 0.01


def test_a_workspace_for_rounding_has_whole_segments():
    """Chunks that end within a segment are refused with the rule."""
    with pytest.raises(ValueError, match="chunk_size is 256; it must be a positive multiple of 32768"):
        Workspace(num_threads=1, chunk_size=256, rounds=True)
