"""What `ar` and `looped` share: text written token by token, each token by a chain that denoises its code.

A token's target is its code, a frozen row of unit norm (`codebook`), with noise of level sigma. A block reads the
tokens before position i and the noised code z of the token at i, and gives the probabilities of that token; their mean
over the codes is the denoised code.

The loss is unweighted cross-entropy: the weight of the L2 loss spans four orders of magnitude and would make it a
lottery on the draw of sigma. Noise lies in [0.1, 10] and not in [0.002, 80], because a row of unit norm can be told
from z alone below sigma of about 1/4: most of the training would be spent on nothing. Inference starts at sigma_max,
where z tells nothing and the tokens before decide, so `top_share` of the first block's samples are drawn there.

Source: arXiv 2506.14202, sections 4.4 and 4.5.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from edgeblocks.causal_layers import CausalLayer
from edgeblocks.codebook import check_codes, code_rows
from edgeblocks.families.base import (
    MOST,
    NOISE_FEATURES,
    Batch,
    BatchSpec,
    ConditionSpec,
    Level,
    Task,
    TextFamily,
    TextInfo,
    noise_problems,
    quantile_levels,
)
from edgeblocks.layers import (
    Linear,
    TokenEmbedding,
    init_linear_,
    init_zero_,
    modulated_norm,
    noise_features,
    rotary_table,
    run_layers,
)
from edgeblocks.noise import NoiseDistribution, NoisePartition, NoiseRange
from edgeblocks.token_loss import token_losses, token_scores

MOST_CODE_WIDTH = 2**12
Past = Float[Tensor, "caches batch heads past head_width"]
"""Keys and values of a block's layers for former tokens: layer by layer, keys first."""
Present = Float[Tensor, "caches batch heads tokens head_width"]
"""The same for the tokens at hand."""


@dataclass(frozen=True, kw_only=True)
class TokenDenoiserSettings:
    """The shape of the network, the width of a token's code, and the distribution of noise levels.

    `top_share` of the first block's samples are drawn at sigma_max, where inference starts.
    """

    width: int = 256
    depth: int = 12
    heads: int = 4
    code_width: int = 64
    top_share: float = 0.4
    sigma_min: float = 0.1
    sigma_max: float = 10.0
    p_mean: float = 0.0
    p_std: float = 1.2

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        values = {name: getattr(self, name) for name in ("width", "depth", "heads")}
        found = [f"{name}={value} must be at least 1" for name, value in values.items() if value < 1]
        found += [
            f"{name}={value} is more than the {MOST[name]} that are possible"
            for name, value in values.items()
            if value > MOST[name]
        ]
        if not found and self.width % (2 * self.heads):
            found.append(
                f"width={self.width} is not divisible by twice heads={self.heads}, which rotary positions need; use "
                f"--set heads=..."
            )
        if self.code_width % 8 or not 8 <= self.code_width <= MOST_CODE_WIDTH:
            found.append(f"code_width={self.code_width} must be a multiple of 8 between 8 and {MOST_CODE_WIDTH}")
        if not 0 <= self.top_share < 1:
            found.append(f"top_share={self.top_share} must lie in [0, 1)")
        return found + noise_problems(
            sigma_min=self.sigma_min, sigma_max=self.sigma_max, p_mean=self.p_mean, p_std=self.p_std
        )


