"""The file `report.html` of a run."""

from dataclasses import dataclass
from pathlib import Path

from edgeblocks.errors import ConfigError, StorageError
from edgeblocks.files.durable import write_atomically
from edgeblocks.files.own import check_new
from edgeblocks.report.facts import read_facts
from edgeblocks.report.run_page import run_page
from edgeblocks.units import format_bytes

REPORT_FILE = "report.html"


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


def write_report(run: Path, out: Path | None = None, *, overwrite: bool = False) -> WrittenReport:
    """Write the page of a run to `out`, or into its directory. The run itself is only read.

    Raises:
        RunError: there is no run, or it is damaged.
        ConfigError: `out` is no name for a page, or is there already; a report in the run's directory is replaced.
        StorageError: the disk refused.
    """
    path = run / REPORT_FILE if out is None else out
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"-o {path}: the report is an HTML page; give a name that ends in .html")
    if out is not None:
        check_new(out, overwrite=overwrite or out.absolute() == (run / REPORT_FILE).absolute())
    facts = read_facts(run)
    content = run_page(facts).encode("utf-8", errors="replace")
    try:
        write_atomically(path, [content])
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; choose another place with -o, such as -o /tmp/report.html"
        ) from error
    return WrittenReport(path=path, bytes=len(content), finished=facts.summary is not None, steps=facts.steps)
