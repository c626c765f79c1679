"""`--set ema_length=0`: no average of the weights is kept, and the last ones stand for it."""

import json

import pytest
from safetensors.numpy import load_file
from support.equality import SMALL, StopAfter, assert_same_bits, block_tensors

import edgeblocks
from edgeblocks.errors import InterruptedRunError

KINDS = {
    "diffusion": {},
    "bf16": {"master": "bf16"},
    "begun as one": {"shared": 0.5},
    "exact": {"method": "exact"},
    "exact, clipped together": {"method": "exact", "clip_by": "network", "optimizer": "adamw"},
    "greedy": {"method": "greedy", "window": 4, "grow": "equal", "blocks": None},
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_a_run_with_an_average(tmp_path, kind):
    """Bit for bit, also on disk and resumed; files have no average, and what is evaluated is the last weights.

    Where a network grows, the average is what the next window begins with, so the weights are others there.
    """
    wanted = {**SMALL, "width": 32, "steps": 8, "mem_budget": "4GB", "visit_steps": 3, "micro_batch": 8, **KINDS[kind]}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    blocks = 2 if kind == "greedy" else 3
    usual = edgeblocks.train(out=tmp_path / "usual", tier="ram", **wanted)
    run = edgeblocks.train(out=tmp_path / "run", tier="ram", ema_length=0, **wanted)
    edgeblocks.train(out=tmp_path / "streamed", tier="disk", ema_length=0, **wanted)
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "resumed", tier="disk", ema_length=0, listener=StopAfter(5), **wanted)
    edgeblocks.resume(tmp_path / "resumed")
    for other in ("streamed", "resumed"):
        assert_same_bits(tmp_path / "run", tmp_path / other, blocks)

    if kind not in ("greedy", "bf16"):
        ours, theirs = (block_tensors(tmp_path / name, blocks) for name in ("run", "usual"))
        assert {name for _, name in theirs.keys() - ours.keys()} == {
            name for _, name in theirs if name.startswith("ema.")
        }
        # Begun as one, blocks are copies of its last weights in either case.
        assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())

    for name, last in (("average", False), ("last", True)):
        run.save_weights(tmp_path / f"{name}.safetensors", last=last)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("average", "last"))
    assert one.keys() == two.keys() and all(one[name].tobytes() == two[name].tobytes() for name in one)
    assert run.sample(n=2, steps=3).shape == usual.sample(n=2, steps=3).shape
    rounded = edgeblocks.load(tmp_path / "run", frozen="int8").evaluate(samples=8)["validation_loss"]
    assert rounded == pytest.approx(run.evaluate(samples=8)["validation_loss"], rel=0.05)


@pytest.mark.parametrize("method", ["diffusion", "exact"])
def test_the_plan_counts_no_average(method):
    """Neither in memory nor on disk: a block of 8-bit moments has 6 bytes a parameter and not 10."""
    wanted = {"data": "digits", "method": method, "blocks": 3, "depth": 6, "width": 256, "mem_budget": "4GB"}
    usual, ours = (
        edgeblocks.plan(**wanted, shared=0, ema_length=length).plan.chosen
        if method == "diffusion"
        else edgeblocks.plan(**wanted, ema_length=length).plan.chosen
        for length in (0.1, 0)
    )
    assert usual.breakdown["ema"] == usual.breakdown["weights"] and ours.breakdown["ema"] == 0
    assert usual.predicted_peak_bytes - ours.predicted_peak_bytes > 0.99 * usual.breakdown["ema"]
    assert ours.block_bytes == pytest.approx(0.6 * usual.block_bytes, rel=0.02)
    assert ours.bytes_written == pytest.approx(0.6 * usual.bytes_written, rel=0.02)


def test_an_export_is_that_of_the_last_weights(tmp_path):
    """Verified against torch as any; its manifest and files say nothing of an average."""
    run = edgeblocks.train(out=tmp_path / "run", steps=4, mem_budget="4GB", ema_length=0, **{**SMALL, "width": 16})
    run.export(tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx/manifest.json").read_text())["family"] == "dit"
    assert edgeblocks.open_export(tmp_path / "onnx").sample(n=1, steps=3).shape == (1, 8, 8, 1)
