"""One image file to one array of pixels, with Pillow.

Only the formats below are tried, whatever the file's name says: Pillow would hand others (EPS) to outside programs. A
few bytes can declare a picture of any size, so the declared size is compared with a limit before anything is decoded.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgeblocks.errors import NoRoomToReadError
from edgeblocks.files.untrusted import open_regular
from edgeblocks.limits import (
    LONGEST_SIDE,
    MOST_DECODED_PIXELS,
    MOST_PICTURE_BYTES,
    MOST_PIXELS,
    MOST_PROGRESSIVE_PIXELS,
)

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = 5  # orientations from here on exchange width and height
_REDUCING_GAP = 2.0  # how much larger than wanted an image may be reduced cheaply before the exact filter runs
_BAND_PIXELS = 2**20
_MOST_REASON_CHARACTERS = 300
_PIXEL_BYTES, _WEBP_BYTES, _COEFFICIENT_BYTES = 11, 21, 6
"""Memory of decoding a pixel: measured at 24 megapixels 1 to 9.6 (most with transparency), WebP 16 to 20; and what a
progressive JPEG's decoder keeps of each pixel in the file, measured 3 to 6."""


class UnreadableImageError(Exception):
    """The file is not a whole, sane image; the message says why. Caught by the folder reader, which skips the file."""


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """What a file says about its image before it is decoded, EXIF orientation applied."""

    width: int
    height: int
    grey: bool


def read_header(path: Path, *, image_size: int | None, room_bytes: int | None = None) -> PictureHeader:
    """Size and kind of an image file, from its first bytes.

    Args:
        room_bytes: memory that decoding it may take; None bounds the pixels alone.

    Raises:
        UnreadableImageError: see there, or too large to be decoded to `image_size`.
        NoRoomToReadError: decoding it would take more than `room_bytes`.
    """
    with _opened(path) as picture:
        width, height = picture.size
        _limit_size(picture, image_size)
        if room_bytes is not None and (needed := _decoding_bytes(picture, width * height)) > room_bytes:
            raise NoRoomToReadError(f"{path} ({width} x {height} pixels, {picture.format})", needed)
        if _orientation(picture) >= _SWAPS_SIDES:
            width, height = height, width
        return PictureHeader(width=width, height=height, grey=picture.mode in _GREY_MODES)


def decode(path: Path, *, image_size: int | None, grey: bool) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 1] when `grey`, else [H, W, 3]; H = W = image_size unless that is None.

    The EXIF orientation is applied, transparent parts become white, 16-bit grey is reduced to 8 bits.

    Raises:
        UnreadableImageError: see there.
    """
    with _opened(path) as picture:
        orientation = _orientation(picture)
        _limit_size(picture, image_size)
        image = _eight_bit(picture, grey=grey)
        if image_size is not None:
            image = fit_square(image, image_size)
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        pixels = np.array(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], 1 if grey else 3)


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """The central square of an L or RGB image, resized to `size` × `size` with Lanczos' filter."""
    width, height = image.size
    side = min(width, height)
    if width == height == size:
        return image
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Pillow's many ways to refuse a file as one error; its warnings about odd but readable files are dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_regular(path) as file, Image.open(_of_usual_size(file), formats=_FORMATS) as picture:
                if picture.mode == "F":
                    raise UnreadableImageError("its pixels are floating-point numbers of unknown range")
                yield picture
    except (UnreadableImageError, NoRoomToReadError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("its content is of no kind of picture that is known") from error
    except Exception as error:  # MemoryError too: damaged headers ask for any amount
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImageError(reason[:_MOST_REASON_CHARACTERS]) from error


def _of_usual_size(file: BinaryIO) -> BinaryIO:
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes > MOST_PICTURE_BYTES:
        raise UnreadableImageError(f"its file has {num_bytes} bytes, and at most {MOST_PICTURE_BYTES} are read")
    return file


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation 1-8 that is still to be applied, 1 when there is none.

    Pillow turns a TIFF by itself, and would decode a whole PNG to look for EXIF at its end.
    """
    if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
        return 1
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF, in any of Pillow's ways, around an image that may be sound
        return 1


def _limit_size(picture: Image.Image, image_size: int | None) -> None:
    """Refuses what would take too much memory to decode, after resolution that nobody asked for is dropped."""
    if "progressive" in picture.info:
        _check_size(picture.size, MOST_PROGRESSIVE_PIXELS, "save it as a plain JPEG, or make it smaller")
    if image_size is None:
        _check_size(picture.size, MOST_PIXELS, "make it smaller, or pass --set image_size=N")
    else:
        _skip_detail(picture, image_size)
        _check_size(picture.size, MOST_DECODED_PIXELS, "make it smaller")


def _decoding_bytes(picture: Image.Image, num_pixels: int) -> int:
    """Memory that decoding takes at most, given the file's pixels; a JPEG's may be fewer once detail is skipped."""
    per_pixel = _WEBP_BYTES if picture.format == "WEBP" else _PIXEL_BYTES
    coefficients = _COEFFICIENT_BYTES * num_pixels if "progressive" in picture.info else 0
    return per_pixel * math.prod(picture.size) + coefficients


def _check_size(size: tuple[int, int], most: int, cure: str) -> None:
    width, height = size
    if width * height > most or max(size) > LONGEST_SIDE:
        raise UnreadableImageError(
            f"it has {width} x {height} pixels, {width * height:,} in all, and at most {most:,} and {LONGEST_SIDE:,} a "
            f"side are decoded; {cure}"
        )


def _skip_detail(picture: Image.Image, image_size: int) -> None:
    """Lets the JPEG decoder drop resolution that resizing would drop anyway; other formats ignore it."""
    gap = _REDUCING_GAP * image_size / min(picture.size)
    if gap < 1:
        width, height = picture.size
        picture.draft(None, (round(width * gap), round(height * gap)))


def _eight_bit(picture: Image.Image, *, grey: bool) -> Image.Image:
    """The image in mode L or RGB."""
    wanted = "L" if grey else "RGB"
    if picture.mode.startswith("I"):
        return _in_bands(picture, wanted, _upper_bits)
    if picture.has_transparency_data:
        return _in_bands(picture, wanted, _on_white)
    return picture if picture.mode == wanted else picture.convert(wanted)


def _in_bands(picture: Image.Image, wanted: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image converted some rows at a time: on the way a pixel takes up to 24 bytes."""
    width, height = picture.size
    rows = max(1, _BAND_PIXELS // width)
    image = Image.new(wanted, picture.size)
    for top in range(0, height, rows):
        band = convert(picture.crop((0, top, width, min(top + rows, height))))
        image.paste(band.convert(wanted), (0, top))
    return image


def _upper_bits(band: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow's own conversion clips at 255."""
    values = np.asarray(band).astype(np.int64)
    return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))


def _on_white(band: Image.Image) -> Image.Image:
    """A picture with transparent parts, laid on white."""
    colours = band.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    white.alpha_composite(colours)
    return white
