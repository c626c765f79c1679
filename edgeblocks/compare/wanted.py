"""What is compared, as asked and after a look at everything; and what was measured. Plain values without torch."""

from dataclasses import dataclass
from pathlib import Path

from edgeblocks.compare.arms import Arm
from edgeblocks.settings.fields import RunSettings
from edgeblocks.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user asks to be compared."""

    arms: tuple[Arm, ...]
    seeds: int
    minutes: float | None
    """Of training of each arm; None where all make the same number of steps."""
    settings: dict[str, object]
    config: Path | None


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What is compared, after a look at everything: the settings, and what is true of the family."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    minutes: float | None
    run: RunSettings
    settings: dict[str, object]
    """Of the run and of its family."""
    depth: int
    task: Task
    unrolled: bool
    """Whether end-to-end training runs some layers several times a step, so that steps differ in layer evaluations."""
    environment: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one training, which may be an ordinary one: that has one block, no budget, and does not split its time."""

    steps: int
    peak_bytes: int
    runtime_bytes: int
    """Of the process before there was a network: interpreter and libraries."""
    step_s: float
    """Of a step of all layers: where blocks are trained alone, of one step of each."""
    blocks: int = 1
    budget_bytes: int | None = None
    time_split: dict[str, float] | None = None
