"""The table of `gpu`'s results, as it stands in docs/gpu.md."""

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu.py begins -->", "<!-- gpu.py ends -->"
"""On a line of their own in the page; what is between them is written anew."""


def table_of(results: dict[str, Any]) -> str:
    """What is written into docs/gpu.md."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"**{results['gpu']}**, {results['system']}, {versions}, {results['date']}; "
        f"{results.get('seconds', 0) / 60:.1f} minutes of `python tests/bench/gpu.py`."
    ]
    if "tests" in results:
        tests = results["tests"]
        broken = tests["failures"] + tests["errors"]
        passed = tests["tests"] - broken - tests["skipped"]
        lines[0] += f" Tests marked `gpu`: {passed} passed, {broken} failed, {tests['skipped']} skipped."
    if "trainings" in results:
        heads = ("family", "method", "precision", "blocks", "device: predicted", "measured", "RAM: predicted")
        rows = [
            [row["family"], row["method"], row["precision"], str(row["blocks"])]
            + _against_plan(row["predicted_peak_bytes"], row["peak_bytes"])
            + _against_plan(row["predicted_ram_peak_bytes"], row["ram_peak_bytes"])
            + [_ms(row[key]) for key in ("predicted_step_s", "step_s")]
            for row in results["trainings"]
        ]
        lines += ["", *_rows((*heads, "measured", "a step: predicted", "measured"), rows)]
    if "times" in results:
        base = next((row["step_s"] for row in results["times"] if row["arm"] == "an ordinary loop"), None)
        rows = [
            [
                row["arm"],
                _ms(row["step_s"]),
                "" if base is None else f"{row['step_s'] / base:.2f}x",
                _gb(row["peak_bytes"]),
            ]
            for row in results["times"]
        ]
        lines += ["", *_rows(("`dit`, half precision", "a step of all layers", "of an ordinary one", "peak"), rows)]
    if "updates" in results:
        rows = [[name, f"{ps:.1f} ps"] for name, ps in results["updates"].items()]
        lines += ["", *_rows(("an update", "a parameter"), rows)]
    if "largest" in results:
        found = results["largest"]
        measured = f", measured {_gb(found['peak_bytes'])}" if "peak_bytes" in found else ", not trained"
        about = f"{found['parameters'] / 1e6:.0f}M parameters in {found['blocks']} blocks"
        about = f"{found['parameters'] / 1e6:.0f}M parameters in {found['blocks']} blocks"
        named = f"The largest `dit` of {found['depth']} layers in {found['mem_budget']} has width {found['width']}"
        plain = f"In an ordinary loop its weights, gradients, moments and mean are {_gb(20 * found['parameters'])}"
        lines += ["", f"{named}: {about}; peak predicted {_gb(found['predicted_peak_bytes'])}{measured}. {plain}."]
    lines += [f"\nLeft out: {one['what']} ({one['why']})." for one in results["left_out"]]
    return "\n".join(lines)


def _rows(heads: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [list(heads), ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _against_plan(predicted: int | None, measured: int | None) -> list[str]:
    """Both; bold where more was taken than was planned."""
    over = predicted is not None and measured is not None and measured > predicted
    return [_gb(predicted), f"**{_gb(measured)}**" if over else _gb(measured)]


def _gb(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"


def _times(one: float, other: float | None) -> str:
    return "-" if other is None else f"{one / other:.2f}x"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"


def write_between_marks(page: Path, table: str) -> None:
    """The table instead of what is between the marks of a page."""
    text = page.read_text()
    assert text.count(BEGIN) == text.count(END) == 1, f"{page} has no place for the table: {BEGIN} .. {END}"
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")
