"""Which characters of a text the 27 of text8 leave out, and whether that is worth a word.

That capitals become small, digits words and signs spaces is what text8 is. That the ä of German, or every letter of a
Russian text beside its English quotations, becomes a space too is seldom meant.
"""

import unicodedata
from dataclasses import dataclass, fields

import numpy as np

_MOST_LETTERS = 0.005
"""Of a text's letters and digits. English with foreign names loses less (Moby-Dick 0.00001); tables of German letters
give those with dots and ß some 0.02."""
_MOST_SIGNS = 0.15
"""Of all that is no space. Measured: Moby-Dick 0.045, this project's README 0.12, its program text 0.17."""
_MOST_KINDS = 4096
"""Different characters that are counted one by one: a text with all of Unicode must not fill the memory."""
_MOST_NAMED = 5
_MOST_CODE = 0x10FFFF


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Characters of a text but for its spaces, and those that were left out.

    letters: those of any script, with digits and the marks that belong to letters.
    signs: all others, all of which are left out.
    most_frequent_letters, most_frequent_signs: of those left out, as code points, the most frequent first.
    """

    letters: int
    letters_left_out: int
    signs: int
    most_frequent_letters: tuple[int, ...]
    most_frequent_signs: tuple[int, ...]

    def warning(self) -> str | None:
        """What to tell the user; None where no more is lost than text8 is known for."""
        whole = self.letters + self.signs
        if self.letters_left_out > _MOST_LETTERS * self.letters:
            lost, of, named = self.letters_left_out, f"{self.letters:,} letters", self.most_frequent_letters
            share = lost / self.letters
        elif self.signs > _MOST_SIGNS * whole:
            lost, of, named = self.signs, f"{whole:,} characters that are no spaces", self.most_frequent_signs
            share = lost / whole
        else:
            return None
        return (
            f"{lost:,} of the text's {of} ({share:.1%}) are left out, most often {' '.join(map(_shown, named))}: the "
            f"tokenizer chars writes a to z and space alone; --tokenizer bytes keeps every character"
        )


class Tally:
    """Counts what is left out, stretch by stretch, in memory that does not grow with the text."""

    def __init__(self) -> None:
        self._kept = 0
        self._others = 0
        self._counts: dict[int, int] = {}

    def add(self, text: str) -> None:
        """Count a stretch of text."""
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ascii_counts = np.bincount(codes[codes < 128], minlength=128)
        found = dict(enumerate(ascii_counts.tolist()))
        for code, count in zip(*np.unique(codes[codes >= 128], return_counts=True), strict=True):
            found[int(code)] = int(count)
        for code, count in found.items():
            if code < 128 and chr(code).isalnum():
                self._kept += count
            elif count and not chr(code).isspace():
                self._count(code, count)

    def _count(self, code: int, count: int) -> None:
        if code in self._counts or len(self._counts) < _MOST_KINDS:
            self._counts[code] = self._counts.get(code, 0) + count
        else:
            self._others += count

    def result(self) -> LeftOut:
        """The sums. Characters that came when there were too many kinds are letters: no script has so many signs."""
        letters = {code: count for code, count in self._counts.items() if _is_letter(code)}
        signs = {code: count for code, count in self._counts.items() if code not in letters}
        lost = sum(letters.values()) + self._others
        return LeftOut(
            letters=self._kept + lost,
            letters_left_out=lost,
            signs=sum(signs.values()),
            most_frequent_letters=_most_frequent(letters),
            most_frequent_signs=_most_frequent(signs),
        )


def read_left_out(content: object) -> LeftOut | None:
    """What a cache has of it; None where it has nothing.

    Raises:
        ValueError: it is not what was written.
    """
    if content is None:
        return None
    if not isinstance(content, dict) or content.keys() != {field.name for field in fields(LeftOut)}:
        raise ValueError("what is left out is three counts and two lists")
    counts = [content[name] for name in ("letters", "letters_left_out", "signs")]
    lists = [content[name] for name in ("most_frequent_letters", "most_frequent_signs")]
    if any(type(count) is not int or not 0 <= count < 2**63 for count in counts):
        raise ValueError("a count of characters")
    for codes in lists:
        if not isinstance(codes, list) or len(codes) > _MOST_NAMED:
            raise ValueError("a list of some characters")
        if any(type(code) is not int or not 0 <= code <= _MOST_CODE for code in codes):
            raise ValueError("the number of a character")
    letters, lost, signs = counts
    if lost > letters:
        raise ValueError("more is left out than there is")
    return LeftOut(
        letters=letters,
        letters_left_out=lost,
        signs=signs,
        most_frequent_letters=tuple(lists[0]),
        most_frequent_signs=tuple(lists[1]),
    )


def _is_letter(code: int) -> bool:
    return chr(code).isalnum() or unicodedata.category(chr(code)).startswith("M")


def _most_frequent(counts: dict[int, int]) -> tuple[int, ...]:
    return tuple(sorted(counts, key=lambda code: (-counts[code], code))[:_MOST_NAMED])


def _shown(code: int) -> str:
    """A character as a message can hold it: no half of one, no mark without its letter, nothing that moves a cursor."""
    character = chr(code)
    alone = character.isprintable() and not unicodedata.category(character).startswith("M")
    return character if alone else f"U+{code:04X}"
