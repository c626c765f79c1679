"""Python processes that are started from this one.

Python looks for modules in the folder that it is started in before it looks among its own: a user's random.py there, or
the json.py of a run that came from elsewhere, would be run in the place of a library.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

_SAFE_PATH = "PYTHONSAFEPATH"


def python_module(name: str, *arguments: str) -> list[str]:
    """The command that runs an installed module, whatever is in the folder where it is started.

    >>> python_module("edgeblocks.cli", "plan")[1:]
    ['-P', '-m', 'edgeblocks.cli', 'plan']
    """
    return [sys.executable, "-P", "-m", name, *arguments]


@contextlib.contextmanager
def installed_modules_first() -> Iterator[None]:
    """The same for processes that a library starts meanwhile, such as those of `multiprocessing`."""
    former = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = former
