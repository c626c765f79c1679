import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.adam_moments import adam_moments, update_error

from edgeblocks.optim.moments import GROUP_SIZE, SIGNED, UNSIGNED, Scratch, dequantize_, quantize_, scratch_bytes

NUM_STEPS = {SIGNED: 127, UNSIGNED: 255}
kinds = pytest.mark.parametrize("kind", [SIGNED, UNSIGNED])


def round_trip(values: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and what comes back."""
    codes = torch.empty(values.numel(), dtype=kind)
    scales = torch.empty(values.numel() // GROUP_SIZE)
    scratch, back = Scratch.empty(values.numel()), torch.empty_like(values)
    quantize_(codes, scales, values.clone(), scratch=scratch)
    dequantize_(back, codes, scales, scratch=scratch)
    return codes, scales, back


def moment_like(numel: int, kind: torch.dtype, *, seed: int) -> torch.Tensor:
    normal = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return normal if kind == SIGNED else normal.square()


def relative(values: torch.Tensor) -> torch.Tensor:
    """Each over the largest magnitude of its group, in double precision."""
    groups = values.double().view(-1, GROUP_SIZE)
    return (groups / groups.abs().amax(1, keepdim=True)).nan_to_num(0.0).view(-1)


@kinds
def test_codes_are_fourth_roots(kind):
    """Codes are those of the formula in double precision, but for a value halfway between two."""
    values = moment_like(2**16, kind, seed=0)
    codes, scales, back = round_trip(values, kind)
    steps = NUM_STEPS[kind] * relative(values).abs() ** 0.25
    nearest = steps.round().clamp(min=0 if kind == SIGNED else 1) * values.sign()
    assert (codes.double() == nearest).double().mean() > 0.999
    assert torch.equal(scales, values.view(-1, GROUP_SIZE).abs().amax(1))
    expected = scales.repeat_interleave(GROUP_SIZE) * (codes.double() / NUM_STEPS[kind]) ** 4 * values.sign()
    torch.testing.assert_close(back.double(), expected, rtol=1e-6, atol=0)


@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-30, 30),
    kind=st.sampled_from([SIGNED, UNSIGNED]),
    spread=st.integers(0, 6),
)
def test_error_bound(seed, exponent, kind, spread):
    """A value comes back with its sign, within half a step of its fourth root, or a whole one near 0."""
    values = moment_like(4 * GROUP_SIZE, kind, seed=seed)
    values = values * 10.0**exponent * values.abs() ** spread
    _, scales, back = round_trip(values, kind)
    ratios = (back / scales.repeat_interleave(GROUP_SIZE)).nan_to_num(0.0).abs().double()
    expected, got = (NUM_STEPS[kind] * magnitudes**0.25 for magnitudes in (relative(values).abs(), ratios))
    allowed = torch.where((expected < 0.5) & (kind == UNSIGNED), 1.001, 0.501)
    assert ((got - expected).abs() <= allowed).all()
    assert (back * values >= 0).all()


@pytest.mark.parametrize(
    ("spread", "percent", "share"), [(0.0, 1.1, 1.08), (0.5, 1.4, 0.8), (1.0, 2.3, 0.75), (2.0, 13, 0.5)]
)
def test_updates_err_less_than_with_the_code_of_bitsandbytes(spread, percent, share):
    """Adam's update is as far off as `optim.moments` says, and never much farther than with the dynamic code."""
    functional = pytest.importorskip("bitsandbytes.functional")
    exp_avg, exp_avg_sq = adam_moments(spread)

    def by_bitsandbytes(values: torch.Tensor, *, signed: bool) -> torch.Tensor:
        code = functional.create_dynamic_map(signed=signed)
        scaled = relative(values)
        nearest = torch.bucketize(scaled, (code[1:].double() + code[:-1].double()) / 2)
        scales = values.view(-1, GROUP_SIZE).abs().amax(1).repeat_interleave(GROUP_SIZE)
        return code[nearest.clamp(min=0 if signed else 1)] * scales

    by_theirs = (by_bitsandbytes(exp_avg, signed=True), by_bitsandbytes(exp_avg_sq, signed=False))
    ours = update_error((exp_avg, exp_avg_sq), (round_trip(exp_avg, SIGNED)[2], round_trip(exp_avg_sq, UNSIGNED)[2]))
    theirs = update_error((exp_avg, exp_avg_sq), by_theirs)
    assert 100 * ours == pytest.approx(percent, rel=0.1)
    assert ours <= share * theirs


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from([SIGNED, UNSIGNED]))
def test_requantizing_changes_nothing(seed, kind):
    """What came back once gets the same codes again, and differs by rounding: the code adds no drift of its own."""
    codes, _, back = round_trip(moment_like(2 * GROUP_SIZE, kind, seed=seed), kind)
    again_codes, _, again = round_trip(back, kind)
    assert torch.equal(codes, again_codes)
    torch.testing.assert_close(again, back, rtol=1e-6, atol=0)


