"""Settings of families: what each may be stands at its field, and so does what it must be beside another.

A field's annotation is checked for every family, also for one of your own: `kernel: Annotated[int, Field(ge=1)] = 3`.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from edgeblocks.diffusion.noise import NoiseDistribution
from edgeblocks.files.checked import field_problems
from edgeblocks.limits import MOST_HEADS, MOST_LAYERS, MOST_NOISE, MOST_WIDTH

MOST = {"width": MOST_WIDTH, "depth": MOST_LAYERS, "heads": MOST_HEADS, "patch": 2**12}
LEAST_MASS = 1e-6
"""Of the noise distribution, inside [sigma_min, sigma_max]; with less, quantiles there cannot be told apart."""


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """A family's settings, of which every field has a default."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        return field_problems(type(self), vars(self))


def _divisible_by_4(width: int) -> int:
    if width % 4:
        raise ValueError("it is not divisible by 4, which 2-D positions need")
    return width


def _divides_width(heads: int, info: ValidationInfo) -> int:
    width = info.data.get("width", 0)
    if width % heads:
        raise ValueError(f"width={width} is not divisible by it; use --set heads=...")
    return heads


def _divides_half_of_width(heads: int, info: ValidationInfo) -> int:
    width = info.data.get("width", 0)
    if width % (2 * heads):
        raise ValueError(f"width={width} is not divisible by twice it, as rotary positions need; use --set heads=...")
    return heads


def _lies_above_sigma_min(sigma_max: float, info: ValidationInfo) -> float:
    sigma_min = info.data.get("sigma_min", 0.0)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min={sigma_min}, and sigma_min < sigma_max is needed")
    return sigma_max


def _leaves_levels_to_draw(p_std: float, info: ValidationInfo) -> float:
    other = {name: info.data[name] for name in ("sigma_min", "sigma_max", "p_mean") if name in info.data}
    if len(other) < 3:
        return p_std
    noise = NoiseDistribution(**other, p_std=p_std)
    if noise.quantile(noise.sigma_max) - noise.quantile(noise.sigma_min) < LEAST_MASS:
        raise ValueError(
            f"with p_mean={noise.p_mean} hardly any of this noise distribution lies between "
            f"sigma_min={noise.sigma_min} and sigma_max={noise.sigma_max}, so no levels can be drawn"
        )
    return p_std


Width = Annotated[int, Field(ge=1, le=MOST["width"], description="features of a token")]
Depth = Annotated[int, Field(ge=1, le=MOST["depth"], description="layers of the whole network")]
Patch = Annotated[
    int, Field(ge=1, le=MOST["patch"], description="side of the squares that an image is cut into, in pixels")
]
Share = Annotated[float, Field(ge=0, lt=1)]
TopShare = Annotated[
    Share,
    Field(description="share of the first block's samples that is drawn at sigma_max, where inference starts"),
]
Flip = Annotated[bool, Field(description="mirror half of the images")]
_AnyHeads = Annotated[int, Field(ge=1, le=MOST["heads"], description="attention heads")]

# A field sees those before it that are not refused: `width` stands before `heads`, and the levels stand in this order.
WidthOfPatches = Annotated[Width, AfterValidator(_divisible_by_4)]
Heads = Annotated[_AnyHeads, AfterValidator(_divides_width)]
RotaryHeads = Annotated[_AnyHeads, AfterValidator(_divides_half_of_width)]
SigmaMin = Annotated[float, Field(ge=1 / MOST_NOISE, le=MOST_NOISE, description="lowest noise level")]
SigmaMax = Annotated[
    float, Field(gt=0, le=MOST_NOISE, description="highest noise level"), AfterValidator(_lies_above_sigma_min)
]
PMean = Annotated[
    float,
    Field(
        ge=-MOST_NOISE,
        le=MOST_NOISE,
        description="mean of the logarithm of the noise levels in training",
    ),
]
PStd = Annotated[
    float, Field(gt=0, le=MOST_NOISE, description="its standard deviation"), AfterValidator(_leaves_levels_to_draw)
]
