"""Sizes and durations as text, at the edges only. Inside, sizes are ints of bytes."""

import math
import re

PROCESSES_DIFFER_BYTES = 2_000_000
"""Interpreter and libraries of one program take this much more or less from process to process, measured."""
BARE_PROCESS_BYTES = 320_000_000
"""More than the interpreter and the libraries of training take, measured 225 to 300 MB."""
ABOUT_THE_SAME = 0.05
"""Two figures whose noise is not known and that differ by no larger share are not called different."""
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]*|%)\s*", re.ASCII)


def parse_size(text: str, *, whole_bytes: int | None = None) -> int:
    """Bytes of a size such as `6GB`, `512MiB`, `1.5 GB` or `50%` (of `whole_bytes`).

    Raises:
        ValueError: not a size, not positive, or a percentage where no whole is known.

    >>> parse_size("6GB"), parse_size("1 KiB"), parse_size("50%", whole_bytes=1000)
    (6000000000, 1024, 500)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a size; write for example 6GB, 512MiB or 50%")
    number, unit = float(match["number"]), match["unit"].upper()
    if unit == "%":
        if whole_bytes is None:
            raise ValueError(f"'{text}': a percentage has no meaning here; write for example 6GB")
        if number > 100:
            raise ValueError(f"'{text}' is more than all of the memory; write at most 100%")
        size_bytes = int(whole_bytes * number / 100)
    elif unit in _UNITS:
        size_bytes = int(number * _UNITS[unit])
    else:
        raise ValueError(f"'{match['unit']}' in '{text}' is not a unit; use KB, MB, GB, KiB, MiB, GiB or %")
    if size_bytes <= 0:
        raise ValueError(f"'{text}' is {size_bytes} bytes; a size must be larger than zero")
    return size_bytes


def advised_budget(needed_bytes: int) -> str:
    """A budget, as a flag takes it, that will still do when it is tried in the next process.

    >>> advised_budget(441_200_000)
    '444MB'
    """
    return f"{math.ceil((needed_bytes + PROCESSES_DIFFER_BYTES) / 1e6)}MB"


def who_holds(taken_bytes: int) -> str:
    """Whose the memory is that a process takes before anything is read or planned, in words.

    >>> who_holds(250_000_000), who_holds(2_000_000_000)
    ('the interpreter and its libraries', 'what this process already holds')
    """
    return (
        "the interpreter and its libraries" if taken_bytes < BARE_PROCESS_BYTES else "what this process already holds"
    )


def format_bytes(size_bytes: float) -> str:
    """A size for people, three significant digits, decimal units.

    >>> format_bytes(687_194_767), format_bytes(2048), format_bytes(0)
    ('687 MB', '2.05 KB', '0 B')
    """
    size = float(size_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_duration(duration_s: float) -> str:
    """A duration for people.

    >>> format_duration(0.0123), format_duration(75), format_duration(3700)
    ('12.3 ms', '1 min 15 s', '1 h 02 min')
    >>> format_duration(71.9 * 3600), format_duration(926 * 3600), format_duration(2401 * 3600)
    ('71 h 54 min', '38 days 14 h', '100 days')
    """
    if duration_s < 1:
        return f"{duration_s * 1000:.3g} ms"
    if duration_s < 60:
        return f"{duration_s:.3g} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(duration_s / 60), 60)
    if hours < 72:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(duration_s / 3600), 24)
    return f"{days} days {hours} h" if days < 100 else f"{days} days"


def format_count(count: float) -> str:
    """A count for people.

    >>> format_count(3_531_000), format_count(1_500_000_000), format_count(999.7)
    ('3.53M', '1.5B', '1k')
    """
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:.3g}"
