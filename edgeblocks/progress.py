"""Listeners, which get the progress of a long call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Listener(Protocol):
    """Gets the progress of a long call. All methods are optional to act on; `Silent` ignores everything."""

    def stage(self, text: str) -> None:
        """Another stage of the call begins, such as planning or training."""
        ...

    def advance(self, done: int, total: int, text: str) -> None:
        """`done` of `total` files, blocks or samples are done."""
        ...

    def planned(self, plan_text: str, out: Path) -> None:
        """A new run's plan, in words, and the run's directory."""
        ...

    def step(self, progress: Progress) -> None:
        """A training step was made. An error raised here ends the run, saved."""
        ...

    def blocks(self, rows: Sequence[BlockProgress], left_s: float | None) -> None:
        """How far all blocks are while a cluster trains them, and how long it will take, about; None: not known yet."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know, in a sentence."""
        ...


class Silent:
    """A listener that ignores everything."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, text: str) -> None: ...

    def planned(self, plan_text: str, out: Path) -> None: ...

    def step(self, progress: Progress) -> None: ...

    def blocks(self, rows: Sequence[BlockProgress], left_s: float | None) -> None: ...

    def note(self, text: str) -> None: ...


class Marked(str):
    """A note with an example of which some pieces are marked, in [[ ]]; a terminal can show them in a colour."""

    heading: str
    pieces: tuple[tuple[str, bool], ...]
    """Text, and whether it is marked."""

    def __new__(cls, heading: str, pieces: Sequence[tuple[str, bool]]) -> Marked:
        """
        >>> Marked("the first, answers in", [("2 + 2? ", False), ("4", True)])
        'the first, answers in [[ ]]: 2 + 2? [[4]]'
        """
        text = "".join(f"[[{piece}]]" if is_marked else piece for piece, is_marked in pieces)
        made = super().__new__(cls, f"{heading} [[ ]]: {text}")
        made.heading, made.pieces = heading, tuple(pieces)
        return made


@dataclass
class Progress:
    """Where a run is. `seconds` splits the wall time of this process."""

    losses: dict[int, float] = field(default_factory=dict)
    """Smoothed training loss of each block."""
    loss: float = 0.0
    """Of the last step alone, as the next two are."""
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    steps: int = 0
    """Of each block."""
    steps_done: int = 0
    """Of all blocks together that are trained here."""
    steps_total: int = 0
    block: int | None = 0
    """The one that is trained; None where all are trained together, whose loss is that of block 0."""
    step: int = 0
    examples_per_s: float = 0.0
    example: str = "img"
    """What an example is called, in short."""
    used_bytes: int = 0
    """Resident now."""
    budget_bytes: int = 0
    bytes_written: int = 0
    """Bytes of blocks written to disk in the whole life of the run."""
    stall_s: float = 0.0
    """Waited for blocks."""
    compute_s: float = 0.0
    data_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    previews_s: float = 0.0
    """Spent on previews and evaluations between steps."""
    looks_left_s: float = 0.0
    """That those to come and the evaluation at the end will take, about."""
    steps_before: int = 0
    """Of these blocks, made before this process."""
    earlier_s: float | None = 0.0
    """Seconds of training before this process; None where the run's records do not tell them."""

    @property
    def left_s(self) -> float | None:
        """Until the run is finished, about: its steps, evaluations and samples; None before the first step."""
        made = self.steps_done - self.steps_before
        if made < 1:
            return None
        training_s = time.perf_counter() - self.started - self.previews_s
        return training_s / made * (self.steps_total - self.steps_done) + self.looks_left_s

    @property
    def seconds(self) -> float | None:
        """Seconds that the run has been trained until now, for its records; None as `earlier_s` is."""
        if self.earlier_s is None:
            return None
        return round(self.earlier_s + time.perf_counter() - self.started - self.previews_s, 3)


@dataclass(frozen=True, kw_only=True)
class BlockProgress:
    """How far a block is that is trained elsewhere."""

    block: int
    step: int
    """Made there, as far as is known."""
    saved: int
    """Of these, those that are at home."""
    steps: int
    """To make."""
    where: str
    """The name of the machine, or what the block waits for."""
    is_training: bool = False
    loss: float | None = None
    """Smoothed."""
    examples_per_s: float | None = None
    used_bytes: int | None = None
    """Resident there."""
