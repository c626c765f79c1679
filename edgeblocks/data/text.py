"""Text to train on: windows of tokens, out of a text that may be much larger than the memory.

The text is tokenised once, as a stream, into a cache on the disk, and a batch is read from there. Nothing is kept of
the text's length: an order is drawn step by step, and an example is named by the token at which it begins.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.dataset import Progress, silent
from edgeblocks.data.documents import Account, TextSource, find_text
from edgeblocks.data.plain_text import Reading
from edgeblocks.data.token_cache import FORMAT_VERSION, StoredTokens, Stretch, TokenFile, grouped, open_or_build_tokens
from edgeblocks.data.tokenizer import FEWEST_PAIRS, KINDS, Tokenizer, build_tokenizer, read_tokenizer, train_pairs
from edgeblocks.errors import ConfigError, DataError, NoRoomToReadError
from edgeblocks.limits import LONGEST_SEQUENCE, MOST_TOKENS
from edgeblocks.seeds import seed_at

_MOST_HOLD_OUT = 0.5
_FEWEST_WINDOWS = 2
"""In each part: with fewer there is nothing to draw from, or to compare."""
_SAMPLE_BYTES = 2**23
"""Of the training part, spread evenly over it, from which byte pairs are learned."""
_MOST_WORD_BYTES = 2**20
"""Of the different words among them, which the memory for learning goes with: after so many no more are taken."""
_STRETCH_ROOM_BYTES = 20_000_000
"""Measured: 9 MB for the text on its way to the cache as characters, 4 MB as bytes."""
_PAIRS_ROOM_BYTES = 60_000_000
"""Measured: 23 MB for the library, and what lies beside the words while they are learned and encoded."""
_ROOM_PER_PAIR_BYTES = 900
"""Measured: 400 to 870 with 16,000 to 50,000 tokens."""
_ROOM_PER_WORD_BYTE = 112
"""Measured: 90 with words of random letters, of which no two are alike."""
_LOADED_PER_BYTE = 30
"""What a tokenizer keeps in memory, measured with 8,000 and 100,000 tokens, by the bytes of its definition."""

_LONG_WORD = re.compile(r"\S{1001}|\s{1001}")
_SHORT_WORDS = re.compile(r"\s{0,1000}\S{1,1000}|\s{1,1000}")


@dataclass(frozen=True, kw_only=True)
class WindowOrder:
    """Batches of windows that begin anywhere in the training part, each drawn from (seed, block, step) alone.

    No permutation is kept, so that a text of 10^11 tokens costs no memory, and a resumed run seeks in no time.
    """

    num_starts: int
    batch: int
    seed: int
    block: int

    def indices(self, step: int) -> NDArray[np.int64]:
        """Where the windows of the step begin, int64 [batch], uniform over 0 to num_starts - 1."""
        generator = np.random.default_rng(seed_at(self.seed, "order", self.block, step))
        return generator.integers(0, self.num_starts, self.batch, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSet:
    """Windows of `length` tokens of a text whose last part is held out. A window is named by its first token.

    num_tokens, train_tokens: of the whole text, and of the part from its beginning that is trained on.
    vocabulary: number of different tokens; a mask is not among them.
    characters_per_token, bytes_per_token: of the text as it is tokenised (for "chars": as text8 is written), in the
        hold-out part, or in the training part where nothing is held out. Bytes are those of UTF-8.
    fingerprint: sha256 of the tokens and the tokenizer, in hexadecimal: the same wherever the text lies.
    resident_bytes: what the set keeps in memory.
    reading: what was read, in a line: files, documents, tokens, and what was left out.
    warnings: what of the text is left out, where that is much.
    class_names, unreadable: empty; images have them.
    """

    source: str
    fingerprint: str
    tokenizer: Tokenizer
    num_tokens: int
    train_tokens: int
    length: int
    characters_per_token: float
    bytes_per_token: float
    resident_bytes: int
    token_file: TokenFile = field(repr=False)
    reading: str
    warnings: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    packed: bool = False
    """Whether a window holds several texts that do not see each other."""

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, a mask not counted."""
        return self.tokenizer.vocabulary

    @property
    def has_held_out(self) -> bool:
        """Whether a part is kept for validation."""
        return self.train_tokens < self.num_tokens

    @property
    def train_examples(self) -> int:
        """Windows of the training part, which begin at any of its tokens."""
        return self.train_tokens - self.length + 1

    def order(self, *, batch: int, seed: int, block: int) -> WindowOrder:
        """The order in which a block sees the training part."""
        return WindowOrder(num_starts=self.train_examples, batch=batch, seed=seed, block=block)

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], None]:
        """The windows int64 [b, length] that begin at `indices`, and no labels.

        Raises:
            StorageError: the cache has been damaged since it was opened.
        """
        starts = np.asarray(indices, dtype=np.int64)
        last = self.num_tokens - self.length
        if len(starts) and not (starts.min() >= 0 and starts.max() <= last):
            raise IndexError(f"windows that begin at {starts.min()}..{starts.max()} are outside 0..{last}")
        windows = np.empty((len(starts), self.length), dtype=np.int64)
        for window, start in zip(windows, starts, strict=True):
            window[:] = self.token_file.read(int(start), self.length)
        return windows, None

    def evaluation_indices(self, most: int) -> NDArray[np.int64]:
        """At most so many windows side by side, spread evenly over the hold-out part, else over the training part."""
        begin, end = (self.train_tokens, self.num_tokens) if self.has_held_out else (0, self.train_tokens)
        num_windows = (end - begin) // self.length
        number = min(most, num_windows)
        return begin + np.arange(number, dtype=np.int64) * num_windows // max(1, number) * self.length

    def batch_resident_bytes(self, batch: int) -> int:
        """What a call of `gather` with `batch` indices adds to the resident memory, in bytes."""
        return batch * self.length * 8 + 2 * self.token_file.window_bytes(self.length)

    def describe(self) -> str:
        """The set in one line."""
        held_out = f" and {self.num_tokens - self.train_tokens:,} hold-out" if self.has_held_out else ""
        return (
            f"{self.train_tokens:,} training{held_out} tokens, {self.vocabulary:,} different ones "
            f"({self.tokenizer.kind}, {self.characters_per_token:.2f} characters each), in windows of {self.length:,}"
        )


