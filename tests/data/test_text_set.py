"""What open_text promises whatever the source: tokens, parts, windows, settings, and words for what cannot be read."""

import hashlib
import json
import lzma
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgeblocks.data
from edgeblocks.data.documents import find_text
from edgeblocks.data.parquet import _page_sizes
from edgeblocks.data.plain_text import PIECE_CHARACTERS, Piece
from edgeblocks.data.text import open_text
from edgeblocks.data.token_cache import grouped
from edgeblocks.data.tokenizer import build_tokenizer, train_pairs
from edgeblocks.errors import ConfigError, DataError, NoRoomToReadError

SAMPLE = Path(edgeblocks.data.__file__).with_name("moby_dick.txt.xz")
LINES = "".join(f"Line {number}: déjà vu — 鯨 swam {number * 37} miles.\n" for number in range(3000))


def opened(source, cache_dir, **settings):
    settings = {
        "tokenizer": "bytes",
        "vocabulary": 300,
        "length": 8,
        "hold_out": 0.1,
        "cache_dir": cache_dir,
    } | settings
    return open_text(str(source), **settings)


def all_tokens(text):
    """Every token of a set in one reading, which windows are compared with."""
    return text.token_file.read(0, text.num_tokens)


def whole_text(source, cache_dir, **settings):
    text = opened(source, cache_dir, **{"length": 1, "hold_out": 0} | settings)
    return text.tokenizer.decode(all_tokens(text))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def test_text_replaced_by_other_text_of_the_same_size_and_time_is_noticed(tmp_path):
    """Archives set fixed times; the old text is never trained on."""
    for letter in "ab":
        for name in ("1.txt", "2.txt"):
            path = tmp_path / "texts" / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(letter * 100)
            os.utime(path, (0, 0))
        assert whole_text(tmp_path / "texts", tmp_path / "cache").startswith(letter * 100)
        assert whole_text(tmp_path / "texts" / "1.txt", tmp_path / "cache") == letter * 100


def test_the_built_in_text_is_moby_dick_and_small():
    """It begins and ends as the book does, is what its description says, and holds no licence of a distributor."""
    packed = SAMPLE.read_bytes()
    text = lzma.decompress(packed).decode("utf-8")
    told = SAMPLE.with_name("MOBY_DICK.md").read_text(encoding="utf-8")
    assert len(packed) < 1e6
    assert "Call me Ishmael." in text and text.endswith("only found another orphan.\n")
    assert hashlib.sha256(text.encode()).hexdigest() in told
    assert f"{len(text):,} characters ({len(text.encode()):,} bytes" in told and f"{len(packed):,} bytes" in told
    assert not any(word in text.lower() for word in ("gutenberg", "ebook", "http", "www."))


@pytest.mark.parametrize(("kind", "vocabulary"), [("chars", 27), ("bytes", 256)])
def test_the_built_in_text_is_tokenised_as_a_whole(tmp_path, kind, vocabulary):
    """The streamed tokens are those of the undivided text."""
    text = opened("moby-dick", tmp_path, tokenizer=kind, length=1)
    expected = build_tokenizer(kind, None).encode(lzma.decompress(SAMPLE.read_bytes()).decode("utf-8"))
    assert text.vocabulary == text.tokenizer.vocabulary == vocabulary
    assert text.num_tokens == len(expected)
    positions = np.random.default_rng(0).integers(0, len(expected), 2000)
    np.testing.assert_array_equal(text.gather(positions)[0][:, 0], expected[positions])


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe"])
def test_windows_are_slices_of_the_tokens(source, tmp_path, kind):
    """In the order asked for, repeated if asked for, within a page and over several, to the last token."""
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    text = opened(source, tmp_path / "cache", tokenizer=kind, length=5000, hold_out=0)
    tokens = all_tokens(opened(source, tmp_path / "cache", tokenizer=kind, length=1, hold_out=0))
    starts = np.array([4000, 0, text.num_tokens - 5000, 0, 4095, 4096])
    windows, labels = text.gather(starts)
    assert windows.dtype == np.int64 and labels is None
    np.testing.assert_array_equal(windows, [tokens[start : start + 5000] for start in starts])


