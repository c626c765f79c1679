"""The file `report.html` of a run."""

from dataclasses import dataclass
from pathlib import Path

from edgeblocks.errors import ConfigError, StorageError
from edgeblocks.files.durable import write_atomically
from edgeblocks.files.own import check_new
from edgeblocks.profiling.budgets import check_needed
from edgeblocks.registry import build_target
from edgeblocks.report.facts import num_records, read_facts
from edgeblocks.report.previews import preview_bytes
from edgeblocks.report.run_page import run_page
from edgeblocks.units import format_bytes

REPORT_FILE = "report.html"
PAGE_BYTES = 50_000_000
"""What a page takes beside its records and pictures, measured 36 MB: most of it is matplotlib."""
RECORD_BYTES = 1_700
"""Of a record, measured 1,500."""
PICTURE_COPIES = 9
"""Of a picture's file, measured 7.8: as text, in its place, and in the page that is written."""


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """A report that was written. `steps` are those that each block has saved."""

    path: Path
    bytes: int
    finished: bool
    steps: tuple[int, ...]

    def to_json(self) -> dict[str, object]:
        return {"path": str(self.path), "bytes": self.bytes, "finished": self.finished, "steps": list(self.steps)}

    def line(self) -> str:
        """For people."""
        so_far = "" if self.finished else "; the run is not finished, so it shows what there is"
        return f"wrote {self.path} ({format_bytes(self.bytes)}){so_far}"


def write_report(
    run: Path, out: Path | None = None, *, overwrite: bool = False, mem_budget: str | None = None
) -> WrittenReport:
    """Write the page of a run to `out`, or into its directory. The run itself is only read.

    Args:
        mem_budget: what the process may take of memory; None does not bound it.

    Raises:
        RunError: there is no run, or it is damaged.
        ConfigError: `out` is no name for a page, or is there already; a report in the run's directory is replaced.
        DoesNotFitError: it takes more than `mem_budget`.
        StorageError: the disk refused.
    """
    path = run / REPORT_FILE if out is None else out
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"-o {path}: the report is an HTML page; give a name that ends in .html")
    if out is not None:
        check_new(out, overwrite=overwrite or out.absolute() == (run / REPORT_FILE).absolute())
    _check_memory(run, mem_budget)
    facts = read_facts(run)
    content = run_page(facts).encode("utf-8", errors="replace")
    try:
        write_atomically(path, [content])
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; choose another place with -o, such as -o /tmp/report.html"
        ) from error
    return WrittenReport(path=path, bytes=len(content), finished=facts.summary is not None, steps=facts.steps)


def _check_memory(run: Path, mem_budget: str | None) -> None:
    """Refuse to begin where the page takes more than it may."""
    if mem_budget is None:
        return
    records, pictures_bytes = num_records(run), preview_bytes(run / "samples")
    needed_bytes = build_target("cpu").used_bytes() + PAGE_BYTES
    needed_bytes += RECORD_BYTES * records + PICTURE_COPIES * pictures_bytes
    why = f"{records:,} records of steps and {format_bytes(pictures_bytes)} of samples are in memory as they are drawn"
    check_needed(mem_budget, needed_bytes, f"the report of {run}", why)
