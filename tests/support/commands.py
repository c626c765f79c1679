"""The command in this process."""

import re

from typer.testing import CliRunner

from edgeblocks.cli.main import app

TINY = ["--steps", "2", "--batch", "4", "--set", "depth=3", "--set", "width=16", "--set", "sample_grids=0"]
TINY += ["--set", "hold_out=0.005"]  # to evaluate takes longer than to train


def invoke(*arguments, typed=None):
    """`typed` is its standard input."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


def assert_refused(result, exit_code, message):
    """The exit code, the message on standard error, and no traceback."""
    assert result.exit_code == exit_code, (result.output, result.exception)
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert "Traceback" not in result.output
