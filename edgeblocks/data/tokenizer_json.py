"""Checks a tokenizer.json before the library `tokenizers` reads it.

The file may come from anywhere, and the library takes all the memory that it asks for: where there is none left the
process ends, which nobody can catch. So what makes text longer is multiplied along each chain of parts, and what is
unpacked is compared with its size first. What else is wrong with a file the library says itself.
"""

import base64
import json
import math
from collections.abc import Iterator, Mapping

from edgeblocks.files.untrusted import MalformedFileError, shown
from edgeblocks.limits import MOST_TOKENS

_MOST_VALUES = 5 * MOST_TOKENS
"""A token takes one or two in the vocabulary, and three in the list of pairs."""
_MOST_GROWTH = 32
"""Of text on its way to its tokens. What Llama's tokenizer does to a space is counted as 12, T5's chain as all 32."""
_TABLE_GROWTH = 8
"""Of text by a `Precompiled` table, of which a chain may so have one. A text of its worst character grows more."""
_LONGEST_REPLACEMENT_BYTES = 33
"""Of one character in such a table; that is the longest one of Unicode's own."""
_LONGEST_WORD = 1000
"""For `WordPiece`, which takes the cube of a word's length; usual are 100."""


def check_definition(definition: str) -> None:
    """That the library can be given the content of a tokenizer.json, whatever it then says about it.

    Raises:
        MalformedFileError: it cannot.
    """
    if sum(map(definition.count, "[{,")) > _MOST_VALUES:
        raise MalformedFileError(f"it holds more than {_MOST_VALUES} values")
    try:
        content = json.loads(definition, object_pairs_hook=_without_twins)
        if not isinstance(content, dict):
            raise ValueError("an object is expected")
        for place in ("normalizer", "pre_tokenizer", "decoder"):
            growth = math.prod(map(_growth, _parts(content.get(place))))
            if growth > _MOST_GROWTH:
                raise MalformedFileError(f"its {place} may make text {growth} times as long, at most {_MOST_GROWTH}")
    except MalformedFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(f"it is not the JSON of a tokenizer ({str(error)[:200]})") from error
    model = content.get("model")
    longest = model.get("max_input_chars_per_word", 0) if isinstance(model, dict) else 0
    if not isinstance(longest, int) or longest > _LONGEST_WORD:
        raise MalformedFileError(
            f"its model.max_input_chars_per_word is {shown(longest)}, a number up to {_LONGEST_WORD} is used"
        )


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys are there once: of two, the library may take the other one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _parts(part: object) -> Iterator[dict[str, object]]:
    """The parts that a normalizer, pre-tokenizer or decoder is a chain of."""
    if isinstance(part, dict):
        yield part
        for inner in part.values():
            if isinstance(inner, list):
                for item in inner:
                    yield from _parts(item)


def _growth(part: Mapping[str, object]) -> int:
    """How many times longer a part can make a text, in bytes."""
    kind = part.get("type")
    if kind == "Replace":
        pattern = part.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        num_bytes = _num_bytes(part.get("content"))
        return max(1, -(-num_bytes // _num_bytes(found))) if _num_bytes(found) else 1 + num_bytes
    if kind == "Prepend":
        return 1 + _num_bytes(part.get("prepend"))
    if kind == "Precompiled":
        _check_table(part.get("precompiled_charsmap"))
        return _TABLE_GROWTH
    return 2 if kind in ("ByteLevel", "Metaspace") else 1


def _num_bytes(text: object) -> int:
    return len(text.encode(errors="replace")) if isinstance(text, str) else 0


def _check_table(packed: object) -> None:
    """That a table of characters and their replacements is as long as it says: a trie's size, the trie, and texts."""
    table = base64.b64decode(packed, validate=True) if isinstance(packed, str) else b""
    trie_bytes = int.from_bytes(table[:4], "little")
    if len(table) < 4 or trie_bytes > len(table) - 4:
        raise ValueError(f"a table of characters that has {len(table)} bytes declares {trie_bytes}")
    if max(map(len, table[4 + trie_bytes :].split(b"\0"))) > _LONGEST_REPLACEMENT_BYTES:
        raise ValueError(f"a character is replaced by more than {_LONGEST_REPLACEMENT_BYTES} bytes")
