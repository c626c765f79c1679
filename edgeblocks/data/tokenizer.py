"""Text as numbers and back: the 27 characters of text8, bytes, or byte pairs that were learned from the text. No torch.

Training and the deployed chain use the same tokenizers, so that a prompt means the same in both.
"""

import hashlib
import re
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeblocks.data.tokenizer_json import check_definition
from edgeblocks.errors import ConfigError, DataError, RunError
from edgeblocks.files.untrusted import MalformedFileError, open_regular, read_text
from edgeblocks.limits import MOST_TOKENS

Kind = Literal["chars", "bytes", "bpe"]

KINDS: tuple[Kind, ...] = ("chars", "bytes", "bpe")
FEWEST_PAIRS = 256
"""The bytes themselves, with which byte pairs begin."""
TOKENIZER_FILE = "tokenizer.json"
"""Where a run or an export keeps byte pairs."""
MOST_DEFINITION_BYTES = 2**26
"""Of a tokenizer.json; that of 256,000 tokens has some 35 MB."""

_CHARACTERS = b" abcdefghijklmnopqrstuvwxyz"
_DIGITS = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")
_LOWERED = bytes(
    ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else ord(" ") for byte in range(256)
)  # digits stay, to be spelled out
_SPACES = re.compile(rb"  +")


class Tokenizer(Protocol):
    """Turns text into token ids from 0 to vocabulary - 1, and back."""

    @property
    def kind(self) -> Kind:
        """By which name `build_tokenizer` makes it again."""

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """The tokens [n] of a text."""

    def decode(self, tokens: ArrayLike) -> str:
        """The text of tokens [n].

        Raises:
            ValueError: a token that is none, such as a mask.
        """

    def to_json(self) -> str | None:
        """The content of the tokenizer.json; None where the kind says everything."""


class CharacterTokenizer:
    """27 tokens: 0 is a space, 1 to 26 are a to z; any text is first written with these, see `normalize`."""

    kind: Kind = "chars"
    vocabulary = len(_CHARACTERS)

    def encode(self, text: str) -> NDArray[np.int64]:
        """The tokens of `normalize(text)`."""
        written = np.frombuffer(normalize(text), dtype=np.uint8)
        return np.where(written == ord(" "), 0, written.astype(np.int64) - (ord("a") - 1))

    def decode(self, tokens: ArrayLike) -> str:
        """The characters of the tokens."""
        ids = _checked(tokens, self.vocabulary)
        return np.frombuffer(_CHARACTERS, dtype=np.uint8)[ids].tobytes().decode("ascii")

    def to_json(self) -> None:
        """The kind says everything."""


