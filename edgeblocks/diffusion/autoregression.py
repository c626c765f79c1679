"""Text that is written token by token, each from a chain over noise levels. No torch: the deployed chain runs it.

A position's target is its token's row of the code-book. To write it, its state z starts as noise and walks the noise
levels; at each one the block that owns it gives logits, whose softmax-weighted mean of code-book rows is the denoised
state. A block attends to the earlier positions through its KV cache: their keys and values, kept since they were
written.

Families differ in what the KV cache depends on. Where it comes from the tokens alone (`ar`), each block has one. Where
it comes from noised codes (`looped`), each level has its own, and a position's entries are made when its token is
known, from the token's own noised code as in training, together with the next position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from edgeblocks.diffusion.solver import integrate
from edgeblocks.diffusion.token_choice import (
    Probabilities,
    Tokens,
    Values,
    choose_tokens,
    drawing_problems,
    length_problems,
    softmax,
)
from edgeblocks.errors import ConfigError
from edgeblocks.seeds import seed_at

MOST_STEPS = 1000
PROBABILITY_COPIES = 8
PROMPT_SEGMENT = 64
"""Positions of a prompt that go through a network together."""
LEAST_READ_SIGMA = 2.0
"""See `read_levels`."""


CachesPer = Literal["block", "step"]


@dataclass(frozen=True, kw_only=True)
class TokenChain:
    """How a token is written: the noise levels, the block of each, and the KV cache that it reads.

    codes: the code-book [vocabulary, code_width].
    length: positions of a text.
    levels: descending noise levels.
    blocks: the block of each level.
    caches_per: whether levels share the KV cache of their block, or each step of the chain has its own. Those depend on
        noised codes, so that a position's entries are made when its token is known.
    num_caches: tensors of keys and of values in each block's KV cache.
    """

    codes: Values
    length: int
    levels: tuple[float, ...]
    blocks: tuple[int, ...]
    caches_per: CachesPer
    num_caches: tuple[int, ...]
    heads: int
    head_width: int

    @property
    def cache_keys(self) -> tuple[int, ...]:
        """For each level the number of its KV cache."""
        return self.blocks if self.caches_per == "block" else tuple(range(len(self.levels)))

    @property
    def sample_bytes(self) -> int:
        """See `writing_bytes`."""
        vocabulary, code_width = self.codes.shape
        of_key = dict(zip(self.cache_keys, self.blocks, strict=True))
        return writing_bytes(
            length=self.length,
            num_caches=sum(self.num_caches[block] for block in of_key.values()),
            width=self.heads * self.head_width,
            vocabulary=vocabulary,
            code_width=code_width,
        )


def writing_bytes(*, length: int, num_caches: int, width: int, vocabulary: int, code_width: int) -> int:
    """What writing one text keeps in memory: the KV cache, noise, and several copies of its probabilities.

    Args:
        num_caches: tensors of keys and of values [length, width], of all blocks and steps of the chain.
    """
    return length * (4 * num_caches * width + 4 * code_width + 24) + PROBABILITY_COPIES * 8 * vocabulary


class Predict(Protocol):
    """A network with its KV cache: logits of the last of some consecutive positions.

    The keys and values of these positions go into the KV cache, over those that it had of them.
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


def check_continuing(
    *, n: int, steps: int, temperature: float, top_p: float, length: int | None, trained_length: int
) -> None:
    """Check the settings of a request for texts.

    Raises:
        ConfigError: with all that is impossible.
    """
    problems = drawing_problems(n=n, temperature=temperature, top_p=top_p)
    problems += length_problems(length, trained_length=trained_length)
    if not 1 <= steps <= MOST_STEPS:
        problems.append(f"--steps {steps}: 1 to {MOST_STEPS} noise levels a token are possible")
    if problems:
        raise ConfigError(*problems)


def check_prompt(prompt: Tokens, *, length: int, trained_length: int) -> None:
    """Check that a text of this length has room behind a prompt [p].

    Raises:
        ConfigError: there is no room behind it.
    """
    if len(prompt) >= trained_length:
        raise ConfigError(
            f"--prompt has {len(prompt)} tokens and the network was trained on texts of {trained_length}, which leaves "
            f"no room to go on; give at most {trained_length - 1}, for example the prompt's end"
        )
    if len(prompt) >= length:
        raise ConfigError(
            f"--prompt has {len(prompt)} tokens, which are part of the text, and --length {length} leaves no room to "
            f"go on; give --length {len(prompt) + 1} to {trained_length}, or a shorter prompt"
        )


