"""What it costs to keep blocks that wait in 8 or 4 bits: quality, bytes, time. A table in Markdown.

    python tests/bench/frozen_blocks.py
    python tests/bench/frozen_blocks.py --families ar vit --steps 50

Each family's usual network in blocks is trained for a while, and evaluated with its blocks as they are, as int8 and as
nf4. `loss` is that of hold-out examples; `expanding` is what the codes of a block take to become float32, beside a
forward pass of so many examples through it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import edgeblocks
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Frozen
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.profiling.block_step import example_batch
from edgeblocks.runs.quantized_blocks import quantized_store

FAMILIES: dict[str, dict[str, Any]] = {
    "dit": {"data": "digits"},
    "vit": {"data": "digits"},
    "mdlm": {"data": "moby-dick", "length": 64, "hold_out": 0.002},
    "ar": {"data": "moby-dick", "length": 64, "hold_out": 0.01},
    "looped": {"data": "moby-dick", "length": 64, "hold_out": 0.01},
}
KINDS: tuple[Frozen, ...] = ("int8", "nf4")
ROUNDS = 9
EXAMPLES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=150)
    wanted = parser.parse_args()
    print("| family | parameters | kept as | bytes that wait | loss | change | expanding a block | a forward pass |")
    print("|---|---|---|---|---|---|---|---|")
    for family in wanted.families:
        print(rows(family, wanted.steps), flush=True)


def rows(family: str, steps: int) -> str:
    """Lines of the table."""
    folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
    try:
        how = {**FAMILIES[family], "family": family, "steps": steps, "mem_budget": "4GB", "sample_grids": 0}
        run = edgeblocks.train(out=folder / "run", **how)
        evaluated, lines = 0 if family in ("dit", "vit") else 2, []
        loss = run.evaluate(samples=evaluated)["validation_loss"]
        directory = run.directory
        parameters = sum(layout.num_parameters for layout in directory.store().layouts)
        start = f"| {family} | {parameters / 1e6:.2f}M "
        lines.append(f"{start}| fp32 | {4 * parameters / 1e6:.1f} MB | {loss:.5f} | | | |")
        for kind in KINDS:
            rounded = edgeblocks.load(run.path, frozen=kind).evaluate(samples=evaluated)["validation_loss"]
            store = quantized_store(directory, len(directory.file_layers), kind)
            waiting = sum(layout.num_bytes for layout in store.layouts)
            expanding_s, passing_s = times(run, kind)
            lines.append(
                f"{start}| {kind} | {waiting / 1e6:.1f} MB | {rounded:.5f} | {100 * (rounded / loss - 1):+.2f} % "
                f"| {1e3 * expanding_s:.1f} ms | {1e3 * passing_s:.0f} ms |"
            )
    finally:
        shutil.rmtree(folder)
    return "\n".join(lines)


def times(run: edgeblocks.Run, kind: Frozen) -> tuple[float, float]:
    """Seconds of expanding a block, and of a forward pass; medians, in turns."""
    directory = run.directory
    family, store = directory.family(), quantized_store(directory, 1, kind)
    buffer, copy = store.buffer(("ema",)), Float32Copy(store.layouts, torch.device("cpu"))
    store.read(0, buffer)
    network = family.block(num_layers=directory.layers[0], checkpointing=False)
    network.reset_tables_()
    if not directory.method.one_network:
        copy.hold_(buffer, "ema").bind_(network)
    batch, taken = example_batch(family, EXAMPLES, "cpu"), ([], [])
    for _ in range(ROUNDS):
        started = time.perf_counter()
        copy.hold_(buffer, "ema")
        taken[0].append(time.perf_counter() - started)
        started = time.perf_counter()
        with torch.no_grad(), computing_in("fp32", "cpu"):
            family.loss(network, batch)
        taken[1].append(time.perf_counter() - started)
    return statistics.median(taken[0]), statistics.median(taken[1])


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    main()
