"""Some layers trained between frozen ones: the numbers of an ordinary loop, streamed, resumed, merged, written with."""

import pytest
import torch
from safetensors.torch import load_file
from support.commands import assert_refused, invoke
from support.equality import StopAfter, assert_same_bits

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.pretrained.frozen_layers import FrozenLayers
from edgeblocks.runs.open_data import data_of
from edgeblocks.tuning import tuning_settings

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"length": 24, "batch": 3, "steps": 4, "warmup": 0, "mem_budget": "4GB", "micro_batch": 2, "tune": "blocks"}
WANTED |= {"precision": "fp32"}
WANTED |= {"train_blocks": "1,2", "learning_rate": 1e-3, "optimizer": "adamw"}


@pytest.fixture(scope="module", params=["none", "int8"])
def tuned(request, model, text, tmp_path_factory):
    """The two layers in the middle, in one stage."""
    out = tmp_path_factory.mktemp("part") / "run"
    return edgeblocks.finetune(model, data=text, out=out, quantize=request.param, **WANTED)


def rounded(library, model, kind):
    """The library's whole network, the layers that are frozen as they are read."""
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    frozen = FrozenLayers(str(model), kind, torch.device("cpu"))
    read = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for number in (0, 3):
        frozen.bind_(read.model.layers[number], number)
        frozen.load_(number)
        network.model.layers[number].load_state_dict(read.model.layers[number].state_dict())
    return network


def test_it_trains_as_the_library_does_between_rounded_layers(tuned, model, library):
    """Losses of every step and weights at the end; gradients go down through the layer above."""
    network = rounded(library, model, tuned.directory.settings.family.quantize)
    layers = network.model.layers[1:3].requires_grad_(True)
    optimizer = torch.optim.AdamW(layers.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    data = data_of(tuned.directory.settings.run, lambda *_: None)
    order = data.order(batch=3, seed=0, block=0)
    for step, record in enumerate(tuned.directory.metrics()):
        tokens = torch.from_numpy(data.gather(order.indices(step))[0])
        loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        assert record["loss"] == pytest.approx(loss.item(), rel=2e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    theirs, family = dict(network.named_parameters()), tuned.directory.family()
    stored = load_file(tuned.directory.store().path(0))
    names = [name for name in stored if name.startswith("weights.")]
    assert len(names) == 2 * 9
    for name in names:
        expected = theirs[family.name_in_file(tuned.directory.tensor_name(0, name.removeprefix("weights.")))].detach()
        assert torch.allclose(stored[name].view(expected.shape), expected, rtol=1e-3, atol=2e-4), name
    metrics = tuned.summary["metrics"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"]


def test_in_stages_streamed_stopped_and_resumed_it_gives_the_same_bits(tuned, model, text, tmp_path):
    settings = tuning_settings(model, {**WANTED, "data": str(text), "clip_by": "network", "quantize": "int8"})
    whole = edgeblocks.train(out=tmp_path / "whole", **{**settings, "blocks": 2, "tier": "ram"})
    with pytest.raises(InterruptedRunError):
        stop = StopAfter(2)
        edgeblocks.train(out=tmp_path / "run", listener=stop, **{**settings, "blocks": 2, "tier": "disk"})
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(whole.path, again.path, blocks=2)
    assert whole.summary["metrics"]["validation"] == again.summary["metrics"]["validation"]


def test_merged_it_differs_in_the_trained_layers_alone(tuned, model, library, tmp_path):
    merged = tuned.merge(tmp_path / "merged")
    assert (merged["trained"], merged["untouched"]) == (2 * 9, 2 * 9 + 2)
    for path in model.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "merged" / path.name)
        for name, value in before.items():
            assert torch.equal(after[name], value) != (".layers.1." in name or ".layers.2." in name), name
    library.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_it_writes_as_the_model_that_it_merges_into(model, text, tmp_path):
    run = edgeblocks.finetune(model, data=text, out=tmp_path / "run", quantize="none", **WANTED)
    run.merge(tmp_path / "merged")
    asked = {"prompt": "the sea was calm and", "temperature": 0}
    with edgeblocks.writer(tmp_path / "merged", mem_budget="4GB") as merged:
        assert merged.continued(**asked, length=16) == run.sample_text(n=1, **asked, length=16)


def test_what_cannot_be_tuned_so_is_refused(model, text):
    asked = ["finetune", model, "--data", text, "--length", "16", "--dry-run", "--tune", "blocks"]
    assert_refused(invoke(*asked), 2, "--train-blocks 2,3 trains the last ones")
    assert_refused(invoke(*asked, "--train-blocks", "0,2"), 2, "that follow each other")
    assert_refused(invoke(*asked, "--train-blocks", "4"), 2, "some of 0 to 3")
    assert_refused(invoke(*asked, "--train-blocks", "last"), 2, "needs --train-blocks")
    assert_refused(invoke(*asked, "--train-blocks", "1", "--blocks", "9"), 2, "cut into 1 to 4")
    assert_refused(invoke(*asked, "--train-blocks", "1", "--lora-rank", "4"), 2, "these belong to --tune lora")
    settings = tuning_settings(model, {**WANTED, "train_blocks": "1", "blocks": 2, "data": str(text)})
    assert (settings["first_layer"], settings["trained_layers"]) == (2, 2)
    with pytest.raises(ConfigError, match="has layers 0 to 3"):
        edgeblocks.plan(**{**settings, "first_layer": 3})
