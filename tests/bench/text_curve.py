"""Bits a character of a text family over the time of its training, beside simple means on the same text.

    python tests/bench/text_curve.py mdlm curve.jsonl --out run --minutes 60 --every 10 --steps 3500
    python tests/bench/text_curve.py - curve.jsonl --table docs/text_curve.md --plot docs/text_curve.png

The training is the command itself; every so many minutes it is stopped with SIGTERM, evaluated on the hold-out part
with its EMA weights, and resumed, which changes no bit of it. Only training counts as time: as the wall shows it,
and as the processor's time of the training processes (user and system), which other programs on the machine do not
lengthen much. The learning rate falls to zero with `--steps`: take as many as fit into the minutes. The same command
again goes on with a run directory that exists.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from text_compressors import bits_per_character

COMMAND = [str(Path(sys.executable).with_name("edgeblocks"))]
SHOWN = ("zlib", "bzip2", "3-gram", "5-gram")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family")
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", default="moby-dick")
    parser.add_argument("--out", type=Path, help="the run directory")
    parser.add_argument("--minutes", type=float, default=60, help="of two processor cores")
    parser.add_argument("--every", type=float, default=6)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--note", default="", help="how the rows were measured, for the table")
    wanted = parser.parse_args()
    if wanted.family != "-":
        measure(wanted)
    rows = [json.loads(line) for line in wanted.results.read_text().splitlines()]
    means = bits_per_character(wanted.data, "chars") if wanted.table or wanted.plot else {}
    if wanted.table is not None:
        wanted.table.write_text(table(rows, means, wanted.note))
    if wanted.plot is not None:
        plot(rows, means, wanted.plot)


def measure(wanted: argparse.Namespace) -> None:
    """Train in stretches, and append a row to the results after each."""
    run = wanted.out
    settings = [part for setting in wanted.settings for part in ("--set", setting)]
    start = ["train", wanted.family, "--data", wanted.data, "--steps", str(wanted.steps), "--out", str(run)]
    arguments = [*start, "--set", "sample_grids=0", *settings]
    wall_s = processor_s = 0.0
    if run.exists():
        former = [json.loads(line) for line in wanted.results.read_text().splitlines()]
        last = [row for row in former if row["family"] == wanted.family][-1]
        wall_s, processor_s, arguments = last["wall_s"], last["processor_s"], ["train", "--resume", str(run)]
    while not (run / "summary.json").exists() and processor_s < 120 * wanted.minutes:
        wall, processor = stretch(arguments, 60 * wanted.every)
        wall_s, processor_s = wall_s + wall, processor_s + processor
        arguments = ["train", "--resume", str(run)]
        row = {
            "family": wanted.family,
            "settings": [f"steps={wanted.steps}", *wanted.settings],
            "wall_s": round(wall_s),
            "processor_s": round(processor_s),
            **evaluated(run, wanted.samples),
        }
        with wanted.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def stretch(arguments: list[str], seconds: float) -> tuple[float, float]:
    """Train until two cores could have worked that long; wall and processor seconds of it."""
    before, started = _children_s(), time.monotonic()
    with tempfile.TemporaryFile("w+") as told:  # a pipe that nobody reads would be full of progress at some time
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=told)
        while process.poll() is None:
            time.sleep(1)
            if _used_s(process.pid) > 2 * seconds:
                process.terminate()
                process.wait()
        if process.returncode not in (0, 130):
            told.seek(0)
            raise SystemExit(told.read())
    return time.monotonic() - started, _children_s() - before


def evaluated(run: Path, samples: int) -> dict[str, Any]:
    told = subprocess.run(
        [*COMMAND, "eval", str(run), "--samples", str(samples), "--json"], check=True, capture_output=True, text=True
    )
    result = json.loads(told.stdout)
    text = result["text"]
    return {
        "steps": result["steps"],
        "bits": text["bits_per_character"],
        "error": text["bits_per_character_error"],
        "by_block": result["validation_loss_by_block"],
    }


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _used_s(pid: int) -> float:
    """Processor seconds of a process that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / 100


def table(rows: list[dict[str, Any]], means: dict[str, float], note: str) -> str:
    lines = [
        "# Bits a character while training",
        "",
        "Made by `tests/bench/text_curve.py`, whose first lines say how. Minutes are of two cores, from the",
        "processor's time; the hold-out part is the last tenth of the built-in Moby-Dick (27 different characters).",
        "",
        ", ".join(f"{name} {means[name]:.3f}" for name in SHOWN) + " bits a character.",
        "",
        *([note, ""] if note else []),
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        lines += [
            f"## {family}",
            "",
            f"Settings beside the preset: {', '.join(own[0]['settings'])}.",
            "",
            "| minutes | on the wall | steps of the blocks | bits a character | standard error |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['processor_s'] / 120:.1f} | {row['wall_s'] / 60:.1f} | {', '.join(map(str, row['steps']))} "
            f"| {row['bits']:.3f} | {'' if row['error'] is None else format(row['error'], '.3f')} |"
            for row in own
        ]
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], means: dict[str, float], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        axes.plot([row["processor_s"] / 120 for row in own], [row["bits"] for row in own], marker="o", label=family)
    for name in SHOWN:
        axes.axhline(means[name], color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            name, (0.995, means[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axes.set(xlabel="minutes of two cores", ylabel="bits a character, hold-out part", xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
