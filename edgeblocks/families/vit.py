"""vit: image classification as label diffusion with a vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929).

What is noised is the label. A class is a row of a frozen code-book, the identity matrix: rows of unit norm, orthogonal,
so neither the target nor the estimate fed back to the chain has to be normalised. A block sees the image, the noised
label z and the noise level, and gives the probabilities of the classes; their mean over the code-book, which is the
probabilities themselves, is the denoised label.

Source: arXiv 2506.14202, section 4.1. The loss is unweighted cross-entropy: the weight of the L2 loss spans four orders
of magnitude and would make it a lottery on the draw of sigma.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from edgeblocks.data.augment import Augmentation, augmented
from edgeblocks.diffusion.noise import NoisePartition, NoiseRange
from edgeblocks.families.base import (
    NOISE_FEATURES,
    Batch,
    BatchSpec,
    ConditionSpec,
    ImageFamily,
    ImageInfo,
    Level,
    draw_sigmas,
    patch_problems,
)
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.layers import (
    AdaLnZeroLayer,
    Condition,
    Hidden,
    Linear,
    PreNormLayer,
    SelfAttention,
    TokenEmbedding,
    WithPositions,
    init_linear_,
    init_plain_,
    init_zero_,
    modulated_norm,
    noise_features,
    patchify,
    run_layers,
)
from edgeblocks.families.precision import lowered
from edgeblocks.families.settings import (
    Depth,
    FamilySettings,
    Flip,
    Heads,
    Patch,
    PMean,
    PStd,
    Share,
    SigmaMax,
    SigmaMin,
    TopShare,
    WidthOfPatches,
)

Classes = Float[Tensor, "batch classes"]
"""One value a class: noised labels, logits, probabilities."""
Images = Float[Tensor, "batch channels height width"]
Sigma = Float[Tensor, " batch"]
"""Each image's noise level."""
SIGMA_DATA = 0.5
"""Of the preconditioning of z, and of the pixels."""


@dataclass(frozen=True, kw_only=True)
class VitSettings(FamilySettings):
    """The shape of the network and its objective's settings."""

    width: WidthOfPatches = 128
    depth: Depth = 12
    heads: Heads = 4
    patch: Patch = 4
    label_smoothing: Annotated[Share, Field(description="share of a label that is spread over all classes")] = 0.0
    flip: Flip = False
    crop: Annotated[
        int,
        Field(
            ge=0, le=1024, description="pixels that an image is padded with before a part of its own size is cut out"
        ),
    ] = 0
    randaugment: Annotated[int, Field(ge=0, le=16, description="random operations an image")] = 0
    randaugment_strength: Annotated[float, Field(ge=0, le=1, description="strength of these operations")] = 0.3
    top_share: TopShare = 0.4
    sigma_min: SigmaMin = 0.1
    sigma_max: SigmaMax = 10.0
    p_mean: PMean = 0.0
    p_std: PStd = 1.2


