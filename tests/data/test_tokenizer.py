"""Text as tokens and back, for each kind of tokenizer, and definitions that are none."""

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.data.tokenizer import (
    MOST_DEFINITION_BYTES,
    build_tokenizer,
    normalize,
    read_tokenizer,
    train_pairs,
)
from edgeblocks.errors import DataError, RunError

TEXT = "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse.\n" * 20
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def pairs():
    pytest.importorskip("tokenizers")
    return train_pairs([TEXT], 300)


def written_slowly(text):
    """What wikifil.pl writes, one character at a time."""
    written = ""
    for character in text:
        if "A" <= character <= "Z":
            piece = character.lower()
        elif "a" <= character <= "z":
            piece = character
        elif "0" <= character <= "9":
            piece = f" {WORDS[int(character)]} "
        else:
            piece = " "
        for letter in piece:
            if letter != " " or not written.endswith(" "):
                written += letter
    return written


@given(st.text() | st.text(alphabet="aZ 09\n.é—"))
def test_characters_are_those_of_text8(text):
    """The fast version equals the slow obvious one, whatever the text, and decoding gives what was written."""
    assert normalize(text).decode("ascii") == written_slowly(text)
    tokenizer = build_tokenizer("chars", None)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int64 and all(0 <= token < 27 for token in tokens)
    assert tokenizer.decode(tokens) == written_slowly(text)


def test_the_27_characters_are_numbered_from_the_space():
    """0 is the space and 1 to 26 are a to z; runs keep this for their lifetime."""
    assert build_tokenizer("chars", None).encode(" abz").tolist() == [0, 1, 2, 26]


@given(st.text())
def test_bytes_come_back_as_the_text(text):
    """Any text, with characters of one to four bytes."""
    tokenizer = build_tokenizer("bytes", None)
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == list(text.encode())
    assert tokenizer.decode(tokens) == text


@given(text=st.text())
def test_byte_pairs_come_back_as_the_text(pairs, text):
    """Even characters that were not in the text they were learned from."""
    assert pairs.decode(pairs.encode(text)) == text


def test_byte_pairs_are_shorter_than_bytes_and_fill_their_vocabulary(pairs):
    """Merges were learned, and ids stay below the vocabulary."""
    tokens = pairs.encode(TEXT)
    assert pairs.vocabulary == 300 and 256 <= tokens.max() < 300
    assert len(tokens) < 0.6 * len(TEXT.encode())


def test_a_tokenizer_is_made_again_from_its_definition(pairs):
    """As the deployed chain does; kinds without a definition have None."""
    again = build_tokenizer("bpe", pairs.to_json())
    np.testing.assert_array_equal(again.encode(TEXT), pairs.encode(TEXT))
    assert again.to_json() == pairs.to_json()
    assert build_tokenizer("chars", None).to_json() is None and build_tokenizer("bytes", None).to_json() is None


def test_a_definition_is_in_memory_once(pairs):
    """A run that goes on asks for its own and for its data's, and 50,000 pairs take some 40 MB; others are others."""
    first = build_tokenizer("bpe", pairs.to_json())
    assert build_tokenizer("bpe", pairs.to_json()) is first
    assert build_tokenizer("bpe", train_pairs([TEXT], 280).to_json()).vocabulary == 280


def test_learning_gives_the_same_pairs_in_every_process(pairs):
    """No order of a hash table decides between two pairs that are seen equally often."""
    code = (
        "import sys; from edgeblocks.data.tokenizer import train_pairs;"
        "sys.stdout.write(train_pairs([sys.stdin.read()], 300).to_json())"
    )
    for _ in range(2):
        command = [sys.executable, "-X", "utf8", "-c", code]
        done = subprocess.run(command, input=TEXT.encode(), check=True, capture_output=True)
        assert done.stdout.decode() == pairs.to_json()


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe"])
@pytest.mark.parametrize("token", [-1, None])
def test_a_token_that_is_none_is_refused(pairs, kind, token):
    """A mask, whose id is the vocabulary, has no text."""
    tokenizer = pairs if kind == "bpe" else build_tokenizer(kind, None)
    with pytest.raises(ValueError, match=rf"outside 0\.\.{tokenizer.vocabulary - 1}"):
        tokenizer.decode([0, tokenizer.vocabulary if token is None else token])


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe"])
def test_half_a_surrogate_pair_is_encoded_all_the_same(pairs, kind):
    """A prompt from a terminal can hold one; it is no character, and no reason to end."""
    tokenizer = pairs if kind == "bpe" else build_tokenizer(kind, None)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == ("a b" if kind == "chars" else "a?b")


