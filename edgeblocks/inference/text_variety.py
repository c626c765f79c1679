"""How varied texts are: distinct words and word groups, and how much a text repeats itself. Plain arithmetic.

Such figures depend on how much text there is, so they are compared between equal amounts: samples beside hold-out text.
"""

from collections.abc import Sequence

DISTINCT_GROUPS = (1, 2, 3)
REPEATED_GROUP = 4


def word_groups(text: str, count: int) -> list[tuple[str, ...]]:
    """All runs of `count` consecutive words of a text.

    >>> word_groups("to be or not", 3)
    [('to', 'be', 'or'), ('be', 'or', 'not')]
    """
    words = text.split()
    return [tuple(words[start : start + count]) for start in range(len(words) - count + 1)]


def distinct_share(texts: Sequence[str], count: int) -> float | None:
    """How many different groups of `count` words there are, of all groups of the texts; None where there is none.

    Source: Li et al. 2016, arXiv 1510.03055 (distinct-n).

    >>> distinct_share(["a b a b", "a b"], 2)
    0.5
    """
    groups = [group for text in texts for group in word_groups(text, count)]
    return len(set(groups)) / len(groups) if groups else None


def repeated_share(texts: Sequence[str], count: int = REPEATED_GROUP) -> float | None:
    """The share of groups of `count` words that occurred before in the same text; None where there is no group.

    >>> repeated_share(["a b c a b c", "a b c"], 3)
    0.2
    """
    groups = [word_groups(text, count) for text in texts]
    total = sum(map(len, groups))
    return sum(len(some) - len(set(some)) for some in groups) / total if total else None


def variety(texts: Sequence[str]) -> dict[str, float | None]:
    """The figures of some texts: `distinct_1` to `distinct_3`, `repeated_4`, and how many `words` they are from."""
    return {
        **{f"distinct_{count}": distinct_share(texts, count) for count in DISTINCT_GROUPS},
        f"repeated_{REPEATED_GROUP}": repeated_share(texts),
        "words": sum(len(text.split()) for text in texts),
    }
