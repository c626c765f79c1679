"""The pixels of one image that a program gave: a picture, an array or a tensor."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.python_objects import ACCEPTED_IMAGES, sides
from edgeblocks.errors import DataError, NoRoomToReadError
from edgeblocks.files.untrusted import shown

_PIXEL_BYTES = 12
"""Of a picture while it is converted: itself, with transparency, on white, and as an array."""


def pixels_of(number: int, image: object, *, image_size: int | None, room_bytes: int | None) -> NDArray[np.uint8]:
    """An image as uint8 [H, W, 1 or 3].

    Args:
        number: the image's, by which errors name it.
        image_size: the side that it is cut and scaled to; None: as it is.
        room_bytes: the most that converting it may take.

    Raises:
        DataError: it is no image.
        NoRoomToReadError: converting it takes more.
    """
    from PIL import Image

    from edgeblocks.data.decoding import fit_square

    if isinstance(image, Image.Image):
        needed_bytes = _PIXEL_BYTES * image.width * image.height
        if room_bytes is not None and needed_bytes > room_bytes:
            raise NoRoomToReadError(f"image {number} of the data ({image.width} x {image.height} pixels)", needed_bytes)
        pixels = _pixels_of_picture(number, image)
    else:
        pixels = _pixels_of_array(number, image)
    if image_size is not None and pixels.shape[:2] != (image_size, image_size):
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        pixels = np.asarray(fit_square(picture, image_size)).reshape(image_size, image_size, pixels.shape[2])
    return pixels


def _pixels_of_picture(number: int, picture: Any) -> NDArray[np.uint8]:
    from PIL import Image

    from edgeblocks.data.decoding import upright

    if picture.mode.startswith(("I", "F")):
        raise DataError(
            f"image {number} of the data has mode {picture.mode}, values of more than 8 bits; give uint8, or floats "
            "from 0 to 1"
        )
    picture = upright(picture)  # as files of a folder are; Pillow leaves it to its callers
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    elif picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _pixels_of_array(number: int, image: object) -> NDArray[np.uint8]:
    is_tensor = hasattr(image, "detach")
    values = np.asarray(image.detach().cpu() if is_tensor else image)  # type: ignore[attr-defined]
    if values.dtype.kind not in "buif":
        raise DataError(f"image {number} of the data is {shown(image)} ({type(image).__name__}); {ACCEPTED_IMAGES}")
    if is_tensor and values.ndim == 3 and values.shape[0] in (1, 3):
        values = np.moveaxis(values, 0, 2)  # tensors have their channels first
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] not in (1, 3) or 0 in values.shape:
        cure = "move the channels last" if values.ndim == 3 and values.shape[0] in (1, 3) else "reshape it"
        cure = "drop the transparency with [..., :3]" if values.shape[-1:] == (4,) else cure
        raise DataError(
            f"image {number} of the data has the shape {sides(values.shape) or '()'}; wanted height x width, with 1 "
            f"or 3 channels; {cure}"
        )
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    most = 1 if values.dtype.kind == "f" else 255
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= most):
        raise DataError(
            f"image {number} of the data has {values.dtype} from {np.min(values):g} to {np.max(values):g}; wanted 0 to "
            f"{most}; undo its normalisation, or give uint8 from 0 to 255"
        )
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8) if most == 1 else values.astype(np.uint8)