def test_a_definition_that_cuts_and_fills_up_is_used_without(pairs):
    """Texts keep their length whatever the tokenizer.json asks for."""
    definition = json.loads(pairs.to_json())
    definition["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    definition["padding"] = {
        "strategy": {"Fixed": 9999}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    np.testing.assert_array_equal(build_tokenizer("bpe", json.dumps(definition)).encode(TEXT), pairs.encode(TEXT))


@pytest.mark.parametrize("definition", ["", "{}", "[]", "null", '{"model": 5}', "{" * 100_000, "\0", "[" * 100_000])
def test_a_definition_that_is_none_is_an_error_of_ours(pairs, definition):
    """Not JSON, too deep, or JSON of something else."""
    with pytest.raises(RunError, match=r"`tokenizers` cannot read it|is not the JSON of a tokenizer"):
        build_tokenizer("bpe", definition)


def doubling(kind, parts):
    part = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    return {"type": "Sequence", parts: [{"type": "ByteLevel"} if kind == "ByteLevel" else part] * 40}


def unpacked(size, texts):
    table = base64.b64encode(size.to_bytes(4, "little") + texts).decode()
    return {"type": "Precompiled", "precompiled_charsmap": table}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", doubling("Replace", "normalizers"), "normalizer may make text 1099511627776 times as long"),
        ("pre_tokenizer", doubling("ByteLevel", "pretokenizers"), "pre_tokenizer may make text 1099511627776 times"),
        ("decoder", doubling("Replace", "decoders"), "decoder may make text 1099511627776 times as long"),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 99}, "normalizer may make text 100 times as long"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 99}, "100 times as long"),
        ("normalizer", unpacked(2**32 - 1, b""), "a table of characters that has 4 bytes declares 4294967295"),
        ("normalizer", unpacked(0, b"x" * 34 + b"\0"), "a character is replaced by more than 33 bytes"),
        ("normalizer", {"normalizers": [unpacked(0, b"aa\0")] * 2}, "normalizer may make text 64 times as long"),
        ("model", {"type": "WordPiece", "max_input_chars_per_word": 10**9}, "max_input_chars_per_word is 1000000000"),
        ("version", [0] * 5_300_000, "it holds more than 5242880 values"),
    ],
)
def test_a_definition_that_would_fill_the_memory_is_refused_before_the_library_sees_it(pairs, part, value, message):
    """The library ends the process where it gets no memory, which no message can follow."""
    with pytest.raises(RunError, match=message):
        build_tokenizer("bpe", json.dumps({**json.loads(pairs.to_json()), part: value}))


def table_of_one(character, replacement):
    """A `Precompiled` table that replaces one ASCII character: a trie of 256 units, and the text that it points to."""
    units, node = np.zeros(256, dtype="<u4"), 128 ^ ord(character)
    units[0], units[node] = 128 << 10, 1 << 10 | 1 << 8 | ord(character)
    units[node ^ 1] = 1 << 31
    return unpacked(units.nbytes, units.tobytes() + replacement.encode() + b"\0")


