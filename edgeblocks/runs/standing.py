"""How far each block of a run is, who trained it, and what is to be done next."""

from dataclasses import asdict, dataclass
from pathlib import Path

from edgeblocks.runs.apart import next_commands, steps_left
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.history import trained_on, trained_s
from edgeblocks.runs.shared import as_far_as_it_is
from edgeblocks.runs.summary import TrainedSpan
from edgeblocks.units import format_duration


@dataclass(frozen=True, kw_only=True)
class BlockStanding:
    """Of a block, or of the whole network where its parts are trained together."""

    block: int
    step: int
    left: int
    """Steps that it has still to make."""
    left_s: float | None
    """Seconds that these take, about; None where no step was timed."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Of a run."""

    run: Path
    finished: bool
    """Whether it is trained and evaluated."""
    part: str
    """What is trained apart: block, or network."""
    steps_wanted: int
    """Of each block."""
    begins: tuple[int, int] | None
    """Steps that the denoiser which all blocks begin as has made, and is to make, while there are no blocks yet."""
    blocks: tuple[BlockStanding, ...]
    trained_on: tuple[TrainedSpan, ...]
    trained_s: float | None
    next: tuple[str, ...]
    """What to type."""

    def to_json(self) -> dict[str, object]:
        return {
            "run": str(self.run),
            "finished": self.finished,
            "steps_wanted": self.steps_wanted,
            "begins": None if self.begins is None else list(self.begins),
            "blocks": [asdict(block) for block in self.blocks],
            "left": [block.block for block in self.blocks if block.left],
            "trained_s": self.trained_s,
            "trained_on": [span.model_dump() for span in self.trained_on],
            "next": list(self.next),
        }

    def text(self) -> str:
        """One line a block, and what to type."""
        lines = []
        if self.begins is not None:
            lines.append(f"the denoiser that all blocks begin as: step {self.begins[0]} of {self.begins[1]}")
        for one in self.blocks:
            name = self.part if self.part != "block" else f"block {one.block}"
            line = f"{name}: step {one.step} of {self.steps_wanted}"
            if one.left and one.left_s is not None:
                line += f", {one.left} are left: about {format_duration(one.left_s)}"
            lines.append("; ".join([line, *(span.words() for span in self.trained_on if span.block == one.block)]))
        if self.trained_s:
            lines.append(f"trained {format_duration(self.trained_s)} in all")
        return "\n".join(
            [*lines, "", *(f"{'next: ' if not n else '      '}{text}" for n, text in enumerate(self.next))]
        )


def standing_of(run: RunDirectory) -> Standing:
    """How far a run is that is not finished, or that is.

    Raises:
        RunError: a file is missing or damaged.
    """
    steps, left, step_s = run.saved_steps(run.store()), steps_left(run), run.plan.measured_step_s
    one = as_far_as_it_is(run)
    apart = steps[:1] if run.method.trained_together else steps
    return Standing(
        run=run.path,
        finished=run.summary is not None and not left,
        part="network" if run.method.trained_together else "block",
        steps_wanted=run.settings.run.steps,
        begins=None if one is run else (one.saved_steps(one.store())[0], one.settings.run.steps),
        blocks=tuple(
            BlockStanding(
                block=block,
                step=step,
                left=left.get(block, 0),
                left_s=None if step_s is None else step_s * left.get(block, 0),
            )
            for block, step in enumerate(apart)
        ),
        trained_on=tuple(trained_on(run)),
        trained_s=trained_s(run),
        next=tuple(next_commands(run)),
    )
