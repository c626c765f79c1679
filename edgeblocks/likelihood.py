"""How likely a chain that writes token by token finds a given text.

With a fixed noise the chain gives each token probabilities that depend on the tokens before it: that is a model of text
by itself, and the mean of its -log p(token) an exact figure of it. Averaged over noises that figure bounds the one of
the model that averages the probabilities over all noises (Jensen); averaging over several noises before taking the
logarithm comes closer.

Where keys and values come from tokens alone all positions of a text are read at once, as in training. Where they come
from noised codes, position i needs those of the known positions before it and a state of its own that does not know its
token: the text is read position by position, just as one is written.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from edgeblocks.chain import BlockRunner
from edgeblocks.drawing import Tokens, Values
from edgeblocks.generation import CachedPredict, TokenChain, Window, read_levels
from edgeblocks.randomness import seed_at
from edgeblocks.token_loss import token_estimates

NOISES = (1, 8)
"""Over how many the bound is told."""

LogShares = NDArray[np.float64]


def log_shares(runner: BlockRunner, chain: TokenChain, tokens: Tokens, *, seed: int, number: int = 0) -> LogShares:
    """log p(token | tokens before it) at each level of a chain with the noise of a number, [levels, texts, length].

    What a text is given does not depend on how texts are grouped.

    Args:
        tokens: [texts, length].
    """
    found = np.empty((len(chain.levels), *tokens.shape))
    read = _at_once if chain.caches_per == "block" else _one_by_one
    size = runner.micro_batch
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        noise = np.stack(
            [
                np.random.default_rng(seed_at(seed, "bound", number, index)).standard_normal(
                    (chain.length, chain.codes.shape[1]), dtype=np.float32
                )
                for index in range(len(tokens))[part]
            ]
        )
        found[:, part] = read(runner, chain, tokens[part], noise)
    return found


@torch.no_grad()
def _at_once(runner: BlockRunner, chain: TokenChain, tokens: Tokens, noise: Values) -> LogShares:
    """All positions together: no position's keys and values depend on its noise."""
    runner.network(chain.blocks[0])
    device = runner.device
    known = torch.from_numpy(tokens).to(device)
    inputs = torch.nn.functional.pad(known[:, :-1], (1, 0), value=len(chain.codes))
    codes = torch.from_numpy(chain.codes).to(device)
    z = torch.from_numpy(noise).to(device) * chain.levels[0]
    found = np.empty((len(chain.levels), *tokens.shape))
    for step, sigma in enumerate(chain.levels):
        denoised, logarithms = _estimates(runner.network(chain.blocks[step]), z, sigma, inputs, known, codes)
        found[step] = logarithms.cpu().numpy()
        sigma_next = chain.levels[step + 1] if step + 1 < len(chain.levels) else 0.0
        z = z + (z - denoised) / sigma * (sigma_next - sigma)
    return found


def _estimates(
    network: Any, z: Tensor, sigma: float, inputs: Tensor, known: Tensor, codes: Tensor
) -> tuple[Float[Tensor, "texts length code"], Float[Tensor, "texts length"]]:
    """Denoised codes, and log p(token)."""
    states = network.window_states(z, torch.full((len(z),), sigma, device=z.device), inputs)
    readout = network.readout
    denoised, logarithms = token_estimates(states.flatten(0, 1), readout.weight, readout.bias, known.flatten(), codes)
    return denoised.view(z.shape), logarithms.view(known.shape)


def _one_by_one(runner: BlockRunner, chain: TokenChain, tokens: Tokens, noise: Values) -> LogShares:
    """Position by position, with the keys and values of the known tokens before."""
    found = np.empty((len(chain.levels), *tokens.shape))
    predict, window = CachedPredict(runner.continued, chain), Window(chain, noise)
    rows = np.arange(len(tokens))
    for position in range(chain.length):

        def keep(step: int, shares: Values, position: int = position) -> None:
            found[step, :, position] = np.log(np.maximum(shares[rows, tokens[:, position]], np.finfo(np.float32).tiny))

        window.shares_at(predict, position, keep)
        window.tokens[:, position] = tokens[:, position]
    return found


def bound(
    runner: BlockRunner,
    chain: TokenChain,
    tokens: Tokens,
    *,
    seed: int,
    noises: Sequence[int] = NOISES,
    on_noise: Callable[[int, int], None] | None = None,
) -> dict[int, tuple[float, float | None]]:
    """For each number of noises -log p(token) in nats and its standard error over texts.

    Args:
        noises: over how many probabilities are averaged before the logarithm, ascending.
        on_noise: called with the noises done and in all.
    """
    wanted = list(read_levels(chain.levels))
    total = np.full(tokens.shape, -np.inf)
    found: dict[int, tuple[float, float | None]] = {}
    for number in range(noises[-1]):
        logarithms = log_shares(runner, chain, tokens, seed=seed, number=number)[wanted]
        total = np.logaddexp(total, np.logaddexp.reduce(logarithms, axis=0) - math.log(len(wanted)))
        if number + 1 in noises:
            nats = (math.log(number + 1) - total).mean(axis=1)
            error = float(nats.std(ddof=1) / math.sqrt(len(nats))) if len(nats) > 1 else None
            found[number + 1] = float(nats.mean()), error
        if on_noise is not None:
            on_noise(number + 1, noises[-1])
    return found
