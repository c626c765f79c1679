"""Samples as picture files. Exported models run without torch, and so does this file."""

from __future__ import annotations

import contextlib
import math
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from edgeblocks.errors import ConfigError, RunError, StorageError
from edgeblocks.files.own import create

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PIECE_PIXELS = 256 * 256
"""Of the pictures that go through an autoencoder together. Fixed, so that no budget changes a bit of them."""
_PADDING_GREY = 224  # seen beside images with a black background and with a white one


def image_grid(
    images: NDArray[np.uint8], *, columns: int | None = None, min_cell: int = 48, padding: int = 2
) -> NDArray[np.uint8]:
    """One picture [H', W', C] of uint8 images [N, H, W, C], row by row, with light-grey lines between and around.

    `columns` None makes the grid as near to a square as N allows. Images whose shorter side is below `min_cell`
    pixels are enlarged by a whole factor, each pixel becoming a square. `padding` is the width of the lines in pixels.

    Raises:
        ValueError: no images, or fewer than one column.
    """
    import numpy as np

    num, height, width, channels = images.shape
    if num == 0 or (columns is not None and columns < 1):
        raise ValueError(f"a grid of {num} images in {columns} columns has no cell")
    columns = math.ceil(math.sqrt(num)) if columns is None else min(columns, num)
    rows = math.ceil(num / columns)
    factor = max(1, math.ceil(min_cell / min(height, width)))
    cell_height, cell_width = height * factor, width * factor
    pitch_y, pitch_x = cell_height + padding, cell_width + padding
    grid = np.full((rows * pitch_y + padding, columns * pitch_x + padding, channels), _PADDING_GREY, dtype=np.uint8)
    for index, image in enumerate(images):
        y, x = padding + index // columns * pitch_y, padding + index % columns * pitch_x
        grid[y : y + cell_height, x : x + cell_width] = image.repeat(factor, axis=0).repeat(factor, axis=1)
    return grid


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Writes a uint8 picture [H, W, C], C being 1 or 3, to `path`; its folder is made where it is missing.

    A reader finds the old file or the whole new one, never a part: the bytes go to a temporary file beside it first.

    Raises:
        ConfigError: `path` does not end in .png.
        StorageError: the disk refused.
    """
    from PIL import Image

    if path.suffix.lower() != ".png":
        raise ConfigError(f"-o {path}: pictures are written as PNG; give a name that ends in .png, such as -o grid.png")
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with create(temporary) as file:
                image.save(file, format="PNG")
            temporary.replace(path)
        except BaseException:  # an interrupt leaves nothing behind either
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise StorageError(
            f"cannot write the picture {path}: {error.strerror or error}; free some space or choose another place "
            "(-o, --out)"
        ) from error


def to_uint8(images: NDArray[np.floating], *, mean: float, scale: float) -> NDArray[np.uint8]:
    """Pixels [N, H, W, C] of images [N, C, H, W] in model space, where x = (pixel / 255 - mean) * scale.

    Values outside the range of pixels are cut to it.

    Raises:
        RunError: a value is not a number (NaN), so it has no colour.

    Source: the inverse of that equation, pixel = round(255 * clip(x / scale + mean, 0, 1)).
    """
    import numpy as np

    num_broken = int(np.isnan(images).any(axis=(1, 2, 3)).sum())
    if num_broken:
        raise RunError(
            f"{num_broken} of {len(images)} images hold values that are not numbers (NaN): the model is damaged or its "
            "training diverged; look at the loss in the run's metrics and train again with a lower learning rate"
        )
    pixels: NDArray[np.uint8] = np.rint(255 * np.clip(images / scale + mean, 0, 1)).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def pictures_together(height: int, width: int) -> int:
    """How many go through an autoencoder at a time.

    >>> pictures_together(256, 256), pictures_together(512, 512), pictures_together(32, 32)
    (1, 1, 64)
    """
    return max(1, _PIECE_PIXELS // (height * width))
