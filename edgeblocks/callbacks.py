"""Callbacks of a training: what happens in it, told to code of the user's own, as plain dataclasses.

class Losses(edgeblocks.Callback):
    def step(self, event):
        print(event.block, event.step, event.loss)

edgeblocks.train(data="digits", out="runs/heard", callbacks=[Losses()])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeblocks.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Training is about to begin or to go on; the run's directory can be resumed from here on."""

    run: Path
    settings: Mapping[str, Any]
    """The run's and its family's, as config.yaml has them."""
    plan: Mapping[str, Any]
    """The content of plan.json."""
    resumed_from: Sequence[int] | None
    """Each block's step that it goes on from; None where the run begins."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step was made, of one block or of the whole network."""

    block: int | None
    """The one that was trained; None where all are trained together."""
    step: int
    """Of this block, counted from 1."""
    steps: int
    """That it is to make."""
    steps_done: int
    """Of all blocks that are trained here."""
    steps_total: int
    loss: float
    """The mean over this step's batch."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    examples_per_s: float
    """A moving average."""
    seconds: float | None
    """That the run has been trained, without evaluation and samples; None where its earlier records do not tell."""
    used_bytes: int
    """Resident, or of the device's memory."""
    budget_bytes: int
    bytes_written: int
    """Of blocks, to disk, in the whole life of the run."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A figure of how good the network is was measured: `evaluations` times on the way, and at the end."""

    step: int
    """Made by every block."""
    measure: str
    """What it is: `validation loss` at the end; on the way what suits the task, such as `top-1 accuracy`."""
    value: float
    standard_error: float | None
    """None of fewer than ten examples."""
    examples: int | None
    """How many it was measured on."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Samples were made on the way, with the same noise each time."""

    step: int
    """Made by every block."""
    path: Path
    """Where they were saved."""
    grid: "NDArray[np.uint8] | None" = field(default=None, repr=False)
    """All images in one, uint8 [height, width, channels]; None of text."""
    texts: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last step is made, the run is evaluated and whole."""

    run: Path
    summary: Mapping[str, Any]
    """The content of summary.json."""


Event = Planned | Step | Evaluated | Sampled | Finished


class Callback:
    """Hears what happens in a training; override what you need.

    An error that a method raises ends the training, with everything saved, and is raised where the training was asked
    for. What a callback keeps in memory counts as the program's around the training.
    """

    def planned(self, event: Planned, /) -> None: ...

    def step(self, event: Step, /) -> None: ...

    def evaluated(self, event: Evaluated, /) -> None: ...

    def sampled(self, event: Sampled, /) -> None: ...

    def finished(self, event: Finished, /) -> None: ...

    def close(self) -> None:
        """The training has ended, finished or not: let go of files. Called once, last."""


class Callbacks:
    """The callbacks of a training, in the order in which they are told."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """
        Raises:
            ConfigError: one of them is no `Callback`.
        """
        wrong = [callback for callback in callbacks if not isinstance(callback, Callback)]
        if wrong:
            raise ConfigError(
                f"callbacks: {wrong[0]!r} is no edgeblocks.Callback; derive a class from it and override what you need"
            )
        self._callbacks = tuple(callbacks)

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def tell(self, event: Event) -> None:
        """Call the method of an event, of each callback.

        Raises:
            Exception: what one of them raises, with a note of where it came from.
        """
        for callback in self._callbacks:
            try:
                getattr(callback, type(event).__name__.lower())(event)
            except Exception as error:
                name = f"{type(callback).__name__}.{type(event).__name__.lower()}"
                error.add_note(f"raised by the callback {name}; the run is saved as far as it is: go on with resume")
                raise

    def close(self) -> None:
        for callback in self._callbacks:
            callback.close()