def test_the_last_share_is_held_out(source, tmp_path):
    """Both parts follow each other, and the second has the share of the text that was asked for."""
    text = opened(source, tmp_path / "cache", hold_out=0.25, length=1)
    size = len(LINES.encode())
    assert text.num_tokens == size and text.has_held_out
    assert abs(text.train_tokens - round(0.75 * size)) < 4  # a character is not divided
    np.testing.assert_array_equal(all_tokens(text), np.frombuffer(LINES.encode(), np.uint8))
    none = opened(source, tmp_path / "cache", hold_out=0)
    assert none.train_tokens == none.num_tokens == size and not none.has_held_out


@pytest.mark.parametrize("hold_out", [0.05, 0.5])
def test_byte_pairs_are_learned_from_the_training_part_alone(tmp_path, hold_out):
    """Whatever stands in the hold-out part, the tokenizer and the training tokens are the same."""
    pytest.importorskip("tokenizers")
    sets = []
    for name, ending in (("a", "whale "), ("b", "squid ")):
        path = tmp_path / name / "text.txt"
        path.parent.mkdir()
        part = round(60_000 * hold_out) // 6
        path.write_text(
            "ship and sea " * ((60_000 - 6 * part) // 13) + "." * ((60_000 - 6 * part) % 13) + ending * part
        )
        sets.append(opened(path, tmp_path / "cache", tokenizer="bpe", hold_out=hold_out))
    first, second = sets
    assert first.tokenizer.to_json() == second.tokenizer.to_json()
    assert first.train_tokens == second.train_tokens and first.fingerprint != second.fingerprint
    decoded = first.tokenizer.decode(first.gather(np.array([first.train_tokens]))[0][0])
    assert decoded.strip().startswith("whale") or "." in decoded


def test_a_window_begins_at_a_uniformly_drawn_place(source, tmp_path):
    """All places of the training part are reached, none outside, equally often."""
    source.write_text("abcdefghij" * 40)
    text = opened(source, tmp_path / "cache", length=8, hold_out=0.1)
    order = text.order(batch=64, seed=3, block=1)
    counts = np.bincount(np.concatenate([order.indices(step) for step in range(2000)]), minlength=353)
    assert len(counts) == 353 == text.train_tokens - text.length + 1
    expected = 2000 * 64 / 353
    assert ((counts - expected) ** 2 / expected).sum() < 352 + 5 * np.sqrt(2 * 352)


def test_an_order_is_a_function_of_seed_block_and_step_alone(source, tmp_path):
    """Neither what was drawn before nor the object matters; each of the three does."""
    text = opened(source, tmp_path / "cache")
    order = text.order(batch=16, seed=0, block=2)
    later = order.indices(900)
    order.indices(5)
    np.testing.assert_array_equal(order.indices(900), later)
    np.testing.assert_array_equal(text.order(batch=16, seed=0, block=2).indices(900), later)
    for other in (order.indices(901), text.order(batch=16, seed=1, block=2).indices(900)):
        assert (other != later).any()
    assert (text.order(batch=16, seed=0, block=3).indices(900) != later).any()
    assert later.dtype == np.int64 and later.shape == (16,)


@pytest.mark.parametrize("most", [0, 1, 7, 10**9])
@pytest.mark.parametrize("hold_out", [0, 0.1])
def test_evaluation_windows_lie_side_by_side_in_their_part(source, tmp_path, hold_out, most):
    """No token twice, none of the other part, spread over all of it, at most so many."""
    text = opened(source, tmp_path / "cache", length=100, hold_out=hold_out)
    begin, end = (text.train_tokens, text.num_tokens) if hold_out else (0, text.num_tokens)
    starts = text.evaluation_indices(most)
    assert starts.dtype == np.int64 and len(starts) == min(most, (end - begin) // 100)
    assert (starts >= begin).all() and (starts + 100 <= end).all() and (np.diff(starts) >= 100).all()
    if most == 7:
        assert starts[-1] > begin + 0.8 * (end - begin)


def test_lengths_of_tokens_are_those_of_the_part_that_is_measured(tmp_path):
    """Counted in the hold-out part where there is one, in characters and in bytes of UTF-8; 1 for characters."""
    path = tmp_path / "text.txt"
    path.write_text("a" * 9000 + "鯨" * 1000, encoding="utf-8")
    text = opened(path, tmp_path / "cache", hold_out=0.25)  # both parts: 9000 bytes, 3000 bytes
    assert (text.characters_per_token, text.bytes_per_token) == (1000 / 3000, 1.0)
    assert opened(path, tmp_path / "cache", hold_out=0).characters_per_token == 10_000 / 12_000
    text = opened("moby-dick", tmp_path / "cache", tokenizer="chars")
    assert (text.characters_per_token, text.bytes_per_token) == (1.0, 1.0)


def test_byte_pairs_know_their_length(source, tmp_path):
    """Characters and bytes of the part, divided by its tokens."""
    pytest.importorskip("tokenizers")
    text = opened(source, tmp_path / "cache", tokenizer="bpe", hold_out=0.2, length=1)
    part = text.tokenizer.decode(text.gather(np.arange(text.train_tokens, text.num_tokens))[0][:, 0])
    num_tokens = text.num_tokens - text.train_tokens
    assert LINES.endswith(part) and part.startswith(" ")
    assert text.characters_per_token == pytest.approx(len(part) / num_tokens)
    assert text.bytes_per_token == pytest.approx(len(part.encode()) / num_tokens)


@given(
    st.lists(st.text(alphabet="aé鯨🐋 0\n", max_size=9)),
    st.integers(0, 60),
    st.booleans(),
)
def test_grouping_loses_nothing_and_keeps_the_border(texts, border, at_spaces):
    """Stretches joined are the pieces joined, and what is held out begins at the border, or at the space before it."""
    position, pieces = 0, []
    for text in texts:
        position += len(text.encode())
        pieces.append(Piece(text, position))
    stretches = list(grouped(iter(pieces), border=border, at_spaces=at_spaces))
    joined = "".join(texts)
    assert "".join(stretch.text for stretch in stretches) == joined
    train = "".join(stretch.text for stretch in stretches if not stretch.held_out)
    exact = joined.encode()[:border].decode(errors="ignore")
    assert train == exact or (at_spaces and exact.startswith(train) and joined[len(train)] == " ")


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe"])
def test_borders_of_chunks_do_not_show(tmp_path, kind, shift):
    """Multi-byte characters, digits and runs of spaces over a border: the tokens are those of the undivided text."""
    text = "x" * shift + "鯨🐋é 12  \n\n 7,  whales'll it's " * 12_000
    assert len(text) > 3 * PIECE_CHARACTERS
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    if kind == "bpe":
        pytest.importorskip("tokenizers")
        tokenizer = train_pairs([text[:5000]], 300)
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        chosen = str(tmp_path / "tokenizer.json")
    else:
        tokenizer, chosen = build_tokenizer(kind, None), kind
    streamed = opened(path, tmp_path / "cache", tokenizer=chosen, length=1, hold_out=0)
    np.testing.assert_array_equal(all_tokens(streamed), tokenizer.encode(text))


def test_text_without_spaces_is_cut_all_the_same(tmp_path):
    """A wall of letters is not collected in memory, learned from in no time, and nothing of it is lost."""
    pytest.importorskip("tokenizers")
    (tmp_path / "text.txt").write_text("acgt" * 200_000)
    assert whole_text(tmp_path / "text.txt", tmp_path / "cache", tokenizer="bpe") == "acgt" * 200_000


def test_documents_of_a_folder_are_joined_by_newlines_in_the_order_of_their_names(tmp_path):
    """Sub-folders after the folder's own files; hidden, empty and other files are left out."""
    folder = tmp_path / "texts"
    (folder / "a").mkdir(parents=True)
    for name, content in {"b.txt": "second", "a.md": "first", "a/c.txt": "third", "empty.txt": ""}.items():
        (folder / name).write_text(content)
    (folder / ".hidden.txt").write_text("never")
    (folder / "picture.png").write_bytes(b"\0\xff")
    (folder / "z.jsonl").write_text('{"text": "a \\ud83d\\udc0b"}\n\n{"text": "half \\ud83d", "n": NaN}\n')
    assert whole_text(folder, tmp_path / "cache") == "first\nsecond\na 🐋\nhalf \ufffd\nthird"
    assert whole_text(folder, tmp_path / "cache", tokenizer="chars") == "first second a half third"


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Editors of Windows write one."""
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfab\r\n")
    assert whole_text(tmp_path / "text.txt", tmp_path / "cache") == "ab\r\n"


def test_parquet_is_read_row_by_row(tmp_path):
    """A row is a document; a missing text is an empty one."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [f"document {number} " * 20 for number in range(500)]
    table = pyarrow.table({"id": range(501), "text": [*documents[:7], None, *documents[7:]]})
    parquet.write_table(table, tmp_path / "text.parquet", row_group_size=100)
    assert whole_text(tmp_path / "text.parquet", tmp_path / "cache") == "\n".join(documents)
    parquet.write_table(pyarrow.table({"body": documents}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"has no column 'text', but 'body' \(string\); name .* --text-key"):
        opened(tmp_path / "other.parquet", tmp_path / "cache")
    (tmp_path / "none.parquet").write_bytes(b"not one" * 100)
    with pytest.raises(DataError, match=r"none\.parquet is not a \.parquet file: .*; copy or save it again"):
        opened(tmp_path / "none.parquet", tmp_path / "cache")
    content = bytearray((tmp_path / "text.parquet").read_bytes())
    content[100:2000] = b"\xff" * 1900
    (tmp_path / "damaged.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged\.parquet is a damaged \.parquet file: .*; copy or save it again"):
        opened(tmp_path / "damaged.parquet", tmp_path / "cache")


def test_progress_counts_the_bytes_of_the_source(source, tmp_path):
    """Upwards, to the end, with the total."""
    pytest.importorskip("tokenizers")
    calls = []
    opened(source, tmp_path / "cache", tokenizer="bpe", progress=lambda *call: calls.append(call))
    size = len(LINES.encode())
    assert {total for _, total, _ in calls} == {size}
    assert [what for _, _, what in calls] == sorted(what for _, _, what in calls)
    done = [done for done, _, what in calls if what == "tokenising"]
    assert done == sorted(done) and done[-1] == size
    again = []
    opened(source, tmp_path / "cache", tokenizer="bpe", progress=lambda *call: again.append(call))
    assert again == []


def wrong_files():
    yield "empty.txt", b"", r"is empty: 0 bytes in 1 file\(s\); give a file with text in it"
    yield (
        "a.txt",
        b"some text\0",
        r"a\.txt is not text: byte 9 is NUL, as in a binary file; give text in UTF-8, or remove",
    )
    yield (
        "a.txt",
        b"x" * 70_000 + b"caf\xe9 au lait",
        r"invalid continuation byte at byte 70003 \(0xe9\); .* iconv -f ISO",
    )
    yield "a.txt", b"caf\xc3", r"unexpected end of data at byte 3 \(0xc3\)"
    yield "a.txt", "text".encode("utf-16"), r"is text in UTF-16, .*: iconv -f UTF-16 -t UTF-8 a\.txt > new\.txt"
    yield (
        "a.jsonl",
        b'{"text": "a"}\n{"body": "b"}',
        r'a\.jsonl, line 2 has no key "text", but .body.; name the key .* --text-key',
    )
    yield "a.jsonl", b'{"text": "a"}\n\n{"text": 5}', r'a\.jsonl, line 3: "text" is 5, not a string; mend'
    yield "a.jsonl", b"[1]", r"a\.jsonl, line 1 is \[1\], not an object with the key"
    yield "a.jsonl", b'{"text": "a', r"a\.jsonl, line 1 is not read: it is not JSON .*; every line of a \.jsonl file"
    yield "a.jsonl", b"x" * (2**24 + 1), r"a\.jsonl, line 1 is longer than 16777216 bytes, .*; divide it"
    yield (
        "a.jsonl",
        b'{"text": ""}\n{"text": ""}',
        r"the text gives no tokens: its documents are empty, .*; give a source",
    )
    yield "a.txt", b"\xef\xbb\xbf", r"the text gives no tokens"
    yield "a.txt", b"ten tokens", r"is too short: 9 tokens in the training part and 1 tokens in the hold-out part, .*8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    list(wrong_files()),
    ids=lambda part: f"{len(part)}" if isinstance(part, bytes) else part,
)
def test_a_file_that_cannot_be_used_is_told_with_its_place_and_a_cure(tmp_path, name, content, message):
    """Which file, at which byte or line, and what to do; no cache is left behind."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.partial")) == []


def test_too_short_a_text_says_what_would_do(tmp_path):
    """Two windows in each part are needed: the numbers, and the three settings that help."""
    (tmp_path / "a.txt").write_text("x" * 100)
    message = (
        r"15 tokens in the hold-out part, .* 2 windows of 8, which are 16 tokens; give more text, a smaller length"
    )
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.txt", tmp_path / "cache", hold_out=0.15)
    assert opened(tmp_path / "a.txt", tmp_path / "cache", hold_out=0.16).num_tokens == 100


@pytest.mark.parametrize("source", ["nowhere", "~nobody-of-this-name/text", "a\0b.txt", "\ud800", "x" * 5000])
def test_a_source_that_is_not_there_lists_what_is_accepted(tmp_path, source):
    """A typing mistake, nobody's home folder, a NUL, half a character, a name longer than any."""
    with pytest.raises(DataError, match=r'give "moby-dick" \(built in\), a text file in UTF-8, a \.jsonl, \.json,'):
        opened(source, tmp_path)


def test_a_folder_without_text_says_what_was_looked_for(tmp_path):
    """The endings of names."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        DataError, match=r"holds no text: looked for \.jl, \.jsonl, .*\.txt in it and in its sub-folders"
    ):
        opened(tmp_path / "folder", tmp_path)


def test_all_wrong_settings_are_reported_together(tmp_path):
    """Each with its value and its range."""
    with pytest.raises(ConfigError) as caught:
        opened("moby-dick", tmp_path, tokenizer="bpe", vocabulary=255, length=0, hold_out=0.6)
    vocabulary, length, hold_out = caught.value.problems
    assert "vocab is 255; byte pairs begin with 256 bytes and end at 1048576" in vocabulary
    assert "length is 0; a window has 1 to" in length and "hold_out is 0.6" in hold_out
    with pytest.raises(ConfigError, match="tokenizer is 'word', neither one of chars, bytes, bpe nor the path"):
        opened("moby-dick", tmp_path, tokenizer="word")


def test_no_room_to_learn_is_told_before_anything_is_read(tmp_path):
    """With what it takes, so that the budget can be raised."""
    with pytest.raises(NoRoomToReadError) as caught:
        opened("moby-dick", tmp_path, tokenizer="bpe", room_bytes=10**7)
    assert caught.value.needed_bytes > 10**7 and "tokenizer: bpe" in caught.value.what


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_long_document_is_refused_with_the_room_that_all_need(tmp_path, kind):
    """Before it is taken: what it takes depends on its own length; and the room that is named does for the longest."""
    path, long = tmp_path / f"long.{kind}", "whale " * 500_000
    documents = ["short", long, long * 2, "short"]
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=2, compression="zstd")
        assert path.stat().st_size < 10_000  # which unpack to 9 MB
    else:
        lines = [json.dumps({"text": text}) for text in documents]
        path.write_text(f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines))
    room_bytes = 30_000_000 + (90_000_000 if kind == "parquet" else 0)
    with pytest.raises(NoRoomToReadError, match=r"long\.(json|parquet)") as caught:
        opened(path, tmp_path / "cache", room_bytes=room_bytes)
    assert caught.value.needed_bytes > room_bytes + 2 * len(long)
    with pytest.raises(NoRoomToReadError):
        opened(path, tmp_path / "cache", room_bytes=caught.value.needed_bytes - 1)
    text = opened(path, tmp_path / "cache", room_bytes=caught.value.needed_bytes, hold_out=0)
    assert text.num_tokens == len("\n".join(documents))


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_sizes_of_pages_are_those_that_the_library_unpacks(tmp_path, dictionary, compression, version):
    """The headers of both versions, with statistics among them, say what the column's metadata say of all together."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [f"document {number} " * (number % 300) for number in range(3000)]
    options = {"use_dictionary": dictionary, "compression": compression, "data_page_version": version}
    parquet.write_table(pyarrow.table({"id": range(3000), "text": documents}), tmp_path / "a.parquet", **options)
    column = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1)
    sizes = _page_sizes(tmp_path / "a.parquet", column)
    assert (sizes.dictionary_bytes > 2**19) == dictionary
    assert 0 < sizes.largest_bytes <= column.total_uncompressed_size
    assert sizes.data_bytes + sizes.dictionary_bytes > column.total_uncompressed_size / 12
    assert whole_text(tmp_path / "a.parquet", tmp_path / "cache") == "\n".join(filter(None, documents))


def parquet_columns():
    pyarrow = pytest.importorskip("pyarrow")
    texts = [*WORDS, None]
    return {
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "string_view": pyarrow.array(texts, pyarrow.string_view()),
        "large_string": pyarrow.array(texts, pyarrow.large_string()),
        "binary": pyarrow.array([text and text.encode() for text in texts]),
        "null": pyarrow.nulls(61),
        "list": pyarrow.array([[text] for text in texts]),
    }


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string", "binary", "null", "list"])
def test_columns_of_text_of_all_types_are_read(tmp_path, kind):
    """Or refused with what helps: another name does not."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": parquet_columns()[kind]}), path)
    if kind in ("null", "list"):
        message = (
            "all of its texts are missing" if kind == "null" else r"is of type 'list<.*>', not of strings; cast it"
        )
        with pytest.raises(DataError, match=message):
            opened(path, tmp_path / "cache")
    else:
        assert whole_text(path, tmp_path / "cache") == "\n".join(WORDS)


def test_bytes_of_a_column_that_are_no_text_are_told_by_their_row(tmp_path):
    """Old writers keep strings as bytes; pictures are bytes, too."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [b"a", b"\x89PNG"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2 is not text in UTF-8: .* at its byte 0"):
        opened(tmp_path / "a.parquet", tmp_path / "cache")


