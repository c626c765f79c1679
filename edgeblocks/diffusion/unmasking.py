"""Text from a chain of blocks that fill in masked tokens. No torch: the deployed chain runs it."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeblocks.diffusion.token_choice import drawing_problems, length_problems, token_at
from edgeblocks.errors import ConfigError
from edgeblocks.seeds import seed_at

MOST_STEPS = 10_000

Logits = NDArray[np.float32]
Tokens = NDArray[np.int64]


def check_writing(*, n: int, steps: int, temperature: float, length: int | None, trained_length: int) -> None:
    """Check the settings of a request for texts.

    Raises:
        ConfigError: with all that is impossible.
    """
    problems = drawing_problems(n=n, temperature=temperature)
    problems += length_problems(length, trained_length=trained_length)
    if not 1 <= steps <= MOST_STEPS:
        problems.append(f"--steps {steps}: 1 to {MOST_STEPS} steps are possible")
    if problems:
        raise ConfigError(*problems)


def unmask(
    logits_of: Callable[[Tokens, float, NDArray[np.bool_]], Logits],
    tokens: Tokens,
    *,
    steps: Sequence[tuple[float, float]],
    mask: int,
    temperature: float,
    seed: int,
    micro_batch: int,
    on_step: Callable[[int], None] | None = None,
) -> Tokens:
    """Tokens [samples, length] with every gap filled; what was given stays as it is.

    The reverse of masking: going from t_from to t_to, a masked token is unmasked with probability
    (t_from - t_to) / t_from, in the last step with certainty, and then drawn from softmax(logits / temperature).
    Sample i has a random stream of its own, so that it does not depend on how many there are or how they are grouped.
    In a step a sample in which nothing is unmasked is left out; a step may run no network at all.

    Args:
        logits_of: of the tokens of some samples, a time t (the middle of a step), and the places [some, length] that
            are wanted: the logits [wanted, vocabulary] there, row by row.
        tokens: with the id `mask` at the gaps.
        steps: intervals (t_from, t_to), descending, each inside one block's range; see `unmasking_steps`.
        temperature: 0 takes the likeliest token.
        micro_batch: samples that go through a network at a time.
        on_step: called with the number of steps done.

    Source: arXiv 2406.07524 (MDLM), section 3.2.3, 2406.04329 (MD4), algorithm 2.
    """
    tokens = tokens.copy()
    length = tokens.shape[1]
    streams = [_stream(seed, index) for index in range(len(tokens))]
    for number, (t_from, t_to) in enumerate(steps):
        # In the last step with certainty, whatever its t_to, so that no gap is left.
        # Of the tokens masked at t_from, the share that is not at t_to: (alpha(t_to) - alpha(t_from)) / (1 -
        # alpha(t_from)).
        share = (t_from - t_to) / t_from if number < len(steps) - 1 else 1.0
        # Drawn for every sample and place, used or not: a sample's stream is then the same however samples are grouped.
        draws = np.stack([stream.random((2, length)) for stream in streams])
        chosen = (tokens == mask) & (draws[:, 0] < share)
        (concerned,) = np.nonzero(chosen.any(axis=1))
        for start in range(0, len(concerned), micro_batch):
            part = concerned[start : start + micro_batch]
            # The middle of the interval, which no boundary between blocks touches; [chosen, vocabulary].
            logits = logits_of(tokens[part], (t_from + t_to) / 2, chosen[part])
            rows, places = np.nonzero(chosen[part])
            uniform = draws[part, 1][rows, places]
            tokens[part[rows], places] = _drawn(logits, temperature, uniform)
        if on_step is not None:
            on_step(number + 1)
    return tokens


def random_numbers(samples: Sequence[int], *, steps: int, length: int, seed: int) -> NDArray[np.float64]:
    """All that `unmask` draws for some samples, uniform in [0, 1), [steps, samples, 2, length]."""
    return np.stack([_stream(seed, index).random((steps, 2, length)) for index in samples], axis=1)


def _stream(seed: int, sample: int) -> np.random.Generator:
    return np.random.default_rng(seed_at(seed, "unmask", sample))


def _drawn(logits: Logits, temperature: float, uniform: NDArray[np.float64]) -> Tokens:
    """A token for each row of logits, by one uniform number each."""
    if temperature == 0:
        likeliest: Tokens = logits.argmax(axis=1)
        return likeliest
    # The largest is taken off before exp, which would overflow otherwise.
    scaled = (logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperature
    return token_at(np.exp(scaled), uniform)


def texts_as_file(texts: Sequence[str]) -> str:
    """Several texts in one, with a line between them."""
    return "\n----\n".join(texts) + "\n"
