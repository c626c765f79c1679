"""Which method of training to take for a family under a budget: what was measured, and what each would cost.

The figures are those of comparisons at equal layer evaluations, kept in measured.json; docs/methods.md shows them with
their conditions, and tests/bench/four_arms.py makes both.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.methods import DIFFUSION, METHODS, MethodName
from edgeblocks.units import ABOUT_THE_SAME, format_bytes, format_duration

if TYPE_CHECKING:
    from edgeblocks.prepare import Prepared

TABLE = "docs/methods.md"
_DATA = {"fashion": "Fashion-MNIST", "moby-dick": "Moby-Dick", "addresses": "the State of the Union addresses"}
"""What `conditions` begin with, for people."""
MUCH_SLOWER = 3.0
"""A recommended method that takes this many times as long as the other has that named as a drawback."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the methods reached with one family: means over seeds on hold-out examples.

    `error` is the standard error of their difference. `shallow` is what a block's layers reached as an ordinary network
    with as many layer evaluations: where that is best, the training was too short for depth to be of use.
    """

    measure: str
    higher_is_better: bool
    diffusion: float
    exact: float
    error: float
    conditions: str
    greedy: float | None = None
    """None where it was not measured."""
    shallow: float | None = None
    shallow_layers: int | None = None

    @property
    def origin(self) -> str:
        """Whose data the figures come from, and how they were made."""
        data, _, how = self.conditions.partition(", ")
        return (
            f"figures of edgeblocks' own trainings on {_DATA.get(data, data)}, not on your data: {how or 'see there'}"
        )

    def of(self, method: MethodName) -> float | None:
        """What a method reached; None where it was not measured."""
        return {"diffusion": self.diffusion, "exact": self.exact, "greedy": self.greedy}[method]

    @property
    def is_shallow_better(self) -> bool:
        """Whether fewer layers were better than every method, by more than the measurement's noise."""
        if self.shallow is None:
            return False
        reached = (self.of(method) for method in METHODS)
        return all(self.is_better(self.shallow, value) for value in reached if value is not None)

    def is_better(self, value: float, other: float) -> bool:
        """Whether one figure is better than another by more than the measurement's noise."""
        # Two standard errors: what lies closer together could be the other way round with other seeds.
        return (value - other if self.higher_is_better else other - value) > 2 * self.error


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a method would take under the budget: seconds, or why it cannot be taken."""

    seconds: float | None = None
    obstacle: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A method and why; None where nothing speaks for one."""

    method: MethodName | None
    reason: str

    def line(self) -> str:
        """For people."""
        if self.method is None:
            return f"method: none is recommended: {self.reason}"
        return f"method: {self.method} is recommended: {self.reason}"


def measured(family: str, *, sliding_window: int = 0) -> Measured | None:
    """What was measured of a family, where its layers see all tokens or the last ones; None where nothing was."""
    content = json.loads((resources.files("edgeblocks") / "measured.json").read_text(encoding="utf-8"))
    # How deep a network should be depends on how far a layer sees, so these figures are kept apart.
    task = f"{family}-sliding" if sliding_window else family
    return Measured(**content[task]) if task in content else None


def option(plan: Callable[[], "Prepared"]) -> Option:
    """What a plan comes to.

    Args:
        plan: makes it; a `prepare.Prepared`.
    """
    try:
        found = plan().plan
        if found.method.grows and len(found.layers) == 1:
            return Option(obstacle="the budget holds all layers at a time, so that nothing would grow")
        return Option(seconds=found.predicted_s)
    except DoesNotFitError as error:
        needed = format_bytes(error.as_fixed_bytes)
        return Option(obstacle=f"it needs {error.flag} {needed}")
    except ConfigError as error:
        return Option(obstacle=error.problems[0].partition(";")[0].removeprefix("--method exact: "))


def recommendation(found: Measured | None, options: dict[MethodName, Option]) -> Recommendation | None:
    """The better method where one is, else the faster one, else the usual one; None where neither can be taken."""
    possible = {method: option.seconds for method, option in options.items() if option.seconds is not None}
    if not possible:
        return None
    if len(possible) == 1:
        (method,) = possible
        obstacles = [f"{name} cannot be taken: {option.obstacle}" for name, option in options.items() if name != method]
        return Recommendation(method=method, reason="; ".join(obstacles))
    reached = {name: value for name in possible if found is not None and (value := found.of(name)) is not None}
    if found is None or len(reached) < 2:
        return Recommendation(
            method=None, reason="nothing was measured of this family; see for yourself with edgeblocks compare"
        )
    # The best, and those that are as good by the measurement's noise.
    ranked = sorted(reached, key=lambda name: reached[name], reverse=found.higher_is_better)
    good = [name for name in ranked if not found.is_better(reached[ranked[0]], reached[name])]
    fastest_s = min(possible[name] for name in good)
    fast = [name for name in good if possible[name] <= fastest_s * (1 + ABOUT_THE_SAME)]
    method = DIFFUSION.name if DIFFUSION.name in fast else fast[0]
    other = next(name for name in (good if len(good) > 1 else ranked) if name != method)
    own, others = reached[method], reached[other]
    times = f"{format_duration(possible[method])} against {format_duration(possible[other])}"
    if len(good) > 1:
        speed = "faster" if len(fast) == 1 else "about as fast"
        said = f"as good as {other} ({found.measure} {own:.4g} and {others:.4g}) and {speed}, {times}"
    else:
        said = f"{found.measure} {own:.4g} against {others:.4g} of {other}"
        drawback = possible[method] > MUCH_SLOWER * possible[other]
        said += f", but slow under this budget: {times}" if drawback else f"; {times}"
    reason = f"{said} ({found.origin}; {TABLE})"
    if found.is_shallow_better:
        reason += (
            f". In trainings as short as that fewer layers do better than any method: {found.shallow_layers} with as "
            f"many layer evaluations reached {found.shallow:.4g}"
        )
    return Recommendation(method=method, reason=reason)
