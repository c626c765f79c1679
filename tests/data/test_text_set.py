"""What open_text promises whatever the source: tokens, parts, windows, settings."""

import hashlib
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.text_files import LINES, all_tokens, opened, whole_text

import edgeblocks.data
from edgeblocks.data.plain_text import PIECE_CHARACTERS, Piece
from edgeblocks.data.token_cache import grouped
from edgeblocks.data.tokenizer import build_tokenizer, train_pairs
from edgeblocks.errors import ConfigError, DataError, NoRoomToReadError

SAMPLE = Path(edgeblocks.data.__file__).with_name("moby_dick.txt.xz")


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


def test_too_short_a_text_says_what_would_do(tmp_path):
    """Two windows in each part are needed: the numbers, and the three settings that help."""
    (tmp_path / "a.txt").write_text("x" * 100)
    message = (
        r"15 tokens in the hold-out part, .* 2 windows of 8, which are 16 tokens; give more text, a smaller length"
    )
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.txt", tmp_path / "cache", hold_out=0.15)
    assert opened(tmp_path / "a.txt", tmp_path / "cache", hold_out=0.16).num_tokens == 100


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
