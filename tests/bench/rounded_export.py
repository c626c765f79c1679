"""Exports with weights in 8 and 4 bits beside float32: size, quality on hold-out data, time. A table in Markdown.

    python tests/bench/rounded_export.py
    python tests/bench/rounded_export.py --families mdlm ar looped --steps 150 --set batch=8 length=32

Small networks (width 128, two blocks of two layers; `looped` in one) are trained and exported three times. All three
make the same 16 samples in turns, one thread each, with weights in memory; times are those of the processor.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from one_file import DATA, example_pixels

import edgeblocks
from edgeblocks.export.manifest_figures import Rounding
from edgeblocks.export.open_export import open_chain
from edgeblocks.onnx_runtime import Hardware

SHAPE: dict[str, Any] = {"width": 128, "heads": 4, "depth": 4, "batch": 32}
WEIGHTS = ("fp32", "int8", "int4")
TOGETHER = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(DATA), default=list(DATA))
    parser.add_argument("--steps", type=int, default=500, help="of training, each block")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="settings of the networks")
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    chosen = {name: int(value) for name, _, value in (one.partition("=") for one in wanted.set)}
    print("| family, weights | size | loss | right | worse by | outputs differ by | examples | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for family in wanted.families:
        folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
        try:
            for row in rows(family, folder, wanted.rounds, {"steps": wanted.steps, **chosen}):
                print(row, flush=True)
        finally:
            shutil.rmtree(folder)


def rows(family: str, folder: Path, rounds: int, chosen: Mapping[str, Any]) -> list[str]:
    """Those of a family."""
    how = {**DATA[family], **SHAPE, "family": family, "mem_budget": "4GB", "sample_grids": 0}
    if family in ("dit", "vit"):
        how["patch"] = 2
    how |= chosen
    run = edgeblocks.train(out=folder / "run", **how)
    manifests = {kind: run.export(folder / kind, weights=kind, most_loss=None) for kind in WEIGHTS}
    make = {kind: maker(folder / kind) for kind in WEIGHTS}
    times: dict[str, list[float]] = {kind: [] for kind in WEIGHTS}
    for number in range(rounds + 1):
        for kind in WEIGHTS:
            start = time.process_time()
            make[kind]()
            if number:  # the first one loads
                times[kind].append(1000 * (time.process_time() - start))
    found = {kind: Rounding(**manifests[kind]["rounding"]) for kind in WEIGHTS[1:]}
    sizes = {kind: sum(file["bytes"] for file in manifests[kind]["files"]) for kind in WEIGHTS}
    return [row(f"`{family}` {kind}", found.get(kind), found["int8"], sizes[kind], times[kind]) for kind in WEIGHTS]


def row(name: str, rounding: Rounding | None, other: Rounding, num_bytes: int, times: list[float]) -> str:
    """`rounding` None is float32, whose figures stand in the `other` one as well."""
    differ = examples = worse = ""
    loss, right = other.loss_fp32, other.accuracy_fp32
    if rounding is not None:
        loss, right = rounding.loss, rounding.accuracy
        cost, error = rounding.cost
        worse = f"{cost:+.2%}" if error is None else f"{cost:+.2%} ± {2 * error:.2%}"
        differ, examples = f"{rounding.relative_difference:.2%}", str(rounding.examples)
    share = "" if right is None else f"{right:.2%}"
    ms = statistics.median(times)
    size = f"{num_bytes / 1e6:.2f} MB"
    return f"| {name} | {size} | {loss:.5g} | {share} | {worse} | {differ} | {examples} | {ms:.0f} |"


def maker(path: Path) -> Any:
    """What makes the samples with weights that stay in memory."""
    chain: Any = open_chain(path, hardware=Hardware(threads=1))
    chain.keeps_all = True
    chain.close = lambda: None
    if chain.manifest.task == "classes":
        pixels = example_pixels(chain.manifest.image_shape)
        return lambda: chain.classify(pixels[:TOGETHER])
    make = chain.sample if chain.manifest.task == "images" else chain.write
    return lambda: make(TOGETHER)


if __name__ == "__main__":
    main()
