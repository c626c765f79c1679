"""What a GPU does: its tests, plans against measured peaks, times against ordinary loops, the largest network in 6 GB.

    python tests/bench/gpu.py --json gpu.json --docs docs/gpu.md    # all of it, ten minutes at most
    python tests/bench/gpu.py --parts trainings --families dit --precisions fp32
    python tests/bench/gpu.py --target stand-in ..                  # the same on a device made of the processor

Parts, in this order; what the time is too short for is left out, and said so:

- tests: those marked `gpu`.
- times: a step of all layers of a dit (in bf16, or `--precision`) by both methods, by an ordinary loop (autocast, the
  fused AdamW of torch), and by one with recomputed activations and bitsandbytes' AdamW8bit.
- updates: the 8-bit step by bitsandbytes' kernel and in chunks of ours, torch's fused fp32 step.
- trainings: each family, method and precision: both memories and a step's time, planned and measured; 6 steps of each
  block or stage in two visits, a grid and an evaluation.
- largest: the widest dit of 24 layers that a plan with good blocks fits into 6 GB; it is then trained for a step.

Each training has a process of its own, as peaks are a process's. Peaks are the summaries': of the GPU all memory that
is not free. Figures are written to the JSON file as they come, what pytest
prints is beside it, and the table goes between the marks of the docs' page at the end.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from gpu_table import table_of, write_between_marks

ROOT = Path(__file__).parents[2]
PRECISIONS = ("bf16", "fp16", "fp32")
PARTS = ("tests", "times", "updates", "trainings", "largest")
TEXT = {"depth": 12, "width": 512, "heads": 8, "length": 256, "batch": 32, "hold_out": 0.01}
IMAGES = {"depth": 12, "batch": 64, "patch": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "dit": {**IMAGES, "width": 768, "heads": 12},
    "vit": {**IMAGES, "width": 512, "heads": 8, "patch": 4, "batch": 128},
    "mdlm": TEXT,
    "ar": TEXT,
    "looped": TEXT,
}
LARGEST: dict[str, Any] = {"depth": 24, "batch": 32, "patch": 2}
WIDTHS = tuple(range(768, 4097, 256))
HEAD_WIDTH = 64
ARMS = {"an ordinary loop": {}, "with checkpointing and AdamW8bit": {"checkpointing": True, "eight_bit": True}}
TIMED_STEPS, TRAINED_STEPS = 12, 6
UPDATED_PARAMETERS = 2**26
ADAMW = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
SHORTEST_S = 20.0
"""A part is not begun with less time left."""
KEPT = ("family", "method", "blocks", "parameters", "budget_bytes", "predicted_peak_bytes", "peak_bytes", "step_s")
KEPT += ("predicted_ram_peak_bytes", "ram_peak_bytes", "predicted_step_s", "memory_changes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--target", choices=("cuda", "cpu", "stand-in"), default="cuda")
    parser.add_argument("--families", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=("diffusion", "exact"), default=["diffusion", "exact"])
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "fp32"], help="of the trainings"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the times and the largest")
    parser.add_argument("--mem-budget", default="8GB")
    parser.add_argument("--largest-budget", default="6GB")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tests", type=Path, nargs="+", help="files; those that have tests marked gpu unless given")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="of the results, written as they come")
    parser.add_argument("--docs", type=Path, help="a page between whose marks the table is written")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one part's figures, in this process
    wanted = parser.parse_args()
    if wanted.part is not None:
        print(json.dumps(figures(**json.loads(wanted.part))))
        return
    session = Session(wanted.target, wanted.minutes, wanted.json)
    for part in PARTS:
        if part in wanted.parts:
            _PARTS[part](session, wanted)
    table = table_of(session.results)
    print(table)
    if wanted.docs is not None:
        write_between_marks(wanted.docs, table)


class Session:
    """Asks for figures within a time, and keeps what there is so far in a file."""

    def __init__(self, target: str, minutes: float, path: Path) -> None:
        self.target, self._path, self._started = target, path, time.monotonic()
        self._end = self._started + 60 * minutes
        versions = {name: metadata.version(name) for name in ("edgeblocks", "torch")}
        self.results: dict[str, Any] = {"target": target, "date": date.today().isoformat(), "versions": versions}
        self.results |= {"system": platform.platform(), "gpu": _gpu_name(target), "left_out": []}

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def ask(self, what: str, **request: Any) -> dict[str, Any] | None:
        """Figures of a part; None where there is no time for it or it failed, which is noted."""
        if self.left_s < SHORTEST_S:
            return self.leave_out(what, "the time was up")
        print(f"{what} ..", file=sys.stderr, flush=True)
        try:
            if self.target == "stand-in":
                return figures(target=self.target, **request)
            command = [sys.executable, __file__, "--part", json.dumps({"target": self.target, **request})]
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.left_s, check=True)
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
        except subprocess.TimeoutExpired:
            return self.leave_out(what, "the time was up before it was done")
        except subprocess.CalledProcessError as error:
            return self.leave_out(what, error.stderr.strip().rsplit("\n", 1)[-1][:300])

    def leave_out(self, what: str, why: str) -> None:
        self.results["left_out"].append({"what": what, "why": why})
        self.write()

    def keep(self, part: str, found: object) -> None:
        """A part's result, or one more of a list."""
        if isinstance(found, dict) and part in ("times", "trainings"):
            self.results.setdefault(part, []).append(found)
        else:
            self.results[part] = found
        self.write()

    def write(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self._started, 1)
        self._path.write_text(json.dumps(self.results, indent=1) + "\n")


