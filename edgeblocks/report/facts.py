"""The facts of a run directory for a report. Reads only, and never a block's content.

Nothing here takes the run's lock: a run that is being trained is read as it is, between two of its writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from edgeblocks.errors import RunError, StorageError
from edgeblocks.files.untrusted import open_regular
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.opening import open_run
from edgeblocks.runs.schema import RecordFields, read_json
from edgeblocks.runs.shared import as_far_as_it_is
from edgeblocks.runs.summary import Summary

MOST_RECORDS = 400_000
"""Of metrics.jsonl: one has about a thousand for each block."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run as its files tell it. `summary` is None while it is not finished."""

    directory: RunDirectory
    steps: tuple[int, ...]
    """Of each block file."""
    bytes_written: int | None
    """To disk, in the whole life of the run; None where neither the summary nor the block files tell it."""
    records: tuple[RecordFields, ...]
    summary: Summary | None
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

    def of_block(self, block: int) -> list[RecordFields]:
        """The records of a block, in the order of its steps."""
        return sorted((record for record in self.records if record.block == block), key=lambda record: record.step)


def num_records(path: Path) -> int:
    """How many records of metrics.jsonl `read_facts` would keep at most.

    Raises:
        RunError: the file cannot be read.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        return 0
    try:
        with open_regular(metrics) as file:
            return min(1 + sum(piece.count(b"\n") for piece in iter(partial(file.read, 2**20), b"")), MOST_RECORDS)
    except OSError as error:
        raise RunError(f"cannot read {metrics}: {error.strerror}") from error


def read_facts(path: Path) -> RunFacts:
    """The facts of a run directory, finished or not; while its blocks are still one, of the run of that denoiser.

    Raises:
        RunError: there is no run, or what it is cannot be read.
    """
    directory = as_far_as_it_is(open_run(path))
    doubts: list[str] = []
    read = list(islice(directory.records(), MOST_RECORDS + 1))
    if len(read) > MOST_RECORDS:
        doubts.append(f"metrics.jsonl has more than {MOST_RECORDS:,} records; those behind them are not shown.")
    records = tuple(record for record in read[:MOST_RECORDS] if record.block < len(directory.file_layers))
    summary = directory.summary
    steps, written = _saved(directory, records, doubts)
    return RunFacts(
        directory=directory,
        steps=steps,
        bytes_written=written if summary is None or summary.disk_bytes_written is None else summary.disk_bytes_written,
        records=records,
        summary=summary,
        environment=_environment_of(directory.path, doubts),
        doubts=tuple(doubts),
    )


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


def _environment_of(path: Path, doubts: list[str]) -> dict[str, object]:
    try:
        return read_json(path / "env.json")
    except RunError as error:
        doubts.append(f"The versions and the machine are not known: {error}.")
        return {}
