"""Training in half precision: float32's equalities, half of the activations' memory, nearly the same losses."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS, SLOTS, plain_training, trained, whole_weights, with_slots
from support.shapes import checked_shapes

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.precision import computing_in, lowered
from edgeblocks.optim import loss_scale
from edgeblocks.optim.loss_scale import LossScale
from edgeblocks.profiling.measurement import with_precision
from edgeblocks.profiling.precisions import WORTH_IT, half_gain
from edgeblocks.profiling.step_trace import traced_step
from edgeblocks.registry import build_family, family_type
from edgeblocks.runs.create import changed_environment
from edgeblocks.settings.reading import resolve_settings

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = {"precision": "bf16", "steps": 6}
IMAGE = {"channels": 1, "height": 16, "width": 16, "num_classes": 10, "mean": 0.5, "scale": 1.0}
TEXT = {"vocabulary": 300, "length": 64}
FAMILIES = {"dit": IMAGE, "vit": IMAGE, "mdlm": TEXT, "ar": TEXT, "looped": TEXT}


def random_batch(family, count, generator):
    drawn = {torch.int64: lambda shape: torch.randint(0, 9, shape, generator=generator)}
    drawn[torch.bool] = lambda shape: torch.rand(shape, generator=generator) < 0.5
    drawn[torch.float32] = lambda shape: 0.1 + 0.8 * torch.rand(shape, generator=generator)
    return {name: drawn[dtype](shape) for name, (shape, dtype) in family.batch_spec(count).items()}


IN_BF16 = [(name, method, "bf16") for name in FAMILIES for method in ("diffusion", "exact")]


@pytest.mark.parametrize(("name", "method", "half"), [*IN_BF16, ("dit", "diffusion", "fp16"), ("ar", "exact", "fp16")])
def test_losses_and_gradients_are_nearly_those_of_float32(name, method, half):
    """Losses, float32 themselves, within 0.5 %, gradients within 2 %, and neither is the same."""
    family = build_family(name, {"width": 64, "heads": 2, "depth": 4}, FAMILIES[name], method)
    generator = torch.Generator().manual_seed(0)
    block = family.block(num_layers=4, checkpointing=False)
    block.reset_tables_()
    block.init_(generator)
    with torch.no_grad():  # no gate is closed, so that every part has a gradient
        for parameter in block.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    batch, found = random_batch(family, 8, generator), {}
    for precision in ("fp32", half):
        for parameter in block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with computing_in(precision), checked_shapes():
            losses = family.loss(block, batch)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        found[precision] = losses.detach(), torch.cat([parameter.grad.flatten() for parameter in block.parameters()])
    for expected, near, most in zip(found["fp32"], found[half], (0.005, 0.02), strict=True):
        assert 0 < (near - expected).norm() / expected.norm() < most


@pytest.mark.parametrize("kind", ["plain", "checkpointed"])
@pytest.mark.parametrize(
    "name", ["dit", "ar", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("vit", "mdlm", "looped"))]
)
def test_activations_take_about_half_of_the_room(name, kind):
    """At 32 samples; what is left of float32 in texts are logits, and rotations by positions while they are made."""
    family = build_family(name, {"width": 256, "heads": 4, "depth": 4}, FAMILIES[name], "diffusion")
    single, half = (traced_step(family, 4, 32, kind, precision=p).peak_bytes for p in ("fp32", "bf16"))
    assert 0.45 < half / single < (0.65 if kind == "plain" else 0.9)


@pytest.mark.parametrize(
    "kind", ["dit", "ar", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("vit", "mdlm"))]
)
def test_exact_training_is_that_of_plain_pytorch_under_autocast(tmp_path, kind):
    """Losses and weights bit for bit: torch.optim.AdamW, torch.autocast; and so on disk, stopped and resumed."""
    made = {"blocks": 4, "tier": "ram", "optimizer": "adamw", "clip": 1e9, **HALF}
    run = trained(kind, tmp_path / "run", **made)
    named, losses = plain_training(run, steps=HALF["steps"])
    assert [record["loss"] for record in run.directory.metrics()] == losses
    weights = whole_weights(run)
    for name, parameter in named.items():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy(), err_msg=name)
    with pytest.raises(InterruptedRunError), checked_shapes():
        streamed = {**made, "tier": "disk", "checkpointing": True, "visit_steps": 4}
        trained(kind, tmp_path / "begun", listener=StopAfter(2), **streamed)
    again = edgeblocks.resume(with_slots(tmp_path / "begun", run, SLOTS[kind][0]))
    assert_same_bits(run.path, again.path, blocks=4)
    assert again.summary["metrics"]["validation"] == run.summary["metrics"]["validation"]
    both = run.evaluate(samples=2)["in_both"]
    assert both["precision"] == "bf16"
    assert both["half"] == pytest.approx(both["fp32"], rel=0.01) and both["half"] != both["fp32"]


@pytest.mark.parametrize("clip_by", ["stage", "network"])
def test_exact_training_in_float16_is_that_of_plain_pytorch_with_loss_scaling(tmp_path, clip_by):
    """torch.amp.GradScaler, losses and weights bit for bit; clipping by the network's norm, too."""
    clip = {"clip": 1e9} if clip_by == "stage" else {"clip": 0.5, "clip_by": "network"}
    made = {"blocks": 3, "tier": "disk", "optimizer": "adamw", "precision": "fp16", "steps": 3, **clip}
    run = trained("dit", tmp_path / "run", **made)
    named, losses = plain_training(run, steps=3)
    assert [record["loss"] for record in run.directory.metrics()] == losses
    weights = whole_weights(run)
    for name, parameter in named.items():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy(), err_msg=name)


