"""What is on a node of a cluster: a copy of a run, and the command that trains one block of it, in its own process.

That process alone is under the budget, as if a user had started it there. No torch here, and nothing of Ray: the driver
makes an actor of it, whose calls come one after the other.
"""

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO

from edgeblocks.children import python_module

_PARENT_DEATH_SIGNAL = 1
_TOLD_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a worker's training goes."""

    version: tuple[int, int, int] | None
    """Of the block's file: it is another one after each visit. None: there is none."""
    exit_code: int | None
    """Of the training; None while it goes on."""
    told: str
    """Its last lines on standard error."""


class Worker:
    """A copy of a run in a temporary folder."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="edgeblocks-"))
        self._copy = self._folder / "run"
        (self._copy / "blocks").mkdir(parents=True)
        self._log = self._folder / "log"
        self._training: subprocess.Popen[bytes] | None = None
        self._open: IO[bytes] | None = None

    def node(self) -> str:
        """The name of the machine."""
        return platform.node()

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
        told = self._log.read_bytes().decode(errors="replace").splitlines() if self._log.exists() else []
        return Report(version=version, exit_code=exit_code, told="\n".join(told[-_TOLD_LINES:]))

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

    def close(self, data_token: str | None = None) -> None:
        """Remove the copy, and the data that were sent where no other worker of this machine needs them."""
        if self._training is not None and self._training.poll() is None:
            self._training.kill()
            self._training.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        if data_token is not None:
            shutil.rmtree(_data_place(data_token), ignore_errors=True)


def _data_place(token: str) -> Path:
    """A folder that all workers of a machine find, and nobody can guess."""
    return Path(tempfile.gettempdir()) / f"edgeblocks-data-{token}"


def _ending_with_this_process() -> Callable[[], object] | None:
    """What a child does before its program: when this process is killed it gets SIGTERM, so that it saves and ends."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
