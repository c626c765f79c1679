"""What the 27 characters leave out of a text: counted as a slow count does, and told where it is much."""

import json
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from edgeblocks.data.cache import meta_digest
from edgeblocks.data.left_out import LeftOut, Tally, read_left_out
from edgeblocks.data.text import open_text

RUSSIAN = "Война и мир. Eh bien, mon prince. Gênes et Lucques ne sont plus que des apanages. "


def opened(source, tmp_path, tokenizer="chars"):
    cache = tmp_path / "cache"
    return open_text(str(source), tokenizer=tokenizer, vocabulary=300, length=8, hold_out=0.1, cache_dir=cache)


def tallied(*stretches):
    tally = Tally()
    for stretch in stretches:
        tally.add(stretch)
    return tally.result()


def counted_slowly(text):
    """By the sentences of the docstrings."""
    whole = Counter(character for character in text if not character.isspace())
    lost = Counter({one: n for one, n in whole.items() if not (one.isascii() and one.isalnum())})
    letters = Counter(
        {one: n for one, n in lost.items() if one.isalnum() or unicodedata.category(one) in ("Mn", "Mc", "Me")}
    )
    signs = lost - letters
    return LeftOut(
        letters=whole.total() - signs.total(),
        letters_left_out=letters.total(),
        signs=signs.total(),
        most_frequent_letters=tuple(sorted(map(ord, letters), key=lambda code: (-letters[chr(code)], code))[:5]),
        most_frequent_signs=tuple(sorted(map(ord, signs), key=lambda code: (-signs[chr(code)], code))[:5]),
    )


def test_counts_are_those_of_a_slow_count_however_the_text_is_cut():
    """Over every script of the first plane, marks, spaces, emoji and halves of surrogate pairs."""
    random = np.random.default_rng(0)
    codes = np.concatenate([random.integers(0, 0x3000, 4000), random.integers(0, 0x180, 4000), [0x1F600, 0xD800] * 9])
    text = "".join(map(chr, random.permutation(codes)))
    expected = counted_slowly(text)
    assert expected.letters_left_out > 1000 and expected.signs > 100
    assert tallied(text) == expected
    assert tallied(text[:1], "", text[1:5000], text[5000:]) == expected


def test_a_text_with_all_of_unicode_is_counted_in_bounded_memory():
    """The sums are whole where there are more kinds of characters than are counted one by one."""
    text = "".join(chr(code) for code in range(0x110000))
    tally = Tally()
    tally.add(text)
    assert len(tally._counts) == 4096
    found = tally.result()
    assert found.letters + found.signs == sum(not character.isspace() for character in text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            RUSSIAN,
            r"^1,000 of the text's 6,200 letters \(16.1%\) are left out, most often и ê В а й: .*--tokenizer bytes",
        ),
        (
            "Schöne Grüße, sagte sie; er schwieg und ging nach Hause. ",
            r"letters \(6.8%\) are left out, most often ß ö ü:",
        ),
        ("for (i = 0; i < n; ++i) { a[i] = f(b[i]); } ", r"characters that are no spaces \(.*most often"),
        ("नमस्ते the world ", r"most often त न म स U\+0947:"),
    ],
)
def test_a_loss_that_is_seldom_meant_is_told_with_figures_and_a_cure(tmp_path, text, words):
    """Of letters, or of signs where they are much of the text; also when the cache has the text; bytes lose nothing."""
    (tmp_path / "text.txt").write_text(text * 100, encoding="utf-8")
    (warning,) = opened(tmp_path / "text.txt", tmp_path).warnings
    assert re.search(words, warning), warning
    assert opened(tmp_path / "text.txt", tmp_path).warnings == (warning,)
    assert opened(tmp_path / "text.txt", tmp_path, "bytes").warnings == ()


@pytest.mark.parametrize(
    "text",
    [
        "moby-dick",
        "“It’s £42”, she said — ‘no!’ 99 times of 100, at the café on the corner where they sat. " * 9,
    ],
)
def test_english_prose_with_its_signs_needs_no_word(tmp_path, text):
    """Capitals, figures, signs and a foreign name are folded, as text8 is written."""
    source = text
    if " " in text:
        source = tmp_path / "text.txt"
        source.write_text(text + "the plain words of an ordinary page, of which there are many more. " * 40)
    assert opened(source, tmp_path).warnings == ()


def test_a_cache_that_does_not_tell_is_used_and_one_that_lies_is_not(tmp_path):
    """As those of earlier versions are; what was damaged is made again."""
    (tmp_path / "text.txt").write_text(RUSSIAN * 100, encoding="utf-8")
    expected = opened(tmp_path / "text.txt", tmp_path).warnings
    (path,) = (tmp_path / "cache").rglob("meta.json")
    meta = json.loads(path.read_text())
    for told, warnings in ((None, ()), ({"letters": -1}, expected)):
        changed = {name: value for name, value in meta.items() if name != "sha256"} | {"left_out": told}
        path.write_text(json.dumps({**changed, "sha256": meta_digest(changed)}))
        assert opened(tmp_path / "text.txt", tmp_path).warnings == warnings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("letters", -1),
        ("signs", True),
        ("signs", "many"),
        ("most_frequent_signs", [0x110000]),
        ("letters", 2**63),
        ("letters", 0),
    ]
    + [("most_frequent_letters", value) for value in (None, [1] * 6, ["a"], [0.5])],
)
def test_what_was_not_written_is_not_read(name, value):
    """Wrong types and sizes, before anything is made of them."""
    told = {"letters": 9, "letters_left_out": 1, "signs": 1, "most_frequent_letters": [], "most_frequent_signs": []}
    assert read_left_out(told) is not None
    with pytest.raises(ValueError):
        read_left_out({**told, name: value})