def test_reading_parquet_takes_room_of_its_own(tmp_path):
    """The library's memory counts, also where its file is one of many in a folder."""
    needed_bytes = []
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).write_text('{"text": "a"}')
        with pytest.raises(NoRoomToReadError) as caught:
            opened(tmp_path, tmp_path / "cache", room_bytes=1)
        needed_bytes.append(caught.value.needed_bytes)
    assert needed_bytes[1] == needed_bytes[0] + 90_000_000


def test_missing_pyarrow_is_a_setting_to_mend(tmp_path):
    """The message names the extra and another format."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = (
        "import pathlib, sys; sys.modules['pyarrow'] = None\n"
        "from edgeblocks.data.text import open_text\n"
        "from edgeblocks.errors import ConfigError\n"
        "try: open_text(sys.argv[1], tokenizer='bytes', vocabulary=0, length=8, hold_out=0,\n"
        "               cache_dir=pathlib.Path(sys.argv[2]))\n"
        "except ConfigError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet"), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "pip install 'edgeblocks[parquet]', or save the text as .jsonl" in done.stdout


def test_reading_text_imports_neither_torch_nor_libraries_it_does_not_need(tmp_path):
    """All of them would cost memory of the budget."""
    code = (
        "import sys, pathlib; from edgeblocks.data.text import open_text;"
        "open_text('moby-dick', tokenizer='chars', vocabulary=0, length=8, hold_out=.1,"
        "          cache_dir=pathlib.Path(sys.argv[1]));"
        "assert not {'torch', 'tokenizers', 'pyarrow', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_set_tells_itself_in_a_line(tmp_path):
    """Numbers of tokens in both parts, the tokenizer, and the window."""
    text = opened("moby-dick", tmp_path, tokenizer="chars", length=256)
    assert text.describe() == (
        f"{text.train_tokens:,} training and {text.num_tokens - text.train_tokens:,} hold-out tokens, "
        "27 different ones (chars, 1.00 characters each), in windows of 256"
    )
    assert (text.class_names, text.unreadable, text.source) == ((), (), "moby-dick")


def test_a_file_and_its_change_have_different_identities(source, tmp_path):
    """The cache of one is not taken for the other's, even where its size and its time are the same."""
    os.utime(source, (0, 0))
    first = find_text(str(source))
    other = tmp_path / "other"
    other.write_bytes(source.read_bytes()[::-1])
    os.utime(other, (0, 0))
    other.replace(source)
    assert find_text(str(source)).identity != first.identity


