"""What block-wise training costs in quality: four arms of a family at equal layer evaluations.

    python tests/bench/fashion_mnist.py fashion.npz
    python tests/bench/four_arms.py fashion.npz arms.jsonl --family vit --steps 1500 --seeds 0 1
    python tests/bench/four_arms.py moby-dick arms.jsonl --family mdlm --steps 1500 --seeds 0 1
    python tests/bench/four_arms.py - arms.jsonl --table docs/four_arms.md

With L layers, the family's preferred number of blocks B, and K steps of each block:
  blocks        B blocks of L/B layers, K steps each
  one block     the same method with B = 1: one block of L layers, K steps (for dit and mdlm: end-to-end training)
  plain         end-to-end training of L layers, K steps
  plain, short  end-to-end training of L/B layers, B K steps: shows whether depth is used at all
A chain that writes text token by token is told by its bound with 8 noises, a plain network by its cross-entropy. The
classical training of a looped network is in looped_classical.py.
Batch, learning rate, schedule, clipping, EMA and the hold-out part are the same; all are evaluated with EMA weights.
The same command again goes on with the arms that the results do not have.
"""

import argparse
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import plain
import torch

import edgeblocks
from edgeblocks.classification import classification_scores
from edgeblocks.config import RunSettings
from edgeblocks.families.vit import Vit, VitSettings
from edgeblocks.run_data import data_of

