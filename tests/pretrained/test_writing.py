"""Text of pretrained models: the library's own greedy text, whatever holds the weights; and conversations."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from support.commands import assert_refused, invoke
from support.small_model import TALK, said, write_conversations, written_by_the_library

import edgeblocks
from edgeblocks.errors import ConfigError, DataError, DoesNotFitError, RunError
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.pretrained.shell import shell_of
from edgeblocks.pretrained.writing import tokenizer_of, writer_of_folder

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "the sea was calm and"
SMALL = {"length": 24, "batch": 2, "steps": 3, "warmup": 0, "mem_budget": "4GB", "learning_rate": 1e-2}
CPU = torch.device("cpu")


@contextmanager
def folder_writer(folder, room, length=40):
    """With so much room for weights beside what writing needs."""
    needed = {"length": length, "budget_bytes": 0, "used_bytes": lambda: 0}
    with pytest.raises(DoesNotFitError) as refused, writer_of_folder(str(folder), CPU, **needed):
        pass
    enough = refused.value.smallest_bytes + room
    with writer_of_folder(str(folder), CPU, **{**needed, "budget_bytes": enough}) as writer:
        yield writer


@pytest.mark.parametrize("room", [0, 2**30])
def test_a_folder_writes_as_the_library(model, library, room):
    """With weights that are read for every token, and with all in memory."""
    with folder_writer(model, room) as writer:
        found = writer.continued(PROMPT, n=2, temperature=0, length=40)
    given = len(tokenizer_of(model_folder(str(model))).encode(PROMPT))
    assert found == [written_by_the_library(library, model, PROMPT, 40 - given)] * 2


@pytest.fixture(scope="module", params=["full", "lora", "tables"])
def tuned(request, model, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    own = {"tune": "lora", "quantize": "none"} if request.param == "lora" else {"blocks": 4, "tier": "disk"}
    out = tmp_path_factory.mktemp("run") / "run"
    return edgeblocks.finetune(folder, data=text, out=out, train_embeddings=request.param == "tables", **own, **SMALL)


def test_a_run_writes_as_the_model_that_it_merges_into(tuned, library, tmp_path):
    """Merged into bfloat16 the weights are rounded: the likeliest tokens of so sharp a model stay the same."""
    tuned.merge(tmp_path / "merged")
    (found,) = tuned.sample_text(n=1, prompt=PROMPT, temperature=0, length=16)
    with edgeblocks.writer(tmp_path / "merged", mem_budget="4GB") as merged:
        assert merged.continued(PROMPT, temperature=0, length=16) == [found]
    assert written_by_the_library(library, tmp_path / "merged", PROMPT, 30).startswith(found)


def test_texts_depend_on_the_seed_and_their_number_alone(tuned):
    drawn = tuned.sample_text(n=3, prompt=PROMPT, length=20, seed=5)
    assert drawn[:2] == tuned.sample_text(n=2, prompt=PROMPT, length=20, seed=5)
    assert drawn != tuned.sample_text(n=3, prompt=PROMPT, length=20, seed=6)
    assert all(text.startswith(PROMPT) for text in drawn)


def test_what_is_not_possible_is_said(tuned, model, tmp_path):
    asked = ["sample", tuned.path, "--prompt", PROMPT, "--n", "1"]
    assert_refused(invoke(*asked, "--steps", "4"), 2, "has no noise levels")
    assert_refused(invoke(*asked, "--length", "3"), 2, "shorten what is given")
    assert_refused(invoke(*asked, "--fill", "a _"), 2, "--fill belongs to networks that fill gaps")
    assert_refused(invoke("chat", model, "-m", "ahoy", "--mem-budget", "100MB"), 3, "the libraries, the tokenizer")
    for path, what in ((tmp_path, "has neither manifest.json nor config.json"), (tmp_path / "nothing", "is no folder")):
        told = rf"{what}; name a run of finetune, or the folder of a model with its config.json"
        assert_refused(invoke("chat", path), 1, told)
    with pytest.raises(ConfigError, match="the model knows 64 positions"), folder_writer(model, 0) as writer:
        writer.continued(PROMPT, length=65)
    with pytest.raises(ConfigError, match="give a --prompt"), folder_writer(model, 0) as writer:
        writer.continued("")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(model / name, tmp_path / name)
    assert_refused(invoke("chat", tmp_path, "-m", "ahoy"), 2, "there are no weights to write with")


def test_another_model_in_its_place_is_noticed(model, text, tmp_path):
    """What was not trained is read from its folder."""
    shutil.copytree(model, tmp_path / "model")
    run = edgeblocks.finetune(tmp_path / "model", data=text, out=tmp_path / "run", **{**SMALL, "steps": 1})
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for use in (lambda: run.sample_text(n=1, prompt=PROMPT), run.evaluate):
        with pytest.raises(RunError, match="is not the model that"):
            use()


def test_it_answers_in_the_words_of_its_template(model, library, tmp_path):
    """Piece by piece the same answer, which is the library's for the conversation as the template writes it."""
    pieces: list[str] = []
    with folder_writer(model, 0, length=60) as writer:
        answer = writer.answer(TALK[:1], most_tokens=8, on_text=pieces.append)
    asked = "<user>the sea?!\n<assistant>"
    assert written_by_the_library(library, model, asked, 8).removeprefix(asked).startswith("".join(pieces))
    assert answer.startswith("".join(pieces)) and pieces
    without = tmp_path / "model"
    shutil.copytree(model, without)
    (without / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"), folder_writer(without, 0) as writer:
        writer.answer(TALK[:1])


def test_a_learned_answer_ends_with_the_token_that_ends_it(model, tmp_path):
    """A conversation that is trained on until it is known by heart is answered with its words, and no more."""
    folder, data = tmp_path / "model", tmp_path / "talk.jsonl"
    shutil.copytree(model, folder)
    tokenizer = tokenizer_of(model_folder(str(model)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [int(tokenizer.encode("!")[0])]}))
    write_conversations(data, count=4)
    run = edgeblocks.finetune(
        folder, data=data, out=tmp_path / "run", hold_out=0.3, **{**SMALL, "length": 56, "steps": 60}
    )
    assert run.evaluate(samples=2)["validation_loss"] == pytest.approx(run.summary["metrics"]["validation_loss"])
    with run.writer() as writer:
        assert writer.answer(TALK[:1]) == "calm."
        assert writer.answer(TALK[:3]) == "the captain saw."
    lines = "".join(f"{message['content']}\n" for message in TALK if message["role"] == "user")
    told = invoke("chat", run.path, "--temperature", "0", typed=lines)
    assert told.exit_code == 0 and told.stdout == "calm.\nthe captain saw.\n", told.output
    told = invoke("chat", run.path, "--temperature", "0", "--json", "-m", "the sea?")
    assert json.loads(told.stdout) == TALK[:2]
    told = invoke("chat", run.path, "--temperature", "0", typed="the sea?\n/new\nthe sea?\n")
    assert told.stdout == "calm.\ncalm.\n", told.output


