"""How likely a chain that writes token by token finds a given text.

With a fixed noise the chain gives each token probabilities that depend on the tokens before it: that is a model of text
by itself, and the mean of its -log p(token) an exact figure of it. Averaged over noises that figure bounds the one of
the model that averages the probabilities over all noises (Jensen); averaging over several noises before taking the
logarithm comes closer.

All positions of a text are read at once, as in training. Each has a state of its own that does not know its token;
where the KV cache comes from noised codes, the known positions before it are run as a second stream.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edgeblocks.diffusion.autoregression import TokenChain, read_levels
from edgeblocks.diffusion.token_choice import Tokens, Values
from edgeblocks.families.precision import computing_in
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.inference.metrics import standard_error
from edgeblocks.seeds import seed_at

NOISES = (1, 8)
"""Numbers of noises for which the bound is reported."""

LogShares = NDArray[np.float64]


def log_shares(runner: BlockRunner, chain: TokenChain, tokens: Tokens, *, seed: int, number: int = 0) -> LogShares:
    """log p(token | tokens before it) at each level of a chain with the noise of a number, [levels, texts, length].

    What a text is given does not depend on how texts are grouped.

    Args:
        tokens: [texts, length].
    """
    found = np.empty((len(chain.levels), *tokens.shape))
    size = runner.micro_batch if chain.caches_per == "block" else max(1, runner.micro_batch // 2)  # two streams
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
        found[:, part] = _read(runner, chain, tokens[part], noise)
    return found


@torch.no_grad()
def _read(runner: BlockRunner, chain: TokenChain, tokens: Tokens, noise: Values) -> LogShares:
    """`log_shares` of some texts with a noise [texts, length, code_width]."""
    family = runner.family
    assert family.task == "continuation"
    runner.network(chain.blocks[0])  # from now on its device is known
    device = runner.device
    answers, eps = torch.from_numpy(tokens).to(device), torch.from_numpy(noise).to(device)
    inputs = torch.nn.functional.pad(answers[:, :-1], (1, 0), value=len(chain.codes))
    codes = torch.from_numpy(chain.codes).to(device)
    # z starts as sigma_max eps, which does not know its token; `known` has the token and the same noise. [B, T, code]
    clean, z = torch.nn.functional.embedding(answers, codes), eps * chain.levels[0]
    found = np.empty((len(chain.levels), *tokens.shape))
    for step, sigma in enumerate(chain.levels):
        network, sigmas = runner.network(chain.blocks[step]), torch.full((len(z),), sigma, device=device)
        known = torch.add(clean, eps, alpha=sigma)
        with computing_in(runner.precision, device):
            denoised, logarithms = family.estimates(network, z, known, sigmas, inputs, answers, codes)
        found[step] = logarithms.cpu().numpy()
        sigma_next = chain.levels[step + 1] if step + 1 < len(chain.levels) else 0.0
        # Euler, as `solver.integrate` does it, at all positions at once: here each has the right tokens before it.
        z = z + (z - denoised) / sigma * (sigma_next - sigma)
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
    # log 0; probabilities of unlikely tokens underflow, so they are added up as logarithms.
    total = np.full(tokens.shape, -np.inf)
    found: dict[int, tuple[float, float | None]] = {}
    for number in range(noises[-1]):
        logarithms = log_shares(runner, chain, tokens, seed=seed, number=number)[wanted]
        total = np.logaddexp(total, np.logaddexp.reduce(logarithms, axis=0) - math.log(len(wanted)))
        if number + 1 in noises:
            # -log of the mean over noises, then the mean over a text's tokens: [texts].
            nats = (math.log(number + 1) - total).mean(axis=1)
            found[number + 1] = float(nats.mean()), standard_error(nats)
        if on_noise is not None:
            on_noise(number + 1, noises[-1])
    return found
