"""mdlm: text by masked diffusion (arXiv 2406.07524, MDLM; 2406.04329, MD4).

Noise is masking: at time t each token of a sequence is hidden with probability t, independently. A block sees what is
left and predicts the hidden tokens. With the linear schedule alpha(t) = 1 - t the bound of a sequence's negative
log-likelihood is

    integral over t from 0 to 1 of  E [ w(t) sum over hidden positions of -log p(token | visible tokens) ],

with w(t) = -alpha'(t) / (1 - alpha(t)) = 1/t. Blocks own ranges of t, so the bound is the sum of the blocks' shares:
the mean of `loss` over a block's own range, times the width of the range.

Source: arXiv 2506.14202, section 4 (partition of the schedule into equal decrements of alpha).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from edgeblocks.diffusion.noise import MaskingSchedule, NoisePartition, NoiseRange, unmasking_steps
from edgeblocks.families.base import (
    NOISE_FEATURES,
    NUM_LEVELS,
    Batch,
    BatchSpec,
    Level,
    TextFamily,
    TextInfo,
    spread_shares,
)
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.layers import Condition, Linear, RotaryAdaLnLayer, TokenEmbedding, run_layers
from edgeblocks.families.precision import lowered
from edgeblocks.families.settings import Depth, FamilySettings, RotaryHeads, Width
from edgeblocks.families.text_block import TextBlock
from edgeblocks.families.token_loss import token_losses, token_scores

LEAST_TIMES = 128
"""At which evaluation looks at a sequence."""


@dataclass(frozen=True, kw_only=True)
class MdlmSettings(FamilySettings):
    """The shape of the network."""

    width: Width = 256
    depth: Depth = 12
    heads: RotaryHeads = 4


class MdlmBlock(TextBlock):
    """One block: token embedding (the last row is the mask's), `num_layers` layers, readout."""

    def __init__(self, *, settings: MdlmSettings, data: TextInfo, num_layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.heads, self.length = settings.heads, data.length
        self.checkpointing = checkpointing
        hidden = settings.width
        self.token_embedding = TokenEmbedding(data.vocabulary + 1, hidden)
        self.noise_up = Linear(NOISE_FEATURES, hidden)
        self.noise_down = Linear(hidden, hidden)
        self.layers = nn.ModuleList(RotaryAdaLnLayer(width=hidden, heads=settings.heads) for _ in range(num_layers))
        self.readout_modulation = Linear(hidden, 2 * hidden)
        self.readout = Linear(hidden, data.vocabulary)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place, layers as the identity (adaLN-Zero)."""
        # Closed gates and small embeddings leave the plateau of letter frequencies first: 6 layers of width 128 on a
        # novel's characters are after 200 steps at 3.48 to 3.70 bits per character (three seeds); with open gates at
        # 3.89, and at 3.72 and 3.89 (two seeds) where embeddings have unit variance too.
        super().init_(generator)

    def forward(
        self, z: Int[Tensor, "batch length"], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of the token at each position, given the visible ones; the mask itself is never an answer."""
        out: Tensor = self.readout(self.hidden(z, t))
        return out.float()

    def hidden(self, z: Int[Tensor, "batch length"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch length width"]:
        """The readout's input."""
        x, condition = self.enter(z, t)
        return self.normalised(run_layers(self.layers, x, condition, checkpointing=self.checkpointing), condition)

    def enter(
        self, z: Int[Tensor, "batch length"], t: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch length width"], Condition]:
        """The first layer's input, and the conditioning of all layers."""
        # t to [-1, 1], about the span of the features.
        return lowered(self.token_embedding(z)), self.condition(2 * t - 1)


class Mdlm(TextFamily, EndToEnd):
    """The family: builds blocks, draws what a training step needs, and computes the per-sample loss.

    A batch has the clean `tokens`, which of them are `masked`, and each sequence's `t`.
    """

    name = "mdlm"
    task: Literal["text"] = "text"
    preferred_blocks = 3
    sigma_data = 1.0
    settings_type: type = MdlmSettings
    condition_spec = None
    settings: MdlmSettings

    @property
    def noise(self) -> MaskingSchedule:
        return MaskingSchedule()

    @property
    def mask(self) -> int:
        """The id that stands at masked positions."""
        return self.data.vocabulary

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a sample's z, whose dtype is int64."""
        return (self.data.length,)

    def block(self, *, num_layers: int, checkpointing: bool) -> MdlmBlock:
        """A block of `num_layers` layers on torch's default device, parameters not initialised."""
        return MdlmBlock(settings=self.settings, data=self.data, num_layers=num_layers, checkpointing=checkpointing)

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives."""
        return {
            "tokens": ((batch, self.data.length), torch.int64),
            "masked": ((batch, self.data.length), torch.bool),
            "t": ((batch,), torch.float32),
        }

    def draw(
        self, tokens: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch: t in (train_low, train_high], evenly spaced from one random start."""
        shares = spread_shares(len(tokens), generator)
        # Down from the upper end, which shares of [0, 1) include and the lower one not: at t = 0 the weight 1/t has no
        # value.
        t = noise_range.train_high - (noise_range.train_high - noise_range.train_low) * shares
        return _batch(tokens, t, torch.rand(tokens.shape, generator=generator))

    def at_level(
        self, tokens: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> Batch:
        """A batch for evaluation, t uniform in (low, high] for each sequence anew."""
        # One row of draws a sequence, so that its draws do not depend on how sequences are grouped.
        random = torch.rand(len(tokens), self.data.length + 1, generator=generator)
        return _batch(tokens, level.high - (level.high - level.low) * random[:, 0].double(), random[:, 1:])

    def evaluation_levels(self, partition: NoisePartition) -> tuple[Level, ...]:
        """Strata of all times, each inside one block's own range: the mean over them is the bound, without bias."""
        # At least `LEAST_TIMES` times a sequence: an estimate from few can be off by a factor of two.
        each = math.ceil(NUM_LEVELS / partition.num_blocks)
        strata = math.ceil(LEAST_TIMES / (each * partition.num_blocks))
        return tuple(
            Level(low=low, high=high, share=high - low, strata=strata)
            for high, low in unmasking_steps(partition, num_steps=each * partition.num_blocks)
        )

    def inputs(self, batch: Batch) -> tuple[Tensor, None]:
        """The partly masked tokens."""
        return batch["tokens"].masked_fill(batch["masked"], self.mask), None

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """The sequence's share of the bound at its t, in nats a token: cross-entropy of masked tokens, times 1/t."""
        return _weighted(token_losses(*_readout_inputs(block, self.inputs(batch)[0], batch)), batch)

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The input of the block's first layer, and the conditioning of all layers."""
        assert isinstance(block, MdlmBlock)
        return block.enter(self.inputs(batch)[0], batch["t"])

    def loss_after(self, block: nn.Module, hidden: Tensor, condition: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """`loss` from what the last layer gives."""
        assert isinstance(block, MdlmBlock)
        return _weighted(token_losses(*_read_from(block, block.normalised(hidden, condition), batch)), batch)

    def logits(
        self,
        block: nn.Module,
        z: Int[Tensor, "batch length"],
        t: Float[Tensor, " batch"],
        wanted: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "answers vocabulary"]:
        """Logits at the wanted places alone."""
        assert isinstance(block, MdlmBlock)
        # Those of all places would take more memory than the network.
        out: Tensor = block.readout(block.hidden(z, t)[wanted])
        return out.float()

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss, and the share of masked tokens that the likeliest answers get right.

        `accuracy` has the loss's weight, so that a mean over sequences is unbiased; for one sequence it can exceed 1.
        """
        losses, right = token_scores(*_readout_inputs(block, self.inputs(batch)[0], batch))
        return {"loss": _weighted(losses, batch), "accuracy": _weighted(right.float(), batch)}


def _readout_inputs(block: nn.Module, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the readout's weight and bias, answers, and which of them count: those that are masked."""
    assert isinstance(block, MdlmBlock)
    return _read_from(block, block.hidden(z, batch["t"]), batch)


def _read_from(block: MdlmBlock, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = states.flatten(0, 1)
    return x, block.readout.weight, block.readout.bias, batch["tokens"].flatten(), batch["masked"].flatten()


def _batch(tokens: np.ndarray, t: Tensor, uniform: Float[Tensor, "batch length"]) -> Batch:
    # Rounded first: mask and weight 1/t must be of the same t.
    t = t.float()
    return {"tokens": torch.from_numpy(tokens), "masked": uniform < t.unsqueeze(1), "t": t}


def _weighted(values: Float[Tensor, " rows"], batch: Batch) -> Float[Tensor, " batch"]:
    """(1/t) times each sequence's sum of values, which are zero where nothing is masked, by its length."""
    # w(t) = -alpha'(t) / (1 - alpha(t)) = 1/t (arXiv 2406.04329), and 1/T for nats a token: [B T] -> [B].
    masked, t = batch["masked"], batch["t"]
    return values.view(masked.shape).sum(1) / (t * masked.shape[1])