@kinds
def test_a_group_of_zeros_stays_zeros(kind):
    """Zeros beside a group of numbers come back as zeros with scale 0."""
    values = torch.cat([torch.zeros(GROUP_SIZE), torch.ones(GROUP_SIZE)])
    _, scales, back = round_trip(values, kind)
    assert scales.tolist() == [0.0, 1.0]
    assert torch.equal(back, values)


@pytest.mark.parametrize("small", [1e-3, 1e-7, 1e-12, 1e-30, 1e-44])
def test_a_second_moment_is_never_zero(small):
    """However small beside its group's largest, a positive second moment comes back positive."""
    values = torch.full((GROUP_SIZE,), small)
    values[17] = 1.0
    _, _, back = round_trip(values, UNSIGNED)
    assert (back > 0).all()
    assert back[17] == 1.0


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-37, 1e37])
@kinds
def test_extreme_scales_stay_finite(scale, kind):
    """Groups at either end of float32's range, subnormal numbers included, never turn into NaN or infinity."""
    values = moment_like(GROUP_SIZE, kind, seed=2) * scale
    _, scales, back = round_trip(values, kind)
    assert back.isfinite().all()
    assert (back.abs() <= scales * (1 + 1e-6)).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_value_breaks_its_group_and_no_other(broken):
    """NaN and infinity come back as NaN in their whole group, and the next group is untouched."""
    values = torch.ones(2 * GROUP_SIZE)
    values[5] = broken
    _, scales, back = round_trip(values, SIGNED)
    assert scales[0].isnan()
    assert back[:GROUP_SIZE].isnan().all()
    assert torch.equal(back[GROUP_SIZE:], torch.ones(GROUP_SIZE))


def test_an_infinite_second_moment_is_loud():
    """An overflown second moment comes back as NaN, where infinity would freeze its group in silence."""
    values = torch.ones(GROUP_SIZE)
    values[5] = float("inf")
    _, _, back = round_trip(values, UNSIGNED)
    assert back.isnan().all()


def test_scratch_bytes_are_true():
    """scratch_bytes is what the tensors hold."""
    scratch = Scratch.empty(4 * GROUP_SIZE)
    assert scratch.magnitudes.nbytes + scratch.factors.nbytes == scratch_bytes(4 * GROUP_SIZE)


def test_importing_brings_neither_bitsandbytes_nor_dynamo():
    """The 8-bit state costs the budget no library: bitsandbytes is 120 MB resident and dynamo 70 MB."""
    program = (
        "import sys, torch, edgeblocks.optim.adamw as optim\n"
        "optim.adamw_step_(*(torch.zeros(256) for _ in range(4)), step=1, learning_rate=1e-3, beta1=0.9, beta2=0.999,"
        " eps=1e-8, weight_decay=0.0)\n"
        "optim.Workspace(num_threads=1, chunk_size=256)\n"
        "print([name for name in ('bitsandbytes', 'torch._dynamo', 'jaxtyping') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
