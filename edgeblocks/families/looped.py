"""looped: text by a network whose core is run again and again, as one denoiser for all noise levels.

A recurrent-depth network (Geiping et al. 2025, arXiv 2502.05171, Huginn) has a prelude that reads the tokens, a core
that improves a state again and again, and a coda that reads the answer from it. Its training unrolls the core and goes
back through many iterations. Here an iteration is a step of a denoising chain, its state the noised code of the next
token: training draws one noise level and makes one pass, and inference makes as many iterations as levels are walked.

Source: arXiv 2506.14202, section 4.5.

Trained end to end it is what Geiping et al. train: `PlainLooped`.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from edgeblocks.diffusion.autoregression import CachesPer
from edgeblocks.diffusion.noise import NoiseRange
from edgeblocks.errors import ConfigError
from edgeblocks.families.ar import PlainAr, PlainArBlock
from edgeblocks.families.base import Batch, BatchSpec, Level, TextInfo
from edgeblocks.families.causal_layers import CausalLayer, halves
from edgeblocks.families.layers import Condition, Hidden, Linear
from edgeblocks.families.precision import lowered
from edgeblocks.families.token_block import Codes, Sigma, TokenDenoiserBlock, Tokens
from edgeblocks.families.token_denoiser import TokenDenoiser, TokenDenoiserSettings

MOST_ITERATIONS = 64
_Iterations = Annotated[int, Field(ge=1, le=MOST_ITERATIONS)]
Iterations = Annotated[
    _Iterations, Field(description="with method=exact: how often its core is run, on average in training")
]
Truncation = Annotated[
    _Iterations, Field(description="with method=exact: through how many of the last iterations gradients go back")
]
SPREAD = 0.5
"""Standard deviation of the logarithm of the mean number of iterations."""


@dataclass(frozen=True, kw_only=True)
class LoopedSettings(TokenDenoiserSettings):
    """Those of a denoiser; and, where the network is trained end to end, its core's iterations."""

    iterations: Iterations = 8
    truncation: Truncation = 8


class LoopedBlock(TokenDenoiserBlock):
    """A quarter of the layers are the prelude, as many the coda, the rest the core, which alone knows the noise level.

    In training and in generation there is one stream: position i has the token before it and the noised code of its own
    token, and later positions, which see it, know that token anyway. Prelude, core and coda have the same kind of
    layer, of the same cost.
    """

    # A coda that knows the noise level too was not better: 3.27 and 3.28 bits per character at sigma_max against 3.29
    # and 3.28, as measured in `TokenDenoiserBlock.init_`.

    def through_layers(
        self, clean: Hidden, noised: Hidden, condition: Condition, past: Tensor | None, present: list[Tensor] | None
    ) -> Hidden:
        """The coda's output."""
        prelude, core, coda = self._parts()
        steady = torch.zeros_like(condition)  # prelude and coda do not depend on the noise level
        x = self.run(prelude, clean, steady, past, present)
        x = self.run(core, x + noised, condition, past, present)
        return self.run(coda, x, steady, past, present)

    def _parts(self) -> tuple[range, range, range]:
        """The layers of prelude, core and coda."""
        total = len(self.layers)
        ends = total // 4
        return range(ends), range(ends, total - ends), range(total - ends, total)

    def reading_states(self, z: Codes, known: Codes, sigma: Sigma, tokens: Tokens) -> Hidden:
        """See there. Behind the prelude, which sees tokens alone, there are two streams: of `known` and of z."""
        prelude, core, coda = self._parts()
        condition = self.condition(sigma.log() / 4)
        steady = torch.zeros_like(condition)
        x = self.run(prelude, lowered(self.token_embedding(tokens)), steady, None, None)
        # [2 B, T, D]: the core adds noised codes to the prelude's output in either stream.
        streams = torch.cat([x + self.noised(known, sigma), x + self.noised(z, sigma)])
        for numbers, conditioning in ((core, condition), (coda, steady)):
            for number in numbers:
                layer = self.layers[number]
                assert isinstance(layer, CausalLayer)
                streams = layer.read(streams, torch.cat([conditioning, conditioning]))
        return self.normalised(halves(streams)[1], condition)


class Looped(TokenDenoiser):
    """The family; see `TokenDenoiser`."""

    name = "looped"
    preferred_blocks = 1
    settings_type: type = LoopedSettings
    block_type = LoopedBlock
    caches_per: CachesPer = "step"
    """States, and so the KV cache, differ from level to level."""