class ByteTokenizer:
    """256 tokens: the bytes of the text in UTF-8."""

    kind: Kind = "bytes"
    vocabulary = 256

    def encode(self, text: str) -> NDArray[np.int64]:
        """The bytes; half a surrogate pair, which is no character, becomes a question mark."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: ArrayLike) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return _checked(tokens, self.vocabulary).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> None:
        """The kind says everything."""


class PairTokenizer:
    """What a tokenizer.json describes; byte pairs, unless the user brought something else.

    Raises:
        ConfigError: the library `tokenizers` is missing.
        MalformedFileError: not the content of a tokenizer.json, or with too many tokens.
    """

    kind: Kind = "bpe"

    def __init__(self, definition: str) -> None:
        library = _library()
        check_definition(definition)
        try:
            self._tokenizer: Any = _guarded(library.Tokenizer.from_str, definition)
            # Lengths are the reader's business; a tokenizer.json may ask for texts cut, filled up, marked or doubled.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.beginning: str = _beginning(self._tokenizer)
            """What it puts before a text, such as `<s>`; tokens that it reads as that mark."""
            self._tokenizer.post_processor = None
            ids = _guarded(self._tokenizer.get_vocab, True).values()
        except _RefusedError as error:
            raise MalformedFileError(f"the library `tokenizers` cannot read it ({error})") from error
        self.vocabulary = max(ids, default=-1) + 1
        if not 2 <= self.vocabulary <= MOST_TOKENS:
            raise MalformedFileError(f"its token ids end at {self.vocabulary - 1}; 1 to {MOST_TOKENS - 1} are used")

    def encode(self, text: str) -> NDArray[np.int64]:
        """The tokens, without any that would mark a beginning or an end.

        Raises:
            DataError: the tokenizer refuses the text, for example for an unknown word.
        """
        return np.array(self._encoded(text).ids, dtype=np.int64)

    def encode_with_offsets(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens [n], and the characters [n, 2] from and to which each of them stands.

        Raises:
            DataError: as of `encode`.
        """
        found = self._encoded(text)
        return np.array(found.ids, dtype=np.int64), np.array(found.offsets, dtype=np.int64).reshape(-1, 2)

    def _encoded(self, text: str) -> Any:
        whole = text.encode("utf-8", errors="replace").decode("utf-8")
        try:
            return _guarded(self._tokenizer.encode, whole, None, False, False)
        except _RefusedError as error:
            raise DataError(
                f"the tokenizer cannot encode a text of {len(text)} characters: {error}; "
                "choose a tokenizer that knows all of it, such as tokenizer: bpe"
            ) from error

    def decode(self, tokens: ArrayLike) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: the tokenizer refuses the tokens, which one that can be used does not.
        """
        ids = _checked(tokens, self.vocabulary).tolist()
        try:
            return str(_guarded(self._tokenizer.decode, ids, False))
        except _RefusedError as error:
            raise DataError(
                f"the tokenizer cannot decode {len(ids)} tokens: {error}; its tokenizer.json needs another decoder"
            ) from error

    def to_json(self) -> str:
        """The content of the tokenizer.json."""
        return str(self._tokenizer.to_str())


_IN_MEMORY: weakref.WeakValueDictionary[bytes, PairTokenizer] = weakref.WeakValueDictionary()
"""By the sha256 of their definitions. A run and its data have the same one, and 50,000 tokens take 35 MB."""


def check_readable(flag: str, text: str, tokenizer: Tokenizer) -> None:
    """That a tokenizer keeps something of a text that the user wrote.

    Raises:
        ConfigError: none of its characters are among those that the network knows.
    """
    if text.strip() and not tokenizer.decode(tokenizer.encode(text)).strip():
        raise ConfigError(
            f"{flag} {text!r} has no character that this network knows; it was trained on "
            f"{'a to z and space' if tokenizer.kind == 'chars' else 'other text'}"
        )


def stored_tokenizer(
    folder: Path, kind: str, *, definition_sha256: str | None, vocabulary: int, cure: str
) -> "Tokenizer":
    """The tokenizer that a run or an export keeps in its folder.

    Args:
        definition_sha256: of its tokenizer.json; None where it has none.
        vocabulary: the number of tokens in the folder's manifest.
        cure: what to do about a damaged one, for the message.

    Raises:
        ConfigError: the library `tokenizers` is missing.
        RunError: its file is missing, damaged, or of another vocabulary.
    """
    path, definition = folder / TOKENIZER_FILE, None
    if definition_sha256 is not None:
        try:
            definition = read_text(path, most_bytes=MOST_DEFINITION_BYTES)
        except (OSError, MalformedFileError) as error:
            raise RunError(f"cannot read {path}: {error}; {cure}") from error
        if hashlib.sha256(definition.encode()).hexdigest() != definition_sha256:
            raise RunError(f"{path} does not match its checksum; {cure}")
    tokenizer = build_tokenizer(kind, definition, path=path)
    if tokenizer.vocabulary != vocabulary:
        raise RunError(
            f"{folder} is damaged: its tokenizer has {tokenizer.vocabulary} tokens, manifest.json says "
            f"{vocabulary}; {cure}"
        )
    return tokenizer


def build_tokenizer(kind: str, definition: str | None, *, path: Path | None = None) -> Tokenizer:
    """The tokenizer that a run or an export keeps, of that kind.

    Args:
        definition: the content of its tokenizer.json, None unless it is "bpe".
        path: where the definition was read, which the message names; None: it has no file.

    Raises:
        ConfigError: the library `tokenizers` is missing.
        RunError: no such kind, or no such definition.

    >>> tokenizer = build_tokenizer("chars", None)
    >>> tokenizer.decode(tokenizer.encode("Chapter 42."))
    'chapter four two '
    """
    if kind == "chars":
        return CharacterTokenizer()
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe" and definition is not None:
        digest = hashlib.sha256(definition.encode()).digest()
        if (known := _IN_MEMORY.get(digest)) is not None:
            return known
        try:
            _IN_MEMORY[digest] = tokenizer = PairTokenizer(definition)
            return tokenizer
        except MalformedFileError as error:
            raise RunError(f"{path or 'a tokenizer.json'} cannot be used: {error}; put it back from a copy") from error
    raise RunError(f"a tokenizer is one of {', '.join(KINDS)}, and bpe has a definition; put it back from a copy")


def normalize(text: str) -> bytes:
    """The text as text8 is written: a to z, digits spelled out, all else a space, and no two spaces in a row.

    Source: M. Mahoney, wikifil.pl. As there, only A to Z are made lower case: an accented letter is a space.

    >>> normalize("It's the 7th... \u00c9t\u00e9!")
    b'it s the seven th t '
    """
    written = text.encode("ascii", errors="replace").translate(_LOWERED)  # one byte a character
    for digit, word in enumerate(_DIGITS):
        written = written.replace(b"%d" % digit, b" " + word + b" ")
    return _SPACES.sub(b" ", written)


def train_pairs(texts: Iterable[str], vocabulary: int) -> PairTokenizer:
    """Byte pairs learned from `texts`; fewer than `vocabulary` where there are not so many pairs seen twice.

    Source: R. Sennrich et al., arXiv:1508.07909, on bytes as in GPT-2.

    Raises:
        ConfigError: the library `tokenizers` is missing.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PairTokenizer(tokenizer.to_str())


