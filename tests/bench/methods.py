"""The table behind the recommendation of a method: comparisons gathered into the package and into docs/methods.md.

    edgeblocks compare vit --data fashion.npz --arms diffusion,exact .. -o compare/vit
    python tests/bench/methods.py compare/vit compare/dit ..

Each folder is one of `edgeblocks compare` with the arms diffusion and exact, at equal layer evaluations. A family that
is not among them keeps what it has.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]
PACKAGED = HERE / "edgeblocks/measured.json"
PAGE = HERE / "docs/methods.md"


def main() -> None:
    found = json.loads(PACKAGED.read_text()) if PACKAGED.exists() else {}
    for folder in sys.argv[1:]:
        content = json.loads((Path(folder) / "compare.json").read_text())
        found[content["family"]] = entry(content)
    found = dict(sorted(found.items()))
    PACKAGED.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


def entry(content: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a comparison."""
    assert content["equal"] == "layer evaluations", "the table is at equal layer evaluations"
    values: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for row in content["arms"]:
        values.setdefault(row["arm"], []).append(row["quality"][-1]["value"])
        errors.setdefault(row["arm"], []).append(row["quality"][-1]["standard_error"])
    settings, means = content["settings"], {arm: statistics.mean(found) for arm, found in values.items()}
    seeds = len(values["exact"])
    blocks = next(row["blocks"] for row in content["arms"] if row["arm"] == "diffusion")
    conditions = (
        f"{Path(settings['data']).stem}, {settings['depth']} layers of width {settings['width']}, {blocks} blocks, "
        f"{settings['steps']} steps of batch {settings['batch']}, {seeds} seed{'s' if seeds > 1 else ''}"
    )
    return {
        "measure": content["measure"],
        "higher_is_better": content["higher_is_better"],
        "diffusion": round(means["diffusion"], 5),
        "exact": round(means["exact"], 5),
        "error": round(math.hypot(*(_error(found, errors[arm]) for arm, found in values.items())), 5),
        "conditions": conditions,
    }


def _error(values: list[float], errors: list[float]) -> float:
    """Of a mean over seeds: from the examples' standard error, or from the seeds' spread where that is more."""
    of_examples = statistics.mean(error**2 for error in errors) ** 0.5
    return max(of_examples, statistics.stdev(values) if len(values) > 1 else 0.0) / len(values) ** 0.5


def page(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Which method for which family",
        "",
        "`edgeblocks plan` recommends a method from this table and from what each would take under the budget.",
        "Made by `tests/bench/methods.py` from `edgeblocks compare --arms diffusion,exact`: equal layer evaluations,",
        "the same data and batches, EMA weights, hold-out examples. The error is the standard error of the difference;",
        "one below twice of it counts as none. These are small networks and short trainings on one kind of",
        "data: compare on your own with `edgeblocks compare` before a long run.",
        "",
        "| family | measure | diffusion | exact | error | better | conditions |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, one in found.items():
        difference = one["diffusion"] - one["exact"]
        better = "neither"
        if abs(difference) > 2 * one["error"]:
            better = "diffusion" if (difference > 0) == one["higher_is_better"] else "exact"
        lines.append(
            f"| {family} | {one['measure']} | {one['diffusion']:.4f} | {one['exact']:.4f} | {one['error']:.4f} "
            f"| {better} | {one['conditions']} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
