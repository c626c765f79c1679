"""What reaches a terminal: texts that cannot steer it, and commands that can be pasted.

Names of files and classes may hold any character: an escape would change the terminal, a line break the format.
"""

import re
import shlex
from pathlib import Path

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and line feed, what turns the direction of writing, and bytes that are no text."""


def visible(text: str) -> str:
    r"""The text, its control characters written out. Its lines stay.

    >>> print(visible("x\x1b[31mred"))
    x\x1b[31mred
    """
    return _STEERING.sub(lambda found: _written(found[0]), text)


def one_line(text: object) -> str:
    r"""A name inside a line, for people.

    >>> print(one_line("a\nb"))
    a\nb
    """
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def quoted(name: Path | str) -> str:
    r"""A name as a shell takes it, in one line of text.

    >>> print(quoted(Path("my runs/a")), quoted("runs/a"), quoted("a\nb"))
    'my runs/a' runs/a $'a\nb'
    """
    text = str(name)
    if one_line(text) == text:
        return shlex.quote(text)
    return "$'" + one_line(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def command(verb: str, *arguments: Path | str) -> str:
    """A command of ours with its arguments.

    >>> command("train", "--resume", Path("my runs/a"))
    "edgeblocks train --resume 'my runs/a'"
    """
    return " ".join(["edgeblocks", verb, *map(quoted, arguments)])


def _written(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's name for a byte that is no text
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
