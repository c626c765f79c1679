"""A bar of stacked parts as a piece of a page: how a whole is divided."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgeblocks.report.colours import series_colour
from edgeblocks.report.page import fragment


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a bar. One that is `quiet` is grey: nobody chose it; one that is `free` is empty: it is not used."""

    label: str
    value: float
    quiet: bool = False
    free: bool = False


def stacked_bar(parts: Sequence[Part], *, title: str, write: Callable[[float], str], caption: str = "") -> Markup:
    """HTML of a bar with a legend that has each part's value and share; parts of nothing are left out.

    Args:
        write: how a value is written, for example `units.format_bytes`.
    """
    parts = [part for part in parts if part.value > 0]
    total = sum(part.value for part in parts)
    coloured = [part for part in parts if not (part.free or part.quiet)]
    rows = [
        {
            "label": part.label,
            "value": write(part.value),
            "share": f"{part.value / total:.1%}",
            "width": f"{100 * part.value / total:.3f}",
            "colour": _colour(part, coloured),
        }
        for part in parts
    ]
    shares = ", ".join(f"{row['label']} {row['share']}" for row in rows)
    return fragment("bar.html", title=title, rows=rows, description=f"{title}: {shares}", caption=caption)


def _colour(part: Part, coloured: Sequence[Part]) -> str | None:
    """In CSS; None of what is drawn empty."""
    if part.free:
        return None
    return "var(--quiet)" if part.quiet else series_colour(coloured.index(part), len(coloured))
