"""What `ar` and `looped` share: text written token by token, each token by a chain that denoises its code.

A token's target is its code, a frozen row of unit norm (`diffusion.codebook`), with noise of level sigma. A block reads
the tokens before position i and the noised code z of the token at i, and gives the probabilities of that token; their
mean over the codes is the denoised code.

The loss is unweighted cross-entropy: the weight of the L2 loss spans four orders of magnitude and would make it a
lottery on the draw of sigma. Noise lies in [0.1, 10] and not in [0.002, 80], because below sigma of about 1/4 z alone
shows which row of unit norm it is: most of the training would be spent on nothing. Inference starts at sigma_max, where
z shows nothing and the tokens before decide, so `top_share` of the first block's samples are drawn there.

Source: arXiv 2506.14202, sections 4.4 and 4.5.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from edgeblocks.diffusion.autoregression import CachesPer
from edgeblocks.diffusion.codebook import check_codes, code_rows
from edgeblocks.diffusion.noise import NoiseDistribution, NoisePartition, NoiseRange
from edgeblocks.families.base import (
    Batch,
    BatchSpec,
    ConditionSpec,
    Level,
    TextFamily,
    TextInfo,
    quantile_levels,
    spread_shares,
)
from edgeblocks.families.settings import (
    Depth,
    FamilySettings,
    PMean,
    PStd,
    RotaryHeads,
    SigmaMax,
    SigmaMin,
    TopShare,
    Width,
)
from edgeblocks.families.token_block import Codes, Past, Present, Sigma, TokenDenoiserBlock, Tokens
from edgeblocks.families.token_loss import token_estimates, token_losses, token_scores
from edgeblocks.limits import LONGEST_SEQUENCE, MOST_CODE_WIDTH


@dataclass(frozen=True, kw_only=True)
class TokenDenoiserSettings(FamilySettings):
    """The shape of the network, the width of a token's code, and the distribution of noise levels."""

    width: Width = 256
    depth: Depth = 12
    heads: RotaryHeads = 4
    sliding_window: Annotated[
        int,
        Field(
            ge=0,
            le=LONGEST_SEQUENCE,
            description="tokens that a layer's attention sees, the token's own and the last; 0: all before",
        ),
    ] = 0
    code_width: Annotated[
        int, Field(ge=8, le=MOST_CODE_WIDTH, multiple_of=8, description="width of a token's code")
    ] = 64
    top_share: TopShare = 0.4
    sigma_min: SigmaMin = 0.1
    sigma_max: SigmaMax = 10.0
    p_mean: PMean = 0.0
    p_std: PStd = 1.2