@pytest.mark.parametrize("method", ["diffusion", "exact"])
def test_an_update_that_float16_cannot_hold_is_left_out(tmp_path, method, monkeypatch):
    """The scale is halved until gradients are finite again, and kept with the blocks: a resumed run goes on with it."""
    too_large = partial(LossScale, exponent=24)
    monkeypatch.setattr("edgeblocks.training.loop.LossScale", too_large)
    wanted = {**KINDS["dit"], "depth": 4, "method": method, "precision": "fp16", "steps": 12, "blocks": 2}
    wanted |= {"mem_budget": "4GB", "sample_grids": 0, "visit_steps": 4, "optimizer": "adamw"}
    one = edgeblocks.train(out=tmp_path / "one", **wanted)
    norms = [record["gradient_norm"] for record in one.directory.metrics() if record["block"] == 0]
    assert norms[0] is None and norms[-1] is not None
    scales = [one.directory.store().header(block).loss_scale for block in range(2)]
    assert all(8 < scale.exponent < 24 and scale.steps > 0 for scale in scales)
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "two", tier="disk", listener=StopAfter(6), **wanted)
    monkeypatch.undo()
    two = edgeblocks.resume(tmp_path / "two")
    assert_same_bits(one.path, two.path, blocks=2)
    assert [two.directory.store().header(block).loss_scale for block in range(2)] == scales


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 6))
def test_the_scale_moves_as_torchs_own(finite, interval):
    """After any series of steps that were finite or were not; unscaled gradients that are no numbers are an error."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=interval)
    scaler.scale(torch.zeros(()))  # from now on it has a scale
    scale = LossScale()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss_scale, "GROWTH_INTERVAL", interval)
        for is_finite in finite:
            if scale.exponent in (0, loss_scale.LARGEST_EXPONENT):
                break
            parameter = torch.zeros((), requires_grad=True)
            parameter.grad = torch.tensor(0.0 if is_finite else torch.inf)
            optimizer = torch.optim.SGD([parameter], lr=1.0)
            scaler.step(optimizer)
            scaler.update()
            scale = scale.after(finite=is_finite)
            assert scale.value == scaler.get_scale()
    with pytest.raises(FloatingPointError):
        LossScale(exponent=0).after(finite=False)


@pytest.mark.parametrize(
    "family", ["dit", "looped", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("vit", "mdlm", "ar"))]
)
def test_blocks_stream_and_resume_without_changing_a_bit(tmp_path, family):
    """Resident, and on disk with checkpointing, stopped and resumed; another precision gives other bits."""
    kind = {**KINDS["dit" if family in ("dit", "vit") else "mdlm"], "family": family, "depth": 4}
    wanted = {**kind, **HALF, "blocks": 2, "mem_budget": "4GB", "sample_grids": 0, "visit_steps": 3}
    one = edgeblocks.train(out=tmp_path / "one", tier="ram", checkpointing=False, **wanted)
    streamed = {**wanted, "tier": "disk", "checkpointing": True}
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "two", listener=StopAfter(8), **streamed)
    edgeblocks.resume(tmp_path / "two")
    assert_same_bits(one.path, tmp_path / "two", blocks=2)
    edgeblocks.train(out=tmp_path / "fp32", **{**wanted, "precision": "fp32"})
    with pytest.raises(AssertionError):
        assert_same_bits(one.path, tmp_path / "fp32", blocks=2)


def test_a_run_goes_on_in_another_precision_where_it_is_told_to(tmp_path):
    """Planned again, since activations take twice the room; config.yaml and plan.json have the new one."""
    with pytest.raises(InterruptedRunError):
        trained("dit", tmp_path / "run", listener=StopAfter(2), **HALF)
    former = json.loads((tmp_path / "run/plan.json").read_text())
    assert former["precision"] == "bf16"
    run = edgeblocks.resume(tmp_path / "run", precision="fp32")
    assert run.directory.precision == "fp32"
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["precision"] == "fp32"
    assert plan["breakdown"]["activations"] > 1.5 * former["breakdown"]["activations"]


def test_other_instructions_are_told_where_they_change_sums(tmp_path):
    """A run in bfloat16 that was begun on a processor with other instructions for it; float32 does not mind."""
    for precision, expected in (("bf16", "its instructions for bf16"), ("fp32", None)):
        run = trained("dit", tmp_path / precision, **{**HALF, "precision": precision, "steps": 1})
        env = json.loads((run.path / "env.json").read_text())
        (run.path / "env.json").write_text(json.dumps({**env, "bf16_instructions": "another"}))
        told = changed_environment(run.directory)
        assert told is None if expected is None else expected in told and "another" in told


def decided(precision, device="cpu", half=None, **where):
    settings = resolve_settings(
        {"family": "dit", "width": 64, "heads": 2, "batch": 8, "precision": precision},
        family_settings=lambda name: family_type(name).settings_type,
    )
    return with_precision(settings, ImageInfo(**IMAGE), device=device, half=half, **where).run.precision


def test_auto_is_decided_by_a_measurement_here_and_float32_elsewhere():
    """What was asked for stays; a machine that is not this one cannot be measured."""
    family = build_family("dit", {"width": 64, "heads": 2}, IMAGE, "diffusion")
    gain = half_gain(family, "bf16", samples=8)
    assert 0.01 < gain < 100
    if not 0.7 * WORTH_IT < gain < 1.4 * WORTH_IT:  # else two measurements may differ
        assert decided("auto") == ("bf16" if gain > WORTH_IT else "fp32")
    assert decided("auto", is_here=False) == "fp32"
    assert [decided(precision) for precision in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def test_a_precision_that_does_not_exist_is_refused_with_those_that_do():
    """`auto` among them."""
    with pytest.raises(ConfigError, match="precision='fp8': input should be 'auto', 'fp32', 'bf16' or 'fp16'"):
        decided("fp8")


def test_auto_on_a_gpu_is_the_half_precision_that_it_has():
    """bfloat16 from compute capability 8 on, float16 before, where bfloat16 is refused; so for machines elsewhere."""
    assert [decided("auto", device="cuda", half=half) for half in ("bf16", "fp16")] == ["bf16", "fp16"]
    with pytest.raises(ConfigError, match="this GPU has no bfloat16"):
        decided("bf16", device="cuda", half="fp16")
    small = {"family": "dit", "precision": "auto", "width": 64, "heads": 2, "depth": 3}
    for target, half in (("rtx3060-12gb", "bf16"), ("rtx2060-6gb", "fp16")):
        assert edgeblocks.plan(target=target, **small).plan.precision == half


def test_norms_on_a_gpu_are_traced_in_float32():
    """As torch.autocast computes them there: their inputs are copied, so that a step takes more than on a processor."""
    family = build_family("dit", {"width": 256, "heads": 4, "depth": 4}, FAMILIES["dit"], "diffusion")
    here, there = (traced_step(family, 4, 32, "plain", precision="bf16", device=kind) for kind in ("cpu", "cuda"))
    single = traced_step(family, 4, 32, "plain")
    assert here.peak_bytes < there.peak_bytes < single.peak_bytes


@pytest.mark.usefixtures("gpu_like")
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_beside_a_host_the_numbers_are_the_same(tmp_path, half):
    """A device with memory of its own, made of this processor, trains the same bits."""
    wanted = {**KINDS["dit"], "depth": 4, "precision": half, "steps": 3, "blocks": 2, "sample_grids": 0}
    here = edgeblocks.train(out=tmp_path / "here", mem_budget="4GB", **wanted)
    there = edgeblocks.train(out=tmp_path / "there", target="cuda", mem_budget="1GB", **wanted)
    assert_same_bits(here.path, there.path, blocks=2)


PRODUCTS = {
    "linear": lambda x: F.linear(x, x, x[0]),
    "operator": lambda x: x @ x,
    "matmul": lambda x: torch.matmul(x, x),
    "addmm": lambda x: torch.addmm(x, x, x),
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "convolution": lambda x: F.conv2d(x[None, None], x[None, None, :3, :3]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "norm": lambda x: F.layer_norm(x, (8,)),
    "activation": F.gelu,
    "sum": lambda x: (x @ x) + x,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_trace_rounds_what_autocast_rounds(name):
    """Networks of one's own say nothing of precision: on the meta device they give what they give on a processor."""
    here, traced = torch.randn(8, 8), torch.empty(8, 8, device="meta")
    with computing_in("bf16"):
        expected = PRODUCTS[name](here)
    with computing_in("bf16", "meta"):
        found = PRODUCTS[name](traced)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)


def test_nothing_is_rounded_in_float32():
    """Outside of half precision tensors pass as they are; inside, other types do."""
    x = torch.randn(3)
    assert lowered(x) is x
    with computing_in("bf16"):
        assert lowered(x).dtype == torch.bfloat16
        with computing_in("fp32"):
            assert lowered(x) is x
        assert lowered(x.double()).dtype == torch.float64 and lowered(torch.arange(3)).dtype == torch.int64