LEARNING = {"learning_rate": 1e-3, "warmup": 50, "weight_decay": 0.01, "clip": 1.0, "ema_length": 0.1}
IMAGE = {"width": 96, "depth": 6, "heads": 4, "patch": 4, "batch": 64}
TEXT = {"width": 128, "depth": 6, "heads": 4, "length": 128, "batch": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "dit": IMAGE,
    "vit": IMAGE,
    "mdlm": {**TEXT, "overlap": 0.1},
    "ar": {**TEXT, "depth": 8, "overlap": 0.1},
    "looped": {**TEXT, "depth": 8, "overlap": 0.1},
}
PLAIN = ("vit", "ar", "looped")
"""Families whose end-to-end form is another network than one block; see `plain`."""
EXAMPLES = {"dit": 0, "vit": 1024, "mdlm": 256, "ar": 64, "looped": 16}
"""Of the hold-out part: classified, or sequences of the bound; the loss of images is that of 512."""
BLOCKS = {"dit": 3, "vit": 2, "mdlm": 3, "ar": 4, "looped": 1}
MEASURES = {
    "dit": ("loss",),
    "vit": ("top1", "cross_entropy", "calibration_error"),
    "mdlm": ("bits_per_character",),
    "ar": ("bits_per_character",),
    "looped": ("bits_per_character",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("results", type=Path)
    parser.add_argument("--family", choices=sorted(BLOCKS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--table", type=Path)
    wanted = parser.parse_args()
    former = [json.loads(line) for line in wanted.results.read_text().splitlines()] if wanted.results.exists() else []
    done = {(row["family"], row["arm"], row["steps"], row["seed"]) for row in former}
    if wanted.family is not None:
        for seed in wanted.seeds:
            for arm in arms(wanted.family, wanted.data, wanted.steps, seed, done):
                with wanted.results.open("a") as file:
                    file.write(json.dumps(arm) + "\n")
                print(json.dumps(arm), flush=True)
    if wanted.table is not None:
        wanted.table.write_text(table([json.loads(line) for line in wanted.results.read_text().splitlines()]))


def arms(family: str, data: str, steps: int, seed: int, done: set[tuple[str, str, int, int]]) -> Any:
    """The four arms, one after the other, without those that are done."""
    blocks, depth = BLOCKS[family], SETTINGS[family]["depth"]
    common = {"family": family, "steps": steps, "seed": seed, **SETTINGS[family]}

    def whole(steps: int, depth: int) -> dict[str, Any]:
        if family in PLAIN:
            return end_to_end(family, data, steps, seed, depth=depth)
        return block_wise(family, data, steps, seed, blocks=1, depth=depth)

    ways: list[tuple[str, Any]] = [
        ("one block", lambda: block_wise(family, data, steps, seed, blocks=1, depth=depth)),
    ]
    if family in PLAIN:
        ways.append(("plain", lambda: whole(steps, depth)))
    if blocks > 1:
        ways.insert(0, ("blocks", lambda: block_wise(family, data, steps, seed, blocks=blocks, depth=depth)))
        ways.append(("plain, short", lambda: whole(steps * blocks, depth // blocks)))
    for name, train in ways:
        if (family, name, steps, seed) in done:
            continue
        started = time.perf_counter()
        yield {**common, "blocks": blocks, "arm": name, **train(), "seconds": round(time.perf_counter() - started)}


def block_wise(family: str, data: str, steps: int, seed: int, *, blocks: int, depth: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
    try:
        run = edgeblocks.train(
            family=family,
            out=folder / "run",
            data=data,
            mem_budget="4GB",
            steps=steps,
            seed=seed,
            blocks=blocks,
            sample_grids=0,
            **LEARNING,
            **{**SETTINGS[family], "depth": depth},
        )
        result = run.evaluate(samples=EXAMPLES[family])
    finally:
        shutil.rmtree(folder)
    found = {"loss": result["validation_loss"], **result.get("classification", {}), **result.get("text", {})}
    levels = [round(level["loss"], 4) for level in result["validation"]["levels"]]
    return {
        **{name: found[name] for name in MEASURES[family]},
        "error": found.get("bits_per_character_error", result["validation"]["standard_error"]),
        "levels": levels,
    }


def end_to_end(family: str, data: str, steps: int, seed: int, *, depth: int) -> dict[str, Any]:
    """An ordinary training loop of an ordinary network, see `plain`."""
    shape = {**SETTINGS[family], "depth": depth}
    given = {name: shape[name] for name in ("length",) if name in shape}
    data_set = data_of(RunSettings(family=family, data=data, seed=seed, **given), lambda *_: None)
    model: Any
    if family == "vit":
        sizes = {name: shape[name] for name in ("width", "depth", "heads", "patch")}
        model = plain.PlainClassifier(Vit(VitSettings(**sizes), Vit.data_info(data_set)))
    else:
        sizes = {name: shape[name] for name in ("width", "heads", "length")}
        model = plain.PlainCausal(vocabulary=data_set.vocabulary, num_layers=depth, **sizes)
    averaged = plain.train(model, data_set, steps=steps, batch=shape["batch"], seed=seed, **LEARNING)
    if family == "vit":
        probabilities, labels = plain.over_hold_out(
            lambda pixels, _: averaged(pixels).softmax(1), data_set, EXAMPLES[family]
        )
        assert labels is not None
        found = classification_scores(probabilities, labels)
        return {name: found[name] for name in MEASURES[family]}
    losses, _ = plain.over_hold_out(averaged.losses, data_set, EXAMPLES[family])
    return {name: float(losses.mean()) / math.log(2) / data_set.characters_per_token for name in MEASURES[family]}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Four arms at equal layer evaluations",
        "",
        "Made by `tests/bench/four_arms.py`, whose first lines say what the arms are. Mean over the seeds, and in",
        "brackets each seed, on the hold-out part, EMA weights. Images are Fashion-MNIST's (28x28), the text is the",
        "built-in Moby-Dick in characters. Seconds (evaluation too) are of runs beside other programs: they compare",
        "nothing.",
        f"{platform.system()} {platform.machine()}, 2 cores, torch {torch.__version__}, fp32.",
        "",
    ]
    for family in sorted({row["family"] for row in rows}):
        measures = MEASURES[family]
        own = [row for row in rows if row["family"] == family]
        lines += [
            f"## {family}: {own[0]['blocks']} blocks, {own[0]['steps']} steps of each",
            "",
            ", ".join(f"{name} {own[0][name]}" for name in SETTINGS[family] if name in own[0])
            + (f"; {EXAMPLES[family]} examples evaluated" if EXAMPLES[family] else ""),
            "",
            "| arm | " + " | ".join(name.replace("_", " ") for name in measures) + " | seconds |",
            "|---|" + "---|" * (len(measures) + 1),
        ]
        for arm in dict.fromkeys(row["arm"] for row in own):
            runs = [row for row in own if row["arm"] == arm]
            cells = [
                f"{statistics.mean(run[name] for run in runs):.4f} ({', '.join(f'{run[name]:.4f}' for run in runs)})"
                for name in measures
            ]
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {statistics.mean(r['seconds'] for r in runs):.0f} |")
        lines += ["", "Loss per noise level, high noise first (first seed):", ""]
        for row in own:
            if "levels" in row and row["seed"] == own[0]["seed"]:
                lines.append(f"- {row['arm']}: {', '.join(f'{level:.3f}' for level in row['levels'])}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
