"""Where a run's files may lie: folders that can be written, on disks with room for them that are fast enough."""

import math
import os
import shutil
from pathlib import Path

from edgeblocks.errors import StorageError, WriteLimitError
from edgeblocks.planning.plans import Plan
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.terminal import command, quoted
from edgeblocks.units import format_bytes, format_duration, parse_size

LONGEST_MOVING_S = 600.0
"""A slow disk is refused when it takes longer than this, and longer than the computing."""


def check_disk(plan: Plan, *, work_dir: str | None, out: Path) -> None:
    """Refuse a run for which the disk has no room, or is so slow that moving blocks would be most of the work.

    Raises:
        StorageError: with the bytes that are needed.
    """
    chosen, machine, method = plan.chosen, plan.machine, plan.method
    # Parts that are trained together move in every step, however seldom they are saved.
    longer = "" if method.trained_together else f"longer visits with --set visit_steps={4 * chosen.visit_steps}, "
    blocks_bytes = chosen.blocks * chosen.block_bytes
    wanted = {Path(work_dir) if work_dir else out: chosen.disk_bytes}
    if work_dir:
        wanted[out] = blocks_bytes
    for path, needed in wanted.items():
        free = shutil.disk_usage(existing_folder(path)).free
        if needed > free:
            raise StorageError(
                f"{path} needs {format_bytes(needed)} of disk for {method.parts(chosen.blocks)} of "
                f"{format_bytes(chosen.block_bytes)} and the copies that saving them makes, {format_bytes(free)} are "
                f"free there; choose another disk with {'--work-dir' if path != out else '--out'}, or a smaller network"
            )
    computing_s = plan.computing_s
    moving_s = plan.predicted_s - computing_s
    if moving_s > max(computing_s, LONGEST_MOVING_S):
        raise StorageError(
            f"{Path(work_dir) if work_dir else out} reads {format_bytes(machine.disk_read_bytes_per_s)} and writes "
            f"{format_bytes(machine.disk_write_bytes_per_s)} a second: moving {method.parts(chosen.blocks)} of "
            f"{format_bytes(chosen.block_bytes)} would take {format_duration(moving_s)}, computing "
            f"only {format_duration(computing_s)}; choose a faster disk with --work-dir, {longer}or a larger "
            f"--mem-budget"
        )


def check_work_dir(work_dir: str | None) -> None:
    """Check that blocks can be kept in the work directory.

    Raises:
        StorageError: it is missing, no folder, or not writable.
    """
    if work_dir is None:
        return
    path = Path(work_dir).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise StorageError(
            f"--work-dir {path} {what}; mount its disk, make it (mkdir -p {quoted(path)}), or name another place"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"--work-dir {path} cannot be written; mend its permissions, or name another place")


def check_writes(run: RunDirectory, num_bytes: int, what: str, *, written: int) -> None:
    """Before something that writes `num_bytes` to disk, after the run has written `written`.

    Raises:
        WriteLimitError: together they are more than the user allows.
    """
    allowed = run.settings.run.max_disk_writes
    if allowed is None or written + num_bytes <= parse_size(allowed):
        return
    raise WriteLimitError(
        f"the run has written {format_bytes(written)} to disk; {what} would pass --max-disk-writes {allowed}. "
        f"Everything is saved; go on with a larger limit: {command('train', '--resume', run.resumed_at)} "
        f"--max-disk-writes {math.ceil(2 * (written + num_bytes) / 1e9)}GB"
    )


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    for folder in (path, *path.resolve().parents):
        if folder.is_dir():
            return folder
    return Path()
