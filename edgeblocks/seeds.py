"""Seeds from positions such as (seed, block, step), so that a resumed run draws what it would have drawn. No torch."""

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_at(*position: int | str) -> int:
    """A 63-bit seed for a position; different positions give unrelated seeds.

    >>> seed_at(0, "train", 1, 2)
    7862477292193677372
    """
    digest = hashlib.sha256("/".join(map(_written, position)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _written(part: int | str) -> str:
    """A part of a position as it is hashed: no two positions are written alike.

    Numbers and words stand as they are. A text that could be taken for a number or for several parts follows an empty
    part, which no other position has, as the hexadecimal digits of its bytes.
    """
    if isinstance(part, str) and (part == "" or "/" in part or re.fullmatch(r"0|-?[1-9][0-9]*", part)):
        return f"/{part.encode().hex()}"
    return str(part)


def start_noise(shape: Sequence[int], *, samples: Sequence[int | str], seed: int) -> np.ndarray:
    """Standard normal noise, float32 [samples, *shape], one stream a sample.

    A sample is known by its number or name: its noise is the same whatever others there are, and the same in torch and
    in the deployed chain, for numpy's PCG64 draws it in both.
    """
    noise = np.empty((len(samples), *shape), dtype=np.float32)
    for index, name in enumerate(samples):
        noise[index] = np.random.default_rng(seed_at(seed, "start", name)).standard_normal(shape, dtype=np.float32)
    return noise


def generator_at(*position: int | str, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A generator for a position such as (seed, "train", block, step), of the processor or of a device."""
    import torch

    return torch.Generator(device).manual_seed(seed_at(*position))