KINDS = ["llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2", "granite"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_cache_each_architecture_gives_the_logits_of_the_whole_text(library, tmp_path, kind):
    """Token by token, beyond the length of a sliding window."""
    from edgeblocks.pretrained.gate import _small_network

    config = json.loads(library.AutoConfig.for_model(kind).to_json_string(use_diff=False))
    network = _small_network({**config, "model_type": kind}, tmp_path).eval()
    tokens = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(input_ids=tokens).logits
    shell = shell_of(str(tmp_path), "cpu")
    own = dict(network.named_modules())[shell.layers_name]
    cache = None
    for start, stop in ((0, 5), (5, 6), (6, 10), *((one, one + 1) for one in range(10, 14))):
        found, cache = shell.continued(tokens[:, start:stop], [layer.forward for layer in own], cache)
        assert torch.allclose(found, expected[:, stop - 1], rtol=1e-4, atol=1e-4 * float(expected.abs().max())), stop


def test_a_character_of_several_tokens_is_told_whole(model):
    pieces: list[str] = []
    with folder_writer(model, 0) as writer:
        writer.answer([said("user", "a")], temperature=1.0, most_tokens=30, seed=3, on_text=pieces.append)
    assert "\ufffd" not in "".join(pieces)


def test_afterwards_one_layer_is_in_memory_as_before(model):
    """A training in the same process has planned for that."""
    from edgeblocks.pretrained.frozen_layers import frozen_layers

    with folder_writer(model, 2**30):
        frozen = frozen_layers(str(model), "none", "cpu", None)
        assert sum(table.nbytes for table in frozen.tables) == frozen.all_bytes
    assert sum(table.nbytes for table in frozen.tables) == frozen.all_bytes // 4
