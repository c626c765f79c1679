"""Keeps a running process inside its budget: looks before every step, and recovers when memory is refused.

Two lines of defence. Before a step, what is in use and what the step will take are added up; a step that would pass the
budget is not taken, a smaller one is (`StepShape`: fewer samples at a time, then activation checkpointing), which
changes no mathematics. Behind it the target sets a hard cap (`capped`), so that memory nobody foresaw is refused
by the system as an error that can be caught, instead of swapping or a killed machine; the step is then made again,
smaller. Only when nothing is left to shrink does the run end, with what was trained before the visit or the step saved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from edgeblocks.errors import MAY_BE_REFUSALS, OutOfBudgetError, is_refusal
from edgeblocks.offload.device import Target
from edgeblocks.planning.plans import StepShape
from edgeblocks.units import format_bytes

T = TypeVar("T")

HEADROOM_BYTES = 12_000_000
"""Left free where a smaller step allows it, for memory that no step accounts for: listeners, pages of code."""


class Guard:
    """Chooses the shape of each step so that the process stays inside its budget."""

    def __init__(
        self,
        memory: Target,
        *,
        budget_bytes: int,
        shapes: Sequence[StepShape],
        breakdown: dict[str, int],
        note: Callable[[str], None],
        ram_budget_bytes: int | None = None,
    ) -> None:
        """A guard of a target's memory; `ram_budget_bytes` bounds the host's where the device has its own."""
        self._ram_budget_bytes = ram_budget_bytes
        self._memory, self._budget_bytes, self._breakdown, self._note = memory, budget_bytes, breakdown, note
        self._shapes = list(shapes)
        self.used_bytes = memory.used_bytes()
        """The resident set before the latest step."""
        self.changes: list[dict[str, Any]] = []
        """What was changed while running: one {micro_batch, checkpointing, used_bytes} each."""

    @property
    def shape(self) -> StepShape:
        return self._shapes[0]

    def before_step(self) -> StepShape:
        """The shape of the next step.

        Raises:
            OutOfBudgetError: not even the smallest step fits beside what is in use.
        """
        self._check_host()
        self.used_bytes = self._memory.used_bytes()
        comfortable = self._budget_bytes - HEADROOM_BYTES
        live = self._memory.live_bytes()  # without what the allocator keeps: the step can have that
        expected = live + self.shape.step_bytes
        # Fewer samples at a time and checkpointing change no mathematics, so the largest shape that leaves the headroom
        # is taken.
        if expected > comfortable:
            smaller = [shape for shape in self._shapes[1:] if live + shape.step_bytes <= comfortable]
            if not smaller and expected > self._budget_bytes:  # the smallest may use the headroom too
                smaller = [shape for shape in self._shapes[-1:] if live + shape.step_bytes <= self._budget_bytes]
            if smaller or expected > self._budget_bytes:
                self._go_on_with(smaller, f"the next step would take the process to {format_bytes(expected)}")
        elif self.used_bytes > comfortable:
            self._memory.give_back()  # the allocator keeps what was freed, and it counts as used
        return self.shape

    def give_back(self) -> None:
        """Return memory that nothing lives in: what comes next takes other sizes, and would be beside it."""
        self._memory.give_back()

    def _check_host(self) -> None:
        """Where a device trains, no smaller step takes less of the host's memory: past its bound the run ends."""
        if self._ram_budget_bytes is None:
            return
        used = self._memory.host_used_bytes()
        if used > self._ram_budget_bytes:
            raise OutOfBudgetError(
                f"the host's budget of {format_bytes(self._ram_budget_bytes)} is used up: {format_bytes(used)} are in "
                f"use. Give more with --ram-budget {int(used * 1.25 / 1e6)}MB; what was trained is saved, --resume "
                f"goes on"
            )

    def attempt(self, work: Callable[[StepShape], T], *, undo: Callable[[], object] = lambda: None) -> T:
        """What `work` gives with the shape of a step; where memory is refused to it, with smaller ones in turn.

        Args:
            undo: called before another attempt.

        Raises:
            OutOfBudgetError: not even the smallest fits.
        """
        while True:
            try:
                return work(self.before_step())
            except MAY_BE_REFUSALS as error:
                if not is_refusal(error):
                    raise
            # Not in the except clause: there the error still holds the frames of `work`, and with them its activations.
            undo()
            self._go_on_with(self._shapes[1:], "memory was refused at the cap")

    def go_on_without(self, what: str) -> None:
        """Note that memory was refused to something the run can do without, and release what is unused."""
        self._memory.give_back()
        self._note(
            f"memory: refused to {what}, the budget is {format_bytes(self._budget_bytes)} "
            f"({format_bytes(self._memory.used_bytes())} in use)"
        )

    def refused(self, what: str) -> OutOfBudgetError:
        """The error for memory that was refused to something that cannot be made smaller."""
        why = f"memory was refused to {what}"
        return out_of_budget(self._budget_bytes, self._memory.used_bytes(), self._breakdown, why)

    def _go_on_with(self, shapes: list[StepShape], why: str) -> None:
        used = self._memory.used_bytes()
        if not shapes:
            raise out_of_budget(self._budget_bytes, used, self._breakdown, f"{why}, and no smaller step fits")
        self._shapes = shapes
        self._memory.give_back()
        change = {"micro_batch": self.shape.micro_batch, "checkpointing": self.shape.checkpointing, "used_bytes": used}
        self.changes.append(change)
        self._note(
            f"{why}, the budget is {format_bytes(self._budget_bytes)} ({format_bytes(used)} in use); the "
            f"micro-batch is now {self.shape.micro_batch}, checkpointing "
            f"{'on' if self.shape.checkpointing else 'off'}. Same mathematics, slower steps"
        )


def out_of_budget(budget_bytes: int, used_bytes: int, breakdown: dict[str, int], why: str) -> OutOfBudgetError:
    """The error of a run for which nothing is left to shrink: numbers, the largest item, the flag."""
    # What planning took was given back before training began.
    items = {name: size for name, size in breakdown.items() if name != "planning"}
    item = max(items, key=lambda name: items[name])
    foreign = used_bytes - sum(items.values())
    grown = (
        f"; {format_bytes(foreign)} of what is in use is not in the plan (the program around it, or a plugin, holds it)"
        if foreign > 0.1 * budget_bytes
        else ""
    )
    return OutOfBudgetError(
        f"the budget of {format_bytes(budget_bytes)} is used up: {why}; {format_bytes(used_bytes)} are in use. "
        f"The largest planned item is {item} ({format_bytes(breakdown[item])}){grown}. "
        f"Give more with --mem-budget {int(budget_bytes * 1.25 / 1e6)}MB; --resume goes on from what is saved"
    )


@contextmanager
def refusals_explained(memory: Target, budget_bytes: int, breakdown: dict[str, int]) -> Iterator[None]:
    """Turns a refusal anywhere in a run into the error that says what to do.

    Raises:
        OutOfBudgetError: memory was refused.
    """
    try:
        yield
    except MAY_BE_REFUSALS as error:
        if not is_refusal(error):
            raise
        raise out_of_budget(budget_bytes, memory.used_bytes(), breakdown, "memory was refused at the cap") from error
