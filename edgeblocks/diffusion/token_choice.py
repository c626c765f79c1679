"""Tokens from probabilities: temperature, top-p and one random number for each. No torch: deployed chains use it."""

import re

import numpy as np
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError

MOST_TEXTS = 100_000
HIGHEST_TEMPERATURE = 100.0
GAP_PATTERN = r"(_|\[MASK\])"

Values = NDArray[np.float32]
Tokens = NDArray[np.int64]
Probabilities = NDArray[np.float64]


def drawing_problems(*, n: int, temperature: float, top_p: float = 1.0) -> list[str]:
    """What is wrong with a request for texts, one sentence each."""
    problems = []
    if not 1 <= n <= MOST_TEXTS:
        problems.append(f"--n {n}: 1 to {MOST_TEXTS} texts can be written at a time")
    if not 0 <= temperature <= HIGHEST_TEMPERATURE:
        problems.append(
            f"--temperature {temperature}: 0 (the likeliest token) to {HIGHEST_TEMPERATURE:g} is possible; 1 draws as "
            f"the network was trained"
        )
    if not 0 < top_p <= 1:
        problems.append(
            f"--top-p {top_p}: the share of the probability that tokens are drawn from lies above 0 and is at most 1"
        )
    return problems


def length_problems(length: int | None, *, trained_length: int) -> list[str]:
    """What is wrong with a requested length in tokens; None requests as many as the network was trained on."""
    if length is None or 1 <= length <= trained_length:
        return []
    longer = ""
    if length > trained_length:
        longer = f", and more need a network that is trained on more: edgeblocks train --set length={length}"
    return [
        f"--length {length}: the network was trained on texts of {trained_length} tokens; 1 to {trained_length} are "
        f"possible{longer}"
    ]


def check_options(
    task: str, *, fill: str | None, prompt: str | None, top_p: float | None, length: int | None = None
) -> None:
    """That what is asked of a network that makes text belongs to its kind.

    Args:
        task: `text` where masked tokens are filled in, `continuation` where a text is written from its beginning.

    Raises:
        ConfigError: with all that belongs to the other kind, and what to use.
    """
    problems = []
    if task == "text" and prompt is not None:
        problems.append(
            f"--prompt belongs to networks that write token by token, and this one fills gaps; write the missing "
            f"tokens as gaps: --fill {prompt + ' ____'!r}"
        )
    if task == "text" and top_p is not None:
        problems.append(
            "--top-p belongs to networks that write token by token, and this one fills gaps; use --temperature"
        )
    if task == "text" and fill is not None and length is not None:
        problems.append(
            f"--length {length} has no effect with --fill, whose text is as long as what is given with its gaps; "
            f"leave --length out, or add gaps"
        )
    if task == "continuation" and fill is not None:
        problems.append(
            f"--fill belongs to networks that fill gaps, and this one writes on from a beginning; give it with "
            f"--prompt {re.split(GAP_PATTERN, fill)[0].strip()!r}"
        )
    if problems:
        raise ConfigError(*problems)


def softmax(logits: Values) -> Values:
    """Probabilities along the last axis."""
    # The largest is taken off before exp, which would overflow otherwise.
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: Values = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return found


def choose_tokens(probabilities: Probabilities, uniform: Probabilities, *, temperature: float, top_p: float) -> Tokens:
    """A token for each row of probabilities [b, vocabulary], decided by one uniform number [b] each.

    >>> row = np.array([[0.1, 0.6, 0.3]])
    >>> drawn = ((0.05, 1.0), (0.05, 0.8), (0.9, 0.5))
    >>> [int(choose_tokens(row, np.array([u]), temperature=1.0, top_p=p)[0]) for u, p in drawn]
    [0, 1, 1]
    """
    if temperature == 0:
        likeliest: Tokens = probabilities.argmax(axis=1)
        return likeliest
    with np.errstate(divide="ignore"):
        # p^(1/temperature) relative to the largest, which stays 1: at low temperatures all would underflow. log 0 is
        # -inf, and exp takes it back to 0.
        logarithms = np.log(probabilities) - np.log(probabilities.max(axis=1, keepdims=True))
    return token_at(nucleus(np.exp(logarithms / temperature), top_p), uniform)


def nucleus(weights: Probabilities, top_p: float) -> Probabilities:
    """Weights [b, vocabulary] with zeros but for the smallest set of the largest that has a share of top_p.

    Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1.

    >>> nucleus(np.array([[2.0, 5.0, 3.0]]), 0.7).tolist()
    [[0.0, 5.0, 3.0]]
    """
    if top_p >= 1:
        return weights
    order = np.argsort(-weights, axis=1, kind="stable")  # equals in the tokens' order, on every machine
    sums = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    # A token is out if those before it have the share already, so the likeliest always stays.
    reached_before = sums[:, :-1] >= top_p * sums[:, -1:]
    kept = np.ones(weights.shape, dtype=bool)
    np.put_along_axis(kept, order[:, 1:], ~reached_before, axis=1)
    return np.where(kept, weights, 0.0)


def token_at(weights: NDArray[np.float64], uniform: NDArray[np.float64]) -> Tokens:
    """For each row of weights [rows, tokens] the token at which their sum so far exceeds a share of the whole sum.

    >>> token_at(np.array([[1.0, 0.0, 3.0]] * 3), np.array([0.2, 0.25, 0.9])).tolist()
    [0, 2, 2]
    """
    sums = np.cumsum(weights, axis=1)
    below: Tokens = (sums <= uniform[:, None] * sums[:, -1:]).sum(axis=1)
    # The sum rounds: with a uniform number close to 1 none of the sums may exceed it.
    drawn: Tokens = np.minimum(below, weights.shape[1] - 1)
    return drawn