def read_levels(levels: Sequence[float]) -> tuple[int, ...]:
    """The numbers of the levels at which a token's probabilities are read; the answer is their mean.

    Only near the top. Further down the state has settled on one token, as one draw of the network's own, and the
    probabilities are those of that draw being right. Measured on the characters of Moby Dick (width 64, windows of 64,
    8 levels; ar with 3 blocks of 2 layers, looped with 8 layers), in bits a character with one noise, and with four:

    | levels read | ar | | looped | |
    |---|---|---|---|---|
    | all | 2.672 | 2.501 | 2.647 | 2.452 |
    | from 0.5 up | 2.463 | 2.384 | 2.455 | 2.357 |
    | from 1 up | 2.377 | 2.342 | 2.383 | 2.330 |
    | from 2 up | 2.349 | 2.337 | 2.335 | 2.316 |
    | the top alone | 2.346 | 2.336 | 2.328 | 2.315 |
    | the last alone | 14.04 | 8.05 | 16.76 | 9.20 |

    (Standard errors 0.03 and 0.05; one seed each, networks trained in part: 750 to 1,500 steps.) With 4 and 16 levels
    ar has the same order. The top alone is never worse, so the lower blocks run but hardly change what is written.

    >>> read_levels((10.0, 2.0, 0.7, 0.1)), read_levels((0.4, 0.2))
    ((0, 1), (0,))
    """
    return tuple(number for number, sigma in enumerate(levels) if number == 0 or sigma >= LEAST_READ_SIGMA)


class Window:
    """Some texts that are written together, position by position."""

    def __init__(self, chain: TokenChain, noise: Values) -> None:
        """Texts of which nothing is known.

        Args:
            noise: standard normal, [samples, length, code_width].
        """
        self._chain, self._noise = chain, noise
        # Column i is what position i reads, the token before it; `tokens` is the same memory from column 1 on, so that
        # a token that is written is the next position's input at once.
        self._inputs = np.full((len(noise), chain.length + 1), len(chain.codes), dtype=np.int64)

    @property
    def tokens(self) -> Tokens:
        """[samples, length]; a token that is not known is the id `vocabulary`."""
        return self._inputs[:, 1:]

    def fill(self, predict: Predict, upto: int) -> None:
        """Run the known positions before `upto` through a network, for its KV cache, but for those that
        `probabilities_at` runs again."""
        chain, last = self._chain, upto - self._restated
        for step, sigma in enumerate(chain.levels):
            # Levels that share a KV cache would write the same keys and values into it.
            if chain.cache_keys[step] not in chain.cache_keys[:step]:
                # Piece by piece, as a network's memory grows with the positions that go through together.
                for start in range(0, last, PROMPT_SEGMENT):
                    stop = min(start + PROMPT_SEGMENT, last)
                    predict(step, sigma, self._inputs[:, start:stop], self._known(start, stop, sigma), start)

    def probabilities_at(self, predict: Predict, position: int) -> Probabilities:
        """The probabilities [samples, vocabulary] of a position's token, given those before."""
        chain, start = self._chain, max(0, position - self._restated)
        inputs = self._inputs[:, start : position + 1]
        wanted = read_levels(chain.levels)
        total = np.zeros((len(inputs), len(chain.codes)))
        steps = iter(range(len(chain.levels)))

        def denoise(z: Values, sigma: float) -> Values:
            step = next(steps)  # Euler asks once a level, in their order
            # [samples, restated + 1, code_width]
            states = np.append(self._known(start, position, sigma), z[:, None], axis=1)
            probabilities = softmax(predict(step, sigma, inputs, states, start))
            if step in wanted:
                np.add(total, probabilities, out=total)
            # D(z, sigma) = E[code | z] (arXiv 2506.14202, section 4.4): [samples, vocabulary] @ [vocabulary,
            # code_width].
            denoised: Values = probabilities @ chain.codes
            return denoised

        integrate(denoise, self._noise[:, position], chain.levels, solver="euler")
        return total / len(wanted)

    @property
    def _restated(self) -> int:
        """Known positions at the end that are run again together with the next one."""
        return int(self._chain.caches_per == "step")

    def _known(self, start: int, stop: int, sigma: float) -> Values:
        """The noised codes of positions that are known."""
        codes = self._chain.codes[self.tokens[:, start:stop]]
        state: Values = codes + self._noise[:, start:stop] * np.float32(sigma)
        return state


