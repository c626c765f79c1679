"""Line figures as a piece of a page: an SVG that follows the page's light or dark colours, and a legend in HTML.

Matplotlib draws with stand-in colours that mean nothing, and each is replaced by a CSS colour in what it wrote: the one
drawing is right in light and in dark, and nothing has to be drawn twice. Words in the drawing stay text, which the
page's fonts set; names that come from outside are in the legend alone, where the page escapes them. A drawing is made
for half of a desktop page, which is about the width of a phone, so that its letters stay readable on both.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from edgeblocks.report.colours import MOST_NAMED, series_colour
from edgeblocks.report.page import fragment
from edgeblocks.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Unit = Literal["number", "bytes", "seconds", "share"]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]

_INCHES = (5.5, 3.4)
"""72 units of the drawing each: with letters of 12 units, 14 pixels high on a desktop and 10 on a phone."""
_LETTERS = 12.0
_INK, _GRID, _OF_SERIES = "#020001", "#020002", "#01%04x"
_FIXED = {_INK: "var(--muted)", _GRID: "var(--line)"}
_DASHES = ("--", ":", "-")
_MOST_POINTS = 600
"""Of a line: more are not seen, and each takes some 20 bytes of the page."""
_LARGEST = 1e30
"""A larger number, or on a logarithmic axis a smaller one than its inverse, is no measurement."""
_SMOOTHING = 50
"""The moving mean reaches over so small a part of a line's points to each side."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: `y` against `x`, in the order of x. Points that are no numbers are left out.

    With `smooth` a moving mean is drawn over the values themselves, which stay visible behind it; with `marks` each
    point has a mark.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False
    marks: bool = False


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A level that the lines are seen against, such as a budget: a grey line across the figure, dashed the first.

    On a logarithmic axis one that is not above zero is left out.
    """

    label: str
    value: float


def line_figure(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_unit: Unit = "number",
    y_unit: Unit = "number",
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    references: Sequence[Reference] = (),
    caption: str = "",
) -> Markup:
    """HTML of a figure: title, drawing, legend (where there is more than one thing to tell apart) and caption.

    All words may be anybody's: they are escaped. Where no series has a point that can be drawn, the figure says so.

    Args:
        x_label: what x is, with its unit; seconds are drawn in a fitting unit, which is put behind it.
        y_label: the same for y; it also says to a screen reader what is drawn.
        x_unit: how the numbers along the axis are written; those along the y axis are never changed for it.
        log_x: whether the axis is logarithmic; values of zero and less are left out then.
        from_zero: whether the y axis begins at zero.
        caption: conditions and units, as far as the title does not say them.
    """
    lines = [_drawable(one, log_x=log_x, log_y=log_y) for one in series]
    references = [one for one in references if one.value > 0 or not log_y]
    x_scale, x_name = _time_scale(lines) if x_unit == "seconds" else (1.0, "")
    lines = [(x / x_scale, y) for x, y in lines]
    svg = ""
    if any(len(x) for x, _ in lines):
        figure, axes = _empty_axes(log_x=log_x, log_y=log_y)
        _draw_all(axes, series, lines, references)
        axes.set_xlim(limits(np.concatenate([x for x, _ in lines]), log=log_x))
        axes.set_ylim(_height(lines, references, log_y=log_y, from_zero=from_zero and not log_y))
        _write_axis(axes.xaxis, "number" if x_unit == "seconds" else x_unit, log=log_x)
        _write_axis(axes.yaxis, y_unit, log=log_y)
        axes.set_xlabel(f"{x_label}{x_name}", color=_INK, parse_math=False)
        svg = _themed(_svg_of(figure), num_series=len(series))
    return fragment(
        "figure.html",
        title=title,
        y_label=y_label,
        description=f"{title}: {y_label} against {x_label}{x_name}",
        svg=svg,
        caption=caption,
        is_scale=len(series) > MOST_NAMED,
        keys=[(one.label, series_colour(number, len(series))) for number, one in enumerate(series)],
        references=[(one.label, _DASHES[number % len(_DASHES)]) for number, one in enumerate(references)],
    )


def _drawable(one: Series, *, log_x: bool, log_y: bool) -> Points:
    x, y = np.asarray(one.x, dtype=np.float64), np.asarray(one.y, dtype=np.float64)
    good = np.isfinite(x) & np.isfinite(y) & (np.abs(x) < _LARGEST) & (np.abs(y) < _LARGEST)
    if log_x:
        good &= x > 1 / _LARGEST
    if log_y:
        good &= y > 1 / _LARGEST
    return x[good], y[good]


def _time_scale(lines: Sequence[Points]) -> tuple[float, str]:
    """Seconds of the unit of the longest line, and its name."""
    longest = max((float(x.max()) for x, _ in lines if len(x)), default=0.0)
    for unit_s, name in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * unit_s:
            return unit_s, f" ({name})"
    return 1.0, " (seconds)"


def _empty_axes(*, log_x: bool, log_y: bool) -> tuple["Figure", "Axes"]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": _LETTERS, "axes.labelsize": _LETTERS}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_all(axes: "Axes", series: Sequence[Series], lines: Sequence[Points], references: Sequence[Reference]) -> None:
    for number, (one, (x, y)) in enumerate(zip(series, lines, strict=True)):
        _draw(axes, one, x, y, colour=_OF_SERIES % number, over=number)
    for number, reference in enumerate(references):
        dash = _DASHES[number % len(_DASHES)]
        axes.axhline(reference.value, color=_INK, linestyle=dash, linewidth=1.4, zorder=1.5)


def _draw(axes: "Axes", one: Series, x: NDArray[np.float64], y: NDArray[np.float64], *, colour: str, over: int) -> None:
    marks: dict[str, Any] = {"marker": "o", "markersize": 4.5} if one.marks or len(x) == 1 else {}
    if not one.smooth or len(x) < 8:
        axes.plot(*_thinned(x, y), color=colour, linewidth=1.8, zorder=3 + over / 100, **marks)
        return
    axes.plot(*_thinned(x, y), color=colour, linewidth=0.8, alpha=0.38, zorder=2)
    axes.plot(*_thinned(x, moving_mean(y)), color=colour, linewidth=2.0, zorder=3 + over / 100)


def moving_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the values around each, of which there are fewer at the ends.

    >>> moving_mean(np.array([3.0, 1.0, 2.0]))
    array([2. , 2. , 1.5])
    """
    count = len(values)
    reach = max(1, min(3, count // 8), count // _SMOOTHING)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    place = np.arange(count)
    first, last = np.maximum(place - reach, 0), np.minimum(place + reach + 1, count)
    means: NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return means


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Points:
    """The smallest and the largest value of each of many short stretches: what an eye sees of all of them."""
    if len(x) <= _MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x), _MOST_POINTS // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(edges):
        kept |= {int(start + y[start:end].argmin()), int(start + y[start:end].argmax())}
    places = np.array(sorted(kept))
    return x[places], y[places]


def _height(
    lines: Sequence[Points], references: Sequence[Reference], *, log_y: bool, from_zero: bool
) -> tuple[float, float]:
    """The ends of the y axis."""
    values = np.concatenate([*(y for _, y in lines), [one.value for one in references]])
    if from_zero:
        return 0.0, limits(np.append(values, 0.0), log=False)[1]
    return limits(values, log=log_y)


def limits(values: NDArray[np.float64], *, log: bool) -> tuple[float, float]:
    """The ends of an axis on which all values, of which there is one at least, have a little room.

    >>> limits(np.array([0.0, 100.0]), log=False), limits(np.array([5.0]), log=False)
    ((-4.0, 104.0), (4.5, 5.5))
    """
    low, high = float(values.min()), float(values.max())
    if log:
        room = max((high / low) ** 0.04, 1.0 if high > 1.01 * low else 1.5)
        return low / room, high * room
    span = high - low
    room = 0.04 * span if span > 1e-6 * max(abs(low), abs(high)) else 0.1 * max(abs(low), abs(high))
    return low - max(room, 1e-12), high + max(room, 1e-12)


def _write_axis(axis: "Axis", unit: Unit, *, log: bool) -> None:
    """Numbers as people write them, few enough for a narrow figure."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    if log:
        axis.set_major_locator(LogLocator(subs=_log_marks(math.log10(high / low)), numticks=8))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    write = _WRITERS[unit]
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_tick_params(length=0, labelcolor=_INK, pad=6)


def _log_marks(decades: float) -> tuple[float, ...]:
    """Which digits are written along a logarithmic axis, so that there are some four of them."""
    if decades > 1.5:
        return (1.0,) if decades > 3 else (1.0, 3.0)
    return (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if decades < 0.8 else (1.0, 2.0, 5.0)


def _number(value: float) -> str:
    """A number beside an axis.

    >>> _number(1200.0), _number(2_500_000.0), _number(0.0314), _number(0.0)
    ('1,200', '2.5M', '0.0314', '0')
    """
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


_WRITERS: dict[Unit, Callable[[float], str]] = {
    "number": _number,
    "seconds": _number,
    "bytes": format_bytes,
    "share": lambda value: f"{100 * value:.4g} %",
}


def _svg_of(figure: "Figure") -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "edgeblocks", "path.simplify": True}
    with mpl.rc_context(settings):
        FigureCanvasSVG(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return written.getvalue()


def _shortened(path: re.Match[str]) -> str:
    """A path with one decimal a number: a tenth of a unit is a tenth of a pixel."""
    return re.sub(r"(\.\d)\d+", r"\1", path[0])


_drawings: Iterator[int] = itertools.count()
"""Names inside a drawing must differ from those of the other drawings of a page."""


def _themed(svg: str, *, num_series: int) -> str:
    """The `<svg>` element alone, with CSS colours, without a size of its own, with names of its own."""
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]+"', body)
    assert box is not None, "matplotlib wrote an SVG without a viewBox"
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body[body.index(">") + 1 :], flags=re.DOTALL)
    body = re.sub(r'\bd="[^"]*"', _shortened, body)
    for stand_in, colour in _FIXED.items():
        body = body.replace(stand_in, colour)
    for number in range(num_series):
        body = body.replace(_OF_SERIES % number, series_colour(number, num_series))
    prefix = f"d{next(_drawings)}-"
    body = re.sub(r'(\bid="|url\(#|href="#)', lambda match: match[0] + prefix, body)
    return f'<svg {box[0]} aria-hidden="true">{body.replace("xlink:href", "href")}'
