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
Batch, learning rate, schedule, clipping, EMA and the hold-out part are the same; all are evaluated with EMA weights.
A plain vit is the same network as a block, always given the same noise level and no label.
"""

import argparse
import copy
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import edgeblocks
from edgeblocks.classification import classification_scores
from edgeblocks.data.images import open_images
from edgeblocks.data.order import BatchOrder
from edgeblocks.families.vit import Vit, VitSettings
from edgeblocks.generators import generator_at
from edgeblocks.trainer import BETA1, BETA2, EPS, ema_exponent, learning_rate_at

LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP, EMA_LENGTH = 1e-3, 50, 0.01, 1.0, 0.1
IMAGE = {"width": 96, "depth": 6, "heads": 4, "patch": 4, "batch": 64}
TEXT = {"width": 128, "depth": 6, "heads": 4, "length": 128, "batch": 32}
SETTINGS = {"dit": IMAGE, "vit": IMAGE, "mdlm": {**TEXT, "overlap": 0.1}}
EXAMPLES = {"dit": 0, "vit": 1024, "mdlm": 256}
"""Of the hold-out part: classified, or sequences of the bound; the loss of images is that of 512."""
BLOCKS = {"dit": 3, "vit": 2, "mdlm": 3}
MEASURES = {
    "dit": ("loss",),
    "vit": ("top1", "cross_entropy", "calibration_error"),
    "mdlm": ("bits_per_character",),
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
    if wanted.family is not None:
        for seed in wanted.seeds:
            for arm in arms(wanted.family, wanted.data, wanted.steps, seed):
                with wanted.results.open("a") as file:
                    file.write(json.dumps(arm) + "\n")
                print(json.dumps(arm), flush=True)
    if wanted.table is not None:
        wanted.table.write_text(table([json.loads(line) for line in wanted.results.read_text().splitlines()]))


def arms(family: str, data: str, steps: int, seed: int) -> Any:
    """The four arms, one after the other."""
    blocks, depth = BLOCKS[family], SETTINGS[family]["depth"]
    common = {"family": family, "steps": steps, "seed": seed, **SETTINGS[family]}

    def plain(steps: int, depth: int) -> dict[str, Any]:
        if family == "vit":
            return plain_vit(data, steps, seed, depth=depth)
        return block_wise(family, data, steps, seed, blocks=1, depth=depth)

    ways: list[tuple[str, Any]] = [
        ("blocks", lambda: block_wise(family, data, steps, seed, blocks=blocks, depth=depth)),
        ("one block", lambda: block_wise(family, data, steps, seed, blocks=1, depth=depth)),
        ("plain, short", lambda: plain(steps * blocks, depth // blocks)),
    ]
    if family == "vit":
        ways.insert(2, ("plain", lambda: plain(steps, depth)))
    for name, train in ways:
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
            learning_rate=LEARNING_RATE,
            warmup=WARMUP,
            weight_decay=WEIGHT_DECAY,
            clip=CLIP,
            ema_length=EMA_LENGTH,
            **{**SETTINGS[family], "depth": depth},
        )
        result = run.evaluate(samples=EXAMPLES[family])
    finally:
        shutil.rmtree(folder)
    found = {"loss": result["validation_loss"], **result.get("classification", {}), **result.get("text", {})}
    levels = [round(level["loss"], 4) for level in result["validation"]["levels"]]
    return {**{name: found[name] for name in MEASURES[family]}, "levels": levels}


def plain_vit(data: str, steps: int, seed: int, *, depth: int) -> dict[str, Any]:
    """An ordinary training loop of an ordinary classifier."""
    cache = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
    images = open_images(data, image_size=None, hold_out=0.1, seed=seed, cache_dir=cache)
    shape = {name: IMAGE[name] for name in ("width", "heads", "patch")}
    family = Vit(VitSettings(**shape, depth=depth), Vit.data_info(images))
    network = family.block(num_layers=depth, checkpointing=False)
    network.reset_tables_()
    network.init_(generator_at(seed, "init", 0))
    averaged = copy.deepcopy(network).eval()
    matrices = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPS, fused=True)
    order = BatchOrder(images.train, batch=IMAGE["batch"], seed=seed, block=0)
    exponent = ema_exponent(EMA_LENGTH)

    def logits(model: Any, pixels: np.ndarray) -> torch.Tensor:
        z, sigma = torch.zeros(len(pixels), *family.state_shape), torch.full((len(pixels),), family.settings.sigma_max)
        found: torch.Tensor = model.logits(z, sigma, family.condition(pixels))
        return found

    for step in range(steps):
        pixels, labels = images.gather(order.indices(step))
        assert labels is not None
        F.cross_entropy(logits(network, pixels), torch.from_numpy(labels)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps=steps, warmup=WARMUP, peak=LEARNING_RATE)
        optimizer.step()
        optimizer.zero_grad()
        decay = (1 - 1 / (step + 1)) ** (exponent + 1)
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
    pixels, labels = images.gather(images.held_out[: EXAMPLES["vit"]])
    assert labels is not None
    with torch.no_grad():
        parts = [logits(averaged, part).softmax(1) for part in np.array_split(pixels, max(1, len(pixels) // 256))]
    shutil.rmtree(cache)
    found = classification_scores(torch.cat(parts).numpy(), labels)
    return {name: found[name] for name in ("top1", "cross_entropy", "calibration_error")}


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