WORDS = [f"This is document number {number} about ships — and whales." for number in range(60)]


def as_lines(key="text"):
    return "".join(json.dumps({"id": 1, key: word}) + "\r\n" for word in WORDS)


def as_table(delimiter, key="text"):
    return f"id{delimiter}{key}\n" + "".join(f'1{delimiter}"{word}"\n' for word in WORDS)


RECORDS = {
    "a.jsonl": as_lines(),
    "a.ndjson": as_lines(),
    "lines.json": "\n" + as_lines(),
    "strings.json": json.dumps(WORDS),
    "array.json": json.dumps([{"text": word} for word in WORDS], indent=1),
    "a.csv": "\ufeff" + as_table(","),
    "semicolons.csv": as_table(";"),
    "a.tsv": as_table("\t"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_read_as_documents_under_any_of_their_names(tmp_path, name):
    """The text alone is trained on, under its key, or another that is named."""
    (tmp_path / name).write_text(RECORDS[name], encoding="utf-8")
    assert whole_text(tmp_path / name, tmp_path / "cache") == "\n".join(WORDS)
    if name == "strings.json":
        return
    (tmp_path / name).write_text(RECORDS[name].replace("text", "content"), encoding="utf-8")
    assert whole_text(tmp_path / name, tmp_path / "cache", text_key="content") == "\n".join(WORDS)
    with pytest.raises(DataError, match=r"no (key|column) .text..*, but .*content.*--text-key"):
        opened(tmp_path / name, tmp_path / "cache")


def odd_records():
    yield (
        "a.log",
        '{"text": "a"}\n',
        r"a\.log holds lines of JSON under a name that .*; name it a\.log\.jsonl, or \.txt",
    )
    yield "a.json", '[{"text": "a"}, {"text": null}]', r'a\.json, item 2: "text" is None, not a string; mend'
    yield "a.json", '[{"text": "a"}', r"a\.json is not read: it is not JSON .*; a \.json file is one array of objects"
    yield "a.json", '{"text": {"de": "a"}}', r"is \{'de': 'a'\}, not a string; write the text itself there"
    yield "a.json", "[" + " " * 2**24 + "]", r"is one array of 16777218 bytes, .*jq -c"
    yield "a.json", '{"data": [{"text": "a"}]}', r"has no key .text., and an array under 'data'; give that one: jq -c"
    yield "a.json", '{\n "text": "a"\n}', r"line 1 is not read: .*, or the file is one array of them: jq -s"
    yield "a.csv", 'text\n"a\nb\n', r"a\.csv is not read after byte 10: unexpected end of data; mend the row"
    yield "a.csv", "id,text\n1\n", r"a\.csv, row 1 has 1 columns, and `text` is column 2; mend"
    yield "a.csv", 'id,txet\n1,"x', r"has no column 'text' in its first line, but 'id', 'txet'; did you mean 'txet'\?"
    for encoding in ("utf-32", "utf-16"):
        yield (
            "a.csv",
            "text\na\n".encode(encoding),
            rf"in {encoding.upper()}, and .*: iconv -f {encoding.upper()} -t UTF-8",
        )
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        content = "Ein Text über Wale, ".encode(encoding) * 9
        yield "a b.txt", content, rf"in {encoding}, .*: iconv -f {encoding} -t UTF-8 'a b\.txt' > new"
    # What is made is another file, of the same kind: a table under the name of plain text would be read as prose.
    yield "a.csv", "text\na\n".encode("utf-16"), r"a\.csv > new\.csv$"
    yield "new.txt", "text".encode("utf-16"), r"new\.txt > newer\.txt$"
    yield "new.txt", b"%PDF-1.7", r"pdftotext new\.txt newer\.txt$"
    yield "a.txt", b"a\0b", r"a\.txt > new\.txt$"
    yield "a.txt", b"\x1f\x8b\x08", r"a\.txt is packed with gzip, not text; first: gunzip -k a\.txt"
    yield "a.docx", b"PK\x03\x04..", r"is a zip archive \(or a document of an office program, which is one\), not text"
    yield "a.jsonl", b"PAR1", r"is a \.parquet file of another name, not text; first: mv a\.jsonl a\.jsonl\.parquet"


@pytest.mark.parametrize(("name", "content", "message"), list(odd_records()), ids=lambda part: str(part)[:12])
def test_records_and_files_of_other_kinds_are_told_with_a_cure(tmp_path, name, content, message):
    """None of them is trained on as prose."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name, tmp_path / "cache")


def test_what_was_read_and_left_out_is_told_from_the_cache_too(tmp_path):
    """Files, documents and tokens; empty documents, and files of a folder that are no text, by their endings."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("hello whale " * 99)
    (folder / "b.ndjson").write_text('{"text": "x"}\n{"text": ""}\n\n{"text": ""}\n')
    for name in ("c.pdf", "inner/d.pdf", "e.csv", "README", ".hidden"):
        (folder / name).write_text("no text")
    expected = (
        "2 files of 1.23 KB, 2 documents, 1,190 tokens; left out: 2 empty documents, files of the folder "
        "(2 .pdf, 1 .csv, 1 without an ending)"
    )
    for _ in range(2):
        assert opened(folder, tmp_path / "cache").reading == expected
    assert opened("moby-dick", tmp_path / "cache").reading.startswith("moby-dick (built in, 1.22 MB), 1 document, ")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.csv").write_text("text")
    with pytest.raises(DataError, match=r"its \.csv files are read one at a time: give one by name"):
        opened(tmp_path / "tables", tmp_path / "cache")


def test_files_have_the_same_order_wherever_a_folder_was_unpacked(tmp_path):
    """A Mac takes names apart, é into e and an accent, which sort elsewhere; and a name is found as it is typed."""
    texts = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        folder.mkdir()
        for name in ("zebra", "école", "egg"):
            (folder / f"{unicodedata.normalize(form, name)}.txt").write_text(f"{name} " * 9)
        texts.append(whole_text(folder, tmp_path / "cache"))
        assert whole_text(folder / "école.txt", tmp_path / "cache") == "école " * 9
    assert texts[0] == texts[1]
