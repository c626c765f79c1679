"""A model folder whose files are of different models is refused with what does not fit, before any training."""

import json
import shutil

import pytest
from support.commands import assert_refused, invoke
from support.equality import StopAfter
from support.small_model import write_conversations

import edgeblocks
from edgeblocks.errors import InterruptedRunError, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"length": 24, "batch": 2, "steps": 2, "mem_budget": "4GB"}


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def refused(folder, data, said, *more):
    out = folder.parent / "run"
    asked = ["finetune", folder, "--data", data, "--length", "24", "--mem-budget", "4GB", "--out", out, *more]
    assert_refused(invoke(*asked), 2, said.replace(" ", r"\s+"))
    assert not out.exists()


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows(folder, text):
    def add(found):
        first = len(found["model"]["vocab"])
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        found["added_tokens"] = [{"id": first + n, "content": f"<{n}>", "special": True, **plain} for n in range(100)]

    count = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 100
    changed(folder / "tokenizer.json", add)
    refused(folder, text, rf"the tokenizer has {count} tokens, and the table .* 128 rows: .*embeddings\({count}\)")


@pytest.mark.parametrize("more", [(), ("--train-embeddings",), ("--tune", "lora")])
def test_a_config_whose_vocabulary_is_not_that_of_the_files(folder, text, more):
    """The library would not load what is merged."""
    changed(folder / "config.json", lambda config: config.update(vocab_size=200))
    refused(folder, text, "model.embed_tokens.weight is 200 x 32 .* its files have it as 128 x 32", *more)


def test_no_tokenizer(folder, text):
    """What writes one is named where there is an older file."""
    (folder / "tokenizer.json").unlink()
    refused(folder, text, "has no tokenizer.json, .*; download it with the model")
    (folder / "tokenizer.model").write_bytes(b"")
    refused(folder, text, "it has tokenizer.model, of which transformers writes one: AutoTokenizer.from_pretrained")


def test_a_config_alone_is_planned(model, tmp_path):
    """With nothing but it there is no text of the model's, and none is needed to tell memory and time."""
    shutil.copyfile(model / "config.json", tmp_path / "config.json")
    changed(tmp_path / "config.json", lambda config: config.update(vocab_size=512))
    done = invoke("finetune", tmp_path, "--mem-budget", "4GB", "--length", "24", "--dry-run")
    assert done.exit_code == 0 and "trained end to end" in done.stdout, done.stderr


def test_a_tokenizer_that_does_not_know_what_ends_a_text(folder, tmp_path):
    """Its pieces would be learned as words."""
    write_conversations(tmp_path / "talk.jsonl")
    changed(folder / "tokenizer_config.json", lambda config: config.update(eos_token="</s>"))
    refused(folder, tmp_path / "talk.jsonl", "ends a text with '</s>', of which this tokenizer makes [034] tokens")


def test_another_tokenizer_in_place_of_that_of_a_run(folder, text, tmp_path):
    """With as many tokens: neither trained on, merged nor written with."""
    run = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        edgeblocks.finetune(folder, data=text, out=run, listener=StopAfter(1), **WANTED)

    def turn(found):
        known = found["model"]["vocab"]
        found["model"]["vocab"] = dict(zip(known, reversed(known.values()), strict=True))

    changed(folder / "tokenizer.json", turn)
    loaded = edgeblocks.load(run)
    for act in (
        lambda: edgeblocks.resume(run),
        lambda: loaded.merge(tmp_path / "merged"),
        lambda: loaded.sample_text(n=1, prompt="the sea"),
    ):
        with pytest.raises(RunError, match=r"tokenizer.json \(\d+ tokens\) is not the tokenizer that .* put that back"):
            act()
    assert not (tmp_path / "merged").exists()
