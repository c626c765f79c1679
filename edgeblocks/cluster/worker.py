"""What is on a node of a cluster: a copy of a run, and the command that trains one block of it, in its own process.

That process alone is under the budget, as if a user had started it there. No torch here. The driver makes a Ray
actor of it, whose calls come one after the other.
"""

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from stat import S_ISDIR
from typing import IO

from edgeblocks.children import python_module
from edgeblocks.files.own import file_locks

_PARENT_DEATH_SIGNAL = 1
_TOLD_LINES = 5
_RECORD_BYTES = 4096
"""More than two lines of metrics.jsonl."""
_NOTES = ("note:", "planned again")
_PREFIX, _DATA_PREFIX, _LOCK = "edgeblocks-worker-", "edgeblocks-data-", "lock"


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a worker's training goes."""

    version: tuple[int, int, int] | None
    """Of the block's file: it is another one after each visit. None: there is none."""
    exit_code: int | None
    """Of the training; None while it goes on."""
    told: str
    """Its last lines on standard error; where it failed, what it says of that."""
    notes: tuple[str, ...]
    """Of these, since the last report, those of which the bits may depend."""
    record: bytes
    """The last whole line of metrics.jsonl."""


class Worker:
    """A copy of a run in a temporary folder."""

    def __init__(self, data_token: str) -> None:
        """
        Args:
            data_token: of the driver, whose data stay here between two workers.
        """
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = file_locks().FileLock(self._folder / _LOCK)
        self._lock.acquire()  # the kernel drops it when this process ends in whatever way
        _remove_leftovers(self._folder, _data_place(data_token))
        self._copy = self._folder / "run"
        (self._copy / "blocks").mkdir(parents=True)
        self._log = self._folder / "log"
        self._log_read = 0
        self._told: deque[str] = deque(maxlen=_TOLD_LINES)
        self._training: subprocess.Popen[bytes] | None = None
        self._open: IO[bytes] | None = None

    def node(self) -> tuple[str, str]:
        """The name of the machine, and what Ray calls this node."""
        import ray

        return platform.node(), ray.get_runtime_context().get_node_id()

    def version(self) -> str:
        """Of the package there."""
        return metadata.version("edgeblocks")

    def write(self, name: str, piece: bytes) -> None:
        """Add bytes to a file of the copy."""
        with (self._copy / name).open("ab") as file:
            file.write(piece)

    def stand_in(self, name: str, head: bytes, num_bytes: int) -> None:
        """Make a file that begins so and has that size; the rest of it takes no room on the disk."""
        path = self._copy / name
        path.write_bytes(head)
        os.truncate(path, num_bytes)

    def finds(self, path: str) -> bool:
        """Whether there is something under this path here, too."""
        return Path(path).exists()

    def data_sent(self, token: str) -> str | None:
        """Where the data are that the driver sent to this machine; None where it did not."""
        place = _data_place(token)
        return str(next(place.iterdir())) if place.is_dir() else None

    def receive(self, token: str, name: str, piece: bytes) -> None:
        """Add bytes to a file of the data that are being sent."""
        path = self._folder / token / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(piece)

    def keep_data(self, token: str) -> str:
        """All was sent: other workers of this machine use it as well. Where it is."""
        place = _data_place(token)
        if place.is_dir():
            shutil.rmtree(self._folder / token)
        else:
            (self._folder / token).chmod(0o700)
            (self._folder / token).rename(place)
        return str(next(place.iterdir()))

    def start(self, arguments: Sequence[str], environment: Mapping[str, str | None]) -> None:
        """Start `edgeblocks train --resume` on the copy.

        Args:
            environment: variables as the driver has them; None: it has none of that name.
        """
        own = {name: value for name, value in os.environ.items() if name not in environment}
        own |= {name: value for name, value in environment.items() if value is not None}
        command = ["train", "--resume", str(self._copy), "--work-dir", str(self._folder), *arguments]
        with self._log.open("wb") as log:
            self._training = subprocess.Popen(
                python_module("edgeblocks.cli", *command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=own,
                preexec_fn=_ending_with_this_process(),  # noqa: PLW1509 - one call of the system, looked up before
            )

    def poll(self, block_name: str) -> Report:
        """How it goes now."""
        exit_code = None if self._training is None else self._training.poll()  # first: then the file is its last one
        path = self._copy / "blocks" / block_name
        status = path.stat() if path.exists() else None
        version = None if status is None else (status.st_ino, status.st_mtime_ns, status.st_size)
        lines = self._new_lines()
        self._told += lines
        errors = [line for line in self._told if line.startswith("error:")]
        return Report(
            version=version,
            exit_code=exit_code,
            told="\n".join(errors or self._told),
            notes=tuple(line for line in lines if line.startswith(_NOTES)),
            record=self._last_record(),
        )

    def _new_lines(self) -> list[str]:
        """What the training has said since it was asked last; of a line that is not whole nothing."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as log:
            log.seek(self._log_read)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._log_read += len(whole)
        return whole.decode(errors="replace").splitlines()

    def _last_record(self) -> bytes:
        path = self._copy / "metrics.jsonl"
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _RECORD_BYTES))
            whole = file.read().rpartition(b"\n")[0]
        return whole.rpartition(b"\n")[2]

    def hold(self, block_name: str) -> int:
        """Open the block's file as it is now, and give its bytes: a later visit replaces it under its name only."""
        if self._open is not None:
            self._open.close()
        self._open = (self._copy / "blocks" / block_name).open("rb")
        return os.fstat(self._open.fileno()).st_size

    def read(self, start: int, num_bytes: int) -> bytes:
        """A piece of the file that is held."""
        assert self._open is not None
        self._open.seek(start)
        return self._open.read(num_bytes)

    def records(self) -> bytes:
        """The copy's metrics.jsonl."""
        path = self._copy / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def stop(self) -> None:
        """Have the training save and end."""
        if self._training is not None and self._training.poll() is None:
            self._training.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Remove the copy."""
        if self._training is not None and self._training.poll() is None:
            self._training.kill()
            self._training.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def remove_data(token: str) -> None:
    """Remove the data that the driver sent to this machine."""
    shutil.rmtree(_data_place(token), ignore_errors=True)


def _data_place(token: str) -> Path:
    """A folder that all workers of a machine find, and nobody can guess."""
    return Path(tempfile.gettempdir()) / f"{_DATA_PREFIX}{token}"


def _remove_leftovers(own: Path, own_data: Path) -> None:
    """Remove what workers left here that were killed: their copies, and data once no worker is left that reads them."""
    alive = 0
    for path in set(_own_folders(_PREFIX)) - {own}:
        lock = file_locks().FileLock(path / _LOCK)
        try:
            lock.acquire(blocking=False)
        except (OSError, TimeoutError):  # held by a worker
            alive += 1
            continue
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
    for path in () if alive else set(_own_folders(_DATA_PREFIX)) - {own_data}:
        shutil.rmtree(path, ignore_errors=True)


def _own_folders(prefix: str) -> list[Path]:
    """Folders in the temporary one that begin so and are this user's."""
    found = Path(tempfile.gettempdir()).glob(f"{prefix}*")
    return [path for path in found if (status := path.lstat()).st_uid == os.getuid() and S_ISDIR(status.st_mode)]


def _ending_with_this_process() -> Callable[[], object] | None:
    """What a child does before its program: when this process is killed it gets SIGTERM, so that it saves and ends."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
