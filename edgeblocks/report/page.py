"""A page in one HTML file: its frame, and the pieces that are not drawings. Everything that is put in is escaped.

The file asks for nothing else: style and drawings are in it, there is no script, and a content security policy makes
the browser refuse any request, whatever text a run may bring along.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from edgeblocks.terminal import visible

NO_BREAK = "\N{NO-BREAK SPACE}"
_ONE_LINE = 14
"""Characters of a value that is not broken."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under a heading. `pieces` are HTML from this package's functions.

    `wide` pieces take the whole width; others stand two in a row where there is room.
    """

    title: str
    pieces: Sequence[Markup]
    wide: bool = False
    folded: bool = False
    """Whether only the heading is seen until it is clicked on."""
    note: str = ""


def render(
    title: str, sections: Sequence[Section], *, kind: str, lead: Markup | None = None, footer: str = ""
) -> Markup:
    """The whole page.

    Args:
        title: of the page and of the browser's window.
        kind: what is above the title, such as "run report".
        lead: HTML below the title, such as from `verdict` and `tiles`.
        footer: the last line.
    """
    return fragment("page.html", title=title, kind=kind, lead=lead or "", sections=sections, footer=footer)


def fragment(template: str, /, **values: object) -> Markup:
    """HTML of one of this package's templates. Strings are escaped unless they are HTML of this package already."""
    return Markup(_environment().get_template(template).render(values))


def verdict(text: str, *, good: bool) -> Markup:
    """The page's one sentence; one that is not good has another colour and a sign."""
    return fragment("verdict.html", text=text, good=good)


def tiles(facts: Sequence[tuple[str, str, str]]) -> Markup:
    """The few numbers that are looked for first: each with its name and a word on it."""
    return fragment("tiles.html", facts=facts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", wide: bool = False) -> Markup:
    """A table whose first column names the rows. With a head it is of numbers, without one a list of names and values.

    Args:
        wide: whether it takes the whole width among pieces that stand two in a row.
    """
    if head:  # a short value stays in one line, as "418 MB" does; a long one goes on in the next, so that the page fits
        rows = [[cell.replace(" ", NO_BREAK) if len(cell) <= _ONE_LINE else cell for cell in row] for row in rows]
    return fragment("table.html", head=head, rows=rows, caption=caption, wide=wide)


def card(title: str, text: str) -> Markup:
    """A few words in the place of a figure."""
    return fragment("card.html", title=title, text=text)


def notes(texts: Sequence[str]) -> Markup:
    """Remarks, one a line."""
    return fragment("notes.html", texts=texts)


def _printable(value: object) -> object:
    """A name as it may stand in a page; what is markup is ours."""
    return visible(value) if type(value) is str else value


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("edgeblocks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
