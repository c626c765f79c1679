"""Text that is written token by token, each from a chain over noise levels. No torch: the deployed chain runs it.

A position's target is its token's row of the code-book. To write it, its state z starts as noise and walks the noise
levels; at each one the block that owns it gives logits, whose softmax-weighted mean of code-book rows is the denoised
state. What a block knows of the positions before comes from keys and values that were kept when these were written.

Families differ in what those keys and values depend on. Where they come from the tokens alone (`ar`), each block has one
set of them. Where they come from noised codes (`looped`), each level has its own, and those of a position are made once
its token is known, from the token's own noised code as in training: together with the next position, as a segment of two.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np

from edgeblocks.drawing import Shares, Tokens, Values, choose, drawing_problems, softmax
from edgeblocks.errors import ConfigError
from edgeblocks.randomness import seed_at
from edgeblocks.solver import integrate

DEFAULT_STEPS = 8
MOST_STEPS = 1000
PROMPT_SEGMENT = 64
"""Positions of a prompt that go through a network together."""
LEAST_READ_SIGMA = 0.5
"""See `read_levels`."""


class Predict(Protocol):
    """A network with its keys and values: logits of the last of some consecutive positions.

    It keeps the keys and values of the positions that it is given, in the place of those that it kept of them before.
    """

    def __call__(self, step: int, sigma: float, inputs: Tokens, z: Values, start: int) -> Values:
        """Logits [b, vocabulary] of position start + n - 1.

        Args:
            step: the number of the level in the chain.
            inputs: [b, n], at each position the token before it; the id `vocabulary` at the beginning.
            z: noised codes [b, n, code_width].
            start: the first position; those before have been given.
        """
        ...


def check_continuing(*, n: int, steps: int, temperature: float, top_p: float) -> None:
    """That texts can be asked for like that.

    Raises:
        ConfigError: with all that is impossible.
    """
    problems = drawing_problems(n=n, temperature=temperature, top_p=top_p)
    if not 1 <= steps <= MOST_STEPS:
        problems.append(f"--steps {steps}: 1 to {MOST_STEPS} noise levels a token are possible")
    if problems:
        raise ConfigError(*problems)


def check_prompt(prompt: Tokens, *, length: int) -> None:
    """That a network can go on with a prompt [p].

    Raises:
        ConfigError: there is no room behind it.
    """
    if len(prompt) >= length:
        raise ConfigError(
            f"--prompt has {len(prompt)} tokens and the network was trained on texts of {length}, which leaves no room "
            f"to go on; give at most {length - 1}, for example the prompt's end"
        )


def read_levels(levels: Sequence[float]) -> tuple[int, ...]:
    """The numbers of the levels at which a token's probabilities are read; the answer is their mean.

    >>> read_levels((10.0, 2.0, 0.7, 0.1)), read_levels((0.4, 0.2))
    ((0, 1, 2), (0,))
    """
    return tuple(number for number, sigma in enumerate(levels) if number == 0 or sigma >= LEAST_READ_SIGMA)


def continue_texts(
    predict: Predict,
    codes: Values,
    *,
    prompt: Tokens,
    samples: range,
    length: int,
    levels: Sequence[float],
    cache_keys: Sequence[Hashable],
    restates: bool,
    temperature: float,
    top_p: float,
    seed: int,
    on_token: Callable[[int], None] | None = None,
) -> Tokens:
    """Texts [samples, length] that begin with the prompt.

    Sample i has a random stream of its own, so that it does not depend on how many there are or how they are grouped.

    Args:
        codes: the code-book [vocabulary, code_width].
        prompt: tokens [p], p < length; none is a text from its beginning.
        samples: the numbers of those that are written together.
        levels: of each token's chain, descending.
        cache_keys: for each level a name of the keys and values that it needs: the same at levels that share them.
        restates: whether keys and values depend on noised codes, so that a position's are made when it is known.
        temperature: 1 draws as the network was trained, 0 takes the likeliest token.
        top_p: tokens are drawn from the smallest set of the likeliest whose probability reaches this.
        on_token: called with the number of positions that are known.
    """
    vocabulary, width = codes.shape
    noise = np.empty((len(samples), length, width), dtype=np.float32)
    uniform = np.empty((len(samples), length))
    for row, index in enumerate(samples):
        stream = np.random.default_rng(seed_at(seed, "continue", index))
        noise[row] = stream.standard_normal((length, width), dtype=np.float32)
        uniform[row] = stream.random(length)
    inputs = np.full((len(samples), length + 1), vocabulary, dtype=np.int64)  # input i + 1 is token i
    inputs[:, 1 : len(prompt) + 1] = prompt

    def known_state(positions: slice, sigma: float) -> Values:
        tokens = inputs[:, 1:][:, positions]
        state: Values = codes[tokens] + noise[:, positions] * np.float32(sigma)
        return state

    first = len(prompt) - restates
    for step, sigma in enumerate(levels):
        if cache_keys[step] not in cache_keys[:step]:
            for start in range(0, first, PROMPT_SEGMENT):
                part = slice(start, min(start + PROMPT_SEGMENT, first))
                predict(step, sigma, inputs[:, part], known_state(part, sigma), start)
    wanted = read_levels(levels)
    for position in range(len(prompt), length):
        start = max(0, position - restates)

        def logits_at(step: int, sigma: float, z: Values, start: int = start, position: int = position) -> Values:
            before = known_state(slice(start, position), sigma)
            return predict(step, sigma, inputs[:, start : position + 1], np.append(before, z[:, None], axis=1), start)

        shares = token_shares(logits_at, codes, noise[:, position], levels=levels, wanted=wanted)
        inputs[:, position + 1] = choose(shares, uniform[:, position], temperature=temperature, top_p=top_p)
        if on_token is not None:
            on_token(position + 1)
    return inputs[:, 1:]


def token_shares(
    logits_at: Callable[[int, float, Values], Values],
    codes: Values,
    noise: Values,
    *,
    levels: Sequence[float],
    wanted: Sequence[int],
) -> Shares:
    """The tokens' probabilities [b, vocabulary] by a chain from noise [b, code_width]: the mean over wanted levels.

    Args:
        logits_at: logits [b, vocabulary], given the number of a level, the level, and z [b, code_width].
    """
    total = np.zeros((len(noise), len(codes)))
    steps = iter(range(len(levels)))

    def denoise(z: Values, sigma: float) -> Values:
        step = next(steps)
        shares = softmax(logits_at(step, sigma, z))
        if step in wanted:
            np.add(total, shares, out=total)
        denoised: Values = shares @ codes
        return denoised

    integrate(denoise, noise, levels, solver="euler")
    return total / len(wanted)


class Caches:
    """Keys and values of the positions that are known, by the name of what they belong to."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._values: dict[Hashable, Values] = {}

    @property
    def num_bytes(self) -> int:
        return sum(values.nbytes for values in self._values.values())

    def past(self, key: Hashable, upto: int, *, shape: tuple[int, int, int, int]) -> Values:
        """Those of the positions before `upto`, a view [caches, b, heads, upto, head_width].

        Args:
            shape: (caches, b, heads, head_width).
        """
        if key not in self._values:
            assert upto == 0, "positions are given in order"
            self._values[key] = np.zeros((*shape[:3], self._length, shape[3]), dtype=np.float32)
        return self._values[key][:, :, :, :upto]

    def put(self, key: Hashable, start: int, present: Values) -> None:
        """Keep those of positions from `start` on, [caches, b, heads, n, head_width]."""
        self._values[key][:, :, :, start : start + present.shape[3]] = present


