"""Training with weights and EMA in bfloat16 (`master=bf16`): smaller files, equal bits, nearly the same losses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.commands import invoke
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS, SLOTS, trained, with_slots
from support.separate_memory import SeparateMemory

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDED = {"master": "bf16", "steps": 6}
BLOCKS = {"depth": 4, "blocks": 2, "mem_budget": "4GB", "sample_grids": 1, "sample_steps": 2, "visit_steps": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two blocks of a dit, resident."""
    out = tmp_path_factory.mktemp("rounded") / "run"
    return edgeblocks.train(out=out, tier="ram", checkpointing=False, **{**KINDS["dit"], **BLOCKS, **ROUNDED})


def test_blocks_stream_and_resume_without_changing_a_bit(run, tmp_path):
    """On disk with checkpointing, stopped in the middle of a visit and resumed."""
    streamed = {**KINDS["dit"], **BLOCKS, **ROUNDED, "tier": "disk", "checkpointing": True}
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "two", listener=StopAfter(7), **streamed)
    again = edgeblocks.resume(tmp_path / "two")
    assert_same_bits(run.path, again.path, blocks=2)
    assert again.summary["metrics"]["validation"] == run.summary["metrics"]["validation"]


@pytest.mark.usefixtures("gpu_like")
def test_beside_a_device_blocks_are_those_of_the_processor(run, tmp_path):
    """Bit for bit; blocks on the device are of 6 bytes a parameter."""
    wanted = {**KINDS["dit"], **BLOCKS, **ROUNDED, "target": "cuda", "mem_budget": "2GB", "ram_budget": "4GB"}
    there = edgeblocks.train(out=tmp_path / "there", tier="ram", **wanted)
    assert_same_bits(run.path, there.path, blocks=2)
    block_bytes = there.directory.store().layouts[0].num_bytes
    assert set(SeparateMemory.newest.device_buffers) == {block_bytes}


@pytest.mark.parametrize(("kind", "clip_by"), [("ar", "stage"), ("dit", "network")])
def test_exact_training_streams_and_resumes_without_changing_a_bit(tmp_path, kind, clip_by):
    """Stages in memory, and on disk, stopped and resumed, with either clipping."""
    made = {"blocks": 4, "clip_by": clip_by, "clip": 0.5, "master": "bf16", "steps": 4}
    resident = trained(kind, tmp_path / "run", tier="ram", **made)
    with pytest.raises(InterruptedRunError):
        trained(kind, tmp_path / "begun", listener=StopAfter(2), tier="disk", visit_steps=3, **made)
    again = edgeblocks.resume(with_slots(tmp_path / "begun", resident, SLOTS[kind][0]))
    assert_same_bits(resident.path, again.path, blocks=4)
    assert again.summary["metrics"]["validation"] == resident.summary["metrics"]["validation"]


def test_a_file_has_six_bytes_a_parameter_and_is_plain_safetensors(run):
    """Weights and EMA are bfloat16, moments as before; the plan knows."""
    store = run.directory.store()
    layout = store.layouts[0]
    tensors = load_file(store.path(0))
    kinds = {name.partition(".")[0]: tensor.dtype for name, tensor in tensors.items() if "optimizer" not in name}
    assert kinds == {"weights": torch.bfloat16, "ema": torch.bfloat16}
    assert store.path(0).stat().st_size <= store.file_bytes(0)
    assert sum(tensor.nbytes for tensor in tensors.values()) == layout.num_bytes
    moments = layout.part_span("optimizer")[1]
    assert layout.num_bytes == 4 * layout.num_parameters + moments
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["master"] == "bf16"
    assert plan["candidates"][0]["block_bytes"] == layout.num_bytes


@pytest.mark.parametrize("last", [False, True])
def test_weights_are_written_as_float32_and_begun_with(run, tmp_path, last):
    """The file and the network for torch hold what the blocks do, and a run that begins with it has that again."""
    run.save_weights(tmp_path / "w.safetensors", last=last)
    written = load_file(tmp_path / "w.safetensors")
    network = run.network(last=last)
    part = "weights" if last else "ema"
    kept = load_file(run.directory.store().path(1))
    for name, value in network.named_parameters():
        assert value.dtype == written[name].dtype == torch.float32
        assert torch.equal(value.detach(), written[name])
        if name.startswith("block_1."):
            assert torch.equal(value.detach(), kept[f"{part}.{name.removeprefix('block_1.')}"].float())
    wanted = {**KINDS["dit"], **BLOCKS, **ROUNDED, "init": str(tmp_path / "w.safetensors"), "learning_rate": 1e-30}
    again = edgeblocks.train(out=tmp_path / "again", **{**wanted, "steps": 1, "sample_grids": 0})
    begun = load_file(again.directory.store().path(1))
    names = [name.removeprefix("ema.") for name in kept if name.startswith("ema.")]
    assert all(torch.equal(begun[f"weights.{name}"], kept[f"{part}.{name}"]) for name in names)


def test_samples_and_evaluation_after_training_are_those_in_it(run):
    """With the run's slots and a copy in between, and from its files."""
    assert run.evaluate()["validation"]["total"] == run.summary["metrics"]["validation"]["total"]
    assert list((run.path / "samples").iterdir())


def test_losses_are_nearly_those_of_float32_and_the_plan_says_what_is_saved(run, tmp_path):
    """Within 1 % after six steps; what waits takes six tenths, and the resident block no more than before."""
    single = edgeblocks.train(out=tmp_path / "fp32", tier="ram", **{**KINDS["dit"], **BLOCKS, "steps": 6})
    ours, theirs = (one.summary["metrics"]["validation"]["total"] for one in (run, single))
    assert 0 < abs(ours / theirs - 1) < 0.01
    plans = [json.loads((one.path / "plan.json").read_text()) for one in (run, single)]
    parameters = run.directory.store().layouts[0].num_parameters
    rounded, plain = (plan["breakdown"] for plan in plans)
    slots = plans[0]["slots"]
    assert rounded["weights"] == (2 * slots + 4) * parameters and plain["weights"] == 4 * slots * parameters
    assert rounded["ema"] == 2 * slots * parameters and rounded["gradients"] == plain["gradients"] == 4 * parameters


def test_the_setting_stays_as_it_was(run):
    """A resumed run refuses another one, with the way out; and there is no third."""
    result = invoke("train", "--resume", run.path, "--set", "master=fp32")
    assert result.exit_code == 2
    assert "leave out --set master=fp32, or start a new run with --out" in result.output
    with pytest.raises(ConfigError, match="master"):
        edgeblocks.plan(master="fp16")
    assert edgeblocks.load(run.path).directory.master == "bf16"
