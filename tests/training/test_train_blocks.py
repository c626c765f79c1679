"""Some stages are trained end to end while the others are frozen."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file
from support.commands import invoke
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS, SLOTS, plain_training, trained, whole_weights, with_slots
from support.made_up_plans import MACHINE, REQUEST, costs

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError, RunError
from edgeblocks.methods import EXACT
from edgeblocks.planning.planner import make_plan
from edgeblocks.planning.stage_order import traffic_of_a_step, uses_of_a_step
from edgeblocks.registry import build_family

pytestmark = pytest.mark.usefixtures("one_thread")

MADE = {"blocks": 4, "tier": "ram", "optimizer": "adamw", "clip": 1e9, "steps": 8}
CASES = [("dit", "0,3"), ("vit", "2,3"), ("mdlm", "1")]


def random_weights(kind, path):
    """A file of random weights, no part of which is zero."""
    prepared = edgeblocks.plan(**KINDS[kind], method="exact", mem_budget="4GB")
    told = prepared.settings
    family = build_family(told.run.family, asdict(told.family), asdict(prepared.data), "exact")
    network, generator = family.block(num_layers=6, checkpointing=False), torch.Generator().manual_seed(0)
    named = network.named_parameters()
    save_file({name: 0.1 * torch.randn(parameter.shape, generator=generator) for name, parameter in named}, path)
    return str(path)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def run(request, tmp_path_factory):
    """A run with some of its four stages trained, all in memory."""
    kind, numbers = request.param
    out = tmp_path_factory.mktemp(kind) / "run"
    made = dict(MADE)
    if "3" not in numbers:  # a frozen readout of zeros would let nothing be learned
        made["init"] = random_weights(kind, out.with_name("init.safetensors"))
    return kind, {**made, "train_blocks": numbers}, trained(kind, out, train_blocks=numbers, **made)


def test_it_is_plain_pytorch_with_frozen_parameters(run):
    """requires_grad_(False) on these parameters and torch.optim.AdamW on the rest: losses and weights, bit for bit.

    The frozen ones are what they were, and what their average is.
    """
    _, settings, made = run
    numbers = settings["train_blocks"]
    named, losses = plain_training(made, steps=8)
    records = list(made.directory.metrics())
    assert [record["loss"] for record in records] == losses and len(set(losses)) == 8
    assert all(record["gradient_norm"] > 0 for record in records)
    weights = whole_weights(made)
    for name, parameter in named.items():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy(), err_msg=name)
    frozen = [stage for stage in range(4) if str(stage) not in numbers.split(",")]
    for stage in frozen:
        tensors = load_file(made.path / "blocks" / f"block_{stage:03d}.safetensors")
        assert all(tensors[f"ema.{own[8:]}"].tobytes() == value.tobytes() for own, value in tensors.items()
                   if own.startswith("weights."))  # fmt: skip
        assert sum(value.size for name, value in tensors.items() if name.startswith("optimizer.")) == 0
    assert made.summary["trained_blocks"] == [int(number) for number in numbers.split(",")]


def test_streamed_stages_give_the_bits_of_resident_ones(run, tmp_path):
    """With checkpoints every three steps, and activation checkpointing; frozen files are never written again.

    One, two or three stages are in memory: with one family all numbers, with each other one of them (`SLOTS`).
    """
    kind, settings, made = run
    settings = {**settings, "tier": "disk", "checkpointing": True, "visit_steps": 3}
    with pytest.raises(InterruptedRunError):
        trained(kind, tmp_path / "begun", listener=StopAfter(1), **settings)
    for slots in SLOTS[kind]:
        out = with_slots(tmp_path / "begun", made, slots)
        files = [out / "blocks" / f"block_{stage:03d}.safetensors" for stage in range(4)]
        born = [path.stat().st_mtime_ns for path in files]
        again = edgeblocks.resume(out)
        assert_same_bits(made.path, again.path, blocks=4)
        assert again.summary["metrics"]["validation"] == made.summary["metrics"]["validation"]
        written = [path.stat().st_mtime_ns != before for path, before in zip(files, born, strict=True)]
        assert written == list(made.directory.trained)
        assert edgeblocks.resume(out).summary == again.summary  # finished, though frozen stages made no step


def test_what_was_trained_in_part_is_used_as_any_other(run, tmp_path):
    """Its files have different sizes, and the one with most bytes need not be the one with most weights.

    Exported is one family: what is traced does not know which stages were trained.
    """
    kind, _, made = run
    assert made.evaluate(samples=2)["steps"] == [8] * 4
    if kind == "vit":
        made.export(tmp_path / "onnx")
    written = made.save_weights(tmp_path / "weights.safetensors")
    assert written["tensors"] == len(whole_weights(made))


@given(
    trained=st.lists(st.booleans(), min_size=1, max_size=7).filter(any).map(tuple),
    slots=st.integers(1, 7),
)
def test_frozen_stages_are_never_put_away_and_save_traffic(trained, slots):
    """Fewer trained stages never move more; below the lowest trained one nothing runs backward."""
    some, whole = traffic_of_a_step(trained, slots), traffic_of_a_step((True,) * len(trained), slots)
    assert some.offloaded <= min(sum(trained), whole.offloaded)
    assert some.rest_loaded <= sum(trained)
    uses = uses_of_a_step(trained)
    assert min(use.stage for use in uses if use.backward) == trained.index(True)
    assert all(trained[use.stage] for use in uses if use.changes)


def test_a_plan_knows_what_is_frozen():
    """Less time, fewer bytes written and less disk than with all stages trained, and no more memory."""
    request = replace(REQUEST, method=EXACT, blocks=6, tier="disk")
    whole, some = (make_plan(costs(), MACHINE, replace(request, trained=one)).chosen for one in (None, (4, 5)))
    assert some.step_s < 0.7 * whole.step_s
    assert some.bytes_written < 0.5 * whole.bytes_written
    assert some.disk_bytes < 0.7 * whole.disk_bytes
    assert some.predicted_peak_bytes <= whole.predicted_peak_bytes


def test_the_budget_cuts_as_if_all_were_trained():
    """The fastest plan must not be the one that trains least; and where the cut is the budget's, the plan says so."""
    request = replace(REQUEST, method=EXACT, budget_bytes=400_000_000)
    whole, some = (make_plan(costs(), MACHINE, replace(request, trained=one)) for one in (None, (0,)))
    assert some.chosen.blocks == whole.chosen.blocks > 1
    assert any(f"--blocks {some.chosen.blocks} fixes the cut" in warning for warning in some.warnings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"blocks": 2, "train_blocks": "1,2"}, "cut into 2 stages, 0 to 1; name these, or .* --blocks 3"),
        ({"train_blocks": "2"}, "cut into 1 stage, stage 0; name these, or cut it into more with --blocks 3"),
        ({"train_blocks": "two"}, "numbers of blocks are needed"),
        ({"train_blocks": "-1"}, "numbers of blocks are needed"),
        (
            {"train_blocks": "1,2", "method": "diffusion"},
            "with --method diffusion there is nothing to choose.*use --method exact",
        ),
    ],
)
def test_stages_that_are_not_there_are_refused(settings, told):
    wanted = {**KINDS["vit"], "method": "exact", "mem_budget": "4GB", **settings}
    with pytest.raises(ConfigError, match=told):
        edgeblocks.plan(**wanted)


