"""dit: image generation with a diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748) as an EDM denoiser.

A block is a whole small DiT: its own stem (patch, noise-level and class embedding), its layers and its own readout. It
sees a noised image z, the noise level and the class, and predicts the clean image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeblocks.families.base import NOISE_FEATURES, ImageInfo, patch_problems
from edgeblocks.families.denoiser import (
    SIGMA_DATA,
    DenoiserSettings,
    EdmBlock,
    ImageDenoiser,
    init_condition_,
    noise_and_class,
)
from edgeblocks.families.layers import (
    AdaLnZeroLayer,
    LabelEmbedding,
    Linear,
    WithPositions,
    init_linear_,
    init_zero_,
    modulated_norm,
    patchify,
    unpatchify,
)
from edgeblocks.families.precision import lowered
from edgeblocks.families.settings import Heads, Patch, WidthOfPatches

__all__ = ["SIGMA_DATA", "Dit", "DitBlock", "DitSettings"]


@dataclass(frozen=True, kw_only=True)
class DitSettings(DenoiserSettings):
    """The shape of the network and its objective's settings."""

    width: WidthOfPatches = 128
    heads: Heads = 4
    patch: Patch = 2


class DitBlock(WithPositions, EdmBlock):
    """One block: stem, `num_layers` layers, readout."""

    stem_parts = ("patch_embedding", "noise_up", "noise_down", "label_embedding")
    readout_parts = ("readout_modulation", "readout")

    def __init__(self, *, settings: DitSettings, data: ImageInfo, num_layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.patch, self.height, self.width = settings.patch, data.height, data.width
        self.checkpointing = checkpointing
        features = data.channels * settings.patch**2
        hidden = self.hidden = settings.width
        self.patch_embedding = Linear(features, hidden)
        self.noise_up = Linear(NOISE_FEATURES, hidden)
        self.noise_down = Linear(hidden, hidden)
        self.label_embedding = LabelEmbedding(num_classes=data.num_classes, width=hidden) if data.num_classes else None
        self.layers = nn.ModuleList(AdaLnZeroLayer(width=hidden, heads=settings.heads) for _ in range(num_layers))
        self.readout_modulation = Linear(hidden, 2 * hidden)
        self.readout = Linear(hidden, features)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place as DiT does."""
        # In the modules' order: it decides which of the generator's numbers each matrix gets, so another order would be
        # other weights from the same seed.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, generator)
        init_condition_(self.noise_up, self.noise_down, self.label_embedding, generator)
        for layer in self.layers:
            assert isinstance(layer, AdaLnZeroLayer)
            # Gates of zero: a layer begins as the identity (adaLN-Zero, arXiv 2212.09748, section 3.2).
            init_zero_(layer.modulation)
        init_zero_(self.readout_modulation)
        init_zero_(self.readout)

    def begun(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patches with their positions, and noise level and class."""
        condition = noise_and_class(self.noise_up, self.noise_down, self.label_embedding, c_noise, labels)
        tokens = lowered(self.patch_embedding(patchify(x, self.patch)) + self.positions)
        return tokens, condition  # [B, T, D], [B, D]

    def ended(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """An image of the patches."""
        shift, scale = self.readout_modulation(condition).chunk(2, dim=-1)
        tokens = self.readout(modulated_norm(hidden, shift, scale))  # [B, T, D] -> [B, T, C p^2]
        return unpatchify(tokens, patch=self.patch, height=self.height, width=self.width)


class Dit(ImageDenoiser):
    """The family: builds blocks, draws what a training step needs, and computes the per-sample loss."""

    name = "dit"
    settings_type: type = DitSettings
    settings: DitSettings

    def data_problems(self, data: ImageInfo) -> list[str]:
        """Whether patches cover an image, and it can be mirrored."""
        return [*super().data_problems(data), *patch_problems(self.settings.patch, data)]

    def block(self, *, num_layers: int, checkpointing: bool) -> DitBlock:
        """A block of `num_layers` layers on torch's default device, parameters not initialised."""
        return DitBlock(settings=self.settings, data=self.data, num_layers=num_layers, checkpointing=checkpointing)