class TokenDenoiser(TextFamily):
    """Draws what a training step needs, and computes the per-sample loss; a subclass names its kind of block.

    A batch has the clean `tokens`, the noise `eps` of their codes and each sequence's `sigma`.
    """

    task: Literal["continuation"] = "continuation"
    settings_type: type = TokenDenoiserSettings
    settings: TokenDenoiserSettings
    block_type: type[TokenDenoiserBlock]
    caches_per: CachesPer
    """What keys and values depend on: the tokens alone, so that each block has one set, or noised codes as well."""

    def __init__(self, settings: TokenDenoiserSettings, data: TextInfo) -> None:
        """A family of these settings on this text.

        Raises:
            ConfigError: with everything that is impossible.
        """
        super().__init__(settings, data)
        check_codes(data.vocabulary, settings.code_width)

    @property
    def noise(self) -> NoiseDistribution:
        s = self.settings
        return NoiseDistribution(sigma_min=s.sigma_min, sigma_max=s.sigma_max, p_mean=s.p_mean, p_std=s.p_std)

    @property
    def sigma_data(self) -> float:
        """Of a row of unit norm whose features are all of the same size."""
        return float(self.settings.code_width**-0.5)

    @property
    def begin(self) -> int:
        """The id that stands before the first token of a window."""
        return self.data.vocabulary

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a sample's z."""
        return self.data.length, self.settings.code_width

    @property
    def condition_spec(self) -> ConditionSpec:
        """The token before each position."""
        return "tokens", (self.data.length,), torch.int64

    @property
    def code_width(self) -> int:
        return self.settings.code_width

    @property
    def heads(self) -> int:
        return self.settings.heads

    @property
    def head_width(self) -> int:
        return self.settings.width // self.settings.heads

    def num_caches(self, num_layers: int) -> int:
        """Tensors of keys and of values in the KV cache of a block of `num_layers` layers."""
        return 2 * num_layers

    def block(self, *, num_layers: int, checkpointing: bool) -> TokenDenoiserBlock:
        """A block of `num_layers` layers on torch's default device, parameters not initialised."""
        return self.block_type(
            width=self.settings.width,
            heads=self.settings.heads,
            sliding_window=self.settings.sliding_window,
            code_width=self.settings.code_width,
            data=self.data,
            num_layers=num_layers,
            checkpointing=checkpointing,
        )

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives."""
        return {
            "tokens": ((batch, self.data.length), torch.int64),
            "eps": ((batch, *self.state_shape), torch.float32),
            "sigma": ((batch,), torch.float32),
        }

    def draw(
        self, tokens: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch: sigmas evenly spaced in q between the widened ends, from one random start."""
        noise, shares = self.noise, spread_shares(len(tokens), generator)
        at_top = torch.zeros_like(shares, dtype=torch.bool)
        if noise_range.train_high >= noise.sigma_max:
            top_share = self.settings.top_share
            at_top = shares < top_share
            shares = (shares - top_share).clamp(min=0) / (1 - top_share)  # the others still cover the whole range
        high, low = (noise.quantile(sigma) for sigma in (noise_range.train_high, noise_range.train_low))
        q = high + (low - high) * shares
        # sigma = exp(P_mean + P_std Phi^-1(q)): uniform in q is the training distribution, restricted to this range.
        sigma = torch.exp(noise.p_mean + noise.p_std * torch.special.ndtri(q))
        # The quantile and its inverse round: a level just outside would belong to a neighbour.
        sigma = sigma.clamp(noise_range.train_low, noise_range.train_high).float()
        return self._batch(tokens, sigma.masked_fill(at_top, noise.sigma_max), generator)

    def at_level(
        self, tokens: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> Batch:
        """A batch at one noise level, for evaluation."""
        return self._batch(tokens, torch.full((len(tokens),), level.middle), generator)

    def _batch(self, tokens: np.ndarray, sigma: Tensor, generator: torch.Generator) -> Batch:
        eps = torch.randn(len(tokens), *self.state_shape, generator=generator)
        return {"tokens": torch.from_numpy(tokens), "eps": eps, "sigma": sigma}

    def evaluation_levels(self, partition: NoisePartition) -> tuple[Level, ...]:
        """The top, where inference starts and a loss says most, and then what training sees in equal shares.

        The same whatever the partition. The top has no share: the mean over the others estimates the training loss.
        """
        levels = quantile_levels(self.noise)
        top = Level(low=self.noise.sigma_max, high=self.noise.sigma_max, share=0.0)
        return top, *(Level(low=sigma, high=sigma, share=1 / len(levels)) for sigma in levels)

    def inputs(self, batch: Batch) -> tuple[Float[Tensor, "batch length code"], Int[Tensor, "batch length"]]:
        """The noised codes, and the token before each."""
        codes = torch.from_numpy(code_rows(self.data.vocabulary, self.settings.code_width))
        return self._inputs(codes.to(batch["tokens"].device), batch)

    def _inputs(self, codes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = batch["tokens"]
        # y + sigma eps, [B, T, code].
        z = torch.addcmul(F.embedding(tokens, codes), batch["sigma"][:, None, None], batch["eps"])
        # Position i reads the token at i - 1, so that its own token is never an input.
        return z, F.pad(tokens[:, :-1], (1, 0), value=self.begin)

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Mean cross-entropy of each sequence's tokens, in nats."""
        return token_losses(*self._readout_inputs(block, batch)).view(batch["tokens"].shape).mean(1)

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss, and the share of tokens that the likeliest answers get right."""
        losses, right = token_scores(*self._readout_inputs(block, batch))
        shape = batch["tokens"].shape
        return {"loss": losses.view(shape).mean(1), "accuracy": right.view(shape).float().mean(1)}

    def next_logits(
        self, block: nn.Module, z: Codes, sigma: Sigma, tokens: Tokens, past: Past
    ) -> tuple[Float[Tensor, "batch vocabulary"], Present]:
        """Logits of the last position, and the keys and values of all; see `TokenDenoiserBlock.forward`."""
        assert isinstance(block, TokenDenoiserBlock)
        hidden, present = block.hidden(z, sigma, tokens, past)
        # The last position alone: logits of all of them are [B, n, vocabulary], and only one is drawn from.
        logits: Tensor = block.readout(hidden[:, -1])
        return logits.float(), present

    def estimates(
        self,
        block: nn.Module,
        z: Codes,
        known: Codes,
        sigma: Sigma,
        tokens: Tokens,
        answers: Tokens,
        codes: Float[Tensor, "vocabulary code"],
    ) -> tuple[Codes, Float[Tensor, "batch tokens"]]:
        """The denoised code and log p(answer) at each position of a known text; see `TokenDenoiserBlock`."""
        assert isinstance(block, TokenDenoiserBlock)
        # [B, T, D] -> [B T, D], as the logits are made a chunk of rows at a time.
        states, readout = block.reading_states(z, known, sigma, tokens).flatten(0, 1), block.readout
        denoised, logarithms = token_estimates(states, readout.weight, readout.bias, answers.flatten(), codes)
        return denoised.view(z.shape), logarithms.view(answers.shape)

    def with_iterations(self, batch: Batch, count: int) -> Batch:
        """The batch: layers are run once."""
        return batch

    def _readout_inputs(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, the readout's weight and bias, answers, and which of them count: all."""
        assert isinstance(block, TokenDenoiserBlock)
        z, tokens = self._inputs(block.codes, batch)
        x = block.window_states(z, batch["sigma"], tokens).flatten(0, 1)
        answers = batch["tokens"].flatten()
        return x, block.readout.weight, block.readout.bias, answers, torch.ones_like(answers, dtype=torch.bool)
