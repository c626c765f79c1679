"""ar: text by an autoregressive chain of denoisers (arXiv 2506.14202, section 4.4).

Clean tokens and noised codes are two streams through the same layers. The codes attend to the clean tokens before them
and never to each other, so all positions of a window are trained at once. The clean stream does not know the noise
level: its keys and values hold for every step of the chain that a block runs, and writing text keeps them once a block.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from edgeblocks.causal_layers import CausalLayer, TwoStreamLayer
from edgeblocks.families.token_block import TokenDenoiserBlock
from edgeblocks.families.token_denoiser import TokenDenoiser


class ArBlock(TokenDenoiserBlock):
    """Both streams go through a layer together, one above the other in the batch."""

    def new_layers(self, num_layers: int, *, width: int, heads: int) -> list[CausalLayer]:
        """Layers of two streams."""
        return [TwoStreamLayer(width=width, heads=heads, last=number == num_layers - 1) for number in range(num_layers)]

    def through_layers(
        self,
        clean: Float[Tensor, "batch tokens width"],
        noised: Float[Tensor, "batch tokens width"],
        condition: Float[Tensor, "batch width"],
        past: Tensor | None,
        present: list[Tensor] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """The last layer's output.

        It starts from the token before, as the clean stream does, and z's projection is added. From that projection
        alone, which starts at zero, it would stay zero, as all gates are closed: nothing was learnt in 200 steps.
        """
        streams = torch.cat([clean, clean + noised])
        conditions = torch.cat([torch.zeros_like(condition), condition])
        return self.run(range(len(self.layers)), streams, conditions, past, present)


class Ar(TokenDenoiser):
    """The family; see `TokenDenoiser`."""

    name = "ar"
    preferred_blocks = 4
    block_type = ArBlock

    def cache_key(self, step: int, block: int) -> int:
        """The block: the clean stream is the same at all its levels."""
        return block
