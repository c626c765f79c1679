"""`info`, `report`, `settings` and `doctor`: what is there."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgeblocks.cli.exit_codes import verb
from edgeblocks.cli.options import Json, Overwrite, RunArgument, WritingBudget
from edgeblocks.cli.screen import json_text, say, say_lines


@verb()
def info(
    path: Annotated[Path, typer.Argument(help="A run directory or an exported directory.", show_default=False)],
    as_json: Json = False,
) -> None:
    """What a run directory or an exported directory holds."""
    from edgeblocks.cli.console import facts
    from edgeblocks.runs.describe import describe

    description = describe(path)
    say_lines(
        json_text(description) if as_json else facts([(key, _readable(value)) for key, value in description.items()])
    )


@verb()
def report(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file that is written.", show_default="RUN/report.html")
    ] = None,
    mem_budget: WritingBudget = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page of a run: plan against measured, losses, memory against the budget, time, samples.

    The file needs no network and no other file. A run that is not finished is shown as far as it is, undisturbed.
    """
    from edgeblocks.report.run_report import write_report

    written = write_report(run, out, overwrite=overwrite, mem_budget=mem_budget)
    say(json_text(written.to_json()) if as_json else written.line())


@verb()
def settings(
    family: Annotated[
        str | None, typer.Argument(help="Those of this family; all families otherwise.", show_default=False)
    ] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the tables of docs/settings.md.")] = False,
) -> None:
    """List every setting with its default, what it may be, and what it means."""
    from edgeblocks.cli.console import wrapped_table
    from edgeblocks.registry import family_names, family_type
    from edgeblocks.settings.table import HEADINGS, as_markdown, family_settings, run_settings

    names = family_names() if family is None else (family,)
    of_families = family_settings({name: family_type(name).settings_type for name in names})
    tables = {"of every run": run_settings(), f"of {', '.join(names)}": of_families}
    if as_json:
        say_lines(json_text([{**asdict(setting), "of": of} for of, table in tables.items() for setting in table]))
        return
    for of, table in tables.items():
        rows = [HEADINGS, *(tuple(cell.replace("`", "") for cell in setting.cells) for setting in table)]
        say_lines(f"\n{of}:\n\n{as_markdown(table) if markdown else wrapped_table(rows)}")
    say_lines(
        "\nGive one with --set key=value, in a file with --config, or as a keyword from Python; presets give some"
    )


@verb()
def doctor(
    work_dir: Annotated[
        Path, typer.Option("--work-dir", help="Folder whose disk is measured: where runs will be written.")
    ] = Path(),
    time_s: Annotated[
        float,
        typer.Option("--time", min=5, max=3600, help="Seconds that it may take; a busy machine needs more."),
    ] = 28.0,
    as_json: Json = False,
) -> None:
    """Measure this machine in half a minute: which budgets and presets are sensible, what is wrong, what mends it."""
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.doctor.examination import examine, report_text

    with ConsoleListener() as listener:
        report = examine(work_dir, listener, limit_s=time_s)
    say_lines(json_text(report.to_json()) if as_json else report_text(report))


def _readable(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_readable(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_readable, value))
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e-3 else str(value)
