"""What the user is told of the images that were read: how many of what, what was left out, and what looks like a slip.

A slip in the data is seen in no loss: the network learns what it is given.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.image_cache import StoredImages
from edgeblocks.data.picture_files import listed

_DARK = 64
"""Where no value of a set is larger, its images are black to the eye: labels of pixels, or shades of fewer bits."""
_MANY_AGAIN = 0.01


def reading(stored: StoredImages, left_out: Sequence[str]) -> str:
    """The images, their classes, and what was left out, in one line.

    Args:
        left_out: kinds of files that the source holds beside the images, each with its number.
    """
    told = f"{len(stored.images):,} images"
    names = stored.content.class_names
    if stored.labels is not None:
        counts = np.bincount(stored.labels, minlength=len(names))
        least, most = int(counts.argmin()), int(counts.argmax())
        of_each = f"of {counts[least]:,} each"
        if counts[least] != counts[most]:
            of_each = f"from {counts[least]:,} ({listed([names[least]])}) to {counts[most]:,} ({listed([names[most]])})"
        told += f" in {len(names):,} classes {of_each}" if len(names) > 1 else f" in 1 class ({listed(names)})"
    unreadable = [f"{len(stored.content.unreadable):,} unreadable"] if stored.content.unreadable else []
    beside = [*unreadable, *stored.content.left_out, *left_out]
    return f"{told}; left out: {', '.join(beside)}" if beside else told


def doubtful(stored: StoredImages) -> list[str]:
    """What in the images or their classes looks like a slip, one sentence each."""
    content, doubts, notes = stored.content, stored.doubts, []
    if content.deep_range is not None:
        low, high = content.deep_range
        notes.append(f"grey of more than 8 bits has values from {low:,} to {high:,}, which are spread over 0 to 255")
    if content.num_of_several:
        notes.append(
            f"{content.num_of_several:,} files hold several pages or frames, of which the first is read; save the "
            "others as files of their own to train on them"
        )
    if doubts.brightest < _DARK:
        notes.append(
            f"the largest value of all images is {doubts.brightest} of 255, so they are nearly black; where they have "
            "fewer shades, or are labels of pixels, scale them to 0 to 255"
        )
    if doubts.num_in_several_classes:
        notes.append(
            f"{doubts.num_in_several_classes:,} images lie in one class and, equal in every pixel, in another; a "
            "network cannot tell them apart: remove them where they do not belong"
        )
    if doubts.num_again > _MANY_AGAIN * len(stored.images):
        notes.append(
            f"{doubts.num_again:,} of {len(stored.images):,} images are there already, equal in every pixel: the "
            "hold-out part may hold images that are trained on"
        )
    return [*notes, *_alike(content.class_names)]


def untrained(labels: NDArray[np.int64] | None, train: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """Classes of which the training part has no image, in a sentence: a set may bring a test part of its own."""
    without = [] if labels is None else np.setdiff1d(np.arange(len(names)), labels[train]).tolist()
    if not without:
        return []
    return [
        f"{len(without)} of {len(names)} classes have images in the test part alone and are not learned: "
        f"{listed([names[number] for number in without])}"
    ]


def _alike(names: Sequence[str]) -> list[str]:
    """Names of classes that look the same, in a sentence, written so that they differ."""
    seen: dict[str, str] = {}
    pairs = []
    for name in names:
        plain = unicodedata.normalize("NFC", name).casefold().strip()
        if plain in seen:
            pairs.append(f"{seen[plain]!a} and {name!a}")
        seen[plain] = name
    if not pairs:
        return []
    return [f"classes are called alike, and may be meant as one: {listed(pairs)}"]
