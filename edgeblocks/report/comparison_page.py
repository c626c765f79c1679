"""The page of a comparison: which way of training gave what, for how much time and memory."""

import math
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from markupsafe import Markup

from edgeblocks.methods import METHODS
from edgeblocks.report import page
from edgeblocks.report.bars import Part, stacked_bar
from edgeblocks.report.comparison import Comparison, Row, has_too_few, with_error
from edgeblocks.report.figures import Reference, Series, line_figure
from edgeblocks.report.page import Section
from edgeblocks.report.surroundings import values_table
from edgeblocks.units import ABOUT_THE_SAME, format_bytes, format_count, format_duration


def comparison_page(content: Comparison) -> str:
    """The HTML report of a comparison.

    Args:
        content: of compare.json.
    """
    settings = content["settings"]
    name = Path(str(settings["data"])).name
    return page.render(
        f"Ways to train {content['family']} on {name}",
        _sections(content),
        kind="edgeblocks: comparison",
        lead=_lead(content),
        footer=f"Made by edgeblocks {metadata.version('edgeblocks')} on {datetime.now(UTC):%d %B %Y, %H:%M} UTC.",
    )


def trained(content: Comparison) -> dict[str, list[Row]]:
    """The trainings of each arm that have a result, by the arm's name."""
    rows = [row for row in content["arms"] if row["failure"] is None]
    return {name: [row for row in rows if row["arm"] == name] for name in dict.fromkeys(row["arm"] for row in rows)}


def final_value(rows: Sequence[Row]) -> float:
    """The mean over the seeds of the figure at the end."""
    return float(statistics.mean(row["quality"][-1]["value"] for row in rows))


def _lead(content: Comparison) -> Markup:
    arms = trained(content)
    failed = [f"{row['arm']}, seed {row['seed']}: {row['failure']}" for row in content["arms"] if row["failure"]]
    pieces = [page.verdict(_verdict(content, arms), good=bool(arms))]
    if arms:
        pieces.append(page.tiles([_tile(content, name, rows) for name, rows in arms.items()]))
    if failed:
        pieces.append(page.notes(failed))
    return Markup().join(pieces)


def _verdict(content: Comparison, arms: dict[str, list[Row]]) -> str:
    """Which arm is best, and whether the difference is more than the noise of the measurement."""
    if not arms:
        return "No arm has a result"
    sign = -1 if content["higher_is_better"] else 1
    order = sorted(arms, key=lambda name: sign * final_value(arms[name]))
    verdict = f"Best {content['measure']} at equal {content['equal']}: {order[0]}"
    if len(order) == 1:
        return verdict
    first, second = arms[order[0]], arms[order[1]]
    if any(has_too_few(row["quality"][-1]) for row in (*first, *second)):
        return f"{verdict}; {content['examples']} examples are too few to tell whether {order[1]} is worse"
    difference = abs(final_value(first) - final_value(second))
    noise = 2 * math.hypot(_error(first), _error(second))
    share = difference / max(abs(final_value(first)), abs(final_value(second)), 1e-30)
    if not noise and share <= ABOUT_THE_SAME:
        return f"{verdict}, and {order[1]} is about as good: they differ by {100 * share:.2g} %, and no error is known"
    if difference < noise:
        return f"{verdict}, but the difference to {order[1]} is within the error of {content['examples']} examples"
    return f"{verdict}, before {order[1]} by {difference:.3g}"


def _error(rows: Sequence[Row]) -> float:
    """Of the mean over the seeds: from the examples' standard error, or from the seeds' spread where that is more."""
    values = [row["quality"][-1]["value"] for row in rows]
    errors = [row["quality"][-1]["standard_error"] or 0.0 for row in rows]
    of_examples = math.sqrt(statistics.mean(error**2 for error in errors))
    return max(of_examples, statistics.stdev(values) if len(values) > 1 else 0.0) / math.sqrt(len(values))


def _tile(content: Comparison, name: str, rows: Sequence[Row]) -> tuple[str, str, str]:
    peak = format_bytes(max(row["peak_bytes"] for row in rows))
    return name, f"{final_value(rows):.4g}", f"{content['measure']}, peak memory {peak}"


def _sections(content: Comparison) -> list[Section]:
    arms = trained(content)
    budget = [row["budget_bytes"] for rows in arms.values() for row in rows if row["budget_bytes"] is not None]
    better = "Higher" if content["higher_is_better"] else "Lower"
    note = (
        f"{better} is better; measured on {content['examples']} hold-out examples with the mean of the weights. Time "
        f"is that of training alone, on a machine that may have had other things to do. By default diffusion and exact "
        f"have moments of 8 bits; exact clips each stage's gradient by itself (clip_by), an ordinary loop the whole."
    )
    return [
        Section(title="Results", pieces=[_table(content, arms)], wide=True, note=note),
        Section(title="Quality", pieces=_quality_figures(content, arms)),
        Section(title="Memory and time", pieces=[_memory_figure(content, arms, budget), *_time_bars(arms)]),
        Section(title="Settings", pieces=[values_table(content["settings"])], wide=True, folded=True),
        Section(title="Environment", pieces=[values_table(content["environment"])], wide=True, folded=True),
    ]


