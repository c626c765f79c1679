"""What the records of a run's steps tell: how long it was trained, by which machines, and how low the losses are.

`seconds` of a record counts from the run's beginning, and records come in the order in which steps were made, or in
that of the blocks where copies of a run were gathered. So a record's own time is the difference to the one before it.
"""

import math
from collections.abc import Iterator
from itertools import groupby

from edgeblocks.runs.directory import SHARED_FOLDER, RunDirectory
from edgeblocks.runs.schema import RecordFields, checked_record, read_records
from edgeblocks.runs.summary import TrainedSpan


def trained_s(run: RunDirectory) -> float | None:
    """How long the run has been trained, by its records; None where one of them has no time."""
    longest = shared_s(run)
    for record in run.records():
        if record.seconds is None or longest is None:
            return None
        longest = max(longest, record.seconds)
    return longest


def shared_s(run: RunDirectory) -> float | None:
    """How long the denoiser was trained that the blocks began as, whose records are in its own folder; else 0."""
    path = run.path / SHARED_FOLDER / "metrics.jsonl"
    if not run.shared_steps or not path.exists():
        return 0.0
    found = [one.seconds for one in (checked_record(RecordFields, record) for record in read_records(path)) if one]
    times = [seconds for seconds in found if seconds is not None]
    return max(times, default=0.0) if len(times) == len(found) else None


def smoothed_losses(run: RunDirectory) -> dict[int, float]:
    """The training loss of each block that has one, smoothed, as its last record has it."""
    losses = {record.block: record.smoothed_loss for record in run.records()}
    return {block: loss for block, loss in losses.items() if loss is not None and math.isfinite(loss)}


def with_own_time(run: RunDirectory) -> Iterator[tuple[dict[str, object], RecordFields, float | None]]:
    """The records of a run in their order, as they are and checked, each with the seconds that were its own.

    None where a record has no time.
    """
    former = shared_s(run) or 0.0
    for content in run.metrics():
        record = checked_record(RecordFields, content)
        if record is None:
            continue
        if record.seconds is None:
            yield content, record, None
            continue
        yield content, record, max(0.0, record.seconds - former)
        former = max(former, record.seconds)


def trained_on(run: RunDirectory) -> list[TrainedSpan]:
    """Who trained which steps of which block, block by block; nothing of steps whose records name no machine.

    Of blocks that began as one it is told from there on: the denoiser that they began as is a run of its own.
    """
    timed = [(record, own_s or 0.0) for _, record, own_s in with_own_time(run) if record.machine is not None]
    timed.sort(key=lambda one: one[0].block)  # keeps the order of a block's records
    spans, former = [], None
    for (block, machine), group in groupby(timed, key=lambda one: (one[0].block, one[0].machine)):
        records, times = zip(*group, strict=True)
        first = run.shared_steps if former is None or former.block != block else former.last_step
        former = TrainedSpan(
            block=block, machine=machine, first_step=first, last_step=records[-1].step, seconds=round(sum(times), 3)
        )
        spans.append(former)
    return spans
