"""The block of `ar` and `looped`: reads tokens and noised codes, and returns keys and values for the KV cache."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from edgeblocks.diffusion.codebook import code_rows
from edgeblocks.families.base import NOISE_FEATURES, TextInfo
from edgeblocks.families.causal_layers import CausalLayer, PlainCausalLayer
from edgeblocks.families.layers import Condition, Hidden, Linear, TokenEmbedding, init_zero_, run_layers
from edgeblocks.families.precision import lowered
from edgeblocks.families.text_block import TextBlock

Tokens = Int[Tensor, "batch tokens"]
Codes = Float[Tensor, "batch tokens code"]
"""Of the token at each position, most of them with noise."""
Sigma = Float[Tensor, " batch"]
"""Each sequence's noise level."""
Past = Float[Tensor, "caches batch heads past head_width"]
"""The KV cache of a block: keys and values for the earlier tokens, layer by layer, keys first."""
Present = Float[Tensor, "caches batch heads tokens head_width"]
"""The same for the current tokens."""


class TokenDenoiserBlock(TextBlock, ABC):
    """One block: token embedding (the last row is that of the beginning), z's projection, layers, readout.

    A subclass says how tokens and z go through the layers, `through_layers`, and may have layers of its own.
    """

    codes: Tensor

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        sliding_window: int = 0,
        code_width: int,
        data: TextInfo,
        num_layers: int,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.heads, self.length, self.vocabulary = heads, data.length, data.vocabulary
        self.checkpointing = checkpointing
        self.token_embedding = TokenEmbedding(data.vocabulary + 1, width)
        self.code_embedding = Linear(code_width, width)
        self.noise_up = Linear(NOISE_FEATURES, width)
        self.noise_down = Linear(width, width)
        self.layers = nn.ModuleList(
            self.new_layers(num_layers, width=width, heads=heads, sliding_window=sliding_window)
        )
        self.readout_modulation = Linear(width, 2 * width)
        self.readout = Linear(width, data.vocabulary)

    def new_layers(self, num_layers: int, *, width: int, heads: int, sliding_window: int) -> list[CausalLayer]:
        """Layers whose parameters are not initialised."""
        return [CausalLayer(width=width, heads=heads, sliding_window=sliding_window) for _ in range(num_layers)]

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
        super().init_(generator)
        init_zero_(self.code_embedding)  # z unseen: at sigma_max it is noise, see the table above

    def reset_tables_(self) -> None:
        """Make the tables of positions and of codes on torch's default device; needed before use."""
        super().reset_tables_()
        codes = torch.as_tensor(code_rows(self.vocabulary, self.code_embedding.in_features))
        # Not stored: every process finds the same codes again (`diffusion.codebook`).
        self.register_buffer("codes", codes, persistent=False)

    def forward(
        self, z: Codes, sigma: Sigma, tokens: Tokens, past: Past | None = None
    ) -> tuple[Float[Tensor, "batch tokens vocabulary"], Present]:
        """Logits of the token at each position, and keys and values for the tokens that follow.

        Args:
            z: the noised code of the token at each position.
            tokens: the token before each position; for the first position of a window the vocabulary's size.
            past: the KV cache of the positions before these; None where there are none.
        """
        x, present = self.hidden(z, sigma, tokens, past)
        logits: Tensor = self.readout(x)
        return logits.float(), present

    def hidden(self, z: Codes, sigma: Sigma, tokens: Tokens, past: Past | None = None) -> tuple[Hidden, Present]:
        """The readout's input, and keys and values; see `forward`."""
        present: list[Tensor] = []
        x = self._states(z, sigma, tokens, past, present)
        return x, torch.stack(present).float()

    def window_states(self, z: Codes, sigma: Sigma, tokens: Tokens) -> Hidden:
        """The readout's input for a whole window, without a KV cache."""
        return self._states(z, sigma, tokens, None, None)

    def _states(
        self, z: Tensor, sigma: Tensor, tokens: Tensor, past: Tensor | None, present: list[Tensor] | None
    ) -> Tensor:
        # c_noise (EDM, table 1); clean and noised codes come in as [B, T, D].
        condition = self.condition(sigma.log() / 4)
        x = self.through_layers(lowered(self.token_embedding(tokens)), self.noised(z, sigma), condition, past, present)
        return self.normalised(x, condition)

    def noised(self, z: Codes, sigma: Sigma) -> Hidden:
        """What the layers are given of noised codes."""
        # To unit variance, as EDM's c_in: a row of unit norm has a variance of 1 / code_width in each feature.
        c_in = (sigma**2 + 1 / z.shape[-1]).rsqrt()
        # [B, T, code] -> [B, T, D]
        out: Tensor = self.code_embedding(c_in[:, None, None] * z)
        return out

    def reading_states(self, z: Codes, known: Codes, sigma: Sigma, tokens: Tokens) -> Hidden:
        """What the readout is applied to, of a known text, all positions at once: each as if it were to be written.

        Args:
            z: states that do not know the token at their position.
            known: its noised code, which later positions may see.
        """
        return self.window_states(z, sigma, tokens)

    @abstractmethod
    def through_layers(
        self, clean: Hidden, noised: Hidden, condition: Condition, past: Tensor | None, present: list[Tensor] | None
    ) -> Hidden:
        """The last layer's output for each noised code. `present` is added to; None keeps nothing."""

    def run(
        self,
        numbers: range,
        x: Hidden,
        condition: Float[Tensor, "batch conditioning"],
        past: Tensor | None,
        present: list[Tensor] | None,
    ) -> Float[Tensor, "answered tokens width"]:
        """x through the layers of these numbers."""
        if present is None:
            layers = (self.layers[number] for number in numbers)
            return run_layers(layers, x, condition, checkpointing=self.checkpointing)
        for number in numbers:
            layer = self.layers[number]
            assert isinstance(layer, CausalLayer | PlainCausalLayer)
            first = len(present)  # not 2 * number: a layer that is run again has keys and values of each time
            x, kept = layer.cached(x, condition, None if past is None else (past[first], past[first + 1]))
            present += kept
        return x
