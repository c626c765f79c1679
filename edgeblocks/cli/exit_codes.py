"""A verb as a command: its options, and its errors as messages and exit codes: 1 it failed, 2 wrong use, 3 does not fit
the budget, 130 interrupted."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Annotated

import typer

from edgeblocks.cli.screen import complain, drop_output, finish_output
from edgeblocks.errors import EdgeblocksError

_Verb = Callable[..., None]
_VERBOSE = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]


def verb(**tables: Mapping[str, object]) -> Callable[[_Verb], _Verb]:
    """Make a command of a function: it has --verbose, and its errors become messages and exit codes.

    Args:
        tables: by the name of a parameter, the options that it stands for: their types by their names. The function
            gets them as a dict, None where nothing was typed.
    """

    def command(function: _Verb) -> _Verb:
        options: list[inspect.Parameter] = []
        for own in inspect.signature(function).parameters.values():
            table = tables.get(own.name)
            options += [own] if table is None else [_option(name, kind, None) for name, kind in table.items()]
        options.append(_option("verbose", _VERBOSE, False))

        @wraps(function)
        def run(*, verbose: bool, **typed: object) -> None:
            given = {own: {name: typed.pop(name) for name in table} for own, table in tables.items()}
            _guarded(partial(function, **typed, **given), verbose=verbose)

        keyword_only = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
        vars(run)["__signature__"] = inspect.Signature(keyword_only)  # what typer reads
        return run

    return command


def _option(name: str, kind: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _guarded(work: Callable[[], None], *, verbose: bool) -> None:
    """Run a verb; turn errors into their message and exit code."""
    try:
        work()
        finish_output()
    except EdgeblocksError as error:
        if verbose:
            raise
        for problem in error.problems:
            complain(f"error: {problem}" if error.exit_code != 130 else problem)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        complain("interrupted")
        raise typer.Exit(130) from error
    except BrokenPipeError as error:  # whoever read it has enough
        drop_output(sys.stdout)
        raise typer.Exit(1) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if verbose:
            raise
        complain(f"error: {_unforeseen(error)}")
        raise typer.Exit(1) from error


def _unforeseen(error: Exception) -> str:
    """An error of the system or of a library, in a line."""
    asked = getattr(error, "filename", None)
    if isinstance(asked, str) and asked.startswith("/proc/"):
        return (
            f"{asked} cannot be read ({getattr(error, 'strerror', error)}): the system is asked there how much memory "
            "it has and how much is used; mount it: mount -t proc proc /proc"
        )
    return f"{type(error).__name__}: {error}. --verbose shows where"
