"""Latents of pictures, as an autoencoder makes them: encoded once into a cache, and read from there batch by batch.

    latents.npy float32 [N, 2, C, h, w]  moments.npy float64 [N, 2]  checks.npy int64 [N]  meta.json

Of each latent its mean and its deviation are kept, so that every training step draws anew. The moments, sum and sum of
squares of what is drawn of a picture, give the statistics of any part; the checks are a CRC-32 of each row.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, open_or_build, read_meta, read_rows
from edgeblocks.data.dataset import Progress
from edgeblocks.data.images import ImageSet
from edgeblocks.data.pictures import pictures_together
from edgeblocks.errors import ConfigError, DataError, StorageError
from edgeblocks.limits import MOST_IMAGES

FORMAT_VERSION = 1
_KIND = CacheKind(
    name="cache of latents",
    content="latents",
    row="the latents of a picture",
    remedy="choose a smaller image_size",
    version=FORMAT_VERSION,
)

Latents = NDArray[np.float32]
Encode = Callable[[NDArray[np.uint8]], Latents]
"""Means and deviations [n, 2, C, h, w] of pictures uint8 [n, H, W, c]."""


@dataclass(frozen=True, kw_only=True)
class StoredLatents:
    """A finished cache. `latents` has the rows [2, C, h, w]."""

    latents: RowFile[np.float32]
    moments: NDArray[np.float64]
    checks: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentSet(ImageSet):
    """Images whose examples are latents: `gather` gives their means and deviations, `pixels` the pictures.

    mean, std: of the latents of the training part that are drawn, over all components together.
    autoencoder: sha256 of the autoencoder's files.
    picture_shape: (height, width, channels) of what it makes of latents.
    """

    stored: StoredLatents
    autoencoder: str
    picture_shape: tuple[int, int, int]

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an example."""
        _, _, channels, height, width = self.stored.latents.shape
        return height, width, channels

    def gather(self, indices: NDArray[np.int64]) -> tuple[Latents, NDArray[np.int64] | None]:
        """Means and deviations float32 [b, 2, C, h, w] of the images' latents, and labels int64 [b], at `indices`.

        Raises:
            StorageError: the cache cannot be read any more, or is damaged.
        """
        indices, path = np.asarray(indices, dtype=np.int64), self.stored.latents.path
        rows = self.stored.latents.read(indices)
        for index, row in zip(indices, rows, strict=True):
            if zlib.crc32(row.data) != self.stored.checks[index]:
                raise StorageError(
                    f"{path} is damaged: the latents of image {index} are not what was encoded; check the disk, delete "
                    f"{path.parent}, and start again: the images are then encoded anew"
                )
        return rows, None if self.labels is None else self.labels[indices]

    def describe(self) -> str:
        """How much there is, for people."""
        return f"{super().describe()}, as latents of {'x'.join(map(str, self.example_shape))}"

    def batch_resident_bytes(self, batch: int) -> int:
        """What a call of `gather` with `batch` indices adds to the resident memory, in bytes."""
        label_bytes = 0 if self.labels is None else self.labels.itemsize
        return batch * (4 * math.prod(self.stored.latents.shape[1:]) + label_bytes)


def open_latents(
    images: ImageSet,
    *,
    autoencoder: str,
    picture_channels: int,
    latent_shape: tuple[int, int, int],
    encoder: Callable[[], Encode],
    cache_dir: Path,
    progress: Progress,
) -> LatentSet:
    """The latents of an image set, encoded when the cache does not have them.

    Args:
        autoencoder: sha256 of its files.
        latent_shape: (channels, height, width).
        encoder: makes what encodes; called only where something is to be encoded.

    Raises:
        ConfigError: the autoencoder gives values that are not finite.
        StorageError: the cache cannot be written or read.
        DataError: all latents are the same.
    """
    count, piece = len(images.images), pictures_together(*images.images.shape[1:3])
    key = json.dumps([images.fingerprint, autoencoder, list(images.images.shape), FORMAT_VERSION])

    def build(files: CacheFiles) -> None:
        encode = encoder()
        row_shape = (2, *latent_shape)
        row_bytes = 4 * math.prod(row_shape)
        arrays = {"moments.npy": (np.float64, (2,)), "checks.npy": (np.int64, ())}
        files.begin({"latents.npy": (np.float32, row_shape), **arrays}, count * (row_bytes + 24))
        for start in range(0, count, piece):
            progress(start, count, "encoding")
            rows = encode(images.pixels(np.arange(start, min(start + piece, count))))
            assert rows.shape[1:] == row_shape and rows.dtype == np.float32
            if not np.isfinite(rows).all():
                raise ConfigError(
                    f"the autoencoder gives latents that are not finite numbers (image {start} or one after it): its "
                    f"weights are damaged; download it again"
                )
            files.append("latents.npy", rows)
            files.append("moments.npy", _moments(rows))
            files.append("checks.npy", np.array([zlib.crc32(row.data) for row in rows], dtype=np.int64))
        progress(count, count, "encoding")
        files.finish({"shape": [count, *row_shape]})

    digest = hashlib.sha256(key.encode()).hexdigest()
    stored = open_or_build(_KIND, cache_dir, f"latents-{digest}", build=build, read=_read_cache)
    mean, std = _mean_std(stored.moments[images.train], math.prod(latent_shape), images.source)
    of_images = {field.name: getattr(images, field.name) for field in fields(images)}
    _, height, width, _ = images.images.shape
    return LatentSet(
        **{
            **of_images,
            "mean": mean,
            "std": std,
            "fingerprint": hashlib.sha256(json.dumps([images.fingerprint, autoencoder]).encode()).hexdigest(),
            "resident_bytes": images.resident_bytes + stored.moments.nbytes + stored.checks.nbytes,
        },
        stored=stored,
        autoencoder=autoencoder,
        picture_shape=(height, width, picture_channels),
    )


def _read_cache(folder: Path) -> StoredLatents:
    """The cache in `folder`.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it is not what was written.
    """
    meta = read_meta(folder, FORMAT_VERSION)
    latents = RowFile(folder / "latents.npy", np.float32, row=_KIND.row, most_rows=MOST_IMAGES)
    if list(latents.shape) != meta["shape"] or len(latents.shape) != 5:
        raise ValueError("the latents have another shape")
    moments = read_rows(folder / "moments.npy", (latents.shape[0], 2), np.float64)
    if not np.isfinite(moments).all():
        raise ValueError("the moments are of no latents")
    checks = read_rows(folder / "checks.npy", latents.shape[:1], np.int64)
    return StoredLatents(latents=latents, moments=moments, checks=checks)


def _moments(rows: Latents) -> NDArray[np.float64]:
    """Expected sum, and expected sum of squares, of what is drawn of each picture: [n, 2, C, h, w] -> [n, 2]."""
    means, deviations = rows.reshape(len(rows), 2, -1).astype(np.float64).swapaxes(0, 1)
    return np.stack([means.sum(axis=1), (means**2 + deviations**2).sum(axis=1)], axis=1)


def _mean_std(moments: NDArray[np.float64], values_per_image: int, source: str) -> tuple[float, float]:
    """Mean and standard deviation from the images' moments [n, 2]."""
    count = len(moments) * values_per_image
    total, total_squares = moments.sum(axis=0)
    mean, variance = total / count, total_squares / count - (total / count) ** 2
    if not variance > 0:
        raise DataError(
            f"data '{source}': all latents of the {len(moments)} training images are {mean:g}; there is nothing to "
            "learn from a constant; check the autoencoder"
        )
    return float(mean), float(math.sqrt(variance))
