"""What compare.json holds."""

from typing import NotRequired, TypedDict


class Mark(TypedDict):
    """How good a network was after some training."""

    step: int
    seconds: float
    value: float
    standard_error: float | None


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
