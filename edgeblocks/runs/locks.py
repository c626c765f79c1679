"""Who may write in a run directory: one training process."""

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeblocks.errors import RunError
from edgeblocks.offload.block_files import storage_error
from edgeblocks.runs.directory import RunDirectory


@contextlib.contextmanager
def locked(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps a second training process out of a run directory.

    The kernel holds the lock and drops it when the process ends in whatever way, so none survives a crash or a reboot.

    Raises:
        RunError: another process trains this run.
        StorageError: the directory cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error("cannot write in the run directory", path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "an unknown process"
            raise RunError(
                f"{path} is being trained by {holder}; wait until it ends, or stop it (Ctrl-C saves), then start again"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise storage_error("cannot lock the run directory", path, error) from error
            note(f"{path} is on a file system without locks: take care that only one process trains this run")
        with contextlib.suppress(OSError):  # the text is for people; a full disk must not stop a run here
            # Only the holder writes; who is refused reads it to say by whom.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_away(run: RunDirectory, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps copies of a run directory, which name the same work directory, from using it at the same time.

    Raises:
        RunError: another process trains there.
    """
    away = run.away_folder
    if away is None or not away.is_dir():
        yield
        return
    with locked(away, note):
        yield
