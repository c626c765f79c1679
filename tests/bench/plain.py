"""The families' layers as ordinary networks for ordinary loops: what the memory of block-wise training is held against.

A denoiser, of images or of masked text, is one network for all noise levels. A classifier is the network of a vit block
that is always given the highest noise level and no label. A causal language model has the layers of an ar block in one
stream, with nothing noised; it stands for ar and looped. Logits are made whole.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeblocks.diffusion.noise import partition_noise
from edgeblocks.families.causal_layers import CausalLayer
from edgeblocks.families.layers import Linear, TokenEmbedding, init_linear_, init_zero_, rotary_table, run_layers
from edgeblocks.families.vit import Vit
from edgeblocks.seeds import generator_at


class PlainDenoiser(nn.Module):
    """All layers of a dit or an mdlm as one denoiser. Logits of text are made whole, as a plain loop makes them."""

    def __init__(self, family: Any, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.family, self.step = family, 0
        self.network = family.block(num_layers=family.num_layers, checkpointing=checkpointing)
        self.network.reset_tables_()
        self.range = partition_noise(family.noise, num_blocks=1, kind="equal-probability", overlap=0.0).ranges[0]

    def init_(self, generator: torch.Generator) -> None:
        self.network.init_(generator)

    def losses(self, examples: np.ndarray, labels: np.ndarray | None) -> Tensor:
        """The loss of each example, at noise that is drawn anew with each call."""
        batch = self.family.draw(examples, labels, self.range, generator_at("plain", self.step))
        self.step += 1
        if self.family.name != "mdlm":
            found: Tensor = self.family.loss(self.network, batch)
            return found
        logits = self.network(self.family.inputs(batch)[0], batch["t"]).transpose(1, 2)
        masked = batch["masked"]
        return (F.cross_entropy(logits, batch["tokens"], reduction="none") * masked).mean(1) / batch["t"]


class PlainClassifier(nn.Module):
    """Logits [batch, classes] of pixels uint8 [batch, height, width, channels]."""

    def __init__(self, family: Vit, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.family = family
        self.network = family.block(num_layers=family.num_layers, checkpointing=checkpointing)
        self.network.reset_tables_()

    def init_(self, generator: torch.Generator) -> None:
        self.network.init_(generator)

    def forward(self, pixels: np.ndarray) -> Tensor:
        z = torch.zeros(len(pixels), *self.family.state_shape)
        sigma = torch.full((len(pixels),), self.family.settings.sigma_max)
        return self.network.logits(z, sigma, self.family.condition(pixels))

    def losses(self, pixels: np.ndarray, labels: np.ndarray | None) -> Tensor:
        """Cross-entropy of each example."""
        assert labels is not None
        return F.cross_entropy(self(pixels), torch.from_numpy(labels), reduction="none")


class PlainCausal(nn.Module):
    """Logits [batch, length, vocabulary] of the token at each position, given those before it."""

    def __init__(
        self, *, vocabulary: int, length: int, width: int, heads: int, num_layers: int, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.begin, self.checkpointing = vocabulary, checkpointing
        self.embedding = TokenEmbedding(vocabulary + 1, width)
        self.layers = nn.ModuleList(CausalLayer(width=width, heads=heads) for _ in range(num_layers))
        self.readout = Linear(width, vocabulary)
        for layer in self.layers:
            layer.attention.set_rotary_(rotary_table(length, width // heads))

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Embeddings small, layers open from the start, as in a plain transformer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, generator)
        nn.init.normal_(self.embedding.weight, std=0.02, generator=generator)
        width = self.embedding.embedding_dim
        for layer in self.layers:
            init_zero_(layer.modulation)
            for gate in (2, 5):
                layer.modulation.bias[gate * width : (gate + 1) * width] = 1.0
        init_zero_(self.readout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Its layers are given a condition of zeros, which leaves them learned gates, scales and shifts."""
        x = self.embedding(F.pad(tokens[:, :-1], (1, 0), value=self.begin))
        steady = x.new_zeros(len(x), x.shape[-1])
        x = run_layers(self.layers, x, steady, checkpointing=self.checkpointing)
        logits: Tensor = self.readout(F.layer_norm(x, x.shape[-1:]))
        return logits

    def losses(self, tokens: np.ndarray, labels: np.ndarray | None) -> Tensor:
        """Mean cross-entropy of each sequence's tokens, in nats."""
        answers = torch.from_numpy(tokens)
        return F.cross_entropy(self(answers).transpose(1, 2), answers, reduction="none").mean(1)
