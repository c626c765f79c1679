"""Predicted peak, measured peak and budget of short training runs, each in a process of its own.

    python tests/bench/budget_grid.py grid.jsonl                   # runs what grid.jsonl does not hold yet
    python tests/bench/budget_grid.py grid.jsonl --table grid.md   # and writes the table with its summary

Every shape is trained under the smallest budget that fits, under one with room for everything, and under one between
them: two visits of every block, a grid of samples, and an evaluation. The peak is the largest resident set as a small
parent process learns it from the kernel, which is what `/usr/bin/time -v` prints.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeblocks.units import PROCESSES_DIFFER_BYTES

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.outside import EDGEBLOCKS, measured

AMPLE = "14GB"
PREFERRED_BLOCKS = {"dit": 3, "vit": 2}
KEYS = ("width", "heads", "depth", "batch", "image", "channels", "patch")
DIT_SHAPES = (
    (64, 2, 4, 1, 8, 1, 2),
    (64, 2, 4, 256, 8, 1, 1),
    (64, 2, 8, 256, 64, 3, 8),
    (64, 4, 12, 64, 16, 3, 2),
    (64, 2, 24, 256, 16, 1, 2),
    (64, 2, 48, 16, 8, 1, 2),
    (128, 4, 4, 16, 32, 3, 4),
    (128, 4, 12, 64, 8, 1, 2),
    (128, 4, 12, 256, 8, 1, 1),
    (128, 4, 12, 50, 8, 1, 2),
    (128, 4, 24, 4, 32, 3, 2),
    (128, 2, 48, 1, 16, 3, 2),
    (192, 6, 12, 32, 16, 1, 1),
    (256, 4, 4, 64, 16, 3, 2),
    (256, 4, 12, 16, 32, 3, 2),
    (256, 8, 12, 1, 64, 3, 4),
    (256, 4, 24, 64, 16, 1, 4),
    (256, 4, 48, 4, 8, 1, 2),
    (384, 6, 12, 64, 32, 3, 4),
    (384, 6, 6, 16, 64, 3, 8),
    (512, 8, 4, 1, 32, 3, 2),
    (512, 8, 12, 16, 16, 3, 2),
    (512, 8, 24, 4, 32, 3, 4),
    (768, 12, 12, 8, 32, 3, 4),
    (1024, 16, 4, 4, 16, 3, 2),
    (1024, 16, 12, 1, 32, 3, 4),
    (1024, 16, 24, 2, 16, 3, 4),
    (1024, 16, 48, 1, 8, 1, 4),
)
VIT_SHAPES = (
    (64, 2, 4, 256, 28, 1, 4),
    (64, 2, 48, 16, 8, 1, 4),
    (128, 4, 12, 1, 32, 3, 4),
    (128, 4, 12, 128, 32, 3, 4),
    (256, 4, 24, 64, 32, 3, 8),
    (384, 6, 12, 16, 64, 3, 8),
    (512, 8, 12, 32, 32, 3, 4),
    (1024, 16, 4, 8, 32, 3, 4),
)
SHAPES: tuple[dict[str, Any], ...] = tuple(
    {"family": family, **dict(zip(KEYS, row, strict=True))}
    for family, rows in (("dit", DIT_SHAPES), ("vit", VIT_SHAPES))
    for row in rows
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of shapes")
    wanted = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="edgeblocks-grid-"))
    os.environ["EDGEBLOCKS_CACHE"] = str(folder / "cache")
    done = read_results(wanted.results)
    try:
        for number, shape in enumerate(SHAPES):
            if wanted.only is None or number in wanted.only:
                measure_shape(number, shape, folder, wanted.results, {(row["shape"], row["kind"]) for row in done})
    finally:
        shutil.rmtree(folder)
    rows = read_results(wanted.results)
    print(summary(rows))
    if wanted.table is not None:
        wanted.table.write_text(table(rows))


def measure_shape(number: int, shape: dict[str, Any], folder: Path, results: Path, done: set[tuple[int, str]]) -> None:
    data = folder / f"{number}.npz"
    random = np.random.default_rng(number)
    count = 2 * shape["batch"] + 8
    images = random.integers(0, 256, size=(count, shape["image"], shape["image"], shape["channels"]), dtype=np.uint8)
    np.savez(data, images=images, labels=np.arange(count) % 4)
    network = {key: shape[key] for key in ("family", "width", "heads", "depth", "patch")}
    settings = {**network, "batch": shape["batch"], "data": data, "hold_out": 4 / count}
    settings |= {"steps": 2, "visit_steps": 1, "sample_grids": 1}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    def plan(budget: str) -> dict[str, Any]:
        return outside("plan", *words, "--mem-budget", budget, "--json", "--out", str(folder))

    smallest = math.ceil(float(plan("1MB")["err"].split("the smallest needs ")[1].split(" ")[0]))
    ample = json.loads(str(plan(AMPLE)["out"]))
    smallest_bytes = smallest * 1_000_000 + PROCESSES_DIFFER_BYTES
    budgets = {"smallest": smallest_bytes, "ample": int(AMPLE.removesuffix("GB")) * 10**9}
    between = math.ceil(math.sqrt(smallest_bytes * ample["predicted_peak_bytes"]) / 1e6) * 1_000_000
    if between > 1.02 * smallest_bytes:
        budgets["between"] = between
    for kind, budget_bytes in budgets.items():
        if (number, kind) in done:
            continue
        run = folder / f"run{number}-{kind}"
        budget = f"{budget_bytes // 1_000_000}MB"
        started = time.monotonic()
        result = outside("train", *words, "--mem-budget", budget, "--out", str(run), "--json")
        row = {"shape": number, "kind": kind, **shape, "budget_bytes": budget_bytes, "code": result["code"]}
        row |= {"peak_bytes": result["peak_bytes"], "seconds": round(time.monotonic() - started, 1)}
        if result["code"] == 0:
            made = json.loads((run / "plan.json").read_text())
            keys = ("predicted_peak_bytes", "blocks", "micro_batch", "accumulation", "checkpointing", "slots")
            row |= {key: made[key] for key in keys}
            row["breakdown"] = made["breakdown"]
            row["adapted"] = "the micro-batch is now" in str(result["err"])
        else:
            row["error"] = str(result["err"])[-500:]
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)
        shutil.rmtree(run, ignore_errors=True)


def outside(*arguments: str) -> dict[str, Any]:
    """Run `edgeblocks ...`: exit code, output, and peak resident set."""
    return measured(*EDGEBLOCKS, *arguments)


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def line(row: dict[str, Any]) -> str:
    shape = (
        row.get("family", "dit")
        + " "
        + " ".join(f"{key[0]}{row[key]}" for key in ("width", "depth", "batch", "image", "patch"))
    )
    if row["code"]:
        return f"{row['shape']:>2} {row['kind']:<8} {shape}: exit {row['code']}: {row['error']}"
    over = row["predicted_peak_bytes"] / row["peak_bytes"] - 1
    return (
        f"{row['shape']:>2} {row['kind']:<8} {shape}: {row['blocks']} blocks, "
        f"{row['accumulation']}x{row['micro_batch']} "
        f"{'ckpt ' if row['checkpointing'] else ''}slots {row['slots']}: budget {row['budget_bytes'] / 1e6:.0f} "
        f"predicted {row['predicted_peak_bytes'] / 1e6:.0f} measured {row['peak_bytes'] / 1e6:.0f} ({over:+.1%}) "
        f"{row['seconds']} s"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if row["code"] == 0]
    if not good:
        return "nothing measured"
    deviations = [row["predicted_peak_bytes"] / row["peak_bytes"] - 1 for row in good]
    inside = sum(row["peak_bytes"] <= row["budget_bytes"] for row in good)
    close = sum(abs(deviation) <= 0.10 for deviation in deviations)
    bound = [
        row
        for row in good
        if row["micro_batch"] < row["batch"] or row["blocks"] > PREFERRED_BLOCKS[row.get("family", "dit")]
    ]
    used = min((row["peak_bytes"] / row["budget_bytes"] for row in bound), default=1.0)
    return (
        f"{len(rows)} runs, {len(rows) - len(good)} failed; within the budget: {inside} of {len(good)}; prediction "
        f"within 10 % of the measured peak: {close} of {len(good)} ({close / len(good):.0%}); predicted against "
        f"measured from {min(deviations):+.1%} to {max(deviations):+.1%}; where the budget made the micro-batch "
        f"smaller than the batch or the blocks more than the family prefers ({len(bound)} runs), at least {used:.0%} "
        f"of it was used"
    )


def table(rows: list[dict[str, Any]]) -> str:
    heads = [
        "family",
        "width",
        "layers",
        "batch",
        "image",
        "patch",
        "budget",
        "blocks",
        "micro-batch",
        "ckpt",
        "in memory",
    ]
    heads += ["predicted", "measured", "predicted/measured"]
    lines = [
        "# Budget, prediction and measurement",
        "",
        "Made by `python tests/bench/budget_grid.py grid.jsonl --table docs/budget_grid.md`; sizes are in MB.",
        "Each line is one process: two visits of every block, a grid of samples and an evaluation, on random images.",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"8-bit AdamW, fp32. `in memory` counts the blocks that have a place there.",
        "",
        f"**{summary(rows)}.**",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in sorted(rows, key=lambda row: (row["shape"], row["budget_bytes"])):
        if row["code"]:
            continue
        cells = [
            row.get("family", "dit"),
            *(row[key] for key in ("width", "depth", "batch")),
            f"{row['image']}x{row['image']}x{row['channels']}",
        ]
        cells += [row["patch"], f"{row['budget_bytes'] / 1e6:.0f}", row["blocks"], row["micro_batch"]]
        cells += ["on" if row["checkpointing"] else "off", f"{row['slots']} of {row['blocks']}"]
        cells += [f"{row[key] / 1e6:.0f}" for key in ("predicted_peak_bytes", "peak_bytes")]
        cells.append(f"{row['predicted_peak_bytes'] / row['peak_bytes'] - 1:+.1%}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
