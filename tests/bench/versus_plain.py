"""Peak memory and time of block-wise training against plain end-to-end PyTorch on the same layers.

    python tests/bench/versus_plain.py memory          # every arm in its own process
    python tests/bench/versus_plain.py time            # both in one process, in turns

The network is a dit of 12 layers, width 384, batch 64 of 32x32x3 (random images).
Memory is the peak resident set above the process's size before training (interpreter, libraries, one small warm-up).
`plain` is an ordinary loop with torch.optim.AdamW(fused=True), `plain+ckpt+8bit` adds activation checkpointing and the
same 8-bit AdamW as ours. Ours runs at the smallest budget for its B and micro-batch (one block in memory, the others on
disk) and keeps an EMA besides, which the plain loops do not.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgeblocks
from edgeblocks.checkpoint import open_run
from edgeblocks.data.images import open_images
from edgeblocks.data.order import BatchOrder
from edgeblocks.errors import DoesNotFitError
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.dit import Dit, DitSettings
from edgeblocks.generators import generator_at
from edgeblocks.guard import Guard
from edgeblocks.layer_costs import LARGEST_HEAP_BYTES
from edgeblocks.noise import partition_noise
from edgeblocks.optim import Workspace, adamw_8bit_step_, adamw_step_
from edgeblocks.plans import StepShape
from edgeblocks.scheduler import Scheduler
from edgeblocks.store import BlockBuffer, BlockLayout, bind_parameters_
from edgeblocks.targets.cpu import CpuTarget
from edgeblocks.trainer import Interruption, Trainer, Visit

BATCH, DEPTH, WIDTH, HEADS = 64, 12, 384, 6


def make_data(folder: Path) -> Path:
    """An .npz of random images."""
    rng = np.random.default_rng(0)
    path = folder / "random.npz"
    np.savez(path, images=rng.integers(0, 255, (512, 32, 32, 3), dtype=np.uint8), labels=np.arange(512) % 10)
    return path


class PlainLoop:
    """End-to-end training of all layers as one denoiser of all noise levels."""

    def __init__(self, data: Path, folder: Path, *, patch: int, checkpointing: bool, eight_bit: bool) -> None:
        self.images = open_images(str(data), image_size=None, hold_out=0.1, seed=0, cache_dir=folder / "cache")
        info = ImageInfo(channels=3, height=32, width=32, num_classes=10, mean=0.5, scale=1.7)
        self.family = Dit(DitSettings(width=WIDTH, depth=DEPTH, heads=HEADS, patch=patch), info)
        self.network = self.family.block(num_layers=DEPTH, checkpointing=checkpointing)
        self.network.reset_tables_()
        self.range = partition_noise(self.family.noise, num_blocks=1, kind="equal-probability", overlap=0.0).ranges[0]
        self.order = BatchOrder(self.images.train, batch=BATCH, seed=0, block=0)
        self.eight_bit = eight_bit
        if eight_bit:  # the same flat 8-bit optimizer as ours, without an EMA
            layout = BlockLayout.of(self.network, "adamw8bit")
            self.layout, self.buffer = layout, BlockBuffer(layout, ("weights", "optimizer"))
            for part in self.buffer.parts:
                self.buffer.part_bytes(part).zero_()
            self.gradients = torch.zeros(layout.num_parameters)
            bind_parameters_(self.network, self.buffer.tensors("weights"), self.gradients)
            self.workspace = Workspace(num_threads=torch.get_num_threads())
        self.network.init_(generator_at(0))
        if not eight_bit:
            self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=True)
        self.step_number = 0

    def step(self, micro_batch: int = BATCH) -> None:
        pixels, labels = self.images.gather(self.order.indices(self.step_number))
        batch = self.family.draw(pixels, labels, self.range, generator_at(0, self.step_number))
        self.step_number += 1
        for start in range(0, BATCH, micro_batch):
            part = {name: tensor[start : start + micro_batch] for name, tensor in batch.items()}
            (self.family.loss(self.network, part).sum() / BATCH).backward()
        if self.eight_bit:
            self._eight_bit_step()
        else:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _eight_bit_step(self) -> None:
        layout, state, weights = self.layout, dict(self.buffer.tensors("optimizer")), self.buffer.flat("weights")
        common = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
        first, rest = slice(0, layout.num_quantized), slice(layout.num_quantized, None)
        moments = [state[f"{m}_{kind}"] for m in ("exp_avg", "exp_avg_sq") for kind in ("codes", "scales")]
        step = self.step_number
        adamw_8bit_step_(weights[first], self.gradients[first], *moments, step=step, workspace=self.workspace, **common)
        adamw_step_(weights[rest], self.gradients[rest], state["exp_avg"], state["exp_avg_sq"], step=step, **common)
        self.gradients.zero_()


def train_ours(data: Path, folder: Path, *, smallest: bool = False, **settings: Any) -> Path:
    """A run of ours in `folder`, of one step, at the smallest budget or an ample one; returns its directory."""
    common = {"data": str(data), "steps": 1, "batch": BATCH, "depth": DEPTH, "width": WIDTH, "heads": HEADS}
    settings = {**common, "sample_grids": 0, **settings}
    budget = "90%"
    if smallest:
        try:
            edgeblocks.plan(mem_budget="1MB", **settings)
        except DoesNotFitError as refusal:
            budget = str(refusal.as_fixed_bytes + 20_000_000)  # the process has grown a little by then
    edgeblocks.train(out=folder / "run", mem_budget=budget, **settings)
    return folder / "run"


def memory_arm(arm: str, patch: int, micro_batch: int, blocks: int) -> None:
    """Run one arm in this process and print its peak above the runtime, in bytes."""
    target = CpuTarget()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder)
        if arm.startswith("plain"):
            if "8bit" in arm:
                target.prepare()
            runtime = target.measure(folder).runtime_bytes
            compact = "8bit" in arm
            loop = PlainLoop(data, folder, patch=patch, checkpointing=compact, eight_bit=compact)
            if not compact:
                runtime = target.used_bytes() - 4 * sum(p.numel() for p in loop.network.parameters())
            for _ in range(2):
                loop.step(micro_batch)
            peak = target.peak_bytes()
        else:
            compact = "ckpt" in arm
            path = train_ours(
                data, folder, smallest=True, patch=patch, blocks=blocks, micro_batch=micro_batch, checkpointing=compact
            )
            plan = json.loads((path / "plan.json").read_text())
            runtime, peak = plan["machine"]["runtime_bytes"], target.peak_bytes()
    print(json.dumps({"arm": arm, "bytes": peak - runtime, "peak": peak}))


def memory(patch: int, micro_batch: int, blocks: int) -> None:
    """Two comparisons: as users train, and everything that saves memory on both sides."""
    for ours, plain in (("ours", "plain"), ("ours+ckpt", "plain+ckpt+8bit")):
        figures = []
        for arm in (ours, plain):
            command = [sys.executable, __file__, "arm", "--arm", arm, "--patch", str(patch)]
            command += ["--micro-batch", str(micro_batch), "--blocks", str(blocks)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
        one, two = (figure["bytes"] for figure in figures)
        print(
            f"patch {patch}, micro-batch {micro_batch}, B={blocks}: {ours} {one / 1e6:.0f} MB, "
            f"{plain} {two / 1e6:.0f} MB, ratio {one / two:.3f}",
            flush=True,
        )


def measure_time(patch: int, blocks: int, rounds: int, *, kept_heap_bytes: int | None) -> None:
    """B block steps against one plain step, in turns; fp32 optimizer state on both sides, then 8-bit on ours.

    `kept_heap_bytes` gives both the allocator settings of ours with so much heap kept: at our 1 GiB the plain loop,
    which needs more, would return and fetch pages every step. None is glibc's default for both.
    """
    CpuTarget.prepare = lambda self: None  # type: ignore[method-assign]
    if kept_heap_bytes is not None:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, LARGEST_HEAP_BYTES)
        libc.mallopt(-1, kept_heap_bytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder)
        plain = PlainLoop(data, folder, patch=patch, checkpointing=False, eight_bit=False)
        arms = {}
        for optimizer in ("adamw", "adamw8bit"):
            path = train_ours(
                data,
                folder / optimizer,
                patch=patch,
                blocks=blocks,
                optimizer=optimizer,
                tier="ram",
                micro_batch=BATCH,
                checkpointing=False,
            )
            run = open_run(path)
            scheduler = Scheduler(run.store(), slots=blocks)
            shapes = [StepShape(**shape) for shape in run.plan["shapes"]]
            guard = Guard(CpuTarget(), budget_bytes=2**62, shapes=shapes, breakdown=run.plan["breakdown"], note=print)
            arms[optimizer] = (Trainer(run, plain.images, scheduler, guard), scheduler)
        plain.step()
        times: dict[str, list[float]] = {"plain": [], "adamw": [], "adamw8bit": []}
        for number in range(1, rounds + 1):
            started = time.perf_counter()
            plain.step()
            times["plain"].append(time.perf_counter() - started)
            for optimizer, (trainer, scheduler) in arms.items():
                total = 0.0
                for block in range(blocks):
                    with scheduler.visit(block, then=None) as resident:
                        started = time.perf_counter()
                        trainer.visit(
                            Visit(block=block, first=number, last=number + 1), resident, Interruption(), lambda _: None
                        )
                        total += time.perf_counter() - started
                    scheduler.flush()
                times[optimizer].append(total)
            row = {arm: round(seconds[-1], 3) for arm, seconds in times.items()}
            print(json.dumps(row), flush=True)
        for optimizer in ("adamw", "adamw8bit"):
            ratios = [ours / base for ours, base in zip(times[optimizer], times["plain"], strict=True)]
            print(
                f"patch {patch}: {blocks} block steps with {optimizer} / one plain step: median "
                f"{statistics.median(ratios):.3f} (of {[round(ratio, 3) for ratio in ratios]})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "arm"])
    parser.add_argument("--arm")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=BATCH)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--default-malloc", action="store_true", help="glibc's default allocator settings")
    arguments = parser.parse_args()
    if arguments.what == "memory":
        memory(arguments.patch, arguments.micro_batch, arguments.blocks)
    elif arguments.what == "time":
        kept_heap_bytes = None if arguments.default_malloc else 2**31 - 1
        measure_time(arguments.patch, arguments.blocks, arguments.rounds, kept_heap_bytes=kept_heap_bytes)
    else:
        memory_arm(arguments.arm, arguments.patch, arguments.micro_batch, arguments.blocks)


if __name__ == "__main__":
    main()
