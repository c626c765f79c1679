"""Training the table of tokens and the head with the layers: the library's own training, whole, tied and untied."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.commands import assert_refused, invoke
from support.equality import StopAfter, assert_same_bits
from support.small_model import write_model, write_tokenizer, written_by_the_library

import edgeblocks
from edgeblocks.errors import InterruptedRunError
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.inference.staged_weights import StagedEma
from edgeblocks.runs.open_data import data_of

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"length": 24, "batch": 3, "steps": 4, "warmup": 0, "blocks": 2, "mem_budget": "4GB", "optimizer": "adamw"}
WANTED |= {"hold_out": 0.1, "learning_rate": 1e-3, "micro_batch": 2, "train_embeddings": True}


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, library, tmp_path_factory):
    """A model with one matrix for both tables, and one with two; in float32, so that nothing of it is rounded."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    write_model(path, tied=request.param == "tied", dtype="float32")
    return path


@pytest.fixture(scope="module")
def tuned(folder, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("tables") / "run"
    return edgeblocks.finetune(folder, data=text, out=out, tier="ram", **WANTED)


def test_it_trains_as_the_library_does(tuned, folder, library):
    """Losses, norms of the whole gradient, and all weights at the end, under torch.optim.AdamW."""
    network = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    data = data_of(tuned.directory.settings.run, lambda *_: None)
    order = data.order(batch=3, seed=0, block=0)
    for step, record in enumerate(tuned.directory.metrics()):
        tokens = torch.from_numpy(data.gather(order.indices(step))[0])
        loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    theirs, family, seen = dict(network.named_parameters()), tuned.directory.family(), set()
    for stage in range(2):
        for name, value in load_file(tuned.directory.store().path(stage)).items():
            part, _, own = name.partition(".")
            if part == "weights":
                known = family.name_in_file(tuned.directory.tensor_name(stage, own))
                expected = theirs[known].detach()
                np.testing.assert_allclose(value.view(expected.shape), expected, rtol=1e-3, atol=2e-4, err_msg=known)
                seen.add(known)
    assert seen == theirs.keys()


def test_streamed_stopped_and_resumed_it_gives_the_same_bits(tuned, folder, text, tmp_path):
    with pytest.raises(InterruptedRunError):
        edgeblocks.finetune(folder, data=text, out=tmp_path / "run", tier="disk", listener=StopAfter(2), **WANTED)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(tuned.path, again.path, blocks=2)
    assert tuned.summary["metrics"]["validation_loss"] == again.summary["metrics"]["validation_loss"]


def test_both_copies_of_a_tied_table_stay_one(tuned, folder):
    """Weights, average and moments."""
    family = tuned.directory.family()
    if family.tied_parameters is None:
        assert family.shell("meta").is_tied is False
        return
    first, last = (load_file(tuned.directory.store().path(stage)) for stage in range(2))
    for part in ("weights", "ema"):
        assert torch.equal(first[f"{part}.table.weight"], last[f"{part}.readout.head"])


def test_a_look_at_a_tied_table_holds_it_once(tuned):
    """In the memory of the gradients, or in a copy; where there are two matrices they stay two."""
    family, spare = tuned.directory.family(), torch.empty(2**20)
    for memory in (None, spare):
        with torch.device("meta"):
            network = family.block(num_layers=family.num_layers, checkpointing=False)
        source = EmaLoader(tuned.directory.store(), slots=2)
        staged = StagedEma(source, tuned.directory.file_layers, spare=memory, tied=family.tied_parameters)
        with staged.ema_weights(0) as weights:
            weights.bind_(network)
        table, head = network.get_parameter("table.weight"), network.get_parameter("readout.head")
        assert (table.data_ptr() == head.data_ptr()) == family.shell("meta").is_tied
        values = load_file(tuned.directory.store().path(1))["ema.readout.head"]
        assert torch.equal(head, values.view(head.shape))


def test_it_is_merged_and_evaluated(tuned, folder, library, tmp_path):
    """Nothing stays as it was; the perplexity that was told is that of the merged model."""
    merged = tuned.merge(tmp_path / "merged")
    assert merged["untouched"] == 0
    network = library.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    data = data_of(tuned.directory.settings.run, lambda *_: None)
    tokens = torch.from_numpy(data.gather(data.evaluation_indices(64))[0])
    with torch.no_grad():
        expected = network(input_ids=tokens, labels=tokens).loss.item()
    assert tuned.summary["metrics"]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    before = (
        network.get_input_embeddings().weight
        - library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight
    )
    assert before.abs().max() > 0


def test_without_an_average_the_last_weights_are_merged(tuned, folder, library, text, tmp_path):
    """The same as `merge --last` of the run that kept one, whatever is asked for."""
    run = edgeblocks.finetune(folder, data=text, out=tmp_path / "run", tier="disk", ema_length=0, **WANTED)
    run.merge(tmp_path / "ours")
    tuned.merge(tmp_path / "theirs", last=True)
    ours, theirs = (
        library.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("ours", "theirs")
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_norms_before_the_layers_stay_as_they_are(library, text, tmp_path):
    """bloom's: a copy of them would be shrunk by weight decay and counted as trained, while the model's own is used."""
    torch.manual_seed(0)
    config = library.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    network = library.BloomForCausalLM(config)
    torch.nn.init.normal_(network.transformer.word_embeddings_layernorm.weight)
    network.save_pretrained(tmp_path / "bloom")
    write_tokenizer(tmp_path / "bloom")
    wanted = {**WANTED, "steps": 2, "weight_decay": 0.1, "learning_rate": 1e-2}
    run = edgeblocks.finetune(tmp_path / "bloom", data=text, out=tmp_path / "run", **wanted)
    merged = run.merge(tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("bloom", "merged"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == {name for name in before if "word_embeddings_layernorm" in name} and len(same) == 2
    assert (merged["trained"], merged["untouched"]) == (len(before) - 2, 2)


def test_what_does_not_go_with_it(model, text, tmp_path):
    """Other ways of tuning; clipping by stages, where one matrix is trained in two."""
    asked = ["finetune", model, "--data", text, "--train-embeddings", "--mem-budget", "4GB", "--out", tmp_path / "run"]
    assert_refused(invoke(*asked, "--tune", "lora"), 2, "tables of tokens are trained with --tune full")
    assert_refused(
        invoke(*asked, "--length", "24", "--batch", "2", "--set", "clip_by=stage"), 2, "needs clip_by=network"
    )


def test_text_is_written_with_what_was_trained(tuned, library, tmp_path):
    """The greedy text of `generate` with the merged model, of prompts and of messages."""
    merged = tmp_path / "merged"
    tuned.merge(merged)
    with tuned.writer() as writer:
        for prompt in ("the sea", "a captain saw", "whale ship crew"):
            expected = written_by_the_library(library, merged, prompt, 16)
            length = len(writer.tokenizer.encode(prompt)) + 16
            assert writer.continued(prompt, temperature=0, length=length) == [expected]
            assert tuned.sample_text(n=1, prompt=prompt, temperature=0, length=length) == [expected]
    asked = "<user>the sea?!\n<assistant>"
    expected = written_by_the_library(library, merged, asked, 8).removeprefix(asked).partition("!")[0]
    told = invoke("chat", tuned.path, "--temperature", "0", "--tokens", "8", "--json", "-m", "the sea?")
    assert json.loads(told.stdout)[1]["content"] == expected, told.output
