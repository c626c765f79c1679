"""What a GPU does with the plans made for it, and how long an optimizer step takes there.

    python tests/bench/gpu.py plans    # predicted and measured: both memories, a step's time; one training a family
    python tests/bench/gpu.py update   # the 8-bit step in chunks, bitsandbytes' kernel, torch's fused fp32 step

Each training has a process of its own, makes 12 steps of each block in two visits, a grid and an evaluation. Peaks are
the summary's: of the GPU all memory that is not free. `--target cpu` shows the same on a processor.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from edgeblocks.optim.adamw import GPU_CHUNK_SIZE, Workspace, adamw_8bit_state, adamw_8bit_step_, adamw_step_

TEXT = {"depth": 12, "width": 512, "heads": 8, "length": 256, "batch": 32}
SHAPES: dict[str, dict[str, int]] = {
    "dit": {"depth": 12, "width": 768, "heads": 12, "patch": 2, "batch": 64},
    "vit": {"depth": 12, "width": 512, "heads": 8, "patch": 4, "batch": 128},
    "mdlm": TEXT,
    "ar": TEXT,
    "looped": TEXT,
}
ADAMW = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plans", "update"))
    parser.add_argument("--target", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mem-budget", default="8GB")
    parser.add_argument("--families", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--parameters", type=int, default=2**26, help="of an update")
    wanted = parser.parse_args()
    if wanted.target == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if wanted.what == "update":
        for name, seconds in updates(wanted.target, wanted.parameters):
            print(f"{name}: {1e12 * seconds / wanted.parameters:.1f} ps a parameter", flush=True)
        return
    for family in wanted.families:
        print(json.dumps(trained(family, wanted.target, wanted.mem_budget)), flush=True)


def trained(family: str, target: str, mem_budget: str) -> dict[str, object]:
    """Figures of a training, from its summary."""
    with tempfile.TemporaryDirectory(prefix="edgeblocks-bench-") as name:
        command = [sys.executable, "-m", "edgeblocks.cli", "train", family, "--target", target, "--json"]
        command += ["--mem-budget", mem_budget, "--steps", "12", "--out", f"{name}/run"]
        settings = {**SHAPES[family], "visit_steps": 6, "sample_grids": 1, "evaluations": 1}
        if "patch" in settings:
            rng, path = np.random.default_rng(0), Path(name, "random.npz")
            images = rng.integers(0, 255, (600, 32, 32, 3), dtype=np.uint8)
            np.savez(path, images=images, labels=np.arange(600) % 10)
            command += ["--data", str(path)]
        else:
            settings["hold_out"] = 0.01
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    summary = json.loads(done.stdout)
    kept = ("family", "blocks", "budget_bytes", "predicted_peak_bytes", "peak_bytes", "predicted_ram_peak_bytes")
    kept += ("ram_peak_bytes", "predicted_step_s", "step_s", "memory_changes")
    return {key: summary[key] for key in kept}


def updates(device: str, numel: int) -> Iterator[tuple[str, float]]:
    """Names of optimizer steps, and seconds of one."""
    parameters, gradients = torch.randn(numel, device=device), torch.randn(numel, device=device)
    state = adamw_8bit_state(numel, device)
    for chunk_size in (GPU_CHUNK_SIZE // 2, GPU_CHUNK_SIZE, 4 * GPU_CHUNK_SIZE, 16 * GPU_CHUNK_SIZE):
        workspace = Workspace(num_threads=1, chunk_size=chunk_size, device=device)

        def eight_bit(workspace: Workspace = workspace) -> None:
            adamw_8bit_step_(parameters, gradients, *state, step=3, workspace=workspace, **ADAMW)

        yield f"8-bit, chunks of {chunk_size // 2**20} Mi", seconds_of(eight_bit, device)
    moments = [torch.zeros_like(parameters) for _ in range(2)]
    yield "fused, fp32", seconds_of(lambda: adamw_step_(parameters, gradients, *moments, step=3, **ADAMW), device)
    bitsandbytes = importlib.import_module("bitsandbytes")
    parameter = torch.nn.Parameter(parameters)
    parameter.grad = gradients
    yield "bitsandbytes, 8-bit", seconds_of(bitsandbytes.optim.AdamW8bit([parameter], lr=1e-3).step, device)
    yield "EMA", seconds_of(lambda: moments[0].lerp_(parameters, 0.1), device)


def seconds_of(call: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Of one of some calls in a row, after two that do not count."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(2):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    main()