class Network(Protocol):
    """A block, as `CachedPredict` calls it."""

    def __call__(self, block: int, z: Values, sigma: Values, inputs: Tokens, past: Values) -> tuple[Values, Values]:
        """Logits [b, vocabulary] of the last position, and keys and values [caches, b, heads, n, head_width].

        Args:
            sigma: one a sample, [b].
            past: keys and values of the positions before, [caches, b, heads, T, head_width].
        """
        ...


class CachedPredict:
    """A `Predict` that keeps the keys and values of the samples that are being written."""

    def __init__(
        self,
        network: Network,
        *,
        length: int,
        block_of: Callable[[float], int],
        cache_keys: Sequence[Hashable],
        cache_shape: Callable[[int], tuple[int, int, int]],
    ) -> None:
        """
        Args:
            block_of: the block that owns a noise level.
            cache_keys: as `continue_texts` is given.
            cache_shape: (caches, heads, head_width) of a block.
        """
        self.caches = Caches(length)
        self._network, self._block_of, self._keys, self._shape = network, block_of, cache_keys, cache_shape

    def __call__(self, step: int, sigma: float, inputs: Tokens, z: Values, start: int) -> Values:
        block, key, count = self._block_of(sigma), self._keys[step], len(inputs)
        num_caches, heads, head_width = self._shape(block)
        past = self.caches.past(key, start, shape=(num_caches, count, heads, head_width))
        logits, present = self._network(block, z, np.full(count, sigma, dtype=np.float32), inputs, past)
        self.caches.put(key, start, present)
        return logits