def open_text(
    source: str,
    *,
    tokenizer: str,
    vocabulary: int,
    length: int,
    hold_out: float,
    cache_dir: Path,
    text_key: str = "text",
    progress: Progress | None = None,
    room_bytes: int | None = None,
    elsewhere: Callable[[], None] | None = None,
) -> TextSet:
    """The text of `source`: "moby-dick" (built in), a file, or a folder of files; see `documents.find_text`.

    tokenizer: "chars", "bytes", "bpe" (learned from the training part), or the path of a tokenizer.json.
    vocabulary: number of tokens that "bpe" learns; the others have a number of their own.
    length: tokens of a window.
    hold_out: share of the source, its end, in the hold-out part, 0 to 0.5. It is cut at that byte, or at the space
        before it for byte pairs, so that no token that is learned has seen the hold-out part.
    cache_dir: where the text is tokenised to, once; the next call with the same files and settings finds it there.
    text_key: the key or column of records that holds the text.
    progress: called with (done, total, what) in bytes, for example (65536, 1216415, "tokenising").
    room_bytes: memory that tokenising may take; None does not bound it.
    elsewhere: called where the text is not in the cache, to tokenise it in another process; None: in this one.

    Raises:
        ConfigError: a setting is out of range, or needs a library that is missing.
        DataError: the text cannot be trained on.
        StorageError: the cache cannot be written or read.
        NoRoomToReadError: tokenising takes more than `room_bytes`.
    """
    _check_settings(tokenizer, vocabulary, length, hold_out)
    text = find_text(source, cache_dir)
    work = _Tokenising(text, tokenizer, vocabulary, hold_out, text_key, progress or silent, room_bytes)
    if elsewhere is not None and not (cache_dir / work.key / "meta.json").exists():
        elsewhere()
    stored = open_or_build_tokens(cache_dir, work.key, tokenizer=work.tokenizer, stretches=work.stretches)
    _check_windows(source, stored, length, hold_out, source_bytes=text.total_bytes)
    measured = stored.held_out if hold_out else stored.train
    warning = None if stored.left_out is None else stored.left_out.warning()
    return TextSet(
        source=source,
        fingerprint=stored.fingerprint,
        tokenizer=stored.tokenizer,
        num_tokens=stored.train.tokens + stored.held_out.tokens,
        train_tokens=stored.train.tokens,
        length=length,
        characters_per_token=measured.characters / measured.tokens,
        bytes_per_token=measured.bytes / measured.tokens,
        resident_bytes=_LOADED_PER_BYTE * stored.definition_bytes,
        token_file=stored.token_file,
        reading=_told(text, stored),
        warnings=() if warning is None else (warning,),
    )


