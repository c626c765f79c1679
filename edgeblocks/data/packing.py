"""Short conversations that share a window: fewer windows, and none of their tokens wasted on filling them up.

A conversation goes into the fullest window that it still fits into, the longest conversations first. What a network is
called with keeps those of a window apart (`pretrained.shell`). Conversations that are held out keep windows of their
own, so that their perplexity is the same figure, packed or not.

Source: best-fit decreasing, Johnson 1973, Near-optimal bin packing algorithms.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, open_or_build
from edgeblocks.data.chat import BEGINS, KIND, PADDING, ROWS_AT_ONCE, ChatSet, RowWriter, read_chat
from edgeblocks.data.tokenizer import PairTokenizer


def packed_chat(chats: ChatSet, *, cache_dir: Path) -> ChatSet:
    """The same conversations, packed; made once for a set.

    Raises:
        StorageError: the cache cannot be written or read.
    """
    decides = (
        f"packed {KIND.version} {chats.fingerprint} {chats.num_train} {chats.reading} {list(chats.example.pieces)}"
    )

    def build(files: CacheFiles) -> None:
        sizes = _sizes(chats)
        windows = packed([int(size) for size in sizes[: chats.num_train]], chats.length)
        rows = RowWriter(files, chats.length)
        for window in [*windows, *([index] for index in range(chats.num_train, chats.num_examples))]:
            rows.add(_row(chats.stored(np.array(window)), sizes[window]))
        told = (
            f"{chats.reading}. Packed: {chats.num_train:,} of them lie in {len(windows):,} windows of "
            f"{chats.length:,} tokens instead of {chats.num_train:,}, {_full(sizes, chats, len(windows))} full instead "
            f"of {_full(sizes, chats, chats.num_train)}"
        )
        files.finish(
            {
                "fingerprint": rows.finish(),
                "num_train": len(windows),
                "num_examples": rows.count,
                "tokens": chats.num_tokens,
                "counted": round(chats.answered * chats.num_tokens),
                "told": told,
                "example": chats.example.pieces,
                "packed": True,
            }
        )

    tokenizer = chats.tokenizer
    assert isinstance(tokenizer, PairTokenizer)
    key = hashlib.sha256(decides.encode()).hexdigest()
    return open_or_build(
        KIND, cache_dir, key, build=build, read=lambda folder: read_chat(folder, chats.source, tokenizer, chats.length)
    )


def packed(sizes: list[int], room: int) -> list[list[int]]:
    """Which of so many sizes lie together in windows of so much room.

    >>> packed([3, 6, 2, 5], 8)
    [[1, 2], [3, 0]]
    """
    windows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    rooms = 0  # a bit for each amount of room that some window has left
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        fitting = rooms >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            number = by_room[left].pop()
            rooms &= ~(int(not by_room[left]) << left)
        else:
            left, number = room, len(windows)
            windows.append([])
        windows[number].append(index)
        by_room[left - size].append(number)
        rooms |= 1 << (left - size)
    return windows


def _sizes(chats: ChatSet) -> NDArray[np.int64]:
    """Tokens of each conversation."""
    starts = range(0, chats.num_examples, ROWS_AT_ONCE)
    groups = (np.arange(start, min(start + ROWS_AT_ONCE, chats.num_examples)) for start in starts)
    return np.concatenate([(chats.stored(group) != PADDING).sum(axis=1) for group in groups])


def _row(conversations: NDArray[np.int32], sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """One window of some conversations [n, length]."""
    row = np.full(conversations.shape[1], PADDING, dtype=np.int32)
    place = 0
    for tokens, size in zip(conversations, sizes, strict=True):
        row[place : place + size] = tokens[:size]
        row[place] += BEGINS  # it does not count, so it is no complement
        place += int(size)
    return row


def _full(sizes: NDArray[np.int64], chats: ChatSet, windows: int) -> str:
    """Share of the windows' tokens that are no filling, of the training part."""
    return f"{int(sizes[: chats.num_train].sum()) / (windows * chats.length):.0%}"