def _gpu_name(target: str) -> str:
    """The exact card with its driver; asked of the driver, because a process that uses the GPU holds memory there."""
    if target != "cuda":
        return {"cpu": "none: a processor", "stand-in": "none: a device made of a processor"}[target]
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        sys.exit("there is no GPU here, as nvidia-smi knows none; --target stand-in runs the same on this processor")


# What is asked for, part by part.


def ask_tests(session: Session, wanted: argparse.Namespace) -> None:
    files = wanted.tests or sorted(path for path in (ROOT / "tests").rglob("test_*.py") if _has_gpu_tests(path))
    if session.left_s < SHORTEST_S:
        return session.leave_out("tests", "the time was up")
    print("tests ..", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n0", "-q", f"--junitxml={report}", *map(str, files)]
        try:
            with wanted.json.with_suffix(".tests.txt").open("w") as log:
                done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=session.left_s, check=False)
        except subprocess.TimeoutExpired:
            return session.leave_out("tests", "the time was up before they were done")
        if not report.exists():
            return session.leave_out("tests", f"pytest ended with {done.returncode}")
        suite = next(ET.parse(report).iter("testsuite"))
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return session.keep("tests", {**counts, "seconds": float(suite.get("time", 0))})


def _has_gpu_tests(path: Path) -> bool:
    return "@pytest.mark.gpu" in path.read_text()


def ask_times(session: Session, wanted: argparse.Namespace) -> None:
    common = {"family": "dit", "precision": wanted.precision, "shape": SHAPES["dit"], "steps": TIMED_STEPS}
    for method in ("diffusion", "exact"):
        budget = {"mem_budget": wanted.mem_budget}
        found = session.ask(f"time of {method}", kind="training", method=method, looks=False, **budget, **common)
        if found is not None:
            # Of all layers: a step of each block, where blocks are trained apart.
            apart = found["blocks"] if method == "diffusion" else 1
            session.keep("times", {"arm": method, **found, "step_s": found["step_s"] * apart})
    for arm, extras in ARMS.items():
        found = session.ask(f"time of {arm}", kind="plain", **extras, **common)
        if found is not None:
            session.keep("times", {"arm": arm, **found})


def ask_updates(session: Session, wanted: argparse.Namespace) -> None:
    found = session.ask("updates", kind="updates", numel=UPDATED_PARAMETERS)
    if found is not None:
        session.keep("updates", found)


def ask_trainings(session: Session, wanted: argparse.Namespace) -> None:
    for precision in wanted.precisions:
        for family in wanted.families:
            for method in wanted.methods:
                given = {"family": family, "method": method, "precision": precision, "shape": SHAPES[family]}
                given |= {"mem_budget": wanted.mem_budget, "steps": TRAINED_STEPS, "looks": True}
                found = session.ask(f"training of {family} by {method} in {precision}", kind="training", **given)
                if found is not None:
                    session.keep("trainings", {"precision": precision, **found})


