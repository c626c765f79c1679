"""Writing and removing under names of ours, in folders that may come from anywhere: no link is followed.

A run directory that was downloaded may hold a link under any name. What is opened here is a regular file that lies in
its folder and nowhere else, and what is removed is the name, not what it leads to. Folders on the way are checked with
`links_under` before the first write: of a path the system itself only looks at the last part.
"""

import errno
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from edgeblocks.errors import ConfigError

# Windows has neither; links are rare there, and `is_link` is asked first.
_NOT_A_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_CLOSED_IN_CHILDREN = getattr(os, "O_CLOEXEC", 0)


def is_link(path: Path) -> bool:
    """Whether the name itself is a link, wherever it leads."""
    return path.is_symlink()


def links_under(folder: Path, names: Iterable[str], folders: Iterable[str]) -> Iterator[Path]:
    """Links among the `names` in a folder, and among everything in its `folders`.

    Raises:
        OSError: a folder cannot be read.
    """
    for name in (*names, *folders):
        if is_link(folder / name):
            yield folder / name
    for inner in folders:
        if (folder / inner).is_dir() and not is_link(folder / inner):
            yield from (path for path in sorted((folder / inner).iterdir()) if is_link(path))


def check_new(out: Path, *, overwrite: bool) -> None:
    """That a file which the user names may be written. Pipes and devices are there to be written to.

    Raises:
        ConfigError: it is there already and may not be replaced.
    """
    try:
        taken = out.is_file()
    except OSError as error:
        raise ConfigError(f"-o {out}: {error.strerror}; choose another name") from error
    if taken and not overwrite:
        raise ConfigError(f"-o {out} is there already; add --force to replace it, or choose another name")


def create(path: Path, *, buffering: int = -1) -> BinaryIO:
    """A new file, open for writing; what had the name before is removed, not what it leads to.

    Raises:
        OSError: the disk refused, or somebody makes a file of that name at the same time.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOT_A_LINK | _CLOSED_IN_CHILDREN
    return os.fdopen(os.open(path, flags, 0o666), "wb", buffering=buffering)


def append(path: Path, content: bytes) -> None:
    """Add bytes to a file, which is made where there is none.

    Raises:
        OSError: the disk refused, or the name is a link, a pipe or a device, or the file has another name elsewhere.
    """
    descriptor = open_alone(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with os.fdopen(descriptor, "ab") as file:
        file.write(content)


def open_alone(path: Path, flags: int) -> int:
    """A descriptor of a regular file that has this one name.

    Raises:
        OSError: it cannot be opened, or is anything else.
    """
    waiting = getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for without end
    if is_link(path):
        raise OSError(errno.ELOOP, "it is a link, and what it leads to is not ours to write", str(path))
    descriptor = os.open(path, flags | waiting | _NOT_A_LINK | _CLOSED_IN_CHILDREN, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        what = "it has another name elsewhere (a hard link)" if stat.S_ISREG(status.st_mode) else "it is no file"
        raise OSError(errno.ELOOP, f"{what}, and that is not ours to write", str(path))
    return descriptor


def file_locks() -> ModuleType:
    """filelock, the library. It warns where there are no locks of the kernel's, which users need not hear of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import filelock
    return filelock


def make_folder(path: Path) -> None:
    """A folder that is there, and those above it; a link to one is none.

    Raises:
        OSError: the disk refused, or something else has the name.
    """
    if is_link(path):
        raise OSError(errno.ELOOP, "it is a link, and what it leads to is not ours to write", str(path))
    path.mkdir(parents=True, exist_ok=True)
