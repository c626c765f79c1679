"""A chain in one ONNX file beside a graph a block and torch: time and peak memory. Tables in Markdown.

    python tests/bench/one_file.py
    python tests/bench/one_file.py --families dit ar --rounds 9
    python tests/bench/one_file.py --busy --forms blocks chain

Each family's network is exported in both forms, and all three make the same samples in turns, with their graphs and
weights in memory: 1 and 16 images, classified images or texts. Peaks are those of processes of their own that begin,
load and make 16. With --busy times are those of the processor with one thread, for a machine that others use.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeblocks.export.open_export import open_chain
from edgeblocks.onnx_runtime import Hardware

DATA: dict[str, dict[str, Any]] = {
    "dit": {"data": "digits"},
    "vit": {"data": "digits"},
    "mdlm": {"data": "moby-dick", "length": 64, "hold_out": 0.002},
    "ar": {"data": "moby-dick", "length": 64, "hold_out": 0.01},
    "looped": {"data": "moby-dick", "length": 64, "hold_out": 0.01},
}
SHAPE: dict[str, Any] = {}
"""Settings of the networks, where they are not the usual ones."""
BATCHES = (1, 16)
FORMS = {"torch": "torch", "blocks": "a graph a block", "chain": "one file"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(DATA), default=list(DATA))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--busy", action="store_true", help="processor time of one thread")
    parser.add_argument("--peak", nargs=3, metavar=("FORM", "PATH", "N"), help="make N and print the peak in MB")
    wanted = parser.parse_args()
    if wanted.peak:
        form, path, n = wanted.peak
        maker(form, Path(path))(int(n))
        print(peak_mb())
        return
    named = [FORMS[form] for form in wanted.forms]
    print(f"| family | n | {' | '.join(f'{name} ms' for name in named)} |")
    print("|---|---|" + "---|" * len(named))
    peaks = []
    for family in wanted.families:
        folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
        try:
            peaks.append(compared(family, folder, wanted.rounds, wanted.forms, busy=wanted.busy))
        finally:
            shutil.rmtree(folder)
    print(f"\n| family | parameters MB | {' | '.join(f'{name} MB' for name in named)} |")
    print("|---|---|" + "---|" * len(named))
    print("\n".join(peaks))


def compared(family: str, folder: Path, rounds: int, wanted: Sequence[str], *, busy: bool) -> str:
    """Print a family's times, and return the row of its peaks."""
    import edgeblocks

    how = {**DATA[family], **SHAPE, "family": family, "steps": 2, "mem_budget": "4GB", "sample_grids": 0}
    run = edgeblocks.train(out=folder / "run", **how)
    run.export(folder / "blocks")
    run.export(folder / "chain", single_file=True)
    forms = {form: folder / {"torch": "run"}.get(form, form) for form in wanted}
    threads, clock = (1, time.process_time) if busy else (None, time.perf_counter)
    make = {form: maker(form, path, threads) for form, path in forms.items()}
    for n in BATCHES:
        times: dict[str, list[float]] = {form: [] for form in forms}
        for number in range(rounds + 1):
            for form in forms:
                start = clock()
                make[form](n)
                if number:  # the first one loads
                    times[form].append(1000 * (clock() - start))
        ms = " | ".join(f"{statistics.median(found):.0f}" for found in times.values())
        print(f"| {family} | {n} | {ms} |", flush=True)
    size_mb = sum(path.stat().st_size for path in (folder / "chain").glob("chain.onnx*")) / 1e6
    peaks = [measured_peak(form, path, BATCHES[-1]) for form, path in forms.items()]
    return f"| {family} | {size_mb:.0f} | " + " | ".join(str(peak) for peak in peaks) + " |"


def maker(form: str, path: Path, threads: int | None = None) -> Callable[[int], object]:
    """What makes n samples with weights that stay in memory. threads: None: as many as the libraries take."""
    if form == "torch":
        return torch_maker(path, threads)
    chain: Any = open_chain(path, hardware=Hardware(threads=threads))
    chain.keeps_all = True
    chain.close = lambda: None  # a call of its own would load all again
    if chain.manifest.task == "classes":
        pixels = example_pixels(chain.manifest.image_shape)
        return lambda n: chain.classify(pixels[:n])
    make: Callable[[int], object] = chain.sample if chain.manifest.task == "images" else chain.write
    return make


def torch_maker(path: Path, threads: int | None) -> Callable[[int], object]:
    import torch

    import edgeblocks
    from edgeblocks.inference.block_runner import BlockRunner
    from edgeblocks.inference.sampling import class_probabilities
    from edgeblocks.inference.staged_weights import loaded_ema

    if threads is not None:
        torch.set_num_threads(threads)
    run = edgeblocks.load(path)
    directory = run.directory
    ema = loaded_ema(directory, slots=len(directory.file_layers))
    runner = BlockRunner(directory.family(), directory.layers, directory.partition, ema, micro_batch=max(BATCHES))
    task = directory.family().task
    if task == "images":
        return lambda n: run.sample(n=n, runner=runner)
    if task == "classes":
        data: Any = directory.data
        pixels = example_pixels((data.channels, data.height, data.width))
        return lambda n: class_probabilities(directory, runner, pixels[:n], steps=4, noises=4, seed=0)
    return lambda n: run.sample_text(n=n, runner=runner)


def example_pixels(shape: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = shape
    return np.random.default_rng(0).integers(0, 256, (max(BATCHES), height, width, channels), dtype=np.uint8)


def measured_peak(form: str, path: Path, n: int) -> int:
    """MB that a process takes at most."""
    command = [sys.executable, __file__, "--peak", form, str(path), str(n)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_mb() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 // 10**6


if __name__ == "__main__":
    main()
