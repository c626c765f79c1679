"""`compare`: ways to train the same network, side by side."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeblocks.cli.exit_codes import verb
from edgeblocks.cli.options import SETTINGS, Json, given_settings
from edgeblocks.cli.screen import json_text, say_lines
from edgeblocks.errors import ConfigError, EdgeblocksError
from edgeblocks.methods import DIFFUSION
from edgeblocks.report.comparison import with_error
from edgeblocks.terminal import one_line
from edgeblocks.units import format_bytes, format_duration

if TYPE_CHECKING:
    from edgeblocks.report.comparison import Comparison, Row


_OF_AN_ARM = {"method", "init", "train_blocks", "partition", "max_disk_writes"}
"""Settings that an arm decides, or that not every arm has."""


@verb(flags={name: kind for name, kind in SETTINGS.items() if name not in _OF_AN_ARM})
def compare(
    arms: Annotated[
        str | None,
        typer.Option(
            help="Ways to train, with commas between: diffusion, exact, plain (an ordinary loop without a budget), "
            "plain+ckpt, plain+8bit, plain+ckpt+8bit.",
            show_default="diffusion,exact,plain, and plain+ckpt+8bit where bitsandbytes is installed",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Train each arm for this many minutes instead of a number of steps; a short trial measures how many "
            "steps fit."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Times that each arm is trained, each with another seed.")] = 1,
    *,
    flags: dict[str, object],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the arms.", show_default="compare/FAMILY-DATA"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train the same network in several ways and report quality, time and memory of each.

    Every arm has a process of its own, one after the other. The same command again goes on with what is missing.
    """
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.compare.arms import arms_of
    from edgeblocks.compare.trainings import compare as train_arms
    from edgeblocks.compare.wanted import Asked

    given, config = given_settings(flags)
    if minutes is not None and "steps" in given:
        raise ConfigError("--minutes and --steps: an arm trains for a time or for a number of steps")
    with ConsoleListener() as listener:
        parsed = arms_of(arms, listener.note)
        asked = Asked(arms=parsed, seeds=seeds, minutes=minutes, settings=given, config=config)
        content, folder = train_arms(asked, out, listener)
        # Only now: the page's code imports torch, which would lie in memory beside each training.
        from edgeblocks.report.comparison_page import comparison_page
        from edgeblocks.runs.directory import write_text

        write_text(folder / "report.html", comparison_page(content))
    say_lines(json_text(content) if as_json else comparison_table(content, folder))
    if all(row["failure"] is not None for row in content["arms"]):
        raise EdgeblocksError("no arm has a result")


def comparison_table(content: "Comparison", folder: Path) -> str:
    """What `compare` prints: one line an arm, means over the seeds with each seed's figure behind."""
    better = "higher" if content["higher_is_better"] else "lower"
    rows = [["arm", f"{content['measure']} ({better} is better)", "steps", "time", "a step", "peak", "budget"]]
    rows += [_cells(name, rows_of) for name, rows_of in by_arm(content["arms"]).items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [*lines, "", f"{one_line(folder / 'report.html')}: curves, memory over time; compare.json: the figures"]
    )


def by_arm(rows: "Sequence[Row]") -> "dict[str, list[Row]]":
    """The trainings of each arm, in the order of the arms."""
    return {name: [row for row in rows if row["arm"] == name] for name in dict.fromkeys(row["arm"] for row in rows)}


def _cells(name: str, rows: "Sequence[Row]") -> list[str]:
    done = [row for row in rows if row["failure"] is None]
    if not done:
        return [name, f"none: {rows[0]['failure']}", "", "", "", "", ""]
    final = [row["quality"][-1] for row in done]
    spread = f" ({', '.join(format(mark['value'], '.4f') for mark in final)})" if len(final) > 1 else ""
    spread = spread or with_error(final[0], ".4f")
    budget = done[0]["budget_bytes"]
    return [
        name
        + (f", {done[0]['blocks']} blocks" if done[0]["blocks"] > 1 and name == DIFFUSION.name else "")
        + (f" ({len(rows) - len(done)} of {len(rows)} seeds failed)" if len(done) < len(rows) else ""),
        f"{statistics.mean(mark['value'] for mark in final):.4f}{spread}",
        "/".join(dict.fromkeys(str(row["steps"]) for row in done)),
        format_duration(statistics.mean(row["seconds"] for row in done)),
        format_duration(statistics.mean(row["step_s"] for row in done)),
        format_bytes(max(row["peak_bytes"] for row in done)),
        "none" if budget is None else format_bytes(budget),
    ]
