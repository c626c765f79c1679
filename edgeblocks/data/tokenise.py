"""Tokenising in a process of its own, which leaves nothing behind in the one that trains.

Learning byte pairs and unpacking pages of long documents take memory that an allocator keeps when it is freed, and
calls of libraries that no signal interrupts. Here they have their own interpreter, without torch, under the same
budget; Ctrl-C ends it at once.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeblocks import errors
from edgeblocks.children import python_module
from edgeblocks.data.dataset import Progress
from edgeblocks.errors import ConfigError, EdgeblocksError, NoRoomToReadError

SLACK_BYTES = 12_000_000
"""Beside what is counted: code of libraries, pieces of text on their way to the cache."""
_PARTING_S = 0.3


def tokenise_in_child(request: Mapping[str, object], progress: Progress) -> None:
    """Fill the cache as `open_text` does with the arguments in `request`, `budget_bytes` in place of `room_bytes`.

    Raises:
        EdgeblocksError: what `open_text` raises.
    """
    command = python_module("edgeblocks.data.tokenise")
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True) as child,
    ):
        try:
            assert child.stdin is not None and child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request))
                child.stdin.close()
            for line in child.stdout:
                told = json.loads(line)
                if "error" in told:
                    raise _error(told)
                progress(told["done"], told["total"], told["what"])
        except BaseException:
            _end(child)
            raise
        if child.wait() != 0:
            said.seek(0)
            raise EdgeblocksError(
                f"reading '{request['source']}' ended with status {child.returncode}, as when memory runs out:\n"
                f"{said.read()[-2000:]}"
            )


def _end(child: subprocess.Popen[str]) -> None:
    """Ends the child, with a moment to remove what it has written; in a long call of a library it has none."""
    child.terminate()
    try:
        child.wait(timeout=_PARTING_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _error(told: Mapping[str, Any]) -> EdgeblocksError:
    kind = getattr(errors, told["error"])
    if kind is NoRoomToReadError:
        return NoRoomToReadError(told["what"], told["needed_bytes"], taken_bytes=told["taken_bytes"], cure=told["cure"])
    if kind is ConfigError:
        return ConfigError(*told["problems"])
    error: EdgeblocksError = kind(told["message"])
    return error


def main() -> None:
    """Answer one request on standard input with lines of progress, and of an error of ours, on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    from edgeblocks.data.text import open_text

    request = json.load(sys.stdin)
    budget_bytes, taken_bytes = request.pop("budget_bytes"), _resident_bytes() + SLACK_BYTES
    room_bytes = None if budget_bytes is None else max(0, budget_bytes - taken_bytes)

    def progress(done: int, total: int, what: str) -> None:
        print(json.dumps({"done": done, "total": total, "what": what}), flush=True)

    try:
        open_text(**{**request, "cache_dir": Path(request["cache_dir"])}, progress=progress, room_bytes=room_bytes)
    except NoRoomToReadError as error:
        told = {"what": error.what, "needed_bytes": error.needed_bytes, "taken_bytes": taken_bytes, "cure": error.cure}
        print(json.dumps({"error": "NoRoomToReadError", **told}), flush=True)
    except ConfigError as error:
        print(json.dumps({"error": "ConfigError", "problems": error.problems}), flush=True)
    except EdgeblocksError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)


def _resident_bytes() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
