"""Conversations: which tokens are trained on, what is refused, and that the loss is that of the library with labels."""

import json

import numpy as np
import pytest
import torch
from support.small_model import TALK, said, write_tokenizer

from edgeblocks.data.chat import PADDING, open_chat
from edgeblocks.data.chat_files import is_chat
from edgeblocks.data.chat_format import ChatFormat
from edgeblocks.errors import DataError, StorageError
from edgeblocks.families.base import TextInfo
from edgeblocks.pretrained.decoder import Decoder, DecoderSettings

FORGETFUL = "{% for m in messages[-2:] %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


RECORDS = [
    {"messages": TALK},
    {"prompt": "the ship", "completion": " went on."},
    {"prompt": TALK[:1], "completion": TALK[1:2]},
]


@pytest.fixture
def folder(tmp_path, library):
    """A tokenizer and a chat template."""
    path = tmp_path / "model"
    path.mkdir()
    write_tokenizer(path)
    return path


def opened(folder, records=RECORDS, *, length=64, hold_out=0.0, name="talk.jsonl"):
    path = folder.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    how = {"length": length, "hold_out": hold_out, "cache_dir": folder.parent / "cache"}
    return open_chat(str(path), tokenizer=str(folder / "tokenizer.json"), **how)


def counted(data, index):
    """The text of a conversation, and that of its tokens that count."""
    tokens, counts = (array[0] for array in data.gather(np.array([index])))
    size = int((data.rows.read(np.array([index]))[0] != PADDING).sum())
    return data.tokenizer.decode(tokens[:size]), data.tokenizer.decode(tokens[counts])


def test_answers_alone_are_trained_on(folder):
    """Of the assistant's messages, with what the template ends them with; of a completion of texts, with the end."""
    data = opened(folder)
    assert counted(data, 0) == (
        "<user>the sea?!\n<assistant>calm.!\n<user>a whale?!\n<assistant>the captain saw.!\n",
        "calm.!\nthe captain saw.!\n",
    )
    assert counted(data, 1) == ("the ship went on.!", " went on.!")
    assert counted(data, 2) == ("<user>the sea?!\n<assistant>calm.!\n", "calm.!\n")
    assert "[[calm.!\n]]" in data.example and "3 conversations of" in data.reading
    assert sorted(data.order(batch=3, seed=0, block=0).indices(4)) == [0, 1, 2]


def test_what_is_longer_than_a_window_is_cut_and_counted(folder):
    """What then has no answer is left out; the parts are those of the file's end."""
    data = opened(folder, RECORDS * 4, length=20, hold_out=0.25)
    told = data.reading
    assert "cut at 20 tokens" in told, told
    assert (data.num_examples, data.num_train, len(data.evaluation_indices(9))) == (12, 9, 3)
    assert data.gather(np.arange(12))[0].shape == (12, 20)
    with pytest.raises(DataError, match=r"0 conversations have an answer inside a window of 2 tokens"):
        opened(folder, length=2)


def test_a_folder_has_its_hold_out_part(folder):
    opened(folder, RECORDS[:1], name="talks/valid.jsonl")
    opened(folder, RECORDS, name="talks/train.jsonl")
    how = {"length": 64, "hold_out": 0.1, "cache_dir": folder.parent / "cache"}
    data = open_chat(str(folder.parent / "talks"), tokenizer=str(folder / "tokenizer.json"), **how)
    assert (data.num_train, data.num_examples) == (3, 4) and data.has_held_out
    assert counted(data, 3) == counted(data, 0)
    assert is_chat(str(folder.parent / "talks")) and not is_chat(str(folder.parent))


def test_parquet_is_read_as_the_same_records_in_lines(folder):
    """Messages, a prompt and a completion; fields that a record lacks are no fields of it. A folder has its parts, also
    in files as a hub numbers them."""
    from pyarrow import Table, parquet

    talks = folder.parent / "talks"
    talks.mkdir()
    texts = [{"prompt": "the ship", "completion": " went on."}, {"prompt": "a whale", "completion": " saw."}]
    named = [[{**TALK[0], "name": None}, {**TALK[1], "name": "x"}], TALK[:2]]
    messages = [{"messages": messages, "source": "made up"} for messages in named]
    for records, places in (
        (texts, ["one.parquet"]),
        (messages, [f"train-0000{part}-of-00002.parquet" for part in (0, 1)]),
    ):
        expected = opened(folder, [{**record, "source": None} for record in records])
        for part, name in enumerate(places):
            parquet.write_table(
                Table.from_pylist(records[part:] if len(places) == 1 else [records[part]]), talks / name
            )
        source = talks / places[0] if len(places) == 1 else talks
        how = {"length": 64, "hold_out": 0.0, "cache_dir": folder.parent / "cache"}
        assert is_chat(str(source))
        data = open_chat(str(source), tokenizer=str(folder / "tokenizer.json"), **how)
        for array, other in zip(data.gather(np.arange(2)), expected.gather(np.arange(2)), strict=True):
            assert np.array_equal(array, other)
        assert data.example == expected.example
    parquet.write_table(Table.from_pylist(messages[:1]), talks / "test.parquet")
    data = open_chat(str(talks), tokenizer=str(folder / "tokenizer.json"), **how)
    assert (data.num_train, data.num_examples) == (2, 3)


