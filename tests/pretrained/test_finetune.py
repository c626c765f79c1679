"""Fine-tuning a pretrained decoder: the numbers of the library's own training, streamed, resumed, merged."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.commands import assert_refused, invoke
from support.equality import StopAfter, assert_same_bits

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError, RunError
from edgeblocks.runs.open_data import data_of

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"length": 24, "batch": 3, "steps": 4, "warmup": 0, "blocks": 2, "mem_budget": "4GB", "optimizer": "adamw"}
WANTED |= {"hold_out": 0.1, "learning_rate": 1e-3, "micro_batch": 2}


@pytest.fixture(scope="module")
def tuned(model, text, tmp_path_factory):
    """A run that nothing stopped, all stages in memory."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    return edgeblocks.finetune(model, data=text, out=out, tier="ram", **WANTED)


def test_streamed_stopped_and_resumed_it_gives_the_same_bits(tuned, model, text, tmp_path):
    with pytest.raises(InterruptedRunError):
        edgeblocks.finetune(model, data=text, out=tmp_path / "run", tier="disk", listener=StopAfter(2), **WANTED)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(tuned.path, again.path, blocks=2)
    one, other = (run.summary["metrics"] for run in (tuned, again))
    assert one["validation"] == other["validation"]
    assert one["validation_loss_before"] == other["validation_loss_before"]


def test_it_trains_as_the_library_does(tuned, model, library):
    """Losses and weights of transformers' model under torch.optim.AdamW, its tables and its last norm frozen."""
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    network.requires_grad_(False)
    layers = network.model.layers.requires_grad_(True)
    decayed = [parameter for parameter in layers.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in layers.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others}], betas=(0.9, 0.99), weight_decay=0.0)
    records, data = tuned.directory.metrics(), data_of(tuned.directory.settings.run, lambda *_: None)
    order = data.order(batch=3, seed=0, block=0)
    for step, record in enumerate(records):
        tokens = torch.from_numpy(data.gather(order.indices(step))[0])
        loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        for half in (layers[:2], layers[2:]):  # each stage is clipped by its own norm
            torch.nn.utils.clip_grad_norm_(half.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    family = tuned.directory.family()
    theirs = dict(network.named_parameters())
    stored = [load_file(tuned.directory.store().path(stage)) for stage in range(2)]
    for stage, tensors in enumerate(stored):
        for name, value in tensors.items():
            part, _, own = name.partition(".")
            if part == "weights":
                expected = theirs[family.name_in_file(tuned.directory.tensor_name(stage, own))].detach()
                np.testing.assert_allclose(value.view(expected.shape), expected, rtol=1e-3, atol=2e-4, err_msg=name)


def test_perplexity_is_told_before_and_after(tuned, model, library, capsys):
    """Of the same windows; before it is that of the model as it is."""
    metrics = tuned.summary["metrics"]
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    data = data_of(tuned.directory.settings.run, lambda *_: None)
    tokens = torch.from_numpy(data.gather(data.evaluation_indices(64))[0])
    with torch.no_grad():
        expected = network(input_ids=tokens, labels=tokens).loss.item()
    assert metrics["validation_loss_before"] == pytest.approx(expected, rel=1e-5)
    assert metrics["validation_loss"] < expected
    assert tuned.evaluate(samples=4)["validation_loss"] == pytest.approx(metrics["validation_loss"], rel=0.05)


def test_what_was_merged_loads_and_the_rest_is_untouched(tuned, model, library, tmp_path):
    """The same files and types; logits are those of the run's network, rounded to them."""
    merged = tuned.merge(tmp_path / "merged")
    assert merged["trained"] == 4 * 9 and merged["untouched"] == 2
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
            continue
        before, after = load_file(path), load_file(tmp_path / "merged" / path.name)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name].dtype == value.dtype == torch.bfloat16
            assert torch.equal(after[name], value) == (".layers." not in name), name
    tokens = torch.arange(20).view(1, 20)
    found = library.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    network, family = tuned.network(), tuned.directory.family()
    with torch.no_grad():
        hidden, nothing = family.enter(network, {"tokens": tokens})
        expected = family.shell("cpu").leave(network.through_stage(hidden, nothing, checkpointing=False))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert_refused(invoke("merge", tuned.path, "-o", tmp_path / "merged"), 2, "something already")


def test_another_model_in_its_place_is_noticed(tuned, model, text, tmp_path, library):
    """Tensors that are not trained are read from the folder: neither resume nor merge takes another one's."""
    import shutil

    moved = tmp_path / "model"
    shutil.copytree(model, moved)
    with pytest.raises(InterruptedRunError):
        edgeblocks.finetune(moved, data=text, out=tmp_path / "run", listener=StopAfter(2), **WANTED)
    shard = sorted(moved.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for act in (edgeblocks.resume, lambda path: edgeblocks.load(path).merge(tmp_path / "merged")):
        with pytest.raises(RunError, match="is not the model that"):
            act(tmp_path / "run")
    assert not (tmp_path / "merged").exists()


def test_the_command_line(model, text, tmp_path):
    """The plan; a training with its perplexity, which says what stays as it is; what cannot be done with such a run."""
    asked = ["finetune", model, "--data", text, "--length", "16", "--batch", "2", "--steps", "2", "--mem-budget", "4GB"]
    planned = invoke(*asked, "--dry-run")
    assert planned.exit_code == 0 and "trained end to end" in planned.stdout, planned.output
    done = invoke(*asked, "--out", tmp_path / "run")
    assert done.exit_code == 0 and "perplexity on held-out text" in done.stdout, done.output
    assert "stay as they are without --train-embeddings" in " ".join(done.stderr.split())
    assert f"edgeblocks merge {tmp_path / 'run'}" in done.stdout.replace("\n", "")
    before = json.loads((tmp_path / "run/before.json").read_text())["total"]
    assert f"{math.exp(before):.2f} before" in done.stdout
    assert_refused(invoke("sample", tmp_path / "run"), 2, "give a --prompt")
    assert_refused(invoke(*asked, "--set", "method=diffusion"), 2, "fine-tuning sets this itself")


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"master": "bf16"}, {"boundaries": "disk"}])
def test_in_fewer_bits_streamed_is_resident(model, text, tmp_path, settings):
    runs = [
        edgeblocks.finetune(model, data=text, out=tmp_path / tier, tier=tier, **WANTED, **settings)
        for tier in ("ram", "disk")
    ]
    assert_same_bits(runs[0].path, runs[1].path, blocks=2)


def test_a_model_of_another_method_is_refused(model, text):
    with pytest.raises(ConfigError, match="is trained end to end"):
        edgeblocks.plan(family="hf", model=str(model), data=text, method="diffusion", sample_grids=0)
    with pytest.raises(ConfigError, match="name its folder"):
        edgeblocks.plan(family="hf", data=text, method="exact", sample_grids=0)
