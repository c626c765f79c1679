"""What compare.json holds."""

from typing import NotRequired, TypedDict

from edgeblocks.tasks import FEWEST_FOR_ERROR


class Mark(TypedDict):
    """How good a network was after some training."""

    step: int
    seconds: float
    value: float
    standard_error: float | None
    examples: NotRequired[int | None]


def with_error(mark: Mark, digits: str) -> str:
    """A standard error as it stands behind its figure, or that there is none; "" where it was not asked for.

    >>> with_error({"step": 1, "seconds": 1.0, "value": 1.0, "standard_error": None, "examples": 4}, ".2g")
    ' (4 examples, too few for an error)'
    """
    error = mark["standard_error"]
    if error is not None:
        return f" ± {error:{digits}}"
    return f" ({mark.get('examples')} examples, too few for an error)" if has_too_few(mark) else ""


def has_too_few(mark: Mark) -> bool:
    """Whether a figure has no error because of the number of its examples."""
    return mark["standard_error"] is None and (mark.get("examples") or FEWEST_FOR_ERROR) < FEWEST_FOR_ERROR


class Row(TypedDict):
    """One training. One that has a `failure` has none of the figures."""

    arm: str
    meaning: str
    seed: int
    path: str
    failure: str | None
    """Why there is no result."""
    steps: NotRequired[int]
    peak_bytes: NotRequired[int]
    runtime_bytes: NotRequired[int]
    step_s: NotRequired[float]
    blocks: NotRequired[int]
    budget_bytes: NotRequired[int | None]
    time_split: NotRequired[dict[str, float] | None]
    seconds: NotRequired[float]
    quality: NotRequired[list[Mark]]
    memory: NotRequired[list[tuple[float, int]]]
    """Seconds and bytes."""


class Comparison(TypedDict):
    """The whole file."""

    family: str
    measure: str
    higher_is_better: bool
    examples: int
    equal: str
    evaluations_a_step: int | None
    """None where steps differ in them."""
    minutes: float | None
    settings: dict[str, object]
    environment: dict[str, object]
    arms: list[Row]
