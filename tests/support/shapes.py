"""The shapes that annotations promise, checked at every call or not at all.

Checks take half of a small run's time. Tests of networks and of what runs them make all of them, and so does one run
of each family and method; elsewhere the same calls would be checked again and again.
"""

import contextlib
from collections.abc import Iterator

from jaxtyping import config


@contextlib.contextmanager
def checked_shapes(wanted: bool = True) -> Iterator[None]:
    former = config.jaxtyping_disable
    config.update("jaxtyping_disable", not wanted)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", former)