class TokenDenoiserBlock(nn.Module):
    """One block: token embedding (the last row is that of the beginning), z's projection, layers, readout.

    A subclass says how tokens and z go through the layers, `through_layers`.
    """

    codes: Tensor
    two_streams = False

    def __init__(
        self, *, settings: TokenDenoiserSettings, data: TextInfo, num_layers: int, checkpointing: bool
    ) -> None:
        super().__init__()
        self.heads, self.length, self.vocabulary = settings.heads, data.length, data.vocabulary
        self.checkpointing = checkpointing
        hidden = settings.width
        self.token_embedding = TokenEmbedding(data.vocabulary + 1, hidden)
        self.code_embedding = Linear(settings.code_width, hidden)
        self.noise_up = Linear(NOISE_FEATURES, hidden)
        self.noise_down = Linear(hidden, hidden)
        self.layers = nn.ModuleList(
            CausalLayer(width=hidden, heads=settings.heads, two_streams=self.two_streams) for _ in range(num_layers)
        )
        self.readout_modulation = Linear(hidden, 2 * hidden)
        self.readout = Linear(hidden, data.vocabulary)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place: layers as the identity (adaLN-Zero), and z unseen.

        Bits per character of a novel's hold-out part at sigma_max after 200 steps of 8 windows of 64 characters, for 4
        layers of width 64 in one block (two seeds each):

                                          ar             looped
            as here                       3.27, 3.22     3.29, 3.28
            open gates                    3.32, 3.37     3.33, 3.37
            z's projection not zero       3.27, 3.22     3.58, 3.45

        At sigma = 0.5 a projection that is not zero has learnt more by then: 1.88, 1.88 against 1.99, 1.99 in ar.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, generator)
        for parameter in (self.token_embedding.weight, self.noise_up.weight, self.noise_down.weight):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        init_zero_(self.code_embedding)
        for layer in self.layers:
            assert isinstance(layer, CausalLayer)
            init_zero_(layer.modulation)
        init_zero_(self.readout_modulation)
        init_zero_(self.readout)

    def reset_tables_(self) -> None:
        """Make the tables of positions and of codes on torch's default device; needed before use."""
        table = rotary_table(self.length, self.token_embedding.embedding_dim // self.heads)
        for layer in self.layers:
            assert isinstance(layer, CausalLayer)
            layer.attention.set_rotary_(table)
        codes = torch.as_tensor(code_rows(self.vocabulary, self.code_embedding.in_features))
        self.register_buffer("codes", codes, persistent=False)

    def forward(
        self,
        z: Float[Tensor, "batch tokens code"],
        sigma: Float[Tensor, " batch"],
        tokens: Int[Tensor, "batch tokens"],
        past: Past | None = None,
    ) -> tuple[Float[Tensor, "batch tokens vocabulary"], Present]:
        """Logits of the token at each position, and keys and values for the tokens that follow.

        Args:
            z: the noised code of the token at each position.
            tokens: the token before each position; for the first position of a window the vocabulary's size.
            past: keys and values of the positions before these; None where there are none.
        """
        x, present = self.hidden(z, sigma, tokens, past)
        logits: Tensor = self.readout(x)
        return logits, present

    def hidden(
        self,
        z: Float[Tensor, "batch tokens code"],
        sigma: Float[Tensor, " batch"],
        tokens: Int[Tensor, "batch tokens"],
        past: Past | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Present]:
        """What the readout is applied to, and keys and values; see `forward`."""
        present: list[Tensor] = []
        x = self._states(z, sigma, tokens, past, present)
        return x, torch.stack(present)

    def window_states(
        self,
        z: Float[Tensor, "batch tokens code"],
        sigma: Float[Tensor, " batch"],
        tokens: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens width"]:
        """What the readout is applied to, of a whole window, of which nothing is kept for later."""
        return self._states(z, sigma, tokens, None, None)

    def _states(
        self, z: Tensor, sigma: Tensor, tokens: Tensor, past: Tensor | None, present: list[Tensor] | None
    ) -> Tensor:
        noise = noise_features(sigma.log() / 4, NOISE_FEATURES)
        condition = F.silu(self.noise_down(F.silu(self.noise_up(noise))))
        c_in = (sigma**2 + 1 / z.shape[-1]).rsqrt()
        noised = self.code_embedding(c_in[:, None, None] * z)
        x = self.through_layers(self.token_embedding(tokens), noised, condition, past, present)
        shift, scale = self.readout_modulation(condition).chunk(2, dim=-1)
        return modulated_norm(x, shift, scale)

    def through_layers(
        self,
        clean: Float[Tensor, "batch tokens width"],
        noised: Float[Tensor, "batch tokens width"],
        condition: Float[Tensor, "batch width"],
        past: Tensor | None,
        present: list[Tensor] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """The last layer's output for each noised code. `present` is added to; None keeps nothing."""
        raise NotImplementedError

    def run(
        self,
        numbers: range,
        x: Float[Tensor, "batch tokens width"],
        condition: Float[Tensor, "batch width"],
        past: Tensor | None,
        present: list[Tensor] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """x through the layers of these numbers."""
        if present is None:
            layers = (self.layers[number] for number in numbers)
            return run_layers(layers, x, condition, checkpointing=self.checkpointing)
        for number in numbers:
            layer = self.layers[number]
            assert isinstance(layer, CausalLayer)
            x, kept = layer.cached(x, condition, None if past is None else past[2 * number : 2 * number + 2])
            present += kept
        return x


class TokenDenoiser(TextFamily):
    """Draws what a training step needs, and computes the per-sample loss; a subclass names its kind of block.

    A batch has the clean `tokens`, the noise `eps` of their codes and each sequence's `sigma`.
    """

    task: Task = "continuation"
    settings_type = TokenDenoiserSettings
    conditional = False
    settings: TokenDenoiserSettings
    block_type: type[TokenDenoiserBlock]

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
    def head_width(self) -> int:
        return self.settings.width // self.settings.heads

    def num_caches(self, num_layers: int) -> int:
        """Tensors of keys and of values that a block of `num_layers` layers keeps."""
        return 2 * num_layers

    def cache_key(self, step: int, block: int) -> int:
        """Which caches a step of the chain, run by a block, uses; steps of the same key share theirs."""
        raise NotImplementedError

    def block(self, *, num_layers: int, checkpointing: bool) -> TokenDenoiserBlock:
        """A block of `num_layers` layers on torch's default device, parameters not initialised."""
        return self.block_type(
            settings=self.settings, data=self.data, num_layers=num_layers, checkpointing=checkpointing
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
        """One training step's batch: sigmas evenly spaced in q between the widened ends, from one random start.

        Low-discrepancy sampling, arXiv 2107.00630 (VDM), appendix I.1: it lowers the variance of the loss.
        """
        count, noise = len(tokens), self.noise
        start = torch.rand((), dtype=torch.float64, generator=generator)
        shares = (start + torch.arange(count, dtype=torch.float64) / count).remainder(1.0)
        at_top = torch.zeros_like(shares, dtype=torch.bool)
        if noise_range.train_high >= noise.sigma_max:
            top_share = self.settings.top_share
            at_top = shares < top_share
            shares = (shares - top_share).clamp(min=0) / (1 - top_share)
        high, low = (noise.quantile(sigma) for sigma in (noise_range.train_high, noise_range.train_low))
        q = high + (low - high) * shares
        sigma = torch.exp(noise.p_mean + noise.p_std * torch.special.ndtri(q))
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
        z = torch.addcmul(F.embedding(tokens, codes), batch["sigma"][:, None, None], batch["eps"])
        return z, F.pad(tokens[:, :-1], (1, 0), value=self.begin)

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Mean cross-entropy of each sequence's tokens, in nats."""
        return token_losses(*self._readout_inputs(block, batch)).view(batch["tokens"].shape).mean(1)

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss, and the share of tokens that the likeliest answers get right."""
        losses, right = token_scores(*self._readout_inputs(block, batch))
        shape = batch["tokens"].shape
        return {"loss": losses.view(shape).mean(1), "accuracy": right.view(shape).float().mean(1)}

    def _readout_inputs(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, the readout's weight and bias, answers, and which of them count: all."""
        assert isinstance(block, TokenDenoiserBlock)
        z, tokens = self._inputs(block.codes, batch)
        x = block.window_states(z, batch["sigma"], tokens).flatten(0, 1)
        answers = batch["tokens"].flatten()
        return x, block.readout.weight, block.readout.bias, answers, torch.ones_like(answers, dtype=torch.bool)
