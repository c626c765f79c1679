"""Conversations that share a window: none lost, none cut, and training is what it is with a window each."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.commands import assert_refused, invoke
from support.equality import StopAfter, assert_same_bits
from support.small_model import TALK, said

import edgeblocks
from edgeblocks.data.chat import open_chat
from edgeblocks.data.packing import packed, packed_chat
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.pretrained.gate import check_architecture
from edgeblocks.runs.open_data import data_of

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["calm.", "a whale, and the crew saw it.", "the captain.", "the ship went on.", "aye?", "the sea was calm."]
RECORDS = [{"messages": [*TALK[:1], said("assistant", word)]} for word in WORDS]
WANTED = {"length": 60, "steps": 3, "warmup": 0, "mem_budget": "4GB", "hold_out": 0.0, "learning_rate": 1e-3}
WANTED |= {"optimizer": "adamw"}
WAYS = {
    "full": {},
    "lora": {"tune": "lora", "lora_rank": 3, "quantize": "none"},
    "blocks": {"tune": "blocks", "train_blocks": "1,2"},
}

SOME_WAYS = ["full", *(pytest.param(way, marks=pytest.mark.thorough) for way in ("lora", "blocks"))]


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def windows_of(run):
    data = data_of(run.directory.settings.run, lambda *_: None)
    return data, *data.gather(np.arange(data.num_train))


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 70))
def test_each_lies_in_one_window_and_none_is_too_full(sizes, room):
    """With at most 11/9 of the best number and one more, Johnson's bound; two half empty ones never stand side by
    side."""
    windows = packed(sizes, room)
    assert sorted(index for window in windows for index in window) == list(range(len(sizes)))
    filled = [sum(sizes[index] for index in window) for window in windows]
    assert all(0 < size <= room for size in filled)
    assert sum(size <= room // 2 for size in filled) <= 1


@pytest.mark.parametrize("way", SOME_WAYS)
def test_training_is_that_of_a_window_each(model, talks, tmp_path, way):
    """All conversations in one step: losses of every step, and what is trained at its end."""
    asked = {"data": talks, **WANTED, **WAYS[way]}
    alone = edgeblocks.finetune(model, out=tmp_path / "alone", batch=len(RECORDS), **asked)
    together = edgeblocks.finetune(model, out=tmp_path / "together", packing=True, batch=2, **asked)
    data, tokens, labels = windows_of(together)
    counts, positions = labels.swapaxes(0, 1)
    assert len(tokens) == data.num_train == 2 < len(RECORDS)
    assert "Packed: 6 of them lie in 2 windows of 60 tokens instead of 6" in data.reading
    assert int((positions == 0).sum()) == len(RECORDS) and counts.sum() == windows_of(alone)[2].sum()
    for one, other in zip(alone.directory.metrics(), together.directory.metrics(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    stored = [load_file(run.directory.store().path(0)) for run in (alone, together)]
    for name, value in stored[0].items():
        if name.startswith("weights."):
            assert (stored[1][name] - value).abs().max() <= 2e-3 * value.abs().max(), name


@pytest.mark.parametrize("way", SOME_WAYS)
def test_streamed_stopped_and_resumed_it_gives_the_same_bits(model, talks, tmp_path, way):
    asked = {"data": talks, "packing": True, "batch": 2, "micro_batch": 1, **WANTED, **WAYS[way]}
    asked |= {"blocks": 2} if way == "full" else {}
    whole = edgeblocks.finetune(model, out=tmp_path / "whole", tier="ram", **asked)
    with pytest.raises(InterruptedRunError):
        edgeblocks.finetune(model, out=tmp_path / "run", tier="disk", listener=StopAfter(2), **asked)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(whole.path, again.path, blocks=2 if way == "full" else 1)
    losses = [run.summary["metrics"]["validation_loss"] for run in (whole, again)]
    assert losses[0] == losses[1]


def test_held_out_conversations_keep_windows_of_their_own(model, talks, tmp_path):
    """So that a perplexity is that of an unpacked run."""
    where = {"cache_dir": tmp_path}
    alone = open_chat(str(talks), tokenizer=str(model / "tokenizer.json"), length=60, hold_out=0.3, **where)
    together = packed_chat(alone, **where)
    assert (alone.num_train, together.num_train, together.num_examples) == (4, 2, 4)
    for first, second in zip(alone.evaluation_indices(9), together.evaluation_indices(9), strict=True):
        tokens, labels = together.gather(np.array([second]))
        expected, counts = alone.gather(np.array([first]))
        assert np.array_equal(tokens, expected) and np.array_equal(labels[:, 0] == 1, counts)
        assert np.array_equal(labels[0, 1], np.arange(60))


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_architectures_that_cannot_keep_texts_apart_are_refused(library, tmp_path, kind):
    """By what was measured, in words; one text a window they are trained on."""
    config = json.loads(library.AutoConfig.for_model(kind).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    check_architecture(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"of the type {kind} conversations cannot share a window: its hidden"):
        check_architecture(str(tmp_path), packed=True)


def test_text_is_not_packed(model, text, tmp_path):
    """Its windows are full; and images have none."""
    asked = ["finetune", model, "--data", text, "--packing", "--mem-budget", "4GB", "--out", tmp_path / "run"]
    assert_refused(invoke(*asked), 2, "windows of text are full; leave packing out")
    assert_refused(invoke("plan", "dit", "--set", "packing=true"), 2, "dit reads images, and packing is for families")
