"""ar: text by an autoregressive chain of denoisers (arXiv 2506.14202, section 4.4).

Clean tokens and noised codes are two streams through the same layers. The codes attend to the clean tokens before them
and never to each other, so all positions of a window are trained at once. The clean stream does not know the noise
level: one KV cache a block serves every step of the chain that the block runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeblocks.diffusion.autoregression import CachesPer
from edgeblocks.diffusion.noise import NoisePartition
from edgeblocks.families.base import Batch, Level, TextInfo
from edgeblocks.families.causal_layers import CausalLayer, PlainCausalLayer, TwoStreamLayer
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.layers import Condition, Hidden, Linear, TokenEmbedding, init_plain_, init_zero_, rotary_table
from edgeblocks.families.precision import lowered
from edgeblocks.families.token_block import TokenDenoiserBlock, Tokens
from edgeblocks.families.token_denoiser import TokenDenoiser
from edgeblocks.families.token_loss import token_losses


class ArBlock(TokenDenoiserBlock):
    """Both streams go through a layer together, one above the other in the batch."""

    def new_layers(self, num_layers: int, *, width: int, heads: int, sliding_window: int) -> list[CausalLayer]:
        """Layers of two streams."""
        return [
            TwoStreamLayer(width=width, heads=heads, sliding_window=sliding_window, last=number == num_layers - 1)
            for number in range(num_layers)
        ]

    def through_layers(
        self, clean: Hidden, noised: Hidden, condition: Condition, past: Tensor | None, present: list[Tensor] | None
    ) -> Hidden:
        """The last layer's output."""
        # The noised stream starts from the token before, as the clean one does, and z's projection is added. From that
        # projection alone, which starts at zero, it would stay zero, as all gates are closed: nothing was learnt in 200
        # steps.
        streams = torch.cat([clean, clean + noised])  # [2 B, T, D]
        # The clean stream does not know the noise level, so that its keys and values hold at all levels.
        conditions = torch.cat([torch.zeros_like(condition), condition])
        return self.run(range(len(self.layers)), streams, conditions, past, present)


class Ar(TokenDenoiser):
    """The family; see `TokenDenoiser`."""

    name = "ar"
    preferred_blocks = 4
    block_type = ArBlock
    caches_per: CachesPer = "block"
    """The clean stream is the same at all levels of a block."""


class PlainArBlock(TokenDenoiserBlock):
    """An ordinary causal language model, or some of its layers: one stream of clean tokens, no noise, no condition."""

    stem_parts: tuple[str, ...] = ("token_embedding",)
    readout_parts: tuple[str, ...] = ("readout_norm", "readout")

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        sliding_window: int = 0,
        data: TextInfo,
        num_layers: int,
        checkpointing: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.heads, self.length, self.vocabulary = heads, data.length, data.vocabulary
        self.width, self.checkpointing = width, checkpointing
        self.token_embedding = TokenEmbedding(data.vocabulary + 1, width)
        self.layers = nn.ModuleList(
            PlainCausalLayer(width=width, heads=heads, sliding_window=sliding_window) for _ in range(num_layers)
        )
        self.readout_norm = nn.LayerNorm(width)
        self.readout = Linear(width, data.vocabulary)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place."""
        init_plain_(self, generator)
        init_zero_(self.readout)

    def reset_tables_(self) -> None:
        """Make the table of positions, one for all layers, on torch's default device; needed before use."""
        table = rotary_table(self.length, self.width // self.heads)
        for layer in self.layers:
            assert isinstance(layer, PlainCausalLayer)
            layer.attention.set_rotary_(table)

    def enter(self, tokens: Tokens) -> tuple[Hidden, Tensor]:
        """The first layer's input for the token before each position, and an empty conditioning."""
        x = lowered(self.token_embedding(tokens))
        return x, x.new_zeros(x.shape[0], 1)

    def through_layers(
        self, clean: Hidden, noised: Tensor, condition: Tensor, past: Tensor | None, present: list[Tensor] | None
    ) -> Hidden:
        """The last layer's output."""
        return self.run(range(len(self.layers)), clean, condition, past, present)

    def _states(
        self, z: Tensor, sigma: Tensor, tokens: Tensor, past: Tensor | None, present: list[Tensor] | None
    ) -> Tensor:
        x, nothing = self.enter(tokens)
        # z and sigma are not looked at: the signature is that of a denoiser, so that one code writes text with either.
        out: Tensor = self.readout_norm(self.through_layers(x, x, nothing, past, present))
        return out


class PlainAr(Ar, EndToEnd):
    """What `ar` is where it is trained end to end: an ordinary language model, one pass a token, without a chain."""

    # Codes, noise and levels are inherited and not looked at, so that one code writes text with a chain and without.
    # The KV cache is the family's own, and one serves the one level that there is.
    chain_steps = 1

    def block(self, *, num_layers: int, checkpointing: bool) -> PlainArBlock:
        """The network, or some of its layers, on torch's default device, parameters not initialised."""
        return PlainArBlock(
            width=self.settings.width,
            heads=self.settings.heads,
            sliding_window=self.settings.sliding_window,
            data=self.data,
            num_layers=num_layers,
            checkpointing=checkpointing,
        )

    def evaluation_levels(self, partition: NoisePartition) -> tuple[Level, ...]:
        """One, as no noise level differs from another."""
        return (Level.at(self.settings.sigma_max),)

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first layer's input, and an empty conditioning."""
        assert isinstance(block, PlainArBlock)
        # Position i reads the token at i - 1 and is to predict the one at i.
        return block.enter(F.pad(batch["tokens"][:, :-1], (1, 0), value=self.begin))

    def loss_after(self, block: nn.Module, hidden: Tensor, condition: Tensor, batch: Batch) -> Tensor:
        """`loss` from what the last layer gives."""
        assert isinstance(block, PlainArBlock)
        return (
            token_losses(*self._read_from(block, block.readout_norm(hidden), batch)).view(batch["tokens"].shape).mean(1)
        )

    def _readout_inputs(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        assert isinstance(block, PlainArBlock)
        x, nothing = self.enter(block, batch)
        return self._read_from(block, block.readout_norm(block.through_layers(x, x, nothing, None, None)), batch)

    def _read_from(
        self, block: PlainArBlock, states: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        answers = batch["tokens"].flatten()
        every = torch.ones_like(answers, dtype=torch.bool)
        return states.flatten(0, 1), block.readout.weight, block.readout.bias, answers, every
