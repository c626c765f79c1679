"""What the blocks of all text families share: what follows from a noise level, positions, and how parameters begin."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from edgeblocks.families.base import NOISE_FEATURES
from edgeblocks.families.block import Block
from edgeblocks.families.layers import (
    AdaLnZeroLayer,
    Condition,
    Hidden,
    Linear,
    RotaryAttention,
    TokenEmbedding,
    init_linear_,
    init_zero_,
    modulated_norm,
    noise_features,
    rotary_table,
)


class TextBlock(Block):
    """A subclass makes the parts, in the order in which `init_` is to draw them, and says how tokens go through."""

    stem_parts: tuple[str, ...] = ("token_embedding", "noise_up", "noise_down")
    readout_parts: tuple[str, ...] = ("readout_modulation", "readout")
    heads: int
    length: int
    token_embedding: TokenEmbedding
    noise_up: Linear
    noise_down: Linear
    readout_modulation: Linear
    readout: Linear

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place, layers as the identity (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, generator)
        for parameter in (self.token_embedding.weight, self.noise_up.weight, self.noise_down.weight):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        # Closed gates: each layer starts as the identity. The readout starts at zero, with all tokens as likely.
        for layer in self.layers:
            assert isinstance(layer, AdaLnZeroLayer)
            init_zero_(layer.modulation)
        init_zero_(self.readout_modulation)
        init_zero_(self.readout)

    def reset_tables_(self) -> None:
        """Make the table of positions, one for all layers, on torch's default device; needed before use."""
        table = None
        for layer in self.layers:
            assert isinstance(layer, AdaLnZeroLayer) and isinstance(layer.attention, RotaryAttention)
            if table is None:
                table = rotary_table(self.length, layer.modulation.in_features // self.heads)
            layer.attention.set_rotary_(table)

    def condition(self, level: Float[Tensor, " batch"]) -> Condition:
        """The conditioning of layers and readout, for noise levels brought to about [-1, 1]."""
        features = noise_features(level, NOISE_FEATURES)  # [B, 256]
        condition: Tensor = F.silu(self.noise_down(F.silu(self.noise_up(features))))
        return condition

    def normalised(self, x: Hidden, condition: Condition) -> Hidden:
        """The readout's input."""
        shift, scale = self.readout_modulation(condition).chunk(2, dim=-1)  # [B, D] each
        return modulated_norm(x, shift, scale)
