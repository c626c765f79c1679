"""Figures of variety: examples by hand, and what no text can change."""

from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.inference.text_variety import distinct_share, repeated_share, variety

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=12).map(" ".join), max_size=4)


def test_the_figures_of_a_text_that_goes_round():
    """Five times the same four words: four different ones of 20, four groups of 4 of 17 are new."""
    found = variety(["one two three four " * 5])
    assert found["words"] == 20
    assert found["distinct_1"] == 4 / 20 and found["distinct_2"] == 4 / 19 and found["distinct_3"] == 4 / 18
    assert found["repeated_4"] == 13 / 17


def test_texts_without_words_have_no_figures():
    """None, and no division by zero."""
    assert variety(["", " "]) == {"distinct_1": None, "distinct_2": None, "distinct_3": None, "repeated_4": None} | {
        "words": 0
    }


@given(TEXTS, st.integers(1, 4))
def test_shares_are_shares(texts, count):
    """In one text what is not distinct is repeated; shares lie between 0 and 1."""
    for share in (distinct_share(texts, count), repeated_share(texts, count)):
        assert share is None or 0 <= share <= 1
    for text in texts:
        distinct, repeated = distinct_share([text], count), repeated_share([text], count)
        assert (distinct is None) == (repeated is None)
        assert distinct is None or abs(distinct + repeated - 1) < 1e-12
