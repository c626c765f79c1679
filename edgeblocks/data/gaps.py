"""Texts with gaps that a network fills in."""

import re

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.tokenizer import Tokenizer, check_readable
from edgeblocks.diffusion.token_choice import GAP_PATTERN
from edgeblocks.errors import ConfigError

GAPS = ("_", "[MASK]")


def with_gaps(text: str | None, tokenizer: Tokenizer, *, length: int, mask: int) -> tuple[NDArray[np.int64], int]:
    """Tokens [length] with `mask` at the gaps, and how many of them the text takes up; what follows is gaps.

    A gap of one token is written `_` or `[MASK]`. None is a text of gaps alone.

    Raises:
        ConfigError: the text is longer, or has no gap.
    """
    tokens = np.full(length, mask, dtype=np.int64)
    if text is None:
        return tokens, length
    check_readable("--fill", re.sub(GAP_PATTERN, "", text), tokenizer)
    pieces = [
        np.array([mask]) if piece in GAPS else tokenizer.encode(piece) for piece in re.split(GAP_PATTERN, text) if piece
    ]
    given = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    if len(given) > length:
        raise ConfigError(
            f"--fill has {len(given)} tokens and the network was trained on texts of {length}; give a shorter part"
        )
    if not (given == mask).any():
        raise ConfigError(
            f"--fill {text!r} has no gap; write one as _ for each missing token, for example 'the ____ sat'"
        )
    tokens[: len(given)] = given
    return tokens, len(given)
