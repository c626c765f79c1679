"""The code of each token: a frozen row of unit norm, which is what families that write token by token add noise to.

Rows are random signs, all different. Between two of them lies about sqrt(2), whatever the width, as between orthogonal
ones, so 64 features are as good as 768 and take a twelfth of the memory in every block. Frozen rows cannot collapse
and are shared by all blocks without being a parameter; their norm of 1 holds for the target and, because probabilities
are averaged over the same rows, for the estimate that a chain feeds back (at most 1 there).

The table is never stored. No torch.
"""

import hashlib
import weakref

import numpy as np
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError

_IN_MEMORY: weakref.WeakValueDictionary[tuple[int, int], NDArray[np.float32]] = weakref.WeakValueDictionary()


def code_rows(vocabulary: int, width: int) -> NDArray[np.float32]:
    """The codes of `vocabulary` tokens, [vocabulary, width], not to be written to; `width` is divisible by 8.

    Who asks while another has them gets the same ones: of 50,000 tokens they take 13 MB, and in an evaluation the
    trained block, the one that is looked at and the next one each ask.

    Raises:
        ConfigError: two tokens would have the same code.

    >>> rows = code_rows(5, 16)
    >>> [float((row**2).sum()) for row in rows]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    >>> (rows[0] * 4).astype(int).tolist()
    [-1, -1, -1, -1, 1, -1, 1, 1, 1, -1, 1, -1, -1, -1, 1, -1]
    """
    if (known := _IN_MEMORY.get((vocabulary, width))) is not None:
        return known
    bits = np.unpackbits(_packed_rows(vocabulary, width), axis=1)
    rows: NDArray[np.float32] = np.where(bits, np.float32(width**-0.5), np.float32(-(width**-0.5)))
    _IN_MEMORY[vocabulary, width] = rows
    return rows


def check_codes(vocabulary: int, width: int) -> None:
    """That `code_rows` has a code of its own for each token, without making them: 1/32 of the memory.

    Raises:
        ConfigError: two tokens would have the same code.
    """
    _packed_rows(vocabulary, width)


def _packed_rows(vocabulary: int, width: int) -> NDArray[np.uint8]:
    """The signs as bits, [vocabulary, width / 8]."""
    # From a hash function and not from a library's generator: a network of today must find the same table in ten years,
    # in torch and in the deployed chain alike.
    text = f"edgeblocks: {width} signs for each of {vocabulary} tokens"
    num_bytes = vocabulary * width // 8
    packed = np.frombuffer(hashlib.shake_256(text.encode()).digest(num_bytes), np.uint8).reshape(vocabulary, width // 8)
    if len(np.unique(packed.view(f"V{width // 8}"))) < vocabulary:
        raise ConfigError(
            f"code_width={width} gives two of {vocabulary} tokens the same code; use --set code_width=64 or more"
        )
    return packed
