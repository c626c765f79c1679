"""`info`, `report` and `doctor`: what is there."""

from pathlib import Path
from typing import Annotated

import typer

from edgeblocks.cli.exit_codes import verb
from edgeblocks.cli.options import Json, Overwrite, RunArgument
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
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page of a run: plan against measured, losses, memory against the budget, time, samples.

    The file needs no network and no other file. A run that is not finished is shown as far as it is, undisturbed.
    """
    from edgeblocks.report.run_report import write_report

    written = write_report(run, out, overwrite=overwrite)
    say(json_text(written.to_json()) if as_json else written.line())


@verb()
def doctor(
    work_dir: Annotated[
        Path, typer.Option("--work-dir", help="Folder whose disk is measured: where runs will be written.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Measure this machine in half a minute: which budgets and presets are sensible, what is wrong, what mends it."""
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.doctor.examination import examine, report_text

    with ConsoleListener() as listener:
        report = examine(work_dir, listener)
    say_lines(json_text(report.to_json()) if as_json else report_text(report))


def _readable(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_readable(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_readable, value))
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e-3 else str(value)
