"""Predicted peak, measured peak and budget of short fine-tunings, each in a process of its own.

    python tests/bench/tuning_grid.py grid.jsonl --table docs/tuning_grid.md

Pretrained models are random ones of a few shapes, and all is trained in each of the three ways: under the smallest
budget that a plan finds, and under one with room for everything. Runs that the file has are not made again. The peak is
the largest resident set, as a parent process learns it from the kernel.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgeblocks.units import PROCESSES_DIFFER_BYTES

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.outside import EDGEBLOCKS, measured
from support.small_model import TEXT, transformers, write_tokenizer

AMPLE = "8GB"
MODELS: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12},
    "deep": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 24, "num_attention_heads": 4},
    "vocabulary": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
}
VOCABULARIES = {"wide": 8192, "deep": 1024, "vocabulary": 100_000}
SHAPES = ((128, 8), (512, 2))
"""Tokens of a window, and windows a step."""
TUNES = ("full", "lora", "blocks")
KINDS = ("smallest", "ample")
STEPS = 3
_ADVICE = re.compile(r"use --mem-budget (\d+MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", type=Path)
    wanted = parser.parse_args()
    done = read(wanted.results)
    known = {(row["model"], row["length"], row["batch"], row["tune"], row["kind"]) for row in done}
    with tempfile.TemporaryDirectory(prefix="tuning-grid-") as name:
        folder = Path(name)
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": TEXT[start:] * 8}) + "\n" for start in range(9)))
        for model in MODELS:
            write_model(folder / model, model)
            for length, batch in SHAPES:
                for tune in TUNES:
                    for kind in KINDS:
                        if (model, length, batch, tune, kind) not in known:
                            row = {"model": model, "length": length, "batch": batch, "tune": tune, "kind": kind}
                            row |= run(folder, model, length, batch, tune, kind)
                            with wanted.results.open("a") as file:
                                file.write(json.dumps(row) + "\n")
                            print(line(row), flush=True)
    rows = read(wanted.results)
    print(summary(rows))
    if wanted.table is not None:
        wanted.table.write_text(table(rows))


def write_model(folder: Path, name: str) -> None:
    """A llama with random weights in bfloat16."""
    import torch

    library = transformers()
    config = library.LlamaConfig(**MODELS[name], vocab_size=VOCABULARIES[name], max_position_embeddings=1024)
    torch.manual_seed(0)
    library.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


def run(folder: Path, model: str, length: int, batch: int, tune: str, kind: str) -> dict[str, Any]:
    """Exit code, budget, predicted and measured peak in bytes."""
    asked = ["finetune", str(folder / model), "--data", str(folder / "text.jsonl"), "--length", str(length)]
    asked += ["--batch", str(batch), "--steps", str(STEPS), "--tune", tune]
    if tune == "blocks":
        last = MODELS[model]["num_hidden_layers"] - 1
        asked += ["--train-blocks", f"{last - 1},{last}"]
    budget, out = AMPLE, folder / "run"
    if kind == "smallest":
        budget = "500MB"
        # Planning is refused first, where it takes more in its two processes than the training itself.
        while found := _ADVICE.search(str(measured(*EDGEBLOCKS, *asked, "--mem-budget", budget, "--dry-run")["err"])):
            budget = found[1]
    shutil.rmtree(out, ignore_errors=True)  # of a run that failed
    made = measured(*EDGEBLOCKS, *asked, "--mem-budget", budget, "--out", str(out))
    row: dict[str, Any] = {"code": made["code"], "budget_bytes": as_bytes(budget), "peak_bytes": made["peak_bytes"]}
    if made["code"]:
        return {**row, "error": str(made["err"])[-400:]}
    plan = json.loads((out / "plan.json").read_text())
    row |= {key: plan[key] for key in ("predicted_peak_bytes", "micro_batch", "blocks", "slots")}
    return row


def as_bytes(budget: str) -> int:
    """
    >>> as_bytes("650MB"), as_bytes("8GB")
    (650000000, 8000000000)
    """
    return int(budget[:-2]) * {"MB": 10**6, "GB": 10**9}[budget[-2:]]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def line(row: dict[str, Any]) -> str:
    what = f"{row['model']} {row['length']} x {row['batch']} {row['tune']} {row['kind']}"
    if row["code"]:
        return f"{what}: exit {row['code']}: {row['error']}"
    over = row["predicted_peak_bytes"] / row["peak_bytes"] - 1
    sizes = [f"{row[key] / 1e6:.0f}" for key in ("budget_bytes", "predicted_peak_bytes", "peak_bytes")]
    return f"{what}: budget {sizes[0]} predicted {sizes[1]} measured {sizes[2]} ({over:+.1%})"


def summary(rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if row["code"] == 0]
    if not good:
        return "nothing measured"
    deviations = [row["predicted_peak_bytes"] / row["peak_bytes"] - 1 for row in good]
    inside = sum(row["peak_bytes"] <= row["budget_bytes"] + PROCESSES_DIFFER_BYTES for row in good)
    close = sum(abs(deviation) <= 0.10 for deviation in deviations)
    return (
        f"{len(rows)} runs, {len(rows) - len(good)} failed; within the budget: {inside} of {len(good)}; prediction "
        f"within 10 % of the measured peak: {close} of {len(good)}; predicted against measured from "
        f"{min(deviations):+.1%} to {max(deviations):+.1%}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Fine-tuning: budget, prediction and measurement",
        "",
        "Made by `python tests/bench/tuning_grid.py grid.jsonl --table docs/tuning_grid.md`, whose first lines say",
        "what is trained; sizes are in MB. `--tune blocks` trains the last two layers. float32, two cores, Linux.",
        "",
        f"**{summary(rows)}**",
        "",
        "| model | window | batch | `--tune` | budget | stages | micro-batch | predicted | measured | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = (
            f"| {row['model']} | {row['length']} | {row['batch']} | {row['tune']} | {row['budget_bytes'] / 1e6:.0f} |"
        )
        if row["code"]:
            lines.append(f"{start} | | | {row['peak_bytes'] / 1e6:.0f} | failed |")
            continue
        over = row["predicted_peak_bytes"] / row["peak_bytes"] - 1
        lines.append(
            f"{start} {row['blocks']} | {row['micro_batch']} | {row['predicted_peak_bytes'] / 1e6:.0f} | "
            f"{row['peak_bytes'] / 1e6:.0f} | {over:+.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
