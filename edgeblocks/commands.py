"""Commands that messages advise, so that they can be pasted, whatever is in the names of their files."""

import shlex
from pathlib import Path


def quoted(name: Path | str) -> str:
    """A name as a shell takes it.

    >>> quoted(Path("my runs/a")), quoted("runs/a")
    ("'my runs/a'", 'runs/a')
    """
    return shlex.quote(str(name))


def command(verb: str, *arguments: Path | str) -> str:
    """A command of ours with its arguments.

    >>> command("train", "--resume", Path("my runs/a"))
    "edgeblocks train --resume 'my runs/a'"
    """
    return shlex.join(["edgeblocks", *verb.split(), *map(str, arguments)])
