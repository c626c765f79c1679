"""The command line: its verbs, one function each. Torch is imported by those that need it, when they run.

Exit codes: 0 done; 1 the run failed; 2 wrong use; 3 does not fit the budget; 130 interrupted and saved.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeblocks.cli import chatting, comparing, inspection, trained, training
from edgeblocks.cli.screen import complain, open_streams, say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        say(f"edgeblocks {metadata.version('edgeblocks')}")
        raise typer.Exit


@app.callback()
def edgeblocks(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train a deep network block by block under a memory budget; deploy it with onnxruntime."""


app.command()(training.plan)
app.command()(training.train)
app.command()(training.gather)
app.command()(training.finetune)
app.command("eval")(trained.evaluate)
app.command()(trained.sample)
app.command()(chatting.chat)
app.command()(trained.export)
app.command()(trained.weights)
app.command()(trained.merge)
app.command()(trained.run)
app.command()(comparing.compare)
app.command()(inspection.info)
app.command()(inspection.report)
app.command()(inspection.settings)
app.command()(inspection.doctor)


def main() -> None:
    """The `edgeblocks` command."""
    # Torch's threads wait for each other actively for some milliseconds. Where another program holds a core this made a
    # step 3 times slower; 5,000 turns cost nothing on a quiet machine and a sixth less on a busy one.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    open_streams()
    try:
        Path.cwd()
    except OSError as error:  # torch's libraries end the process without a word of why
        complain(f"error: the folder that this command was started in is gone ({error.strerror}); cd to another one")
        sys.exit(2)
    app()
