"""Picture files with noise in them, and a data set of such files opened with usual settings."""

import struct
import zlib

import numpy as np
from PIL import Image

from edgeblocks.data.images import open_images


def opened(source, cache_dir, **settings):
    return open_images(
        str(source), **{"image_size": None, "hold_out": 0.2, "seed": 0, "cache_dir": cache_dir} | settings
    )


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def png(width, height, rows, *, bits=8, kind=2, clear=b""):
    """A PNG of these bytes, with a transparent colour if one is given."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    header += chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
