"""The time of a step that a plan says, against the one that training takes right after it, in the same process.

    python tests/bench/step_times.py times.jsonl                      # every case once; adds to the file
    python tests/bench/step_times.py times.jsonl --only 0 5 --rounds 2
    python tests/bench/step_times.py times.jsonl --processor          # on a machine that others use
    python tests/bench/step_times.py times.jsonl --table times.md     # and writes the table of all in it

Each case is planned and trained twice, in a process of its own with a cache of its own: the second plan has what the
first training took. Beside the plan's time stands what the arithmetic model alone says, without a measured block. The
measured time is the median of the steps but the first three; of stages on disk with waiting for them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

WARM = 3
"""Steps that are left out: the first ones touch memory and load programs."""
SMALL = {"width": 64, "heads": 2, "depth": 12, "batch": 16, "steps": 24}
MIDDLE = {"width": 192, "heads": 4, "depth": 12, "batch": 8, "steps": 24}
WIDE = {"width": 512, "heads": 8, "depth": 12, "batch": 2, "steps": 24}
LENGTHS = {"small": 64, "middle": 64, "wide": 32}
FAMILIES = ("dit", "vit", "mdlm", "ar", "looped")
README = {"mem_budget": "600MB", "tier": "disk", "steps": 24}
CASES: dict[str, dict[str, Any]] = {
    f"{family} {method} {name}": {
        **{"family": family, "method": method, **shape},
        **({"length": LENGTHS[name]} if family in ("mdlm", "ar", "looped") else {}),
    }
    for family in FAMILIES
    for method in ("diffusion", "exact")
    for name, shape in (("small", SMALL), ("middle", MIDDLE), ("wide", WIDE))
} | {
    "the first command of the README": README,
    "the same in bf16": {**README, "precision": "bf16"},
    "ar diffusion middle bf16": {"family": "ar", **MIDDLE, "length": 64, "precision": "bf16"},
    "mdlm exact middle bf16": {"family": "mdlm", "method": "exact", **MIDDLE, "length": 128, "precision": "bf16"},
    "dit exact, stages on disk": {"method": "exact", **MIDDLE, "blocks": 4, "tier": "disk"},
    "dit checkpointed": {**MIDDLE, "checkpointing": True},
    "dit in micro-batches": {**MIDDLE, "micro_batch": 2},
    "dit, AdamW in fp32": {**MIDDLE, "optimizer": "adamw"},
    "ar, long": {"family": "ar", **MIDDLE, "depth": 4, "length": 256, "batch": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processor", action="store_true", help="one thread, and its seconds on a processor")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.case is not None:
        if wanted.processor:  # before anything looks at a clock: what other programs take does not count
            time.perf_counter = time.thread_time
        print(json.dumps(measured(CASES[wanted.case])))
        return
    with tempfile.TemporaryDirectory(prefix="edgeblocks-times-") as cache:
        os.environ.setdefault("EDGEBLOCKS_CACHE", cache)
        run_cases(wanted)
    if wanted.table is not None:
        wanted.table.write_text(table([json.loads(line) for line in wanted.results.read_text().splitlines()]))


def run_cases(wanted: argparse.Namespace) -> None:
    for _ in range(wanted.rounds):
        for number, name in enumerate(CASES):
            if wanted.only is None or number in wanted.only:
                row = {"case": name, **in_a_process(name, processor=wanted.processor)}
                print(json.dumps(row), flush=True)
                with wanted.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def in_a_process(name: str, *, processor: bool) -> dict[str, Any]:
    surroundings = {"GOMP_SPINCOUNT": "5000", **os.environ}  # as the command sets it
    command = [sys.executable, __file__, "none", "--case", name]
    if processor:
        surroundings["OMP_NUM_THREADS"] = "1"
        command.append("--processor")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode:
        return {"failure": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def measured(given: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured seconds of a step, of two plans and trainings in a row."""
    import edgeblocks
    from edgeblocks.profiling import kept_steps

    for path in Path(os.environ["EDGEBLOCKS_CACHE"]).glob(f"{kept_steps.NAME}-*"):
        path.unlink()
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgeblocks-times-") as folder:
        for turn in ("first", "second"):
            settings = {**given, "sample_grids": 0}
            out = Path(folder) / turn
            run = edgeblocks.train(out=out, **settings)
            plan = json.loads((out / "plan.json").read_text())
            by_model_s = modelled_s(run.directory)
            batch = run.directory.settings.run.batch
            times = [batch / row["examples_per_s"] for row in run.directory.metrics() if row["step"] > WARM]
            rows.append(
                {
                    "model_s": by_model_s,
                    "predicted_s": plan["predicted_step_s"],
                    "range_s": plan["predicted_step_range_s"],
                    "from": plan["machine"]["correction"]["origin"],
                    "measured_s": statistics.median(times),
                    "fastest_s": min(times),
                    "mean_s": run.summary["step_s"],
                    "micro_batch": plan["micro_batch"],
                    "correction": plan["machine"]["correction"],
                }
            )
    return {"runs": rows, "load": os.getloadavg()[0]}


def modelled_s(run: Any) -> float:
    """What the arithmetic model alone said of the plan of a `RunDirectory`."""
    from edgeblocks.planning.candidates import candidate
    from edgeblocks.planning.plans import UPDATE_S_PER_PARAMETER, Correction, Cut, Machine, PlanRequest
    from edgeblocks.profiling.measurement import trace_costs

    asked, plan = run.settings.run, run.plan
    request = PlanRequest(
        budget_bytes=plan.budget_bytes,
        batch=asked.batch,
        steps=asked.steps,
        optimizer=asked.optimizer,
        preferred_blocks=1,
        method=run.method,
        precision=run.precision,
    )
    cut = Cut(
        costs=trace_costs(run.settings, run.data, device="cpu").costs,
        machine=replace(
            Machine.of(plan.machine), correction=Correction(), update_s_per_parameter=UPDATE_S_PER_PARAMETER
        ),
        request=request,
        layers=tuple(plan.layers_per_block),
        micro_batch=plan.micro_batch,
        checkpointing=plan.checkpointing,
        slots=plan.slots,
    )
    return candidate(cut).step_s


def table(rows: list[dict[str, Any]]) -> str:
    """A line a case: the measured time over each predicted one, of every round."""
    lines = [
        "| case | a step | by the model | with a block measured | range | from a run before | range |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        own = [row["runs"] for row in rows if row["case"] == name and "runs" in row]
        if own:
            cells = [", ".join(cell) for cell in zip(*(_cells(*runs) for runs in own), strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    def share(row: dict[str, Any], predicted: str) -> str:
        return f"{row['measured_s'] / row[predicted]:.2f}"

    def within(row: dict[str, Any]) -> str:
        low, high = (value / row["predicted_s"] for value in row["range_s"])
        inside = low <= row["measured_s"] / row["predicted_s"] <= high
        return f"{low:.2f} to {high:.2f}{'' if inside else ' (outside)'}"

    return [
        f"{1000 * first['measured_s']:.3g} ms",
        share(first, "model_s"),
        share(first, "predicted_s"),
        within(first),
        share(second, "predicted_s"),
        within(second),
    ]


if __name__ == "__main__":
    main()
