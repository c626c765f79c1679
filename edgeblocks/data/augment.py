"""Random changes of training images that keep their class: flips, shifted crops, RandAugment; with Pillow."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

_MOST_DEGREES = 30.0
_MOST_SHEAR = 0.3
_MOST_SHIFT = 0.45


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may happen to an image.

    flip: mirrored left to right, half of the time.
    crop: padded by so many pixels (reflected), then cut back to its size at a random place.
    operations: so many of RandAugment's operations in a row.
    strength: of these, 0 to 1.
    """

    flip: bool = False
    crop: int = 0
    operations: int = 0
    strength: float = 0.0


def augmented(pixels: NDArray[np.uint8], wanted: Augmentation, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The images [b, H, W, C], each changed at random; the given array itself when nothing is wanted."""
    if wanted == Augmentation(strength=wanted.strength):
        return pixels
    return np.stack([_changed(image, wanted, rng) for image in pixels])


def _changed(image: NDArray[np.uint8], wanted: Augmentation, rng: np.random.Generator) -> NDArray[np.uint8]:
    if wanted.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if wanted.crop:
        height, width, _ = image.shape
        border = min(wanted.crop, height - 1, width - 1)
        padded = np.pad(image, ((border, border), (border, border), (0, 0)), mode="reflect")
        top, left = rng.integers(0, 2 * border + 1, size=2)
        image = padded[top : top + height, left : left + width]
    if wanted.operations and image.shape[2] in (1, 3):
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image))
        for number in rng.integers(0, len(_OPERATIONS), size=wanted.operations):
            signed = wanted.strength * (1 if rng.random() < 0.5 else -1)
            picture = _OPERATIONS[number](picture, signed)
        image = np.asarray(picture).reshape(image.shape)
    return image


def _affine(picture: Image.Image, *coefficients: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


_OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda picture, _: picture,
    lambda picture, _: ImageOps.autocontrast(picture),
    lambda picture, _: ImageOps.equalize(picture),
    lambda picture, amount: picture.rotate(_MOST_DEGREES * amount, Image.Resampling.BILINEAR),
    lambda picture, amount: ImageOps.solarize(picture, round(255 * (1 - abs(amount)))),
    lambda picture, amount: ImageOps.posterize(picture, 8 - round(4 * abs(amount))),
    lambda picture, amount: ImageEnhance.Color(picture).enhance(1 + 0.9 * amount),
    lambda picture, amount: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * amount),
    lambda picture, amount: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * amount),
    lambda picture, amount: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * amount),
    lambda picture, amount: _affine(picture, 1, _MOST_SHEAR * amount, 0, 0, 1, 0),
    lambda picture, amount: _affine(picture, 1, 0, 0, _MOST_SHEAR * amount, 1, 0),
    lambda picture, amount: _affine(picture, 1, 0, _MOST_SHIFT * amount * picture.width, 0, 1, 0),
    lambda picture, amount: _affine(picture, 1, 0, 0, 0, 1, _MOST_SHIFT * amount * picture.height),
)
"""Source: Cubuk et al. 2020, "RandAugment", arXiv 1909.13719, section 3; the usual largest strengths."""