def _table(content: Comparison, arms: dict[str, list[Row]]) -> Markup:
    """One line an arm."""
    head = ["arm", content["measure"], "steps", "time", "a step", "peak memory", "of it libraries", "budget"]
    rows = []
    for name, own in arms.items():
        values = [row["quality"][-1]["value"] for row in own]
        spread = with_error(own[0]["quality"][-1], ".2g") if len(own) == 1 else ""
        budget = own[0]["budget_bytes"]
        rows.append(
            [
                name,
                f"{final_value(own):.4f}{spread}"
                + (f" ({', '.join(f'{value:.4f}' for value in values)})" if len(own) > 1 else ""),
                "/".join(dict.fromkeys(f"{row['steps']:,}" for row in own)),
                format_duration(statistics.mean(row["seconds"] for row in own)),
                format_duration(statistics.mean(row["step_s"] for row in own)),
                format_bytes(max(row["peak_bytes"] for row in own)),
                format_bytes(own[0]["runtime_bytes"]),
                "none" if budget is None else format_bytes(budget),
            ]
        )
    caption = "A step is one of all layers: where blocks are trained alone, one step of each block."
    meanings = page.table([], [[name, own[0]["meaning"]] for name, own in arms.items()], wide=True)
    return Markup().join([page.table(head, rows, caption=caption, wide=True), meanings])


def _quality_figures(content: Comparison, arms: dict[str, list[Row]]) -> list[Markup]:
    """Quality against layer evaluations, and against time."""
    evaluations = content["evaluations_a_step"]

    def against_evaluations(row: Row) -> list[tuple[float, float]]:
        return [(mark["step"] * (evaluations or 1), mark["value"]) for mark in row["quality"]]

    def against_time(row: Row) -> list[tuple[float, float]]:
        return [(mark["seconds"], mark["value"]) for mark in row["quality"]]

    return [
        line_figure(
            _lines(arms, against_evaluations, marks=True),
            title=f"Quality against {'steps' if evaluations is None else 'layer evaluations'}",
            x_label="steps" if evaluations is None else "samples through a layer",
            y_label=content["measure"],
            caption="End to end the core is run several times in a step: steps are not equally much work."
            if evaluations is None
            else "Forward and backward count as one evaluation; what exact runs again is not counted.",
        ),
        line_figure(
            _lines(arms, against_time, marks=True),
            title="Quality against time",
            x_label="time of training",
            y_label=content["measure"],
            x_unit="seconds",
            caption="Without evaluation.",
        ),
    ]


def _lines(
    arms: dict[str, list[Row]], points_of: Callable[[Row], Sequence[tuple[float, float]]], *, marks: bool = False
) -> list[Series]:
    """A line for each training."""
    series = []
    for name, rows in arms.items():
        for row in rows:
            label = name if len(rows) == 1 else f"{name}, seed {row['seed']}"
            points = points_of(row)
            series.append(Series(label=label, x=[x for x, _ in points], y=[y for _, y in points], marks=marks))
    return series


def _memory_figure(content: Comparison, arms: dict[str, list[Row]], budgets: Sequence[int]) -> Markup:
    on_gpu = content["settings"].get("target") == "cuda"
    first = {name: rows[:1] for name, rows in arms.items()}
    return line_figure(
        _lines(first, lambda row: row["memory"]),
        title="Memory over time",
        x_label="time",
        y_label="GPU memory" if on_gpu else "process's resident memory",
        x_unit="seconds",
        y_unit="bytes",
        from_zero=True,
        references=[Reference(label="budget", value=budgets[0])] if budgets else [],
        caption="Measured between steps; peaks inside a step are in the table. Ordinary training has no budget.",
    )


def _time_bars(arms: dict[str, list[Row]]) -> list[Markup]:
    """How the time was spent, of arms that tell it."""
    bars = []
    for name, rows in arms.items():
        split = rows[0]["time_split"]
        if split is None:
            continue
        parts = [
            Part(label="compute", value=split["compute"]),
            Part(label="waiting for layers", value=split["stall"]),
            Part(label="data", value=split["data"]),
            Part(label="other: evaluation, saving", value=split["other"]),
        ]
        count = rows[0]["blocks"]
        unit = METHODS[name].part if name in METHODS else "block"
        caption = f"{format_count(count)} {unit}{'s' if count > 1 else ''}; the whole process's time."
        bars.append(stacked_bar(parts, title=f"Time of {name}", write=format_duration, caption=caption))
    return bars