def _told(text: TextSource, stored: StoredTokens) -> str:
    """What was read, in a line."""
    account = text.given or stored.account
    documents, empty = account.documents, account.empty
    told = f"{text.files_told()}, {documents:,} document{'s' * (documents != 1)}"
    told += f", {stored.train.tokens + stored.held_out.tokens:,} tokens"
    left_out = [f"{empty:,} empty document{'s' * (empty != 1)}"] if empty else []
    left_out += [f"files of the folder ({text.left_out_told()})"] if text.left_out else []
    return told + (f"; left out: {', '.join(left_out)}" if left_out else "")


class _Tokenising:
    """How a text is tokenised: first, for "bpe", a look at its training part, then all of it."""

    def __init__(
        self,
        text: TextSource,
        chosen: str,
        vocabulary: int,
        hold_out: float,
        text_key: str,
        progress: Progress,
        room_bytes: int | None,
    ) -> None:
        self._text, self._chosen, self._vocabulary = text, chosen, vocabulary
        self._progress, self._room_bytes, self._needed_bytes = progress, room_bytes, _STRETCH_ROOM_BYTES
        self._reading = Reading(text_key=text_key, check_room=self._check_document)
        self._border = round(text.total_bytes * (1 - hold_out)) if hold_out else None
        self._given: Tokenizer | None = None
        if chosen in ("chars", "bytes"):
            self._given = build_tokenizer(chosen, None)
        elif chosen != "bpe":
            self._given = read_tokenizer(Path(chosen).expanduser())
        definition = None if self._given is None else self._given.to_json()
        decides = [FORMAT_VERSION, text.identity, self._border, text_key]
        decides += [definition or chosen, vocabulary if self._given is None else None]
        self.key = hashlib.sha256(f"text {json.dumps(decides)}".encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The one to encode with.

        Raises:
            NoRoomToReadError: learning it takes more than there is.
        """
        if self._given is not None:
            definition = self._given.to_json()
            loaded_bytes = 0 if definition is None else _PAIRS_ROOM_BYTES + _LOADED_PER_BYTE * len(definition)
            self._check_room(max(_STRETCH_ROOM_BYTES, loaded_bytes))
            return self._given
        if not self._has_room(_STRETCH_ROOM_BYTES):  # the words cannot even be counted: as many as there may be
            self._check_room(self._learning_bytes(min(self._text.total_bytes, _MOST_WORD_BYTES)))
        return train_pairs(self._sample(), self._vocabulary)

    def stretches(self, tokenizer: Tokenizer, account: Account) -> Iterator[Stretch]:
        """All of the text, whose documents are counted."""
        return self._read("tokenising", account, at_spaces=tokenizer.kind == "bpe")

    def _read(self, what: str, account: Account, *, at_spaces: bool) -> Iterator[Stretch]:
        total = self._text.total_bytes
        pieces = self._text.pieces(self._reading, account)
        for stretch in grouped(pieces, border=self._border, at_spaces=at_spaces):
            yield stretch
            self._progress(min(stretch.position, total), total, what)

    def _sample(self) -> Iterator[str]:
        """Stretches of the training part, evenly spread, of some _SAMPLE_BYTES together.

        Text with so many different words that they would fill the memory gives fewer, from its beginning.
        """
        border = self._text.total_bytes if self._border is None else self._border
        words: set[str] = set()
        taken_bytes = begin = word_bytes = 0
        for stretch in self._read("learning byte pairs", Account(), at_spaces=True):
            if stretch.held_out or word_bytes > _MOST_WORD_BYTES:
                break
            if taken_bytes * border <= _SAMPLE_BYTES * begin:
                taken_bytes += stretch.position - begin
                new = set(stretch.text.split()) - words
                words |= new
                word_bytes += sum(len(word.encode()) for word in new)
                if self._has_room(self._learning_bytes(word_bytes)):
                    yield from _with_short_words(stretch.text)
            begin = stretch.position
        self._check_room(self._learning_bytes(word_bytes))  # of all of them: the figure is the last one asked for

    def _learning_bytes(self, word_bytes: int) -> int:
        """Memory that learning byte pairs takes from so many bytes of different words."""
        return _PAIRS_ROOM_BYTES + _ROOM_PER_WORD_BYTE * word_bytes + _ROOM_PER_PAIR_BYTES * self._vocabulary

    def _has_room(self, tokenising_bytes: int) -> bool:
        return self._room_bytes is None or self._text.reading_bytes + tokenising_bytes <= self._room_bytes

    def _check_room(self, tokenising_bytes: int) -> None:
        self._needed_bytes = tokenising_bytes
        if not self._has_room(tokenising_bytes):
            needed_bytes = self._text.reading_bytes + tokenising_bytes
            raise NoRoomToReadError(f"the text '{self._text.source}' with tokenizer: {self._chosen}", needed_bytes)

    def _check_document(self, what: str, document_bytes: int, cure: str) -> None:
        """That there is room for a document beside what tokenising takes."""
        needed_bytes = self._needed_bytes + document_bytes
        if not self._has_room(needed_bytes):
            raise NoRoomToReadError(what, self._text.reading_bytes + needed_bytes, cure=cure)


def _with_short_words(text: str) -> list[str]:
    """The text in pieces whose words have at most 1,000 characters: learning takes the square of a word's length."""
    return _SHORT_WORDS.findall(text) if _LONG_WORD.search(text) else [text]


def _check_settings(tokenizer: str, vocabulary: int, length: int, hold_out: float) -> None:
    problems = []
    if tokenizer not in KINDS and not _is_there(tokenizer):
        problems.append(
            f"tokenizer is '{tokenizer}', neither one of {', '.join(KINDS)} nor the path of a tokenizer.json "
            "that exists"
        )
    if tokenizer == "bpe" and not FEWEST_PAIRS <= vocabulary <= MOST_TOKENS:
        problems.append(
            f"vocab is {vocabulary}; byte pairs begin with {FEWEST_PAIRS} bytes and end at {MOST_TOKENS} "
            "tokens (--vocab 8192)"
        )
    if not 1 <= length <= LONGEST_SEQUENCE:
        problems.append(f"length is {length}; a window has 1 to {LONGEST_SEQUENCE} tokens (--set length=256)")
    if not 0 <= hold_out <= _MOST_HOLD_OUT:
        problems.append(
            f"hold_out is {hold_out}; it is the share of the text kept for validation, 0 to {_MOST_HOLD_OUT}"
        )
    if problems:
        raise ConfigError(*problems)


_MOST_LOST = 2
"""With more bytes than that for a token, characters were left out of most of a text that is written with 27."""


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        return False


def _check_windows(source: str, stored: StoredTokens, length: int, hold_out: float, *, source_bytes: int) -> None:
    fewest = _FEWEST_WINDOWS * length
    parts = [("training", stored.train.tokens)] + ([("hold-out", stored.held_out.tokens)] if hold_out else [])
    short = [f"{tokens} tokens in the {name} part" for name, tokens in parts if tokens < fewest]
    if short:
        hint = ""
        if (
            source_bytes > _MOST_LOST * (stored.train.tokens + stored.held_out.tokens)
            and stored.tokenizer.kind == "chars"
        ):
            hint = "; most of its characters are not a to z, which is all that chars keeps: --tokenizer bytes keeps all"
        raise DataError(
            f"data '{source}' is too short: {' and '.join(short)}, and each part needs {_FEWEST_WINDOWS} windows of "
            f"{length}, which are {fewest} tokens; give more text, a smaller length, or another hold_out "
            f"(now {hold_out}){hint}"
        )
