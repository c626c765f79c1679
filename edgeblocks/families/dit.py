"""dit: image generation with a diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748) as an EDM denoiser.

A block is a whole small DiT: its own stem (patch, noise-level and class embedding), its layers and its own readout. It
sees a noised image z, the noise level and the class, and predicts the clean image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from edgeblocks.families.base import (
    NOISE_FEATURES,
    Batch,
    BatchSpec,
    ConditionSpec,
    ImageInfo,
    PatchFamily,
    draw_sigmas,
    noise_problems,
    shape_problems,
)
from edgeblocks.layers import (
    AdaLnZeroLayer,
    LabelEmbedding,
    Linear,
    init_linear_,
    init_zero_,
    modulated_norm,
    noise_features,
    patchify,
    run_layers,
    sincos_positions,
    unpatchify,
)
from edgeblocks.noise import NoiseRange, loss_weight

SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class DitSettings:
    """The shape of the network and its objective's settings."""

    width: int = 128
    depth: int = 12
    heads: int = 4
    patch: int = 2
    label_dropout: float = 0.1
    flip: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    p_mean: float = -1.2
    p_std: float = 1.2

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        found = shape_problems(width=self.width, depth=self.depth, heads=self.heads, patch=self.patch)
        if not 0 <= self.label_dropout < 1:
            found.append(f"label_dropout={self.label_dropout} must lie in [0, 1)")
        return found + noise_problems(
            sigma_min=self.sigma_min, sigma_max=self.sigma_max, p_mean=self.p_mean, p_std=self.p_std
        )


class DitBlock(nn.Module):
    """One block: stem, `num_layers` layers, readout.

    `positions` is a fixed table, not a parameter: `reset_tables_` makes it before use, and it is never stored.
    """

    positions: Tensor

    def __init__(self, *, settings: DitSettings, data: ImageInfo, num_layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.patch, self.height, self.width = settings.patch, data.height, data.width
        self.checkpointing = checkpointing
        features = data.channels * settings.patch**2
        hidden = settings.width
        self.patch_embedding = Linear(features, hidden)
        self.noise_up = Linear(NOISE_FEATURES, hidden)
        self.noise_down = Linear(hidden, hidden)
        self.label_embedding = LabelEmbedding(num_classes=data.num_classes, width=hidden) if data.num_classes else None
        self.layers = nn.ModuleList(AdaLnZeroLayer(width=hidden, heads=settings.heads) for _ in range(num_layers))
        self.readout_modulation = Linear(hidden, 2 * hidden)
        self.readout = Linear(hidden, features)

    def reset_tables_(self) -> None:
        """Make the fixed tables on torch's default device."""
        rows, columns = self.height // self.patch, self.width // self.patch
        table = sincos_positions(rows, columns, self.patch_embedding.out_features)
        self.register_buffer("positions", table, persistent=False)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place as DiT does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, generator)
        for linear in (self.noise_up, self.noise_down):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.table.weight, std=0.02, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, AdaLnZeroLayer)
            init_zero_(layer.modulation)
        init_zero_(self.readout_modulation)
        init_zero_(self.readout)

    def forward(
        self,
        z: Float[Tensor, "batch channels height width"],
        sigma: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The denoised image D(z, sigma) = c_skip z + c_out F(c_in z, c_noise) (EDM, equation 7)."""
        total = (sigma**2 + SIGMA_DATA**2).view(-1, 1, 1, 1)
        c_skip = SIGMA_DATA**2 / total
        c_out = sigma.view(-1, 1, 1, 1) * SIGMA_DATA * total.rsqrt()
        c_in = total.rsqrt()
        raw = self._network(c_in * z, sigma.log() / 4, labels)
        return torch.addcmul(c_skip * z, c_out, raw)

    def _network(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        condition = self.noise_down(nn.functional.silu(self.noise_up(noise_features(c_noise, NOISE_FEATURES))))
        if self.label_embedding is not None:
            assert labels is not None
            condition = condition + self.label_embedding(labels)
        condition = nn.functional.silu(condition)
        tokens = self.patch_embedding(patchify(x, self.patch)) + self.positions
        tokens = run_layers(self.layers, tokens, condition, checkpointing=self.checkpointing)
        shift, scale = self.readout_modulation(condition).chunk(2, dim=-1)
        tokens = self.readout(modulated_norm(tokens, shift, scale))
        return unpatchify(tokens, patch=self.patch, height=self.height, width=self.width)


class Dit(PatchFamily):
    """The family: builds blocks, draws what a training step needs, and computes the per-sample loss."""

    name = "dit"
    task = "images"
    preferred_blocks = 3
    sigma_data = SIGMA_DATA
    settings_type = DitSettings
    settings: DitSettings

    @property
    def conditional(self) -> bool:
        return self.data.num_classes > 0

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a sample's z: an image's."""
        return self.data.channels, self.data.height, self.data.width

    @property
    def condition_spec(self) -> ConditionSpec | None:
        """Class numbers, where there are classes."""
        return ("labels", (), torch.int64) if self.conditional else None

    def block(self, *, num_layers: int, checkpointing: bool) -> DitBlock:
        """A block of `num_layers` layers on torch's default device, parameters not initialised."""
        return DitBlock(settings=self.settings, data=self.data, num_layers=num_layers, checkpointing=checkpointing)

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives."""
        image = (batch, self.data.channels, self.data.height, self.data.width)
        spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "clean": (image, torch.float32),
            "eps": (image, torch.float32),
            "sigma": ((batch,), torch.float32),
        }
        if self.conditional:
            spec["labels"] = ((batch,), torch.int64)
        return spec

    def draw(
        self, pixels: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch: sigma uniform in q between the widened ends, labels dropped for guidance."""
        clean = self.data.to_model(pixels)
        count = len(clean)
        if self.settings.flip:
            flipped = torch.rand(count, generator=generator) < 0.5
            clean[flipped] = clean[flipped].flip(-1)
        sigma = draw_sigmas(self.noise, noise_range, count, generator)
        batch = {"clean": clean, "eps": torch.randn(clean.shape, generator=generator), "sigma": sigma}
        if self.conditional:
            assert labels is not None
            dropped = torch.rand(count, generator=generator) < self.settings.label_dropout
            batch["labels"] = torch.from_numpy(labels).masked_fill(dropped, self.data.num_classes)
        return batch

    def at_level(
        self, pixels: np.ndarray, labels: np.ndarray | None, sigma: float, generator: torch.Generator
    ) -> Batch:
        """A batch at one noise level, for evaluation: no flip, no dropped labels."""
        clean = self.data.to_model(pixels)
        batch = {
            "clean": clean,
            "eps": torch.randn(clean.shape, generator=generator),
            "sigma": torch.full((len(clean),), sigma),
        }
        if self.conditional:
            assert labels is not None
            batch["labels"] = torch.from_numpy(labels)
        return batch

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The noised images and their classes."""
        return torch.addcmul(batch["clean"], batch["sigma"].view(-1, 1, 1, 1), batch["eps"]), batch.get("labels")

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """w(sigma) ||D(clean + sigma eps, sigma) - clean||^2 averaged over an image's components, per sample."""
        sigma = batch["sigma"]
        z, labels = self.inputs(batch)
        denoised = block(z, sigma, labels)
        error = (denoised - batch["clean"]).square().flatten(1).mean(1)
        weight: Tensor = loss_weight(sigma, SIGMA_DATA)
        weighted: Tensor = error * weight
        return weighted

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss alone."""
        return {"loss": self.loss(block, batch)}
