"""The one place that prints: on standard output what a verb gives, on standard error what it has to say meanwhile."""

import contextlib
import io
import json
import os
import sys
from typing import TextIO

from edgeblocks.terminal import one_line, visible


def open_streams() -> None:
    """Standard input, output and error are there and take every character.

    A closed one is opened to nowhere: else the next file that is opened gets its number, and what a library complains
    of would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - open as long as the process is
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal without UTF-8 cannot show is a question mark


def say(text: str) -> None:
    """One line on standard output."""
    print(one_line(text))


def say_lines(text: str, *, end: str = "\n") -> None:
    """Several lines on standard output, whose names were made `one_line` when they were put in."""
    print(visible(text), end=end)


def json_text(value: object) -> str:
    """A value as JSON in plain ASCII."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def say_raw(text: str) -> None:
    """A text as it is, for a file or another program; a terminal gets it without what would steer it."""
    print(visible(text) if sys.stdout.isatty() else text, end="")


def complain(text: str) -> None:
    """One line on standard error."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(one_line(text), file=sys.stderr)


def finish_output() -> None:
    """Have standard output written now, while an error can still be told.

    Raises:
        OSError: it could not be; the rest of it is dropped.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        drop_output(sys.stdout)
        raise


def drop_output(stream: TextIO) -> None:
    """What was not written yet goes nowhere: the interpreter would complain of it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
