"""Tokens on the disk: tokens.npy [pages, tokens a page], checks.npy [pages], meta.json, and for
byte pairs tokenizer.json.

A page has 4096 bytes of uint8, uint16 or uint32, the smallest that holds the vocabulary; the last one is filled up with
zeros. Its CRC-32 stands in checks.npy and is compared whenever the page is read.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, open_or_build, read_meta
from edgeblocks.data.documents import Account
from edgeblocks.data.left_out import LeftOut, Tally, read_left_out
from edgeblocks.data.plain_text import PIECE_CHARACTERS, Piece
from edgeblocks.data.tokenizer import (
    MOST_DEFINITION_BYTES,
    CharacterTokenizer,
    PairTokenizer,
    Tokenizer,
    build_tokenizer,
)
from edgeblocks.errors import DataError, RunError, StorageError
from edgeblocks.files.untrusted import read_text
from edgeblocks.limits import MOST_TOKENS

FORMAT_VERSION = 2
PAGE_BYTES = 4096
_KIND = CacheKind(name="token cache", content="tokens", row="a page", remedy="give less text", version=FORMAT_VERSION)
_MOST_PAGES = 2**40
_MOST_UNDIVIDED = 2 * PIECE_CHARACTERS


class Stretch(NamedTuple):
    """Text that is encoded at once, the byte of the source up to which it leads, and in which part it lies."""

    text: str
    position: int
    held_out: bool


@dataclass(kw_only=True)
class Extent:
    """How much text there is: tokens, and the characters and UTF-8 bytes that they stand for."""

    tokens: int = 0
    characters: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """A finished cache. `train` and `held_out` follow each other in the file.

    fingerprint: sha256 of the tokens and the tokenizer, in hexadecimal.
    left_out: what "chars" does not write; None for the other tokenizers, and in caches that do not have it.
    account: the documents that were read.
    """

    token_file: "TokenFile"
    tokenizer: Tokenizer
    definition_bytes: int
    train: Extent
    held_out: Extent
    fingerprint: str
    left_out: LeftOut | None
    account: Account


class TokenFile:
    """tokens.npy of a finished cache, read page by page, each compared with its check."""

    def __init__(self, folder: Path, dtype: np.dtype[np.generic]) -> None:
        self._tokens = RowFile(folder / "tokens.npy", dtype, row=_KIND.row, most_rows=_MOST_PAGES)
        self._checks = RowFile(folder / "checks.npy", np.uint32, row=_KIND.row, most_rows=_MOST_PAGES)
        self.num_pages, self.page_tokens = self._tokens.shape
        if self.page_tokens * dtype.itemsize != PAGE_BYTES or self._checks.shape != (self.num_pages,):
            raise ValueError("pages of another size, or another number of checks")

    def read(self, start: int, length: int) -> NDArray[np.generic]:
        """The tokens [length] from position `start`.

        Raises:
            StorageError: the file has been damaged or cut since it was written.
        """
        first, last = start // self.page_tokens, (start + length - 1) // self.page_tokens
        wanted = np.arange(first, last + 1, dtype=np.int64)
        pages, checks = self._tokens.read(wanted), self._checks.read(wanted)
        for page, check, number in zip(pages, checks, wanted, strict=True):
            # Of every page that is read, as a flipped bit is a token like any other and no shape would show it.
            if zlib.crc32(page.data) != check:
                raise StorageError(
                    f"{self._tokens.path} is damaged: page {number} of {self.num_pages} is not what was written; check "
                    f"the disk, delete {self._tokens.path.parent}, and start again: the text is then tokenised anew"
                )
        return pages.reshape(-1)[start - first * self.page_tokens :][:length]

    def window_bytes(self, length: int) -> int:
        """Bytes of the pages over which a window of so many tokens can lie."""
        return ((length - 2) // self.page_tokens + 2) * PAGE_BYTES


def open_or_build_tokens(
    cache_dir: Path,
    key: str,
    *,
    tokenizer: Callable[[], Tokenizer],
    stretches: Callable[[Tokenizer, Account], Iterator[Stretch]],
) -> StoredTokens:
    """The cache of that key; where there is none or a damaged one, `stretches` are encoded with `tokenizer`.

    Raises:
        DataError: the text gives no tokens.
        StorageError: the cache cannot be written or read.
    """

    def build(files: CacheFiles) -> None:
        chosen = tokenizer()
        account = Account()
        _fill(files, chosen, stretches(chosen, account), account)

    return open_or_build(_KIND, cache_dir, key, build=build, read=_read_cache)


def token_type(vocabulary: int) -> np.dtype[np.generic]:
    """The smallest type of tokens from 0 to vocabulary - 1.

    >>> [token_type(vocabulary).name for vocabulary in (256, 257, 65_537)]
    ['uint8', 'uint16', 'uint32']
    """
    return np.min_scalar_type(vocabulary - 1)


def grouped(pieces: Iterator[Piece], *, border: int | None, at_spaces: bool) -> Iterator[Stretch]:
    """The same text in stretches of some PIECE_CHARACTERS; from byte `border` of the source on it is held out.

    Args:
        border: None if nothing is held out.
        at_spaces: whether a stretch ends only before a space that follows something else, where no byte pair reaches
            across, so that the tokens are those of the undivided text. Text without spaces is cut all the same.
    """
    waiting: list[str] = []
    num_waiting, most, position, held_out = 0, PIECE_CHARACTERS, 0, False
    for text, reached in pieces:
        if border is not None and not held_out and reached > border:
            head, text = _divided(text, border - position, reached - position)  # noqa: PLW2901
            joined = "".join([*waiting, head])
            place = _last_border(joined) if at_spaces else len(joined)
            yield Stretch(joined[:place], border, False)
            waiting, held_out = [joined[place:]], True
            num_waiting, most = len(joined) - place, PIECE_CHARACTERS
        waiting.append(text)
        num_waiting += len(text)
        position = reached
        if num_waiting >= most:
            joined = "".join(waiting)
            place = _last_border(joined) if at_spaces else len(joined)
            # No space to cut at: more is waited for, but not without end.
            if place == len(joined) and at_spaces and num_waiting < _MOST_UNDIVIDED:
                most = _MOST_UNDIVIDED
                continue
            yield Stretch(joined[:place], position, held_out)
            waiting, num_waiting, most = [joined[place:]], len(joined) - place, PIECE_CHARACTERS
    yield Stretch("".join(waiting), position, held_out)


def _divided(text: str, num_bytes: int, total_bytes: int) -> tuple[str, str]:
    """The text in two, the first with the share num_bytes / total_bytes of its bytes, less half a character."""
    encoded = text.encode()
    # By shares, as the source's bytes are not the text's: a .jsonl has quotes and keys, a .parquet is compressed.
    head = encoded[: len(encoded) * num_bytes // total_bytes].decode("utf-8", errors="ignore")
    return head, text[len(head) :]


def _last_border(text: str) -> int:
    """The place of the last space that follows something else; the end if there is none."""
    place = text.rfind(" ")
    while place > 0 and text[place - 1].isspace():
        place = text.rfind(" ", 0, place)
    return place if place > 0 else len(text)


def _fill(files: CacheFiles, tokenizer: Tokenizer, stretches: Iterator[Stretch], account: Account) -> None:
    dtype = token_type(tokenizer.vocabulary)
    page_tokens = PAGE_BYTES // dtype.itemsize
    files.begin({"tokens.npy": (dtype, (page_tokens,)), "checks.npy": (np.dtype(np.uint32), ())}, PAGE_BYTES)
    definition = tokenizer.to_json()
    extents = (Extent(), Extent())
    token_hash = hashlib.sha256()
    tally = Tally() if isinstance(tokenizer, CharacterTokenizer) else None
    waiting = np.empty(0, dtype)
    for tokens, extent, held_out in _encoded(tokenizer, stretches, tally):
        total = extents[held_out]
        total.tokens, total.characters = total.tokens + extent.tokens, total.characters + extent.characters
        total.bytes += extent.bytes
        # Of four bytes each whatever the file's type is: the same text and tokenizer have the same fingerprint.
        token_hash.update(tokens.astype("<u4").data)
        waiting = np.concatenate([waiting, tokens.astype(dtype)])
        num_whole = len(waiting) // page_tokens * page_tokens
        _append(files, waiting[:num_whole].reshape(-1, page_tokens))
        # Only whole pages are written; the rest waits for what comes next, so that pages are full but for the last.
        waiting = waiting[num_whole:]
    if not extents[0].tokens + extents[1].tokens:
        raise DataError(
            "the text gives no tokens: its documents are empty, or the tokenizer leaves out all of their characters; "
            "give a source with text in it, or choose tokenizer: bytes"
        )
    if len(waiting):
        _append(files, np.pad(waiting, (0, page_tokens - len(waiting)))[None])
    if definition is not None:
        files.write("tokenizer.json", definition.encode())
    seen = [tokenizer.kind, _sha256(definition), token_hash.hexdigest()]
    files.finish(
        {
            "kind": tokenizer.kind,
            "vocabulary": tokenizer.vocabulary,
            "definition_sha256": _sha256(definition),
            "train": asdict(extents[0]),
            "held_out": asdict(extents[1]),
            "fingerprint": hashlib.sha256(json.dumps(seen).encode()).hexdigest(),
            "left_out": None if tally is None else asdict(tally.result()),
            "account": asdict(account),
        }
    )


def _encoded(
    tokenizer: Tokenizer, stretches: Iterator[Stretch], tally: Tally | None
) -> Iterator[tuple[NDArray[np.int64], Extent, bool]]:
    """Tokens, how much text they stand for, and whether they are held out.

    Characters are counted as the tokenizer writes them: for "chars" each token is one.
    """
    after_space = False
    for stretch in stretches:
        tokens = tokenizer.encode(stretch.text)
        if tally is not None:
            tally.add(stretch.text)
        if not len(tokens):
            continue
        if isinstance(tokenizer, CharacterTokenizer):
            tokens = tokens[1:] if after_space and tokens[0] == 0 else tokens  # a run of spaces over the border
            after_space = bool(tokens[-1] == 0) if len(tokens) else True
            extent = Extent(tokens=len(tokens), characters=len(tokens), bytes=len(tokens))
        else:
            num_bytes = len(stretch.text.encode("utf-8", errors="replace"))
            extent = Extent(tokens=len(tokens), characters=len(stretch.text), bytes=num_bytes)
        yield tokens, extent, stretch.held_out


def _append(files: CacheFiles, pages: NDArray[np.generic]) -> None:
    if len(pages):
        pages = np.ascontiguousarray(pages)
        files.append("tokens.npy", pages)
        files.append("checks.npy", np.array([zlib.crc32(page.data) for page in pages], dtype=np.uint32))


def _read_cache(folder: Path) -> StoredTokens:
    """The cache in `folder`.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it is not what `_fill` wrote.
    """
    meta = read_meta(folder, FORMAT_VERSION)
    vocabulary, fingerprint = meta["vocabulary"], meta["fingerprint"]
    if type(vocabulary) is not int or not 2 <= vocabulary <= MOST_TOKENS or not isinstance(fingerprint, str):
        raise ValueError("the vocabulary is a number, the fingerprint a text")
    definition = None
    if meta["kind"] == PairTokenizer.kind:
        definition = read_text(folder / "tokenizer.json", most_bytes=MOST_DEFINITION_BYTES)
    if _sha256(definition) != meta["definition_sha256"]:
        raise ValueError("the tokenizer is damaged")
    try:
        tokenizer = build_tokenizer(meta["kind"], definition)
    except RunError as error:
        raise ValueError("no such tokenizer") from error
    train, held_out = _extent(meta["train"]), _extent(meta["held_out"])
    token_file = TokenFile(folder, token_type(vocabulary))
    room = token_file.num_pages * token_file.page_tokens
    if tokenizer.vocabulary != vocabulary or not room - token_file.page_tokens < train.tokens + held_out.tokens <= room:
        raise ValueError("the tokens are of another number or another tokenizer")
    return StoredTokens(
        token_file=token_file,
        tokenizer=tokenizer,
        definition_bytes=len(definition or ""),
        train=train,
        held_out=held_out,
        fingerprint=fingerprint,
        left_out=read_left_out(meta["left_out"]),
        account=Account(**_counts(meta["account"], ("documents", "empty"))),
    )


def _extent(content: object) -> Extent:
    return Extent(**_counts(content, ("tokens", "characters", "bytes")))


def _counts(content: object, names: tuple[str, ...]) -> dict[str, int]:
    if not isinstance(content, dict) or content.keys() != set(names):
        raise ValueError(f"{', '.join(names)} are wanted")
    if any(type(count) is not int or not 0 <= count < 2**63 for count in content.values()):
        raise ValueError("a count")
    return content


def _sha256(definition: str | None) -> str | None:
    return None if definition is None else hashlib.sha256(definition.encode()).hexdigest()
