"""Grey of more than 8 bits as grey of 8.

Cameras, scanners and microscopes use a part of the 16 bits: of 12 bits the upper eight of 16 keep 16 shades. So the
range that a set uses, from its smallest to its largest value, is spread over 0..255.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MOST = 65535
_PHOTOMETRIC_TAG, _ZERO_IS_WHITE = 262, 0


class GreyRange(NamedTuple):
    """The smallest and the largest value of some pictures."""

    low: int
    high: int

    def with_values_of(self, other: "GreyRange") -> "GreyRange":
        """The range of both.

        >>> GreyRange(0, 9).with_values_of(GreyRange(4, 20))
        GreyRange(low=0, high=20)
        """
        return GreyRange(min(self.low, other.low), max(self.high, other.high))

    @property
    def is_most_of_16_bits(self) -> bool:
        """Whether the upper eight bits keep at least half of the 256 shades: then the values are kept as they are."""
        return self.low >= 0 and self.high <= _MOST and 2 * (self.high - self.low) >= _MOST


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture is of grey with more than 8 bits."""
    return picture.mode.startswith("I")


def is_white_zero(picture: Image.Image) -> bool:
    """Whether 0 is white in a picture of deep grey, which Pillow turns round for 8 bits only."""
    tags = getattr(picture, "tag_v2", {})
    return is_deep(picture) and tags.get(_PHOTOMETRIC_TAG) == _ZERO_IS_WHITE


def eight_bits(values: NDArray[np.int64], spread: GreyRange | None) -> NDArray[np.uint8]:
    """Values of deep grey as bytes: `spread` over 0..255, None for their upper eight bits of 16.

    >>> eight_bits(np.array([0, 2000, 4095]), GreyRange(0, 4095)), eight_bits(np.array([0, 65535]), None)
    (array([  0, 125, 255], dtype=uint8), array([  0, 255], dtype=uint8))
    """
    if spread is None:
        return (values.clip(0, _MOST) >> 8).astype(np.uint8)
    width = max(1, spread.high - spread.low)
    return (((values.clip(*spread) - spread.low) * 255 + width // 2) // width).astype(np.uint8)


def values_of(band: Image.Image, *, white_zero: bool) -> NDArray[np.int64]:
    """The values of some rows of a picture of deep grey."""
    values = np.asarray(band).astype(np.int64)
    return _MOST - values if white_zero else values
