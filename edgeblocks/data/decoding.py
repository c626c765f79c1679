"""One image file to one array of pixels, with Pillow.

Only the formats below are tried, whatever the file's name says: Pillow would hand others (EPS) to outside programs. A
few bytes can declare a picture of any size, so what decoding takes is known before anything is decoded.
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
from PIL import Image, UnidentifiedImageError, features

from edgeblocks.data.deep_grey import GreyRange, eight_bits, is_deep, is_white_zero, values_of
from edgeblocks.files.untrusted import open_regular
from edgeblocks.limits import LONGEST_SIDE, MOST_PICTURE_BYTES

EXTENSIONS = frozenset(
    {
        ".apng",
        ".avif",
        ".avifs",
        ".bmp",
        ".dib",
        ".gif",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    }
)

_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
_OPTIONAL_FORMATS = {"avif": "AVIF", "jpg_2000": "JPEG2000"}
"""Those that Pillow may be built without, by the name of what it is built with."""
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_ORIENTATION_TAG = 0x0112
_PNG_EXIF = frozenset({"exif", "Raw profile type exif"})
_SHADES = {"L;2": 85, "L;4": 17}
"""What a step of grey of few bits becomes of 255."""
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
_BAND_PIXELS = 2**18
_MOST_REASON_CHARACTERS = 300
_MOST_DEFLATED = 1032
"""Deflate, the packing of a PNG, makes nothing smaller than this many times."""
_PIXEL_BYTES, _DEEP_PIXEL_BYTES, _CLEAR_PIXEL_BYTES = 6, 9, 11
"""Memory of decoding a pixel, measured at 12 megapixels in ten formats: colours and 8-bit grey 4.1 to 5.9, deep grey
and CMYK up to 8.3, with transparency 9.9 to 10.9."""
_PIXEL_BYTES_OF = {"WEBP": 21, "AVIF": 18}
"""The same, measured 16 to 20, and 10 to 16."""
_JPEG2000_BAND_BYTES = 8
"""Of each component of a pixel, measured 6.5 to 7.2."""
_COEFFICIENT_BYTES = 6
"""What a progressive JPEG's decoder keeps of each pixel in the file, measured 3 to 6."""
_RESIZED_PIXEL_BYTES, _KEPT_PIXEL_BYTES = 12, 7
"""Of each pixel that comes out, on the way of resizing it (measured 2 to 11) or of copying it."""


class UnreadableImageError(Exception):
    """The file is not a whole, sane image; the message says why. Caught by the folder reader, which skips the file."""


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """What a file says about its image before it is decoded, EXIF orientation applied.

    deep: whether it is of grey with more than 8 bits.
    several: whether more pages or frames follow, which are not read.
    decoding_bytes: memory that decoding it takes at most.
    """

    width: int
    height: int
    format: str
    grey: bool
    deep: bool
    several: bool
    decoding_bytes: int


def read_header(path: Path, *, image_size: int | None) -> PictureHeader:
    """Size and kind of an image file, from its first bytes.

    Raises:
        UnreadableImageError: see there.
    """
    with _opened(path) as picture:
        width, height = picture.size
        grey, deep = picture.mode in _GREY_MODES, is_deep(picture)
        _skip_detail(picture, image_size)
        needed = _decoding_bytes(picture, width * height, image_size)
        if _orientation(picture) >= _SWAPS_SIDES:
            width, height = height, width
        return PictureHeader(
            width=width,
            height=height,
            format=picture.format or "",
            grey=grey,
            deep=deep,
            several=_is_one_of_several(picture),  # last, as it moves on
            decoding_bytes=needed,
        )