class VitBlock(WithPositions, Block):
    """One block: stem, `num_layers` layers, readout from the class token's normalised hidden state.

    z enters through the class token.
    """

    def __init__(self, *, settings: VitSettings, data: ImageInfo, num_layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.patch, self.height, self.width = settings.patch, data.height, data.width
        self.checkpointing = checkpointing
        hidden = self.hidden = settings.width
        self.patch_embedding = Linear(data.channels * settings.patch**2, hidden)
        self.label_embedding = Linear(data.num_classes, hidden)
        self.noise_up = Linear(NOISE_FEATURES, hidden)
        self.noise_down = Linear(hidden, hidden)
        self.layers = nn.ModuleList(AdaLnZeroLayer(width=hidden, heads=settings.heads) for _ in range(num_layers))
        self.readout_modulation = Linear(hidden, 2 * hidden)
        self.readout = Linear(hidden, data.num_classes)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear_(module, generator)
        for linear in (self.noise_up, self.noise_down):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        # z's projection starts at zero: at sigma_max z is noise and disturbs.
        nn.init.zeros_(self.label_embedding.weight)
        nn.init.normal_(self.label_embedding.bias, std=0.02, generator=generator)  # the class token itself
        for layer in self.layers:
            assert isinstance(layer, AdaLnZeroLayer)
            init_zero_(layer.modulation)
            width = layer.modulation.in_features
            for gate in (2, 5):  # open: a layer starts as in a plain transformer, not as the identity
                layer.modulation.bias[gate * width : (gate + 1) * width] = 1.0
        init_zero_(self.readout_modulation)
        init_zero_(self.readout)

    def forward(self, z: Classes, sigma: Sigma, images: Images) -> Classes:
        """The denoised label: the probabilities of the classes."""
        return self.logits(z, sigma, images).softmax(dim=-1)

    def logits(self, z: Classes, sigma: Sigma, images: Images) -> Classes:
        """The logarithms of the classes' probabilities, but for a constant."""
        tokens, condition = self.enter(z, sigma, images)
        return self.leave(run_layers(self.layers, tokens, condition, checkpointing=self.checkpointing), condition)

    def enter(self, z: Classes, sigma: Sigma, images: Images) -> tuple[Hidden, Condition]:
        """The class token and the patches, and the conditioning of all layers."""
        noise = noise_features(sigma.log() / 4, NOISE_FEATURES)
        condition = F.silu(self.noise_down(F.silu(self.noise_up(noise))))
        # EDM's c_in, [B, 1]; c_noise is above.
        c_in = (sigma**2 + SIGMA_DATA**2).rsqrt().unsqueeze(1)
        class_token = self.label_embedding(c_in * z).unsqueeze(1)
        tokens = self.patch_embedding(patchify(images, self.patch)) + self.positions
        # [B, 1 + T, D]: the class token is the first.
        return lowered(torch.cat([class_token, tokens], dim=1)), condition

    def leave(self, tokens: Hidden, condition: Condition) -> Classes:
        """The classes' logits from the class token that the last layer gives."""
        shift, scale = self.readout_modulation(condition).chunk(2, dim=-1)
        # From the hidden state, not from c_skip z + c_out h: where c_out goes to 0 the last block could change no
        # answer.
        out: Tensor = self.readout(modulated_norm(tokens[:, :1], shift, scale)[:, 0])
        return out.float()


class PlainVitBlock(WithPositions, Block):
    """A vision transformer as classifiers are, or some of its layers, without conditioning."""

    stem_parts = ("patch_embedding", "class_token")
    readout_parts = ("readout_norm", "readout")

    def __init__(self, *, settings: VitSettings, data: ImageInfo, num_layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.patch, self.height, self.width = settings.patch, data.height, data.width
        self.checkpointing = checkpointing
        hidden = self.hidden = settings.width
        self.patch_embedding = Linear(data.channels * settings.patch**2, hidden)
        self.class_token = TokenEmbedding(1, hidden)
        self.layers = nn.ModuleList(
            PreNormLayer(width=hidden, attention=SelfAttention(width=hidden, heads=settings.heads))
            for _ in range(num_layers)
        )
        self.readout_norm = nn.LayerNorm(hidden)
        self.readout = Linear(hidden, data.num_classes)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place."""
        init_plain_(self, generator)
        init_zero_(self.readout)

    def forward(self, z: Classes, sigma: Sigma, images: Images) -> Classes:
        """The probabilities of the classes, whatever z and sigma are."""
        return self.logits(images).softmax(dim=-1)

    def logits(self, images: Images) -> Classes:
        """The logarithms of the classes' probabilities, but for a constant."""
        tokens, nothing = self.enter(images)
        return self.leave(run_layers(self.layers, tokens, nothing, checkpointing=self.checkpointing))

    def enter(self, images: Images) -> tuple[Hidden, Tensor]:
        """The class token and the patches, and a condition that says nothing."""
        tokens = self.patch_embedding(patchify(images, self.patch)) + self.positions
        token = self.class_token(torch.zeros(images.shape[0], 1, dtype=torch.int64, device=images.device))
        return lowered(torch.cat([token, tokens], dim=1)), images.new_zeros(images.shape[0], 1)

    def leave(self, tokens: Hidden) -> Classes:
        """The classes' logits."""
        out: Tensor = self.readout(self.readout_norm(tokens[:, 0]))
        return out.float()


class Vit(ImageFamily):
    """The family: builds blocks, draws what a training step needs, and computes the per-sample loss."""

    name = "vit"
    task: Literal["classes"] = "classes"
    preferred_blocks = 2
    sigma_data = SIGMA_DATA
    settings_type: type = VitSettings
    settings: VitSettings

    def data_problems(self, data: ImageInfo) -> list[str]:
        """Whether patches cover an image, and there are classes to tell apart."""
        found = patch_problems(self.settings.patch, data)
        if data.num_classes >= 2:
            return found
        count = "one class" if data.num_classes == 1 else "no classes"
        return [
            *found,
            f"the data have {count} and vit is a classifier: it needs at least two; give a folder with one "
            f"sub-folder of images per class, or an .npz with labels",
        ]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a sample's z."""
        return (self.data.num_classes,)

    @property
    def condition_spec(self) -> ConditionSpec:
        """The image in model space."""
        return "images", (self.data.channels, self.data.height, self.data.width), torch.float32

    def block(self, *, num_layers: int, checkpointing: bool) -> Block:
        """A block of `num_layers` layers on torch's default device, parameters not initialised."""
        return VitBlock(settings=self.settings, data=self.data, num_layers=num_layers, checkpointing=checkpointing)

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives."""
        return {
            "images": ((batch, self.data.channels, self.data.height, self.data.width), torch.float32),
            "eps": ((batch, self.data.num_classes), torch.float32),
            "sigma": ((batch,), torch.float32),
            "labels": ((batch,), torch.int64),
        }

    def draw(
        self, pixels: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch: images augmented, sigma as `draw_sigmas` does, in part at sigma_max."""
        s = self.settings
        wanted = Augmentation(flip=s.flip, crop=s.crop, operations=s.randaugment, strength=s.randaugment_strength)
        # Augmentation draws with numpy, which is seeded from the step's generator: a resumed run changes images alike.
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        pixels = augmented(pixels, wanted, rng)
        sigma = draw_sigmas(self.noise, noise_range, len(pixels), generator)
        if noise_range.train_high >= s.sigma_max:
            at_top = torch.rand(len(pixels), generator=generator) < s.top_share
            sigma = sigma.masked_fill(at_top, s.sigma_max)
        return self._batch(pixels, labels, sigma, generator)

    def at_level(
        self, pixels: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> Batch:
        """A batch at one noise level, for evaluation: images as they are."""
        return self._batch(pixels, labels, torch.full((len(pixels),), level.middle), generator)

    def _batch(self, pixels: np.ndarray, labels: np.ndarray | None, sigma: Tensor, generator: torch.Generator) -> Batch:
        assert labels is not None
        return {
            "images": self.data.to_model(pixels),
            "eps": torch.randn(len(pixels), self.data.num_classes, generator=generator),
            "sigma": sigma,
            "labels": torch.from_numpy(labels),
        }

    def condition(self, pixels: np.ndarray) -> Images:
        """A chain's input besides z."""
        return self.data.to_model(pixels)

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Cross-entropy of the readout, per sample; labels are smoothed while training only."""
        smoothing = self.settings.label_smoothing if block.training else 0.0
        logits = self._logits(block, batch)
        return F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=smoothing)

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The loss, and whether the likeliest class is the right one."""
        logits = self._logits(block, batch)
        right = logits.argmax(dim=-1) == batch["labels"]
        return {"loss": F.cross_entropy(logits, batch["labels"], reduction="none"), "top1": right.float()}

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noised rows of the code-book, and the images."""
        labels = batch["labels"]
        rows = torch.zeros(len(labels), self.data.num_classes, device=labels.device)
        # One-hot rows, [B, classes]; z = y + sigma eps.
        clean = rows.scatter(1, labels.unsqueeze(1), 1.0)
        return torch.addcmul(clean, batch["sigma"].unsqueeze(1), batch["eps"]), batch["images"]

    def _logits(self, block: nn.Module, batch: Batch) -> Classes:
        z, images = self.inputs(batch)
        assert isinstance(block, VitBlock)
        return block.logits(z, batch["sigma"], images)


class PlainVit(Vit, EndToEnd):
    """What `vit` is where it is trained end to end: an ordinary classifier, without noise and without a chain."""

    # A batch still has the noise that `Vit` draws, and z and sigma are still handed in: runner, export and the
    # planner's count of a batch's bytes know one kind of batch. The network looks at neither, so one level says all.
    chain_steps = 1

    def block(self, *, num_layers: int, checkpointing: bool) -> PlainVitBlock:
        """The network, or some of its layers, on torch's default device, parameters not initialised."""
        return PlainVitBlock(settings=self.settings, data=self.data, num_layers=num_layers, checkpointing=checkpointing)

    def evaluation_levels(self, partition: NoisePartition) -> tuple[Level, ...]:
        """One, as no noise level differs from another."""
        return (Level.at(self.settings.sigma_max),)

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the first layer is given, and a condition that says nothing."""
        assert isinstance(block, PlainVitBlock)
        return block.enter(batch["images"])

    def loss_after(self, block: nn.Module, hidden: Tensor, condition: Tensor, batch: Batch) -> Tensor:
        """`loss` from what the last layer gives."""
        assert isinstance(block, PlainVitBlock)
        smoothing = self.settings.label_smoothing if block.training else 0.0
        return F.cross_entropy(block.leave(hidden), batch["labels"], reduction="none", label_smoothing=smoothing)

    def _logits(self, block: nn.Module, batch: Batch) -> Classes:
        assert isinstance(block, PlainVitBlock)
        return block.logits(batch["images"])