class PlainLoopedBlock(PlainArBlock):
    """A recurrent-depth network: a prelude reads the tokens, a core improves a state, a coda answers.

    In every iteration the core gets the state and the prelude's output.
    """

    stem_parts = ("token_embedding", "adapter")
    readout_parts = ("state_norm", "readout_norm", "readout")

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        sliding_window: int = 0,
        data: TextInfo,
        num_layers: int,
        checkpointing: bool,
        iterations: int,
        truncation: int,
    ) -> None:
        super().__init__(
            width=width,
            heads=heads,
            sliding_window=sliding_window,
            data=data,
            num_layers=num_layers,
            checkpointing=checkpointing,
        )
        self.iterations, self.truncation = iterations, truncation
        self.adapter = Linear(2 * width, width)
        self.state_norm = nn.LayerNorm(width)

    def enter(self, tokens: Tokens) -> tuple[Hidden, Tensor]:
        """The first layer's input for the token before each position, and a row as long as there are iterations.

        The row takes the place of the conditioning; only its length is used.
        """
        x = lowered(self.token_embedding(tokens))
        return x, x.new_zeros(x.shape[0], self.iterations)

    def through_layers(
        self, clean: Hidden, noised: Tensor, condition: Tensor, past: Tensor | None, present: list[Tensor] | None
    ) -> Hidden:
        """The coda's output after as many iterations as the condition is long."""
        total, count = len(self.layers), condition.shape[1]
        ends, followed = total // 4, torch.is_grad_enabled()
        read = self.run(range(ends), clean, condition, past, present)
        # Zeros, where the paper begins at random: the text then does not depend on chance.
        state = torch.zeros_like(read)
        for iteration in range(count):
            # Gradients go back through the last iterations alone; the others keep no activations.
            with torch.set_grad_enabled(followed and iteration >= count - self.truncation):
                # [B, T, 2 D] -> [B, T, D]
                state = self.adapter(torch.cat([state, read], dim=-1))
                # Brought to the same size every time, however often the core is run.
                state = self.state_norm(self.run(range(ends, total - ends), state, condition, past, present))
        return self.run(range(total - ends, total), state, condition, past, present)

    def through_stage(self, hidden: Tensor, condition: Tensor, *, checkpointing: bool) -> Tensor:
        """`through_layers` as a stage of end-to-end training is run."""
        self.checkpointing = checkpointing
        return self.through_layers(hidden, hidden, condition, None, None)


class PlainLooped(PlainAr):
    """What `looped` is where it is trained end to end: the core is unrolled, a random number of times in each step.

    The number is one and a Poisson number whose mean is log-normal, at most `MOST_ITERATIONS`; gradients go back
    through the last `truncation` iterations. All layers are one stage, because the core is needed in every iteration.

    Source: Geiping et al. 2025, arXiv 2502.05171 (Huginn), sections 3.1 and 3.3.
    """

    name = "looped"
    preferred_blocks = 1
    one_stage = True
    unrolled = True
    layer_period = 4
    """Layers after which the structure repeats: one of the prelude, two of the core, one of the coda."""
    settings_type: type = LoopedSettings
    settings: LoopedSettings

    def __init__(self, settings: LoopedSettings, data: TextInfo) -> None:
        """A family of these settings on this text.

        Raises:
            ConfigError: with everything that is impossible.
        """
        super().__init__(settings, data)
        if settings.depth % self.layer_period:
            raise ConfigError(
                f"depth={settings.depth}: a looped network that is trained end to end has a multiple of "
                f"{self.layer_period} layers, a quarter of them prelude and a quarter coda"
            )

    def block(self, *, num_layers: int, checkpointing: bool) -> PlainLoopedBlock:
        """The network on torch's default device, parameters not initialised."""
        return PlainLoopedBlock(
            width=self.settings.width,
            heads=self.settings.heads,
            sliding_window=self.settings.sliding_window,
            data=self.data,
            num_layers=num_layers,
            checkpointing=checkpointing,
            iterations=self.settings.iterations,
            truncation=self.settings.truncation,
        )

    def num_caches(self, num_layers: int) -> int:
        """Tensors of keys and of values in the KV cache: of a layer of the core, one of each for every iteration."""
        # Prelude and coda run once; the core's keys and values differ from iteration to iteration.
        ends = num_layers // 4
        return 2 * (2 * ends + (num_layers - 2 * ends) * self.settings.iterations)

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives; iterations without gradients cost no memory."""
        return {**super().batch_spec(batch), "iterations": ((batch, self.settings.truncation), torch.float32)}

    def draw(
        self, tokens: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch."""
        batch = super().draw(tokens, labels, noise_range, generator)
        log_mean = math.log(self.settings.iterations) - SPREAD**2 / 2  # a log-normal's mean is exp(mu + sigma^2 / 2)
        mean = (log_mean + SPREAD * torch.randn((), generator=generator)).exp()
        count = min(1 + int(torch.poisson(mean, generator=generator)), MOST_ITERATIONS)
        return self.with_iterations(batch, count)

    def at_level(
        self, tokens: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> Batch:
        """A batch for evaluation, of as many iterations as the network is used with."""
        return self.with_iterations(super().at_level(tokens, labels, level, generator), self.settings.iterations)

    def with_iterations(self, batch: Batch, count: int) -> Batch:
        """The batch, with the number of iterations to run."""
        return {**batch, "iterations": torch.zeros(len(batch["tokens"]), count)}

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first layer's input, and a row as long as there are iterations."""
        return super().enter(block, batch)[0], batch["iterations"]