@pytest.mark.parametrize(("numbers", "told"), [("0,1", True), ("1,2", False)])
def test_a_readout_that_stays_zero_is_told(numbers, told):
    """A readout begins with zeros, and while it is frozen nothing below it can learn; a file may have another one."""
    wanted = {**KINDS["vit"], "method": "exact", "mem_budget": "4GB", "blocks": 3, "train_blocks": numbers}
    warnings = edgeblocks.plan(**wanted).plan.warnings
    assert any("stage 2, which has the readout, is frozen" in warning for warning in warnings) == told


def test_stages_that_a_plan_does_not_have_are_a_damaged_run(run, tmp_path):
    _, settings, made = run
    numbers = settings["train_blocks"]
    (tmp_path / "run").mkdir()
    for name in ("plan.json", "manifest.json", "config.yaml", "tokenizer.json"):
        if (made.path / name).exists():
            (tmp_path / "run" / name).write_text((made.path / name).read_text())
    text = (tmp_path / "run/config.yaml").read_text().rpartition("# sha256")[0]
    (tmp_path / "run/config.yaml").write_text(text.replace(f"train_blocks: {numbers}", "train_blocks: 7").replace(
        f"train_blocks: '{numbers}'", "train_blocks: '7'"))  # fmt: skip
    with pytest.raises(RunError, match=r"trains the blocks 7 and plan\.json has 4"):
        edgeblocks.load(tmp_path / "run")


def test_the_command_says_what_is_trained(tmp_path):
    """On the plan, and in `info` of the run."""
    small = [f"--set={key}={value}" for key, value in KINDS["vit"].items() if key not in ("family", "batch", "data")]
    common = ["vit", "--method", "exact", *small, "--batch", "16", "--mem-budget", "4GB", "--steps", "2"]
    common += ["--blocks", "3", "--train-blocks", "1,2"]
    done = invoke("plan", *common)
    assert (
        "in 3 stages of 2 layers, of which 1, 2 (the first is 0) trained end to end, the others frozen" in done.stdout
    )
    done = invoke("train", *common, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert "trained_stages    1, 2" in invoke("info", tmp_path / "run").stdout
    done = invoke("plan", *common[:-1], "3")
    assert done.exit_code == 2 and "--train-blocks 3: the network is cut into 3 stages, 0 to 2" in done.stderr
