"""Text from a network that gives the next token's logits, with a KV cache of its own. No torch: deployed models use it.

What `autoregression` does for a chain over noise levels, without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edgeblocks.diffusion.token_choice import Tokens, Values, choose_tokens, drawing_problems, softmax
from edgeblocks.errors import ConfigError
from edgeblocks.seeds import seed_at

_Cache = TypeVar("_Cache")
NextLogits = Callable[[Tokens, _Cache | None], tuple[Values, _Cache]]
"""Of tokens [b, n] behind those of a cache: logits [b, vocabulary] of what comes next, and the cache with them."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are chosen, and how many.

    Args:
        length: tokens of a text with what it begins with.
        ends: tokens after which a text is finished.
        vocabulary: tokens that the tokenizer knows; a model's head may have more.
        temperature: 1 draws as the model was trained, 0 takes the likeliest token.
        top_p: tokens are drawn from the smallest set of the likeliest whose probability reaches this.
    """

    length: int
    ends: frozenset[int]
    vocabulary: int
    temperature: float
    top_p: float
    seed: int

    def check(self, given: Tokens, *, n: int, positions: int | None) -> None:
        """That this can be asked of a model that knows so many positions, after these tokens.

        Raises:
            ConfigError: it cannot.
        """
        problems = drawing_problems(n=n, temperature=self.temperature, top_p=self.top_p)
        if not len(given):
            problems.append("a text from nothing: the model's tokenizer has no token that begins one; give a --prompt")
        if self.length <= len(given):
            problems.append(
                f"{len(given):,} tokens are given, and there is room for {self.length:,} with what is written; shorten "
                f"what is given, or ask for a longer text"
            )
        if positions is not None and self.length > positions:
            problems.append(
                f"--length {self.length}: the model knows {positions:,} positions, and a text may have no more tokens "
                f"than that"
            )
        if problems:
            raise ConfigError(*problems)


def write(
    next_logits: NextLogits[_Cache],
    given: Tokens,
    drawing: Drawing,
    *,
    n: int,
    piece: int,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """The tokens of n texts after what is given [p], without the token that ends them.

    Sample i has a random stream of its own. All are written together.

    Args:
        piece: of what is given, so many tokens go through the model together.
        on_tokens: called with all texts after each token.
    """
    streams = [np.random.default_rng(seed_at(drawing.seed, "continue", index)) for index in range(n)]
    waiting: Tokens = np.tile(given, (n, 1))
    cache: _Cache | None = None
    written: list[list[int]] = [[] for _ in range(n)]
    ended = np.zeros(n, dtype=bool)
    for _ in range(drawing.length - len(given)):
        for start in range(0, waiting.shape[1], piece):
            logits, cache = next_logits(waiting[:, start : start + piece], cache)
        probabilities = softmax(logits[:, : drawing.vocabulary]).astype(np.float64)
        uniform = np.array([stream.random() for stream in streams])
        chosen = choose_tokens(probabilities, uniform, temperature=drawing.temperature, top_p=drawing.top_p)
        for row, token in enumerate(chosen.tolist()):
            ended[row] |= token in drawing.ends
            if not ended[row]:
                written[row].append(token)
        if on_tokens is not None:
            on_tokens(written)
        if ended.all():
            break
        waiting = chosen[:, None]
    return written
