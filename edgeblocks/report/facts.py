"""What a run directory tells for a report. Reads only, and never a block's content.

Nothing here takes the run's lock: a run that is being trained is read as it is, between two of its writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from edgeblocks.errors import RunError, StorageError
from edgeblocks.files.checked import Checked
from edgeblocks.runs.directory import RunDirectory, open_run
from edgeblocks.runs.schema import (
    Count,
    Diverging,
    Layers,
    RecordFields,
    Samples,
    Seconds,
    Text,
    checked,
    read_json,
)

MOST_RECORDS = 400_000
"""Of metrics.jsonl: one has about a thousand for each block."""

Measured = float | None


class LevelFields(Diverging):
    """One of `levels`: a noise level of the evaluation; more keys are scores."""

    model_config = ConfigDict(extra="allow")

    sigma: float
    block: Annotated[int, Field(ge=0)]
    loss: float
    share: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """What the family tells beside the loss."""
        told = self.model_extra or {}
        return {name: value for name, value in told.items() if isinstance(value, float)}


class ValidationFields(Diverging):
    """`metrics.validation` in summary.json."""

    levels: list[LevelFields] = Field(default_factory=list, max_length=10_000)
    standard_error: Measured = None
    images: Count | None = None
    part: Text = ""


class TextScoreFields(Diverging):
    """`metrics.text` in summary.json."""

    bits_per_character: float
    bits_per_character_error: Measured = None
    bits_per_token: float
    tokenizer: Text = ""
    sequences: Count | None = None
    length: Count | None = None


class ScoreFields(Diverging):
    """`metrics` in summary.json, as far as a report shows them."""

    validation_loss: float
    validation_loss_by_block: list[Measured] = Field(default_factory=list)
    train_loss_by_block: list[Measured] = Field(default_factory=list)
    validation: ValidationFields = ValidationFields()
    text: TextScoreFields | None = None


class MemoryChangeFields(Checked):
    """One of `memory_changes` in summary.json."""

    micro_batch: Samples
    checkpointing: bool


class TrainedFields(Checked):
    """summary.json, as far as a report shows it. What an earlier edgeblocks did not write is None or empty."""

    peak_bytes: Count
    budget_bytes: Annotated[int, Field(ge=1)] | None = None
    ram_peak_bytes: Count | None = None
    disk_bytes: Count | None = None
    disk_bytes_written: Count | None = None
    seconds: Seconds | None = None
    step_s: Seconds | None = None
    sampling_s: Seconds = 0.0
    images_or_tokens_per_s: Annotated[float, Field(ge=0)] | None = None
    time_split: dict[str, float] = Field(default_factory=dict)
    memory_changes: list[MemoryChangeFields] = Field(default_factory=list)
    resumed_from: list[int] | None = None
    metrics: ScoreFields


class CandidateFields(Checked):
    """One of `candidates` in plan.json."""

    blocks: Layers | None = None
    micro_batch: Samples | None = None
    slots: Layers | None = None
    bytes_written: Count | None = None
    disk_bytes: Count | None = None


class PlannedFields(Checked):
    """plan.json, as far as a report shows more of it than a run needs."""

    candidates: list[CandidateFields] = Field(default_factory=list, max_length=10_000)
    warnings: list[Text] = Field(default_factory=list, max_length=100)
    host_breakdown: dict[str, Count] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run as its files tell it. `summary` is None while it is not finished."""

    directory: RunDirectory
    steps: tuple[int, ...]
    """Of each block file."""
    bytes_written: int | None
    """To disk, in the whole life of the run; None where neither the summary nor the block files tell it."""
    records: tuple[RecordFields, ...]
    summary: TrainedFields | None
    planned: PlannedFields
    environment: dict[str, Any]
    doubts: tuple[str, ...]
    """What could not be read, and what is shown instead."""

    @property
    def num_steps(self) -> int:
        """That each block is to make."""
        return self.directory.settings.run.steps

    @property
    def unit(self) -> str:
        """What the layers are cut into."""
        return self.directory.method.part

    @property
    def is_resumed(self) -> bool:
        """Whether what the summary measured is of the time since the run was resumed last."""
        return self.summary is not None and self.summary.resumed_from is not None

    @property
    def chosen(self) -> CandidateFields | None:
        """The candidate that was planned with; None where the plan has none like it."""
        plan = self.directory.plan
        wanted = (len(self.directory.file_layers), plan["micro_batch"], plan["slots"])
        found = [one for one in self.planned.candidates if (one.blocks, one.micro_batch, one.slots) == wanted]
        return found[0] if found else None

    def of_block(self, block: int) -> list[RecordFields]:
        """The records of a block, in the order of its steps."""
        return sorted((record for record in self.records if record.block == block), key=lambda record: record.step)


def read_facts(path: Path) -> RunFacts:
    """The facts of a run directory, finished or not.

    Raises:
        RunError: there is no run, or what it is cannot be read.
    """
    directory = open_run(path)
    doubts: list[str] = []
    read = list(islice(directory.records(), MOST_RECORDS + 1))
    if len(read) > MOST_RECORDS:
        doubts.append(f"metrics.jsonl has more than {MOST_RECORDS:,} records; those behind them are not shown.")
    records = tuple(record for record in read[:MOST_RECORDS] if record.block < len(directory.file_layers))
    summary = _summary_of(path)
    steps, written = _saved(directory, records, doubts)
    return RunFacts(
        directory=directory,
        steps=steps,
        bytes_written=written if summary is None or summary.disk_bytes_written is None else summary.disk_bytes_written,
        records=records,
        summary=summary,
        planned=checked(PlannedFields, path / "plan.json", directory.plan),
        environment=_environment_of(path, doubts),
        doubts=tuple(doubts),
    )


def _summary_of(path: Path) -> TrainedFields | None:
    file = path / "summary.json"
    return checked(TrainedFields, file, read_json(file, finite=False)) if file.exists() else None


def _saved(
    directory: RunDirectory, records: Sequence[RecordFields], doubts: list[str]
) -> tuple[tuple[int, ...], int | None]:
    """Each block file's step and the bytes written; where the files are not here, the last records' steps."""
    count = len(directory.file_layers)
    try:
        store = directory.store()
        headers = [store.header(block) for block in range(count)]
    except (RunError, StorageError) as error:
        doubts.append(f"The steps are those of the last records, because the block files cannot be read: {error}.")
        of_file = [0] * count
        for record in records:
            of_file[record.block] = max(of_file[record.block], record.step)
        return tuple(of_file[:1] * count if directory.method.trained_together else of_file), None
    return tuple(header.step for header in headers), max(header.run_bytes_written for header in headers)


def _environment_of(path: Path, doubts: list[str]) -> dict[str, Any]:
    try:
        return read_json(path / "env.json")
    except RunError as error:
        doubts.append(f"The versions and the machine are not known: {error}.")
        return {}
