"""Who may write in a run directory: one training process, and nothing in it may be a link."""

import contextlib
import errno
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeblocks.errors import RunError
from edgeblocks.files.own import file_locks, links_under, open_alone
from edgeblocks.offload.block_files import storage_error
from edgeblocks.runs.directory import OWN_FOLDERS, OWN_NAMES, RunDirectory
from edgeblocks.terminal import quoted

_MOST_NAMED = 5


@contextlib.contextmanager
def locked(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps a second training process out of a run directory, and this one out of everything else.

    The kernel holds the lock and drops it when the process ends in whatever way, so none survives a crash or a reboot.

    Raises:
        RunError: another process trains this run, or a name of ours in it is a link.
        StorageError: the directory cannot be written.
    """
    check_links(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("cannot write in the run directory", path, error) from error
    with _held(path, note):
        yield


@contextlib.contextmanager
def _held(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    filelock = file_locks()
    # Without a kernel's lock (no fcntl) a file is one as long as it exists, and holds what its owner wrote.
    is_kernels = not issubclass(filelock.FileLock, filelock.SoftFileLock)
    file = path / ("lock" if is_kernels else "lock.pid")
    lock = filelock.FileLock(file, mode=0o644)
    try:
        if file.exists():
            os.close(open_alone(file, os.O_RDWR))
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise RunError(
            f"{path} is being trained by {_holder(file)}; wait until it ends, or stop it (Ctrl-C saves), then start "
            f"again"
        ) from error
    except (OSError, NotImplementedError) as error:  # the second is filelock's word for a file system without locks
        without_locks = (errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS)
        if isinstance(error, OSError) and error.errno not in without_locks:
            raise storage_error("cannot lock the run directory", file, error) from error
        note(f"{path} is on a file system without locks: take care that only one process trains this run")
    try:
        if is_kernels:
            # Only the holder writes; who is refused reads it to say by whom.
            _sign(file)
        yield
    finally:
        lock.release()


def _sign(file: Path) -> None:
    """Who holds a lock, for people; a full disk must not stop a run here."""
    with contextlib.suppress(OSError), os.fdopen(open_alone(file, os.O_RDWR), "r+b", buffering=0) as text:
        text.truncate(0)
        text.write(f"process {os.getpid()} on {platform.node()}\n".encode())


def _holder(file: Path) -> str:
    """The text in a lock's file."""
    found = b""
    with contextlib.suppress(OSError), os.fdopen(open_alone(file, os.O_RDONLY), "rb", buffering=0) as text:
        found = text.read(200) or b""
    return found.decode(errors="replace").strip() or "an unknown process"


@contextlib.contextmanager
def locked_away(run: RunDirectory, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps copies of a run directory, which name the same work directory, from using it at the same time.

    Raises:
        RunError: another process trains there.
    """
    away = run.away_folder
    if away is None or not os.path.lexists(away):
        yield
        return
    _refuse(list(links_under(away.parent, (), (away.name,))), away)
    with _held(away, note):
        yield


def check_links(path: Path) -> None:
    """That no file and no folder that training writes or removes in a run directory is a link.

    Raises:
        RunError: names those that are.
        StorageError: a folder cannot be read.
    """
    try:
        windows = (f"blocks/{folder.name}" for folder in (path / "blocks").glob("window_*"))
        found = list(links_under(path, OWN_NAMES, (*OWN_FOLDERS, *windows)))
    except OSError as error:
        raise storage_error("cannot look into the run directory", path, error) from error
    _refuse(found, path)


def _refuse(links: list[Path], path: Path) -> None:
    if not links:
        return
    named = ", ".join(str(link) for link in links[:_MOST_NAMED]) + (", .." if len(links) > _MOST_NAMED else "")
    raise RunError(
        f"{path} holds {'a link' if len(links) == 1 else f'{len(links)} links'} where training writes: {named}. "
        f"Through them files outside would be changed, so nothing was written. If you trust them, copy the run with "
        f"cp -rL {quoted(path)} COPY and go on with the copy; to keep blocks on another disk use --work-dir"
    )