def test_what_is_wrong_with_parquet_is_said(folder):
    """With the row; a page that would fill the memory; what is no such file."""
    from pyarrow import Table, parquet

    path = folder.parent / "talk.parquet"
    how = {"length": 64, "hold_out": 0.0, "cache_dir": folder.parent / "cache"}

    def refused(message):
        with pytest.raises(DataError, match=message):
            open_chat(str(path), tokenizer=str(folder / "tokenizer.json"), **how)

    parquet.write_table(Table.from_pylist([RECORDS[0], {"messages": [said("robot", "x")]}]), path)
    refused("talk.parquet, row 2: message 1 of `messages` is of the role 'robot'")
    parquet.write_table(Table.from_pylist([{"text": "x"}]), path)
    assert not is_chat(str(path))
    long = [{"prompt": "x", "completion": "y" * 70_000_000}]
    parquet.write_table(Table.from_pylist(long), path)
    refused(
        "talk.parquet: one page of the column 'completion' unpacks to 70 MB, at most 67.1 MB are read; save it in row"
    )
    path.write_bytes(path.read_bytes()[:-100])
    refused("is not a .parquet file")
    assert not is_chat(str(path))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [said("robot", "x")]}, "is of the role 'robot'; there are system, user, assistant, tool"),
        ({"messages": [said("user", "x")]}, "nothing to learn"),
        ({"messages": [said("user", ["x"])]}, "has no `content` that is a text"),
        ({"messages": []}, "no list of messages"),
        ({"text": "x"}, "neither `messages` nor"),
        ({"conversations": []}, r"but `conversations`; .* jq -c '\{messages: \[.conversations\[\]"),
        ([1], "it is no object"),
        ({"prompt": 1, "completion": "x"}, "no list of messages"),
    ],
)
def test_records_that_are_no_conversations_are_named(folder, record, message):
    with pytest.raises(DataError, match=rf"talk.jsonl, line 2: .*{message}"):
        opened(folder, [RECORDS[0], record])


def test_lines_templates_and_damage(folder):
    """What is no JSON; a template that forgets, one that is none, and none at all; a cache that was changed."""
    (folder.parent / "talk.jsonl").write_text('{"messages": ')
    assert not is_chat(str(folder.parent / "talk.jsonl"))
    data = opened(folder)
    assert is_chat(data.source)
    rows = np.load(data.rows.path)
    rows[0, 0] ^= 1
    np.save(data.rows.path, rows)
    with pytest.raises(StorageError, match="is damaged"):
        data.gather(np.array([0]))
    (folder / "chat_template.jinja").write_text(FORGETFUL)
    with pytest.raises(DataError, match="writes message 2 otherwise when others follow"):
        opened(folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="is no template"):
        opened(folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    with pytest.raises(DataError, match=r"does not write it \(system first\)"):
        opened(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        opened(folder)
    assert counted(opened(folder, RECORDS[1:2]), 0)[1] == " went on.!"


def test_a_template_may_do_nothing_but_write(folder):
    """It comes with a model from anywhere."""
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    render = ChatFormat.of(folder).renderer()
    with pytest.raises(Exception, match="unsafe"):
        render(TALK, False)


@pytest.mark.usefixtures("one_thread")
def test_the_loss_is_the_librarys_with_labels(folder, model, library):
    """The mean over all answers' tokens of a batch, whatever stands beside them."""
    data = opened(folder)
    tokens, counts = data.gather(np.arange(3))
    family = Decoder(DecoderSettings(model=str(model)), TextInfo(vocabulary=data.vocabulary, length=64))
    batch = family._batch(tokens, counts)
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    labels = torch.from_numpy(np.where(counts, tokens, -100))
    expected = network(input_ids=batch["tokens"], labels=labels, use_cache=False).loss
    hidden = network.model.layers[-1].register_forward_hook(lambda *given: last.append(given[-1]))
    last = []
    network(input_ids=batch["tokens"], use_cache=False)
    hidden.remove()
    found = family.loss_after(None, last[0], None, batch)
    assert found.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    scores = family._losses(last[0], batch)[0]
    assert bool((scores[~batch["counts"][:, 1:]] == 0).all())
