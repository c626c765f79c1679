"""summary.json: the figures of a finished training. One model, which writes it and reads it back.

`peak_bytes` and `metrics.validation_loss` are always there. What an earlier edgeblocks did not write is None or empty;
keys of a later one are kept as they are.
"""

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from edgeblocks.files.checked import Checked
from edgeblocks.methods import MethodName
from edgeblocks.runs.schema import (
    Count,
    Diverging,
    InitFields,
    Layers,
    Samples,
    Seconds,
    Steps,
    Text,
    checked,
    read_json,
)
from edgeblocks.runs.written_plan import Blocks
from edgeblocks.terminal import one_line
from edgeblocks.units import format_duration

Measured = float | None


class LevelScores(Diverging):
    """One of `metrics.validation.levels`: a noise level of the evaluation; more keys are scores."""

    model_config = ConfigDict(extra="allow")

    sigma: float
    block: Annotated[int, Field(ge=0)]
    share: float | None = None
    loss: float

    @property
    def scores(self) -> dict[str, float]:
        """The family's figures besides the loss."""
        figures = self.model_extra or {}
        return {name: value for name, value in figures.items() if isinstance(value, float)}


class Validation(Diverging):
    """`metrics.validation`."""

    total: Measured = None
    standard_error: Measured = None
    images: Count | None = None
    """Examples, of whatever kind."""
    part: Text = ""
    levels: Annotated[list[LevelScores], Field(max_length=10_000)] = Field(default_factory=list)


class TextScores(Diverging):
    """`metrics.text`: the bound in bits."""

    bits_per_token: float
    bits_per_token_error: Measured = None
    bits_per_character: float
    bits_per_character_error: Measured = None
    characters_per_token: Measured = None
    tokenizer: Text = ""
    sequences: Count | None = None
    length: Count | None = None


class Metrics(Diverging):
    """`metrics`: losses of the blocks, which may be NaN where training diverged, and what the evaluation found."""

    train_loss_by_block: list[Measured] = Field(default_factory=list)
    validation_loss: float
    validation_loss_before: float | None = None
    """Of a pretrained network, before it was trained here."""
    top1_before: float | None = None
    """Of a pretrained image classifier that knew the classes: the share that it had right before."""
    validation_loss_by_block: list[Measured] = Field(default_factory=list)
    validation: Validation = Validation()
    text: TextScores | None = None


class MemoryChange(Checked):
    """One of `memory_changes`: how a step was cut from then on, to stay inside the budget."""

    micro_batch: Samples
    checkpointing: bool
    used_bytes: Count | None = None


class TrainedSpan(Checked):
    """One of `trained_on`: steps of a block that one machine made."""

    block: Annotated[int, Field(ge=0)]
    """0 where all are trained together."""
    machine: Text
    first_step: Count
    """That the block had made before."""
    last_step: Count
    seconds: Seconds

    def words(self) -> str:
        return (
            f"steps {self.first_step} to {self.last_step} on {one_line(self.machine)} ({format_duration(self.seconds)})"
        )


class Summary(Checked):
    """summary.json, in the order of its keys."""

    model_config = ConfigDict(extra="allow")

    family: Text | None = None
    makes: Text | None = None
    """The family's task, see `tasks`."""
    method: MethodName = "diffusion"
    """An earlier edgeblocks, which knew no other, did not write it."""
    blocks: Layers | None = None
    layers_per_block: Annotated[list[Layers], Field(max_length=10_000)] | None = None
    trained_blocks: Blocks | None = None
    parameters: Count | None = None
    steps: Steps | None = None
    budget_bytes: Annotated[int, Field(ge=1)] | None = None
    predicted_peak_bytes: Count | None = None
    peak_bytes: Count
    ram_peak_bytes: Count | None = None
    predicted_ram_peak_bytes: Count | None = None
    disk_bytes: Count | None = None
    disk_bytes_written: Count | None = None
    memory_changes: list[MemoryChange] = Field(default_factory=list)
    seconds: Seconds | None = None
    images_or_tokens_per_s: Annotated[float, Field(ge=0)] | None = None
    step_s: Seconds | None = None
    predicted_step_s: Seconds | None = None
    time_split: dict[str, float] = Field(default_factory=dict)
    """Seconds of computing, loading, storing, waiting for blocks, data, and the rest, which has the next two in it."""
    sampling_s: Seconds = 0.0
    """Of samples and measures of quality on the way."""
    evaluation_s: Seconds = 0.0
    """Of the evaluation at the end."""
    metrics: Metrics
    init: InitFields | None = None
    trained_s: Seconds | None = None
    """That the run was trained in all, in every process and on every machine, without samples and evaluation; the
    denoiser that its blocks began as is counted. None where its records do not tell."""
    trained_on: Annotated[list[TrainedSpan], Field(max_length=10_000)] = Field(default_factory=list)
    """Which machine made which steps."""
    resumed_from: list[int] | None = None
    """Each block's step when the run was resumed last: what was measured is since then. None: never."""

    @property
    def shares_of_time(self) -> dict[str, float]:
        """Seconds by what they went into; together they are all that were measured."""
        split = {name: max(0.0, value) for name, value in self.time_split.items()}
        other = split.get("other", 0.0)
        sampling_s = min(self.sampling_s, other)
        evaluation_s = min(self.evaluation_s, other - sampling_s)
        parts = {name: split.get(name, 0.0) for name in ("compute", "stall", "data")}
        return {**parts, "samples": sampling_s, "evaluation": evaluation_s, "other": other - sampling_s - evaluation_s}

    def to_json(self) -> dict[str, object]:
        """The content of the file: what was given or read, and no defaults."""
        return self.model_dump(exclude_unset=True)


def read_summary(path: Path) -> Summary:
    """The content of summary.json.

    Raises:
        RunError: unreadable or damaged.
    """
    return checked(Summary, path, read_json(path, finite=False))
