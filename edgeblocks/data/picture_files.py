"""The picture files of a folder and of all folders below it, and an account of what lies beside them.

The tree is walked as a stream, in the order of the names, and never listed in memory.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from edgeblocks.data.decoding import EXTENSIONS
from edgeblocks.data.file_identity import file_identity
from edgeblocks.errors import DataError

_NAMES_SHOWN = 10
_KINDS_SHOWN = 6
_MOST_KINDS = 1000
"""Different extensions that are counted one by one."""
_LONGEST_KIND = 12
_OF_OTHER_SYSTEMS = frozenset(
    {
        "$recycle.bin",
        "#recycle",
        "#snapshot",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "__macosx",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "network trash folder",
        "system volume information",
        "temporary items",
        "thumbs.db",
    }
)
"""Folders and files that file servers, archives and other systems put among pictures: thumbnails, waste, records."""
_PICTURES_NOT_READ = frozenset(
    {
        ".arw",
        ".cr2",
        ".cr3",
        ".dcm",
        ".dng",
        ".eps",
        ".exr",
        ".hdr",
        ".heic",
        ".heif",
        ".hif",
        ".ico",
        ".jxl",
        ".nef",
        ".nii",
        ".orf",
        ".psd",
        ".raf",
        ".raw",
        ".rw2",
        ".svg",
    }
)


class FoundFile(NamedTuple):
    """A picture's file: its class, its name relative to the folder, and what changes when it is replaced."""

    label: int
    name: str
    identity: str


@dataclass(kw_only=True)
class LeftOut:
    """What lies among the pictures and is not read: numbers of files by extension, and what is not looked into."""

    kinds: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    of_other_systems: Counter[str] = field(default_factory=Counter)
    no_files: int = 0
    """Pipes, devices and sockets with a picture's name."""

    def count_file(self, name: str) -> None:
        """Count a file that has no picture's extension."""
        kind = os.path.splitext(name)[1].lower() or "without extension"  # noqa: PTH122  # a Path for each file is slow
        kind = printable(kind if len(kind) <= _LONGEST_KIND or kind == "without extension" else "other")
        self.kinds[kind if kind in self.kinds or len(self.kinds) < _MOST_KINDS else "other"] += 1

    def described(self) -> list[str]:
        """Each kind with its number, the most frequent first."""
        kinds = self.kinds.most_common(_KINDS_SHOWN)
        told = [f"{count:,} {kind}" for kind, count in kinds]
        if rest := self.kinds.total() - sum(count for _, count in kinds):
            told.append(f"{rest:,} of {len(self.kinds) - len(kinds)} other kinds")
        if self.hidden:
            told.append(f"{self.hidden:,} hidden")
        if self.of_other_systems:
            told.append(f"{self.of_other_systems.total():,} of other systems ({listed(self.of_other_systems)})")
        if self.no_files:
            told.append(f"{self.no_files:,} that are no files")
        return told

    def warning(self) -> str | None:
        """What to do about pictures of kinds that are not read; None where there are none."""
        found = {kind: count for kind, count in self.kinds.items() if kind in _PICTURES_NOT_READ}
        if not found:
            return None
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.items()))
        return f"{kinds} files are pictures of kinds that are not read; save them as JPEG or PNG to train on them"


class Entries(NamedTuple):
    """A folder's identity, its sub-folders, its pictures, and how many entries it has that are neither, by reason."""

    identity: tuple[int, int]
    folders: list[os.DirEntry[str]]
    pictures: list[os.DirEntry[str]]


def entries_of(folder: Path, left_out_: LeftOut | None = None) -> Entries:
    """What a folder holds, sorted by name. `left_out_` grows by the rest.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        status = folder.stat()
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"data folder {folder} cannot be read: {error.strerror}; mend its permissions or remove it"
        ) from error
    left_out = LeftOut() if left_out_ is None else left_out_
    folders, pictures = [], []
    for entry in entries:
        is_folder = _is_folder(entry)
        if entry.name.lower() in _OF_OTHER_SYSTEMS:
            left_out.of_other_systems[entry.name] += 1
        elif entry.name.startswith("."):
            left_out.hidden += is_folder or _has_a_pictures_name(entry)
        elif is_folder:
            folders.append(entry)
        elif not _has_a_pictures_name(entry):
            left_out.count_file(entry.name)
        elif _can_be_opened(entry):
            pictures.append(entry)
        else:
            left_out.no_files += 1
    return Entries((status.st_dev, status.st_ino), folders, pictures)


def walk(root: Path, folder: str, label: int, left_out_: LeftOut | None = None) -> Iterator[FoundFile]:
    """Picture files below root/folder. A folder that links lead to twice is read once, so that loops end."""
    seen = {entries_of(root).identity} if folder else set()
    waiting = [folder]
    while waiting:
        name = waiting.pop()
        here = entries_of(root / name, left_out_)
        if here.identity in seen:
            continue
        seen.add(here.identity)
        above = f"{name}/" if name else ""
        waiting += [f"{above}{entry.name}" for entry in reversed(here.folders)]
        for entry in here.pictures:
            yield FoundFile(label, f"{above}{entry.name}", _identity(entry))


def files_in(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, and in the place of a folder all pictures in it and below, in the order of their names.

    Raises:
        DataError: a folder cannot be read, or has no picture.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        left_out = LeftOut()
        found = [path / file.name for file in walk(path, "", 0, left_out)]
        if not found:
            beside = f"; beside: {', '.join(left_out.described())}" if left_out.described() else ""
            raise DataError(f"{path} holds no picture: looked for {', '.join(sorted(EXTENSIONS))} in it{beside}")
        files += found
    return files


def listed(names: Iterable[str]) -> str:
    """Some names for a message.

    >>> listed(["a", "b"])
    'a, b'
    """
    known = list(names)
    shown = ", ".join(printable(name) for name in known[:_NAMES_SHOWN])
    return shown if len(known) <= _NAMES_SHOWN else f"{shown} and {len(known) - _NAMES_SHOWN} more"


def printable(name: str) -> str:
    """A file's name as text that can be printed and written, whatever bytes it has on the disk."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _identity(entry: os.DirEntry[str]) -> str:
    try:
        return file_identity(entry.stat())
    except OSError:  # a link to nowhere: found, and named as unreadable once it is opened
        return "nowhere"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _has_a_pictures_name(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in EXTENSIONS  # noqa: PTH122  # a Path for each of a million is slow


def _can_be_opened(entry: os.DirEntry[str]) -> bool:
    """Dead links count, so that they are reported; pipes and devices, which may block, do not."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))  # noqa: PTH110
    except OSError:
        return True