def decode(path: Path, *, image_size: int | None, grey: bool, deep_range: GreyRange | None = None) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 1] when `grey`, else [H, W, 3]; H = W = image_size unless that is None.

    The EXIF orientation is applied, transparent parts become white.

    Args:
        deep_range: values of deep grey that become 0 and 255; None: its upper eight bits of 16 are kept.

    Raises:
        UnreadableImageError: see there.
    """
    with _opened(path) as picture:
        orientation = _orientation(picture)
        _skip_detail(picture, image_size)
        image = _eight_bit(picture, grey=grey, deep_range=deep_range)
        if image_size is not None:
            image = fit_square(image, image_size)
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
        pixels = np.array(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], 1 if grey else 3)


def range_of(path: Path) -> GreyRange | None:
    """The values of a picture of deep grey; None where all of it is transparent.

    Raises:
        UnreadableImageError: see there.
    """
    found: GreyRange | None = None
    with _opened(path) as picture:
        clear, white_zero = picture.info.get("transparency"), is_white_zero(picture)
        for _, band in _bands(picture):
            values = values_of(band, white_zero=white_zero)
            values = values[values != clear] if isinstance(clear, int) else values
            if values.size:
                here = GreyRange(int(values.min()), int(values.max()))
                found = here if found is None else found.with_values_of(here)
    return found


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
            with open_regular(path) as file, Image.open(_of_usual_size(file), formats=_formats(path)) as picture:
                if picture.mode == "F":
                    raise UnreadableImageError("its pixels are floating-point numbers of unknown range")
                _check_size(picture, os.fstat(file.fileno()).st_size)
                _scale_transparency_(picture)
                yield picture
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f"it has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels that Pillow decodes; make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("its content is of no kind of picture that is known") from error
    except Exception as error:  # MemoryError too: damaged headers ask for any amount
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImageError(reason[:_MOST_REASON_CHARACTERS]) from error


def _formats(path: Path) -> list[str]:
    """What the file may be, whatever its name says; but TGA, which nothing but its name tells from other files."""
    optional = [name for feature, name in _OPTIONAL_FORMATS.items() if features.check(feature)]
    return [*_FORMATS, *optional, *(["TGA"] if path.suffix.lower() == ".tga" else [])]


def _of_usual_size(file: BinaryIO) -> BinaryIO:
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes > MOST_PICTURE_BYTES:
        raise UnreadableImageError(f"its file has {num_bytes} bytes, and at most {MOST_PICTURE_BYTES} are read")
    return file


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says that it is seen."""
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation 1-8 that is still to be applied, 1 when there is none.

    Pillow turns a TIFF by itself, and would decode a whole PNG to look for EXIF at its end.
    """
    if picture.format == "TIFF" or (picture.format == "PNG" and not _PNG_EXIF.intersection(picture.info)):
        return 1
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF, in any of Pillow's ways, around an image that may be sound
        return 1


def _decoding_bytes(picture: Image.Image, num_pixels: int, image_size: int | None) -> int:
    """Memory that decoding takes at most, given the file's pixels; a JPEG's may be fewer once detail is skipped."""
    bands = len(picture.getbands())
    if picture.has_transparency_data:
        per_pixel = _CLEAR_PIXEL_BYTES
    else:
        per_pixel = _DEEP_PIXEL_BYTES if is_deep(picture) or picture.mode == "CMYK" else _PIXEL_BYTES
    per_pixel = _PIXEL_BYTES_OF.get(picture.format or "", per_pixel)
    per_pixel = _JPEG2000_BAND_BYTES * bands if picture.format == "JPEG2000" else per_pixel
    coefficients = _COEFFICIENT_BYTES * num_pixels if "progressive" in picture.info else 0
    kept = _KEPT_PIXEL_BYTES * num_pixels if image_size is None else _RESIZED_PIXEL_BYTES * image_size**2
    return per_pixel * math.prod(picture.size) + coefficients + kept


def _check_size(picture: Image.Image, file_bytes: int) -> None:
    """Refuses what cannot be, or is of no use: a few bytes can declare a picture of any size."""
    width, height = picture.size
    if max(width, height) > LONGEST_SIDE:
        raise UnreadableImageError(f"it has {width} x {height} pixels, and at most {LONGEST_SIDE:,} a side are decoded")
    pixel_bits = 1 if picture.mode in ("1", "L", "P") else 8 * len(picture.getbands())
    if picture.format == "PNG" and width * height * pixel_bits > 8 * _MOST_DEFLATED * file_bytes:
        raise UnreadableImageError(f"it declares {width} x {height} pixels, more than {file_bytes:,} bytes can hold")


def _scale_transparency_(picture: Image.Image) -> None:
    """Makes a PNG's transparent colour, which is of the file's bits, one of the picture's, which has 8."""
    clear = picture.info.get("transparency")
    tiles = getattr(picture, "tile", ())
    kind = tiles[0].args if picture.format == "PNG" and tiles else None
    if kind in _SHADES and isinstance(clear, int):
        picture.info["transparency"] = clear * _SHADES[kind]
    elif kind == "RGB;16B" and isinstance(clear, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in clear)


def _is_one_of_several(picture: Image.Image) -> bool:
    """Whether more pages or frames follow the first. A camera's JPEG may hold other things beside its picture."""
    try:
        return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
    except Exception:  # a damaged second frame, in any of Pillow's ways, behind a first one that may be sound
        return False


def _skip_detail(picture: Image.Image, image_size: int | None) -> None:
    """Lets the JPEG decoder drop resolution that resizing would drop anyway; other formats ignore it."""
    gap = 1.0 if image_size is None else _REDUCING_GAP * image_size / min(picture.size)
    if gap < 1:
        width, height = picture.size
        picture.draft(None, (round(width * gap), round(height * gap)))


def _eight_bit(picture: Image.Image, *, grey: bool, deep_range: GreyRange | None) -> Image.Image:
    """The image in mode L or RGB."""
    wanted = "L" if grey else "RGB"
    if is_deep(picture):
        clear, white_zero = picture.info.get("transparency"), is_white_zero(picture)

        def shallow(band: Image.Image) -> Image.Image:
            values = values_of(band, white_zero=white_zero)
            shades = eight_bits(values, deep_range)
            if isinstance(clear, int):
                shades[values == clear] = 255
            return Image.fromarray(shades)

        return _in_bands(picture, wanted, shallow)
    if picture.has_transparency_data:
        return _in_bands(picture, wanted, _on_white)
    return picture if picture.mode == wanted else picture.convert(wanted)


def _in_bands(picture: Image.Image, wanted: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image converted some rows at a time: on the way a pixel takes up to 24 bytes."""
    image = Image.new(wanted, picture.size)
    for top, band in _bands(picture):
        image.paste(convert(band).convert(wanted), (0, top))
    return image


def _bands(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows after the other, and where they begin."""
    width, height = picture.size
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield top, picture.crop((0, top, width, min(top + rows, height)))


def _on_white(band: Image.Image) -> Image.Image:
    """A picture with transparent parts, laid on white."""
    colours = band.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    white.alpha_composite(colours)
    return white