def continue_texts(
    predict: Predict,
    chain: TokenChain,
    *,
    prompt: Tokens,
    samples: range,
    temperature: float,
    top_p: float,
    seed: int,
    on_token: Callable[[], None] | None = None,
) -> Tokens:
    """Texts [samples, length] that begin with the prompt.

    Sample i has a random stream of its own, so that it does not depend on how many there are or how they are grouped.

    Args:
        prompt: tokens [p], p < length; none is a text from its beginning.
        samples: the numbers of those that are written together.
        temperature: 1 draws as the network was trained, 0 takes the likeliest token.
        top_p: tokens are drawn from the smallest set of the likeliest whose probability reaches this.
        on_token: called after each position.
    """
    noise, uniform = random_numbers(chain, samples, seed=seed)
    window = Window(chain, noise)
    window.tokens[:, : len(prompt)] = prompt
    window.fill(predict, len(prompt))
    for position in range(len(prompt), chain.length):
        probabilities = window.probabilities_at(predict, position)
        window.tokens[:, position] = choose_tokens(
            probabilities, uniform[:, position], temperature=temperature, top_p=top_p
        )
        if on_token is not None:
            on_token()
    return window.tokens


def random_numbers(chain: TokenChain, samples: Sequence[int], *, seed: int) -> tuple[Values, Probabilities]:
    """All that writing some samples draws: noise [samples, length, code_width] and uniform numbers [samples, length].

    It is drawn before anything is written: it depends neither on the prompt's length nor on the texts beside a sample.
    """
    noise = np.empty((len(samples), chain.length, chain.codes.shape[1]), dtype=np.float32)
    uniform = np.empty((len(samples), chain.length))
    for row, index in enumerate(samples):
        stream = np.random.default_rng(seed_at(seed, "continue", index))
        noise[row] = stream.standard_normal(noise.shape[1:], dtype=np.float32)
        uniform[row] = stream.random(chain.length)
    return noise, uniform


def write_texts(
    network: "Network",
    chain: TokenChain,
    *,
    prompt: Tokens,
    n: int,
    together: int,
    temperature: float,
    top_p: float,
    seed: int,
    on_token: Callable[[int, int], None] | None = None,
) -> Tokens:
    """`continue_texts` for n samples, `together` at a time.

    Args:
        on_token: called with the number of positions written and how many there will be, over all groups.
    """
    groups = [range(start, min(start + together, n)) for start in range(0, n, together)]
    steps = iter(range(1, len(groups) * (chain.length - len(prompt)) + 1))

    def count() -> None:
        if on_token is not None:
            on_token(next(steps), len(groups) * (chain.length - len(prompt)))

    return np.concatenate(
        [
            continue_texts(
                CachedPredict(network, chain),
                chain,
                prompt=prompt,
                samples=group,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_token=count,
            )
            for group in groups
        ]
    )


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
    """A `Predict` that holds the KV cache of the samples that are being written."""

    def __init__(self, network: Network, chain: TokenChain) -> None:
        self._network, self._chain = network, chain
        self._caches: dict[int, Values] = {}
        """By `TokenChain.cache_keys`, [caches, b, heads, length, head_width]."""

    def __call__(self, step: int, sigma: float, inputs: Tokens, z: Values, start: int) -> Values:
        chain, (count, num_positions) = self._chain, inputs.shape
        block, key = chain.blocks[step], chain.cache_keys[step]
        if key not in self._caches:
            # At full length at once: growing it by a position would copy all of it for every token.
            shape = (chain.num_caches[block], count, chain.heads, chain.length, chain.head_width)
            self._caches[key] = np.zeros(shape, dtype=np.float32)
        cache = self._caches[key]
        logits, present = self._network(
            block, z, np.full(count, sigma, dtype=np.float32), inputs, cache[:, :, :, :start]
        )
        # Over what was there: a position that is run again has the keys and values of its known token.
        cache[:, :, :, start : start + num_positions] = present
        return logits
