"""A verb's errors as messages and exit codes: 1 it failed, 2 wrong use, 3 does not fit the budget, 130 interrupted."""

import sys
from collections.abc import Callable

import typer

from edgeblocks.errors import EdgeblocksError


def guarded(work: Callable[[], None], *, verbose: bool) -> None:
    """Run a verb; turn errors into their message and exit code."""
    try:
        work()
    except EdgeblocksError as error:
        if verbose:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}" if error.exit_code != 130 else line, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        raise typer.Exit(1) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if verbose:
            raise
        print(f"error: {type(error).__name__}: {error}. --verbose shows where", file=sys.stderr)
        raise typer.Exit(1) from error