def test_the_chain_of_parts_that_t5_has_is_used_as_the_library_does():
    """A table, then spaces that are replaced: what makes a chain long is counted, and usual files stay below."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁whale", -3.0), *((letter, -4.0) for letter in "aehlsw")]
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    replace = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    normalizers = [table_of_one("v", "wh"), strip, replace]
    definition = json.dumps({
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
        "decoder": spaces,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
    })  # fmt: skip
    ours, library = build_tokenizer("bpe", definition), tokenizers.Tokenizer.from_str(definition)
    tokens = ours.encode("vale  sea  ")
    assert tokens.tolist() == library.encode("vale  sea  ", add_special_tokens=False).ids
    assert tokens[0] == 2 and ours.decode(tokens) == library.decode(tokens, skip_special_tokens=False)


def test_a_definition_that_cannot_be_used_is_named_by_its_file(pairs, tmp_path):
    """A run and an export hold one each; where there is no file, it is called by what it is."""
    with pytest.raises(RunError, match=r"^a tokenizer\.json cannot be used"):
        build_tokenizer("bpe", "{}")
    with pytest.raises(
        RunError, match=rf"^{re.escape(str(tmp_path / 'tokenizer.json'))} cannot be used: .* from a copy"
    ):
        build_tokenizer("bpe", "{}", path=tmp_path / "tokenizer.json")


def test_a_part_that_is_there_twice_is_refused(pairs):
    """The library might take the other one."""
    with pytest.raises(RunError, match="a key is there twice"):
        build_tokenizer("bpe", pairs.to_json().replace("{", '{"decoder": null,', 1))


def test_what_is_not_part_of_a_text_is_not_encoded(pairs):
    """A template that repeats the text, or puts marks around it, is left out."""
    definition = json.loads(pairs.to_json())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    definition["post_processor"] = {"type": "TemplateProcessing", "single": [text] * 9, "pair": [text, text]}
    definition["post_processor"]["special_tokens"] = {}
    np.testing.assert_array_equal(build_tokenizer("bpe", json.dumps(definition)).encode(TEXT), pairs.encode(TEXT))


def test_tokens_that_the_decoder_refuses_are_an_error_of_ours(pairs):
    """A decoder that cuts more than there is."""
    decoder = {"type": "Strip", "content": "e", "start": 2**63, "stop": 2**63}
    tokenizer = build_tokenizer("bpe", json.dumps({**json.loads(pairs.to_json()), "decoder": decoder}))
    with pytest.raises(DataError, match=r"cannot decode 300 tokens: .*needs another decoder"):
        tokenizer.decode(range(300))


@pytest.mark.parametrize("ids", [{}, {"a": 0}, {"a": 0, "b": 2**30}])
def test_a_vocabulary_out_of_range_is_refused(ids):
    """Nothing to choose from, or ids for which no network has room."""
    pytest.importorskip("tokenizers")
    definition = {"version": "1.0", "model": {"type": "WordLevel", "vocab": ids, "unk_token": "a"}}
    with pytest.raises(RunError, match=r"token ids end at -?\d+; 1 to 1048575 are used"):
        build_tokenizer("bpe", json.dumps(definition))


def test_a_text_that_the_tokenizer_refuses_is_an_error_of_ours():
    """A list of words without one for the unknown."""
    pytest.importorskip("tokenizers")
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "none"}
    tokenizer = build_tokenizer("bpe", json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(DataError, match=r"cannot encode a text of 5 characters: .*choose a tokenizer"):
        tokenizer.encode("whale")


@pytest.mark.parametrize(("kind", "definition"), [("words", None), ("bpe", None), ("", "{}")])
def test_an_unknown_kind_is_refused(kind, definition):
    """A manifest may say anything."""
    with pytest.raises(RunError, match="one of chars, bytes, bpe, and bpe has a definition"):
        build_tokenizer(kind, definition)


def test_a_file_is_read_as_it_was_saved(pairs, tmp_path):
    """A tokenizer.json of the user's own."""
    (tmp_path / "tokenizer.json").write_text(pairs.to_json(), encoding="utf-8")
    np.testing.assert_array_equal(read_tokenizer(tmp_path / "tokenizer.json").encode(TEXT), pairs.encode(TEXT))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "does not begin with {"),
        (b"PK\x03\x04 a zip", "does not begin with {"),
        (b'{"a": 1}', "`tokenizers` cannot read it"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named_with_a_cure(pairs, tmp_path, content, why):
    """What is wrong, and which tokenizers need no file."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"tokenizer\.json is not a tokenizer\.json .*{why}.*; give one that"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_file_larger_than_any_tokenizer_is_not_read(pairs, tmp_path):
    """Its size is compared before it is opened."""
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.write(b"{")
        file.truncate(MOST_DEFINITION_BYTES + 1)
    with pytest.raises(DataError, match="it has 67108865 bytes, and at most 67108864 are read"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_folder_is_no_tokenizer(tmp_path):
    """The system's words, and what to look at."""
    with pytest.raises(DataError, match=r"the tokenizer .* cannot be read: .*; check its path"):
        read_tokenizer(tmp_path)


def test_a_missing_library_is_a_setting_to_mend(tmp_path):
    """The message names the extra, and the tokenizers that need no library work without it."""
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from edgeblocks.data.tokenizer import build_tokenizer, train_pairs\n"
        "from edgeblocks.errors import ConfigError\n"
        "build_tokenizer('chars', None); build_tokenizer('bytes', None)\n"
        "try: train_pairs(['a'], 300)\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'edgeblocks[text]', or choose tokenizer: chars or bytes" in done.stdout