def ask_largest(session: Session, wanted: argparse.Namespace) -> None:
    """The widest by halves: a network that is less wide fits as well."""
    budget, low, high, plan = wanted.largest_budget, -1, len(WIDTHS), None
    while high - low > 1:
        middle = (low + high) // 2
        found = session.ask(
            f"plan of width {WIDTHS[middle]}",
            kind="plan",
            shape=_as_wide_as(WIDTHS[middle]),
            mem_budget=budget,
            precision=wanted.precision,
        )
        if found is None:
            return None
        if found["fits"]:
            low, plan = middle, found
        else:
            high = middle
    if plan is None:
        return session.leave_out("largest", f"no width from {WIDTHS[0]} on fits {budget}")
    session.keep(
        "largest", {"width": WIDTHS[low], **LARGEST, "mem_budget": budget, "precision": wanted.precision, **plan}
    )
    given = {"family": "dit", "method": "diffusion", "precision": wanted.precision, "shape": _as_wide_as(WIDTHS[low])}
    found = session.ask("training of the largest", kind="training", mem_budget=budget, steps=1, looks=False, **given)
    if found is not None:
        session.keep("largest", {**session.results["largest"], **found})
    return None


def _as_wide_as(width: int) -> dict[str, Any]:
    return {**LARGEST, "width": width, "heads": max(1, width // HEAD_WIDTH)}


_PARTS: dict[str, Callable[[Session, argparse.Namespace], None]] = {
    "tests": ask_tests,
    "times": ask_times,
    "updates": ask_updates,
    "trainings": ask_trainings,
    "largest": ask_largest,
}


# The figures, in the process that has the GPU.


def figures(*, kind: str, target: str, **request: Any) -> dict[str, Any]:
    """Of one part: `kind` and the arguments of its function."""
    functions: dict[str, Callable[..., dict[str, Any]]] = {"training": training, "plain": plain}
    functions |= {"updates": updates, "plan": plan_of}
    with _target(target) as name:
        return functions[kind](target=name, **request)


@contextlib.contextmanager
def _target(target: str) -> Iterator[str]:
    """A target's name; the stand-in is known as `cuda` while this lasts."""
    if target != "stand-in":
        yield target
        return
    sys.path.append(str(ROOT / "tests"))
    from edgeblocks import registry

    former = registry._TARGETS["cuda"]
    registry._TARGETS["cuda"] = "support.separate_memory:SeparateMemory"
    try:
        yield "cuda"
    finally:
        registry._TARGETS["cuda"] = former
        sys.path.remove(str(ROOT / "tests"))


def training(
    *,
    target: str,
    family: str,
    method: str,
    precision: str,
    shape: dict[str, Any],
    mem_budget: str,
    steps: int,
    looks: bool,
) -> dict[str, Any]:
    """A run's summary, planned and measured. `looks`: with a grid of samples and an evaluation."""
    import edgeblocks

    with tempfile.TemporaryDirectory(prefix="edgeblocks-bench-") as name:
        run = edgeblocks.train(
            out=Path(name, "run"),
            family=family,
            method=method,
            precision=precision,
            target=target,
            mem_budget=mem_budget,
            steps=steps,
            visit_steps=max(1, steps // 2),
            sample_grids=int(looks),
            evaluations=int(looks),
            **_data(Path(name), shape),
            **shape,
        )
        environment, summary = json.loads((run.path / "env.json").read_text()), run.summary
    kept = {key: summary[key] for key in KEPT}
    return {**kept, **{key: environment[key] for key in ("gpu", "adamw8bit") if key in environment}}


def _data(folder: Path, shape: dict[str, Any]) -> dict[str, str]:
    """Random images, 32x32x3; texts are built in."""
    if "patch" not in shape:
        return {}
    images = np.random.default_rng(0).integers(0, 255, (600, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "random.npz", images=images, labels=np.arange(600) % 10)
    return {"data": str(folder / "random.npz")}


def plain(
    *,
    target: str,
    family: str,
    precision: str,
    shape: dict[str, Any],
    steps: int,
    checkpointing: bool = False,
    eight_bit: bool = False,
) -> dict[str, Any]:
    """An ordinary loop's step and peak, as `edgeblocks compare` trains it."""
    from edgeblocks.api import settings_for_here
    from edgeblocks.compare.plain_training import Recorder, train
    from edgeblocks.progress import Silent
    from edgeblocks.registry import build_family, build_target, family_type
    from edgeblocks.runs.open_data import data_of

    with tempfile.TemporaryDirectory(prefix="edgeblocks-bench-") as name:
        given = {"method": "exact", "steps": steps, "evaluations": 1, "hold_out": 0.02, **shape}
        settings = settings_for_here(
            family=family, target=target, precision=precision, **_data(Path(name), shape), **given
        )
        run = settings.run.model_copy(update={"checkpointing": checkpointing, "evaluations": 0})
        data = data_of(run, lambda *_: None)
        kind = family_type(family, "exact")
        built = build_family(family, asdict(settings.family), asdict(kind.data_info(data)), "exact")
        machine = build_target(target)
        machine.prepare()
        machine.warm_up()
        recorder = Recorder(Path(name), built, data, run, machine, Silent())
        hear = {"on_start": recorder.start, "on_step": recorder.note}
        train(built, data, run, device=machine.torch_device, eight_bit=eight_bit, **hear)
        recorder.finish()
        summary: dict[str, Any] = json.loads(Path(name, "summary.json").read_text())
    return {key: summary[key] for key in ("step_s", "peak_bytes", "runtime_bytes")}


def plan_of(*, target: str, shape: dict[str, Any], mem_budget: str, precision: str) -> dict[str, Any]:
    """Whether a dit has a plan whose blocks have the usual layers, and what it would take."""
    import edgeblocks
    from edgeblocks.errors import DoesNotFitError
    from edgeblocks.planning.plans import FEWEST_GOOD_LAYERS

    with tempfile.TemporaryDirectory(prefix="edgeblocks-bench-") as name:
        given = {"family": "dit", "target": target, "precision": precision, "mem_budget": mem_budget}
        try:
            plan = edgeblocks.plan(**given, **_data(Path(name), shape), **shape).plan
        except DoesNotFitError:
            return {"fits": False}
    chosen = plan.chosen
    found = {"blocks": chosen.blocks, "micro_batch": chosen.micro_batch, "parameters": plan.parameters}
    found |= {"predicted_peak_bytes": chosen.predicted_peak_bytes}
    return {"fits": chosen.layers_per_block >= FEWEST_GOOD_LAYERS, **found}


def updates(*, target: str, numel: int) -> dict[str, Any]:
    """Picoseconds a parameter of an optimizer's step."""
    import torch

    from edgeblocks.optim import adamw
    from edgeblocks.optim.cuda_step import LibraryStep, library_operator
    from edgeblocks.registry import build_target

    device = build_target(target).torch_device
    parameters, gradients = torch.randn(numel, device=device), torch.randn(numel, device=device)
    state = adamw.adamw_8bit_state(numel, device)
    calls: dict[str, Callable[[], object]] = {}

    def by_8bit(**given: Any) -> Callable[[], object]:
        workspace = adamw.Workspace(num_threads=1, device=device, **given)
        return lambda: adamw.adamw_8bit_step_(parameters, gradients, *state, step=3, workspace=workspace, **ADAMW)

    for chunk_size in (adamw.GPU_CHUNK_SIZE, 4 * adamw.GPU_CHUNK_SIZE, 16 * adamw.GPU_CHUNK_SIZE):
        calls[f"8-bit by ours, chunks of {chunk_size // 2**20} Mi"] = by_8bit(chunk_size=chunk_size)
    with contextlib.suppress(ImportError):
        calls["8-bit by bitsandbytes' kernel"] = by_8bit(library=LibraryStep(library_operator(), device=device))
    moments = [torch.zeros_like(parameters) for _ in range(2)]
    calls["fp32 by torch's kernel"] = lambda: adamw.adamw_step_(parameters, gradients, *moments, step=3, **ADAMW)
    calls["EMA"] = lambda: moments[0].lerp_(parameters, 0.1)
    return {name: 1e12 * seconds_of(call, device) / numel for name, call in calls.items()}


def seconds_of(call: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Of one of some calls in a row, after two that do not count."""
    import torch

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
