"""The samples that a run made while it was trained: pictures or texts, as a piece of a page."""

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from edgeblocks.files.untrusted import MalformedFileError, open_regular, read_text
from edgeblocks.report.page import fragment

MOST_PREVIEWS = 12
"""On a page; of more, the newest and evenly spaced others are shown."""
MOST_PICTURE_BYTES = 4 * 2**20
MOST_TEXT_BYTES = 2**17
_MOST_CHARACTERS = 1200
_MOST_TEXTS = 4
_NAME = re.compile(r"step_(\d{1,12})\.(png|txt)", re.ASCII)
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_SMALL_PIXELS = 500
"""A picture that is narrower is enlarged, and its pixels stay sharp."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Samples after a number of steps of each block: a picture in base64, or texts."""

    step: int
    picture: str = ""
    is_small: bool = False
    texts: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"after {self.step:,} steps"


def read_previews(folder: Path) -> tuple[list[Preview], list[str]]:
    """The previews in a run's folder of samples, the newest first, and what is to be said of those left out."""
    found = _found(folder)
    shown = _spread(found)
    remarks = (
        [] if len(shown) == len(found) else [f"{len(shown)} of {len(found)} are shown; the others are in {folder}."]
    )
    previews = []
    for step, path in shown:
        try:
            previews.append(_picture(step, path) if path.suffix == ".png" else _texts(step, path))
        except (OSError, MalformedFileError) as error:
            remarks.append(f"{path.name} is left out: {getattr(error, 'strerror', None) or error}.")
    return previews, remarks


def preview_bytes(folder: Path) -> int:
    """Of the files that `read_previews` reads."""
    return sum(min(path.lstat().st_size, MOST_PICTURE_BYTES) for _, path in _spread(_found(folder)))


def previews_piece(previews: Sequence[Preview]) -> Markup:
    """HTML of previews: pictures in rows, texts as they are."""
    return fragment("previews.html", previews=previews, kind="pictures" if previews[0].picture else "texts")


def _found(folder: Path) -> list[tuple[int, Path]]:
    """The steps and files of all previews, the newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(((int(match[1]), path) for path in entries if (match := _NAME.fullmatch(path.name))), reverse=True)


def _spread(found: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most `MOST_PREVIEWS`, the first and the last among them."""
    if len(found) <= MOST_PREVIEWS:
        return found
    return [found[round(place * (len(found) - 1) / (MOST_PREVIEWS - 1))] for place in range(MOST_PREVIEWS)]


def _picture(step: int, path: Path) -> Preview:
    with open_regular(path) as file:
        content = file.read(MOST_PICTURE_BYTES + 1)
    if len(content) > MOST_PICTURE_BYTES:
        raise MalformedFileError(f"it has more than {MOST_PICTURE_BYTES} bytes")
    if not content.startswith(_PNG) or len(content) < len(_PNG) + 8:
        raise MalformedFileError("it is not a PNG picture")
    (width,) = struct.unpack_from(">I", content, len(_PNG))
    return Preview(step=step, picture=base64.b64encode(content).decode(), is_small=width < _SMALL_PIXELS)


def _texts(step: int, path: Path) -> Preview:
    """The first of the texts, each cut where it is long."""
    texts = read_text(path, most_bytes=MOST_TEXT_BYTES).rstrip("\n").split("\n----\n")
    cut = (text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " .." for text in texts[:_MOST_TEXTS])
    return Preview(step=step, texts=tuple(cut))
