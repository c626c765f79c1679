"""Families that make images as EDM denoisers: dit, and networks of your own (docs/own_family.md).

Source: Karras et al. 2022, arXiv 2206.00364, table 1 (preconditioning, loss weight).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgeblocks.diffusion.noise import NoiseRange, loss_weight
from edgeblocks.families.base import (
    NOISE_FEATURES,
    Batch,
    BatchSpec,
    ConditionSpec,
    ImageFamily,
    ImageInfo,
    Level,
    draw_sigmas,
)
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.layers import Condition, LabelEmbedding, Linear, noise_features, run_layers
from edgeblocks.families.precision import lowered
from edgeblocks.families.settings import Depth, FamilySettings, Flip, PMean, PStd, Share, SigmaMax, SigmaMin, Width

SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(FamilySettings):
    """Settings of every image denoiser: width of the condition, number of layers, and the objective's."""

    width: Width = 128
    depth: Depth = 12
    label_dropout: Annotated[
        Share, Field(description="share of samples without their class, which --guidance needs")
    ] = 0.1
    flip: Flip = False
    sigma_min: SigmaMin = 0.002
    sigma_max: SigmaMax = 80.0
    p_mean: PMean = -1.2
    p_std: PStd = 1.2


class EdmBlock(Block):
    """A block between EDM's preconditioning: `begun`, its layers, `ended`."""

    @abstractmethod
    def begun(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first layer's input for x [batch, channels, height, width], and the conditioning of all layers."""

    @abstractmethod
    def ended(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """F(x, c_noise), of the shape of x, from the last layer's output."""

    def raw(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """F(x, c_noise): the network itself."""
        hidden, condition = self.begun(x, c_noise, labels)
        return self.ended(run_layers(self.layers, hidden, condition, checkpointing=self.checkpointing), condition)

    def enter(self, z: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """`begun` for a noised image."""
        # EDM, table 1. sigma is one number a sample, [B, 1, 1, 1] beside z.
        c_in = (sigma**2 + SIGMA_DATA**2).view(-1, 1, 1, 1).rsqrt()  # to unit variance
        return self.begun(c_in * z, sigma.log() / 4, labels)  # c_noise = ln(sigma) / 4 (EDM, table 1)

    def leave(self, hidden: Tensor, condition: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        """The denoised image D(z, sigma) = c_skip z + c_out F(c_in z, c_noise) (EDM, equation 7)."""
        total = (sigma**2 + SIGMA_DATA**2).view(-1, 1, 1, 1)
        c_skip = SIGMA_DATA**2 / total
        c_out = sigma.view(-1, 1, 1, 1) * SIGMA_DATA * total.rsqrt()
        # With little noise D is nearly z and F a small correction, with much noise F is nearly the image itself: F's
        # target has unit variance at every level.
        return torch.addcmul(c_skip * z, c_out, self.ended(hidden, condition).float())

    def forward(
        self,
        z: Float[Tensor, "batch channels height width"],
        sigma: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The denoised image D(z, sigma)."""
        hidden, condition = self.enter(z, sigma, labels)
        hidden = run_layers(self.layers, hidden, condition, checkpointing=self.checkpointing)
        return self.leave(hidden, condition, z, sigma)


@runtime_checkable
class WithTables(Protocol):
    """A part of a network that has fixed tables, which are not stored."""

    def reset_tables_(self) -> None:
        """Make them on torch's default device."""
        ...


@runtime_checkable
class WithOwnValues(Protocol):
    """A part of a network some of whose parameters start otherwise than `ResidualBlock.init_` has them."""

    def init_(self, generator: torch.Generator) -> None:
        """Set these, in place."""
        ...


class ResidualBlock(EdmBlock):
    """One block of a residual network: stem, `num_layers` layers, readout.

    The stem makes hidden values of a noised image, a layer takes (hidden, condition) and gives hidden, the readout
    takes the same and gives an image; `condition` [batch, width] is of noise level and class, and has passed SiLU.
    """

    stem_parts = ("stem", "noise_up", "noise_down", "label_embedding")
    readout_parts = ("readout",)

    def __init__(
        self,
        *,
        stem: nn.Module,
        layers: list[nn.Module],
        readout: nn.Module,
        width: int,
        num_classes: int,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.noise_up = Linear(NOISE_FEATURES, width)
        self.noise_down = Linear(width, width)
        self.label_embedding = LabelEmbedding(num_classes=num_classes, width=width) if num_classes else None
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.readout = readout

    def reset_tables_(self) -> None:
        """Make fixed tables (buffers that are not stored) on torch's default device, where a part has some."""
        for part in (self.stem, *self.layers, self.readout):
            if isinstance(part, WithTables):
                part.reset_tables_()

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place.

        Norms start as the identity, matrices Xavier-uniform, other vectors at zero; then each part's own `init_` is
        called where it has one, for what should be otherwise (a gate at zero, for example).
        """
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    nn.init.xavier_uniform_(parameter, generator=generator)
                else:
                    nn.init.constant_(parameter, float(name == "weight" and "Norm" in type(module).__name__))
        init_condition_(self.noise_up, self.noise_down, self.label_embedding, generator)
        for part in (self.stem, *self.layers, self.readout):
            if isinstance(part, WithOwnValues):
                part.init_(generator)

    def begun(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stem's output, and noise level and class."""
        condition = noise_and_class(self.noise_up, self.noise_down, self.label_embedding, c_noise, labels)
        return lowered(self.stem(x)), condition

    def ended(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """The readout's output."""
        out: Tensor = self.readout(hidden, condition)
        return out


def noise_and_class(
    noise_up: nn.Module,
    noise_down: nn.Module,
    label_embedding: nn.Module | None,
    c_noise: Tensor,
    labels: Tensor | None,
) -> Condition:
    """The conditioning of every layer by noise level and class, after SiLU."""
    condition = noise_down(nn.functional.silu(noise_up(noise_features(c_noise, NOISE_FEATURES))))
    if label_embedding is not None:
        assert labels is not None
        condition = condition + label_embedding(labels)
    # Here once: every layer's modulation is linear(silu(c)), with the same c.
    return nn.functional.silu(condition)


def init_condition_(
    noise_up: nn.Linear, noise_down: nn.Linear, label_embedding: LabelEmbedding | None, generator: torch.Generator
) -> None:
    """Small normal weights, as DiT has them."""
    for linear in (noise_up, noise_down):
        nn.init.normal_(linear.weight, std=0.02, generator=generator)
    if label_embedding is not None:
        nn.init.normal_(label_embedding.table.weight, std=0.02, generator=generator)


class _WithoutValues(TorchFunctionMode):
    """torch's modules do not initialise themselves in here: on the meta device that would import 80 MB for nothing."""

    _NAMES = frozenset({"uniform_", "normal_", "fill_", "zero_", "constant_", "kaiming_uniform_", "kaiming_normal_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        if getattr(func, "__name__", "") in self._NAMES:
            return args[0] if args else (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


class ImageDenoiser(ImageFamily, EndToEnd):
    """What families of image denoisers share: what they draw, and their loss."""

    task: Literal["images"] = "images"
    preferred_blocks = 3
    sigma_data = SIGMA_DATA
    settings_type: type = DenoiserSettings
    settings: DenoiserSettings

    def data_problems(self, data: ImageInfo) -> list[str]:
        """Whether its pictures can be mirrored."""
        if self.settings.flip and data.autoencoder is not None:
            return [
                "flip=true mirrors latents, and an autoencoder makes other ones of mirrored pictures; leave it out, or "
                "put mirrored pictures among the data"
            ]
        return []

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
        self, examples: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch: sigma uniform in q between the widened ends, labels dropped for guidance."""
        clean = self.data.clean(examples, generator)
        count = len(clean)
        if self.settings.flip:
            # Every draw comes from the step's generator in this order: in another one the same step would be another
            # batch.
            flipped = torch.rand(count, generator=generator) < 0.5
            clean[flipped] = clean[flipped].flip(-1)
        sigma = draw_sigmas(self.noise, noise_range, count, generator)
        batch = {"clean": clean, "eps": torch.randn(clean.shape, generator=generator), "sigma": sigma}
        if self.conditional:
            assert labels is not None
            dropped = torch.rand(count, generator=generator) < self.settings.label_dropout
            # The last row of the table, "no class": trained here, it is what guidance compares with.
            batch["labels"] = torch.from_numpy(labels).masked_fill(dropped, self.data.num_classes)
        return batch

    def at_level(
        self, examples: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> Batch:
        """A batch at one noise level, for evaluation: no flip, no dropped labels."""
        clean = self.data.clean(examples, generator)
        batch = {
            "clean": clean,
            "eps": torch.randn(clean.shape, generator=generator),
            "sigma": torch.full((len(clean),), level.middle),
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
        z, labels = self.inputs(batch)
        return self._weighted_error(block(z, batch["sigma"], labels), batch)

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The input of the block's first layer, and the conditioning of all layers."""
        assert isinstance(block, EdmBlock)
        z, labels = self.inputs(batch)
        return block.enter(z, batch["sigma"], labels)

    def loss_after(self, block: nn.Module, hidden: Tensor, condition: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """`loss` from what the last layer gives."""
        assert isinstance(block, EdmBlock)
        denoised = block.leave(hidden, condition, self.inputs(batch)[0], batch["sigma"])
        return self._weighted_error(denoised, batch)

    def _weighted_error(self, denoised: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        # [B] and not [B, 1]: times a weight [B] that would be [B, B], and every sample would get the mean of all
        # weights.
        error = (denoised - batch["clean"]).square().flatten(1).mean(1)
        weight: Tensor = loss_weight(batch["sigma"], SIGMA_DATA)
        weighted: Tensor = error * weight
        return weighted

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss alone."""
        return {"loss": self.loss(block, batch)}


class OwnDenoiser(ImageDenoiser, ABC):
    """A residual network of your own: a name, settings, and three parts of a block."""

    settings: Any
    """An instance of its `settings_type`."""

    @abstractmethod
    def stem(self) -> nn.Module:
        """A module that makes hidden values of an image [batch, channels, height, width]."""

    @abstractmethod
    def layer(self) -> nn.Module:
        """A module that takes (hidden, condition [batch, width]) and gives hidden; it must not be random."""

    @abstractmethod
    def readout(self) -> nn.Module:
        """A module that takes (hidden, condition) and gives an image."""

    def block(self, *, num_layers: int, checkpointing: bool) -> ResidualBlock:
        """A block of `num_layers` layers on torch's default device, parameters not initialised."""
        with _WithoutValues():
            return ResidualBlock(
                stem=self.stem(),
                layers=[self.layer() for _ in range(num_layers)],
                readout=self.readout(),
                width=self.settings.width,
                num_classes=self.data.num_classes,
                checkpointing=checkpointing,
            )