def read_tokenizer(path: Path) -> PairTokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
        ConfigError: the library `tokenizers` is missing.
        DataError: the file cannot be read, or is none.
    """
    try:
        with open_regular(path) as file:
            begin = file.read(64) or b""  # None: some files of /proc would have to be waited for
        if begin.lstrip()[:1] != b"{":
            raise MalformedFileError("it does not begin with {, as JSON of an object does")
        return PairTokenizer(read_text(path, most_bytes=MOST_DEFINITION_BYTES))
    except OSError as error:
        raise DataError(f"the tokenizer {path} cannot be read: {error.strerror}; check its path") from error
    except MalformedFileError as error:
        raise DataError(
            f"{path} is not a tokenizer.json that can be used: {error}; give one that the library `tokenizers` saved, "
            "or choose tokenizer: chars, bytes or bpe"
        ) from error


Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class _RefusedError(Exception):
    """What the library said."""


def _guarded(call: Callable[Arguments, Answer], *arguments: Arguments.args, **options: Arguments.kwargs) -> Answer:
    """A call of the library, whose errors are plain Exceptions, and where it is surprised, panics past Exception."""
    try:
        return call(*arguments, **options)
    except BaseException as error:
        if isinstance(error, MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        raise _RefusedError(" ".join(str(error).split())[:200]) from error


def _beginning(tokenizer: Any) -> str:
    try:
        marked, plain = (_guarded(tokenizer.encode, "a", None, False, marks).ids for marks in (True, False))
    except _RefusedError:  # it does not know the letter
        return ""
    before = marked[: marked.index(plain[0])] if plain and plain[0] in marked else []
    names = [tokenizer.id_to_token(token) for token in before]
    return "" if None in names else "".join(names)


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"tokenizer: bpe and a tokenizer.json need the library `tokenizers`, which cannot be imported ({error}); "
            "pip install 'edgeblocks[text]', or choose tokenizer: chars or bytes"
        ) from error
    return tokenizers


def _checked(tokens: ArrayLike, vocabulary: int) -> NDArray[np.int64]:
    ids = np.asarray(tokens, dtype=np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
        raise ValueError(f"tokens {ids.min()}..{ids.max()} are outside 0..{vocabulary - 1}")
    return ids
