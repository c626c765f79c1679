"""The solver's arithmetic and the checks of a request for samples, shared by torch's chain and the deployed chain.

Plain operators on whatever arrays are given, and no torch. The same denoiser gives the same samples, bit for bit.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError

Solver = Literal["euler", "heun"]


class Arithmetic(Protocol):
    """An array of numpy or of torch."""

    def __add__(self, other: Self, /) -> Self: ...

    def __sub__(self, other: Self, /) -> Self: ...

    def __mul__(self, other: float, /) -> Self: ...

    def __truediv__(self, other: float, /) -> Self: ...


Array = TypeVar("Array", bound=Arithmetic)


def integrate(
    denoise: Callable[[Array, float], Array],
    z: Array,
    levels: Sequence[float],
    *,
    solver: Solver,
    on_level: Callable[[int], None] | None = None,
) -> Array:
    """Integrate the probability-flow ODE dz/dsigma = (z - D(z, sigma)) / sigma from levels[0] down to 0.

    Args:
        denoise: D(z, sigma) for all samples; it may not keep or change z.
        z: standard normal noise; it is not changed.
        levels: descending Python floats, each strictly inside its block's range.
        solver: `euler` runs the network once a level, `heun` twice except at the last.
        on_level: called with the number of levels done.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.

    >>> float(integrate(lambda z, sigma: 0 * z, np.ones((), np.float32), (80.0, 1.0), solver="euler"))
    0.0
    """
    # numpy and torch round each of these operations alike, because a Python float joins a float32 array as a float32 in
    # both.
    # At sigma_max the data are negligible beside the noise, so the chain begins with sigma_max eps.
    z = z * levels[0]
    for i, sigma in enumerate(levels):
        sigma_next = levels[i + 1] if i + 1 < len(levels) else 0.0
        # dz/dsigma towards less noise, as in EDM's algorithm 1. Equations 3 to 5 of arXiv 2506.14202 print the other
        # sign, with which noise would grow.
        # In place where it can be: an image's samples are many, and five of their size is what the plan counts.
        slope = z - denoise(z, sigma)
        slope /= sigma
        z_next = slope * (sigma_next - sigma)
        z_next += z
        # The slope divides by sigma: there is none at 0, where the last step is Euler's.
        if solver == "heun" and sigma_next > 0:
            z_next = z_next - denoise(z_next, sigma_next)
            z_next /= sigma_next
            z_next += slope
            z_next *= (sigma_next - sigma) / 2
            z_next += z
        z = z_next
        if on_level is not None:
            on_level(i + 1)
    return z


def guide(conditional: Array, unconditional: Array, guidance: float) -> Array:
    """Classifier-free guidance: D_null + guidance (D_class - D_null).

    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """
    return unconditional + (conditional - unconditional) * guidance


def check_request(*, n: int, steps: int, guidance: float, conditional: bool) -> None:
    """Check a request for samples.

    Raises:
        ConfigError: with everything that is wrong.
    """
    problems = []
    if n < 1:
        problems.append(f"--n {n}: at least one sample is needed")
    if steps < 1:
        problems.append(f"--steps {steps}: at least one step is needed")
    if not math.isfinite(guidance) or guidance < 0:
        problems.append(f"--guidance {guidance} must be a number of at least 0")
    if guidance != 1.0 and not conditional:
        problems.append("--guidance needs classes, and this network was trained without")
    if problems:
        raise ConfigError(*problems)


def class_number(label: int | str | None, class_names: Sequence[str]) -> int | None:
    """A class by name or number; a name goes first. None stays None.

    Letters with accents are written in two ways, one code or two; a name is found in either.

    Raises:
        ConfigError: there is no such class.

    >>> class_number("cat", ("dog", "cat")), class_number(0, ("dog", "cat")), class_number(None, ())
    (1, 0, None)
    >>> class_number("caf\u00e9", ("bar", "cafe\u0301"))
    1
    """
    if label is None:
        return None
    if not class_names:
        raise ConfigError(f"--class {label}: this network was trained without classes")
    text = str(label)
    if text in class_names:
        return list(class_names).index(text)
    alike = [number for number, name in enumerate(class_names) if _composed(name) == _composed(text)]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise ConfigError(
            f"--class {label}: the classes {', '.join(f'{number} ({class_names[number]!a})' for number in alike)} are "
            "written so; give the number"
        )
    if text.isascii() and text.isdecimal() and int(text) < len(class_names):
        return int(text)
    shown = ", ".join(map(_distinct, class_names[:20])) + (", .." if len(class_names) > 20 else "")
    raise ConfigError(f"--class {label}: there is no such class; the {len(class_names)} classes are {shown}")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _distinct(name: str) -> str:
    """A name as a message shows it: one with letters in parts looks like one that is written in another way."""
    return name if name == _composed(name) else ascii(name)


def classes_in_turn(num_samples: int, *, num_classes: int, chosen: int | None) -> NDArray[np.int64] | None:
    """The class of each sample, int64 [samples]: the chosen one, or all in turn; None for an unconditional network.

    >>> classes_in_turn(4, num_classes=3, chosen=None).tolist()
    [0, 1, 2, 0]
    """
    if num_classes == 0:
        return None
    if chosen is not None:
        return np.full(num_samples, chosen, dtype=np.int64)
    return np.arange(num_samples, dtype=np.int64) % num_classes
