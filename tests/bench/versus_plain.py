"""Peak memory and time of block-wise training against plain end-to-end PyTorch on the same layers.

    python tests/bench/versus_plain.py memory                      # every arm in its own process
    python tests/bench/versus_plain.py memory --family mdlm --vocab 32768
    python tests/bench/versus_plain.py memory --set depth=24 --set batch=16 --blocks 8 --methods diffusion greedy exact
    python tests/bench/versus_plain.py time                        # both in one process, in turns
    python tests/bench/versus_plain.py exact --tier disk           # the same for --method exact
    python tests/bench/versus_plain.py time --precision bf16       # bf16 on both sides; and ours in fp32 beside it

The networks have 12 layers of width 384; images are random, 32x32x3, texts are random words. Memory is the peak
resident set above the process's size before training (interpreter, libraries, one small warm-up). `plain` is an
ordinary loop with torch.optim.AdamW(fused=True), see `plain`; `plain+ckpt+8bit` adds activation checkpointing and the
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
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import PlainCausal, PlainClassifier, PlainDenoiser

import edgeblocks
from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import DoesNotFitError
from edgeblocks.methods import METHODS, MethodName, Precision
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, bind_parameters_
from edgeblocks.offload.block_slots import BlockSlots
from edgeblocks.offload.tiers import DiskTier
from edgeblocks.optim.adamw import Workspace, adamw_8bit_step_, adamw_step_
from edgeblocks.planning.layer_costs import LARGEST_HEAP_BYTES
from edgeblocks.progress import Progress, Silent
from edgeblocks.registry import family_type
from edgeblocks.runs.open_data import data_of
from edgeblocks.runs.opening import open_run
from edgeblocks.seeds import generator_at
from edgeblocks.settings.fields import RunSettings
from edgeblocks.targets.cpu import CpuTarget
from edgeblocks.training.diffusion import DiffusionTrainer, Visit
from edgeblocks.training.guard import Guard

LAYERS = {"depth": 12, "width": 384, "heads": 6}
SHAPES: dict[str, dict[str, int]] = {
    "dit": {**LAYERS, "patch": 2, "batch": 64},
    "vit": {**LAYERS, "patch": 2, "batch": 64},
    "mdlm": {**LAYERS, "length": 256, "batch": 32},
    "ar": {**LAYERS, "length": 256, "batch": 32},
    "looped": {**LAYERS, "length": 256, "batch": 32},
}
CHARACTERS = 27


def make_data(folder: Path, reads: str) -> Path:
    """An .npz of random images, or a text of 600,000 random words."""
    rng = np.random.default_rng(0)
    if reads == "images":
        path = folder / "random.npz"
        np.savez(path, images=rng.integers(0, 255, (512, 32, 32, 3), dtype=np.uint8), labels=np.arange(512) % 10)
        return path
    path = folder / "random.txt"
    letters = rng.integers(0, 26, (40_000, 6), dtype=np.uint8) + ord("a")
    words = np.array([bytes(word).decode() for word in letters])
    path.write_text(" ".join(words[rng.integers(0, len(words), 600_000)]))
    return path


def data_settings(family: str, data: Path, vocab: int) -> dict[str, Any]:
    """What `edgeblocks.train` is told of the data."""
    found: dict[str, Any] = {"family": family, "data": str(data)}
    if data.suffix == ".txt":
        found["hold_out"] = 0.0005  # a few windows: evaluating 64 of them 144 times would take longer than all else
    return found if vocab == CHARACTERS else {**found, "tokenizer": "bpe", "vocab": vocab}


class PlainLoop:
    """End-to-end training of all layers by an ordinary loop."""

    def __init__(
        self,
        settings: dict[str, Any],
        shape: dict[str, int],
        *,
        checkpointing: bool,
        eight_bit: bool,
        precision: Precision = "fp32",
    ) -> None:
        self.precision = precision
        given = {name: shape[name] for name in ("length",) if name in shape}
        self.data = data_of(RunSettings(**settings, **given), lambda *_: None)
        self.batch = shape["batch"]
        self.model = plain_model(settings["family"], self.data, shape, checkpointing=checkpointing)
        self.order = self.data.order(batch=self.batch, seed=0, block=0)
        self.eight_bit = eight_bit
        if eight_bit:  # the same flat 8-bit optimizer as ours, without an EMA
            layout = BlockLayout.of(self.model, "adamw8bit")
            self.layout, self.buffer = layout, BlockBuffer(layout, ("weights", "optimizer"))
            for part in self.buffer.parts:
                self.buffer.part_bytes(part).zero_()
            self.gradients = torch.zeros(layout.num_parameters)
            bind_parameters_(self.model, self.buffer.tensors("weights"), self.gradients)
            self.workspace = Workspace(num_threads=torch.get_num_threads())
        self.model.init_(generator_at(0))
        if not eight_bit:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.step_number = 0

    def step(self, micro_batch: int) -> None:
        examples, labels = self.data.gather(self.order.indices(self.step_number))
        self.step_number += 1
        for start in range(0, self.batch, micro_batch):
            part = slice(start, start + micro_batch)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                losses = self.model.losses(examples[part], None if labels is None else labels[part])
            (losses.sum() / self.batch).backward()
        if self.eight_bit:
            self._eight_bit_step()
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
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


def plain_model(family: str, data: DataSet, shape: dict[str, int], *, checkpointing: bool) -> Any:
    """The ordinary network of as many layers."""
    if family in ("ar", "looped"):
        sizes = {name: shape[name] for name in ("length", "width", "heads")}
        vocabulary = family_type(family).data_info(data).vocabulary
        return PlainCausal(vocabulary=vocabulary, num_layers=shape["depth"], checkpointing=checkpointing, **sizes)
    kind = family_type(family)
    sizes = {name: shape[name] for name in ("width", "depth", "heads", "patch") if name in shape}
    whole = kind(kind.settings_type(**sizes), kind.data_info(data))
    return (PlainClassifier if family == "vit" else PlainDenoiser)(whole, checkpointing=checkpointing)


def train_ours(folder: Path, *, smallest: bool = False, **settings: Any) -> Path:
    """A run of ours in `folder`, of one step, at the smallest budget or an ample one; returns its directory."""
    settings = {"steps": 1, "sample_grids": 0, **settings}
    budget = "90%"
    if smallest:
        edgeblocks.plan(mem_budget="90%", **settings)  # the data's cache is made here, which takes memory of its own
        try:
            edgeblocks.plan(mem_budget="1MB", **settings)
        except DoesNotFitError as refusal:
            budget = str(refusal.as_fixed_bytes + 20_000_000)  # the process has grown a little by then
    edgeblocks.train(out=folder / "run", mem_budget=budget, **settings)
    return folder / "run"


def memory_arm(arm: str, family: str, vocab: int, shape: dict[str, int], micro_batch: int, blocks: int) -> None:
    """Run one arm in this process and print its peak above the runtime, in bytes."""
    target = CpuTarget()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = data_settings(family, make_data(folder, family_type(family).reads), vocab)
        if arm.startswith("plain"):
            if "8bit" in arm:
                target.prepare()
            runtime = target.measure(folder).runtime_bytes
            compact = "8bit" in arm
            loop = PlainLoop(settings, shape, checkpointing=compact, eight_bit=compact)
            if not compact:
                runtime = target.used_bytes() - 4 * sum(p.numel() for p in loop.model.parameters())
            for _ in range(2):
                loop.step(micro_batch)
            peak = target.peak_bytes()
        else:
            method, compact = arm.partition("+")[0], "ckpt" in arm
            wanted = {"method": method, "micro_batch": micro_batch, "checkpointing": compact}
            grown = {"window": shape["depth"] // blocks, "grow": "equal", "steps": shape["depth"]}  # each window once
            wanted |= grown if method == "greedy" else {"blocks": blocks}
            path = train_ours(folder, smallest=True, **settings, **shape, **wanted)
            plan = json.loads((path / "plan.json").read_text())
            runtime, peak = plan["machine"]["runtime_bytes"], target.peak_bytes()
    print(json.dumps({"arm": arm, "bytes": peak - runtime, "peak": peak}))


def memory(
    family: str, vocab: int, given: list[str], micro_batch: int, blocks: int, methods: Sequence[MethodName]
) -> None:
    """Lines of a table, megabytes: as users train, and with everything that saves memory; and the shares of plain's."""

    def measured(arm: str) -> float:
        command = [sys.executable, __file__, "arm", "--arm", arm, "--family", family, "--vocab", str(vocab)]
        command += ["--micro-batch", str(micro_batch), "--blocks", str(blocks)]
        command += [part for setting in given for part in ("--set", setting)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found: int = json.loads(done.stdout.splitlines()[-1])["bytes"]
        return found / 1e6

    plain, small_plain = measured("plain"), measured("plain+ckpt+8bit")
    name = f"{family}{f' of {vocab} tokens' if vocab != CHARACTERS else ''} {' '.join(given)}".strip()
    print(f"| {name}, B={blocks} | plain | with checkpointing and 8-bit AdamW | ours / plain | with both / with both |")
    print("|---|---|---|---|---|")
    print(f"| ordinary PyTorch | {plain:.0f} | {small_plain:.0f} | | |", flush=True)
    for method in methods:
        ours, small = measured(method), measured(f"{method}+ckpt")
        shares = f"{ours / plain:.3f}, checkpointed {small / plain:.3f} | {small / small_plain:.3f}"
        print(f"| {method} | {ours:.0f} | {small:.0f} | {shares} |", flush=True)


def measure_time(
    family: str,
    vocab: int,
    shape: dict[str, int],
    blocks: int,
    rounds: int,
    *,
    kept_heap_bytes: int | None,
    precision: Precision,
) -> None:
    """B block steps against one plain step, in turns; fp32 optimizer state on both sides, then 8-bit on ours.

    In bf16 both compute in that, plain by `torch.autocast`; ours in fp32 is then a third arm.

    `kept_heap_bytes` gives both the allocator settings of ours with so much heap kept: at our 1 GiB the plain loop,
    which needs more, would return and fetch pages every step. None is glibc's default for both, -1 keeps all.
    """
    CpuTarget.prepare = lambda self: None  # type: ignore[method-assign]
    if kept_heap_bytes is not None:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, LARGEST_HEAP_BYTES)
        libc.mallopt(-1, kept_heap_bytes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = data_settings(family, make_data(folder, family_type(family).reads), vocab)
        batch = shape["batch"]
        plain = PlainLoop(settings, shape, checkpointing=False, eight_bit=False, precision=precision)
        arms = {}
        wanted = {"adamw": ("adamw", precision), "adamw8bit": ("adamw8bit", precision)}
        if precision == "bf16":
            wanted["adamw8bit in fp32"] = ("adamw8bit", "fp32")
        for name, (optimizer, computed_in) in wanted.items():
            path = train_ours(
                folder / name,
                **settings,
                **shape,
                blocks=blocks,
                optimizer=optimizer,
                precision=computed_in,
                tier="ram",
                micro_batch=batch,
                checkpointing=False,
            )
            run = open_run(path)
            scheduler = BlockSlots(DiskTier(run.store()), slots=blocks)
            plan = run.trainable_plan
            guard = Guard(
                CpuTarget(), budget_bytes=2**62, shapes=plan.step_shapes, breakdown=plan.breakdown, note=print
            )
            arms[name] = (DiffusionTrainer(run, plain.data, scheduler, guard), scheduler)
        plain.step(batch)
        times: dict[str, list[float]] = {"plain": [], **{name: [] for name in arms}}
        for number in range(1, rounds + 1):
            started = time.perf_counter()
            plain.step(batch)
            times["plain"].append(time.perf_counter() - started)
            for name, (trainer, scheduler) in arms.items():
                total = 0.0
                for block in range(blocks):
                    visit = Visit(block=block, first=number, last=number + 1)
                    with trainer.visit(visit, then=None), closing(trainer._batches(visit)) as batches:
                        started = time.perf_counter()
                        trainer.train_step(visit, number, batches)
                        total += time.perf_counter() - started
                    scheduler.flush()
                times[name].append(total)
            row = {arm: round(seconds[-1], 3) for arm, seconds in times.items()}
            print(json.dumps(row), flush=True)
        pairs = [(name, "plain") for name in arms]
        if precision == "bf16":
            pairs.append(("adamw8bit", "adamw8bit in fp32"))
        for name, base in pairs:
            ratios = [one / other for one, other in zip(times[name], times[base], strict=True)]
            against = "one plain step" if base == "plain" else f"those with {base}"
            print(
                f"{family} {shape} in {precision}: {blocks} block steps with {name} / {against}: median "
                f"{statistics.median(ratios):.3f} (of {[round(ratio, 3) for ratio in ratios]})",
                flush=True,
            )


class InTurns(Silent):
    """Times each step of a training, and after it a step of an ordinary loop."""

    def __init__(self, plain: PlainLoop) -> None:
        self._plain, self._since = plain, time.perf_counter()
        self.ratios: list[float] = []

    def step(self, progress: Progress) -> None:
        now = time.perf_counter()
        ours_s = now - self._since
        self._plain.step(self._plain.batch)
        self._since = time.perf_counter()
        if progress.step > 1:  # the first one waits for stages and fetches memory
            self.ratios.append(ours_s / (self._since - now))
            print(json.dumps({"exact": round(ours_s, 3), "plain": round(self._since - now, 3)}), flush=True)


def measure_exact_time(
    family: str,
    vocab: int,
    shape: dict[str, int],
    stages: int,
    rounds: int,
    tier: str,
    micro_batch: int,
    precision: Precision,
) -> None:
    """A step of --method exact against a plain step, in turns; 8-bit optimizer state and an EMA on our side alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = data_settings(family, make_data(folder, family_type(family).reads), vocab)
        turns = InTurns(PlainLoop(settings, shape, checkpointing=False, eight_bit=False, precision=precision))
        edgeblocks.train(
            out=folder / "run",
            listener=turns,
            mem_budget="90%",
            method="exact",
            precision=precision,
            steps=rounds + 1,
            visit_steps=rounds + 1,
            sample_grids=0,
            blocks=stages,
            tier=tier,
            micro_batch=micro_batch,
            checkpointing=False,
            **settings,
            **shape,
        )
        plan = json.loads((folder / "run/plan.json").read_text())
        print(
            f"{family} {shape} in {precision}: {stages} stages, {plan['slots']} in memory, micro-batch {micro_batch}: "
            f"a step of exact / a plain step: median {statistics.median(turns.ratios):.3f} "
            f"(of {[round(ratio, 3) for ratio in turns.ratios]})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "exact", "arm"])
    parser.add_argument("--arm")
    parser.add_argument("--family", choices=sorted(SHAPES), default="dit")
    parser.add_argument("--vocab", type=int, default=CHARACTERS, help="of byte pairs; else characters")
    parser.add_argument("--set", action="append", default=[], dest="given", help="another shape, such as patch=4")
    parser.add_argument("--micro-batch", type=int, help="as large as the batch unless given")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["diffusion"], help="of memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tier", choices=["ram", "disk"], default="ram", help="of the stages of exact")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of time and exact")
    parser.add_argument("--default-malloc", action="store_true", help="glibc's default allocator settings")
    parser.add_argument("--keep-memory", action="store_true", help="the heap is never given back")
    arguments = parser.parse_args()
    changed = (setting.partition("=") for setting in arguments.given)
    shape = {**SHAPES[arguments.family], **{name: int(value) for name, _, value in changed}}
    micro_batch = arguments.micro_batch or shape["batch"]
    common = (arguments.family, arguments.vocab)
    if arguments.what == "memory":
        memory(*common, arguments.given, micro_batch, arguments.blocks, arguments.methods)
    elif arguments.what == "exact":
        asked = (arguments.blocks, arguments.rounds, arguments.tier, micro_batch, arguments.precision)
        measure_exact_time(*common, shape, *asked)
    elif arguments.what == "time":
        kept_heap_bytes = None if arguments.default_malloc else -1 if arguments.keep_memory else 2**31 - 1
        heap = {"kept_heap_bytes": kept_heap_bytes, "precision": arguments.precision}
        measure_time(*common, shape, arguments.blocks, arguments.rounds, **heap)
    else:
        memory_arm(arguments.arm, *common, shape, micro_batch, arguments.blocks)


if __name__ == "__main__":
    main()
