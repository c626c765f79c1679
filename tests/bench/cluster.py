"""Blocks of a run in one process, on one node of a Ray cluster, and on three: time, memory, bytes that are sent.

    OMP_NUM_THREADS=1 python tests/bench/cluster.py
    OMP_NUM_THREADS=1 python tests/bench/cluster.py --steps 4000 --rounds 3

All nodes are on this machine (`ray.cluster_utils.Cluster`), each with room for one block at a time, so three of them
gain what its processors give. A round has the three ways in turns; the table has the medians. `training` is what is
spread: from the first step to the last block at home. The processor's time is that of the command and of all that
nodes do for it. Memory is what was resident at most: of the process that the user starts, of the largest training on a
node, which its budget bounds, and of Ray's process beside that, which it does not.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

HOW: dict[str, Any] = {"data": "digits", "blocks": 3, "shared": 0, "mem_budget": "1GB", "sample_grids": 0}
HOW |= {"hold_out": 0.02, "width": 64, "tier": "ram"}
MEMORY_BYTES = 1_200_000_000
"""Of a node: one block's budget, not two."""
COLUMNS = ("training s", "whole command s", "processor s", "command MB", "training on a node MB", "Ray beside it MB")


class Watch(threading.Thread):
    """Peaks and processor time of this process's children, by what they are."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self._seconds: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            self._look()

    def end(self) -> None:
        self._look()
        self._ended.set()
        self.join()

    @property
    def processor_s(self) -> float:
        return sum(self._seconds.values())

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError, IndexError):
                words, times = process.cmdline(), process.cpu_times()
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
                kind = "node" if "--blocks-here" in words else "command" if "--out" in words else "other"
                kind = "beside" if words[0].startswith("ray::Worker") else kind
                self.peaks[kind] = max(self.peaks.get(kind, 0), peak)
                self._seconds[process.pid, process.create_time()] = times.user + times.system


def command(out: Path, steps: int, *more: str) -> list[str]:
    settings = [word for name, value in HOW.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "edgeblocks.cli", "train", "--out", str(out), "--steps", str(steps), *settings, *more]


def measured(out: Path, steps: int, nodes: int) -> tuple[list[float], str]:
    """One row's figures, and what the command said; 0 nodes: no cluster."""
    cluster = None
    try:
        more = []
        if nodes:
            from ray.cluster_utils import Cluster

            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
            for _ in range(nodes):
                cluster.add_node(num_cpus=1, memory=MEMORY_BYTES)
            more = ["--cluster", cluster.address]
        watch, started = Watch(), time.perf_counter()
        watch.start()
        process = subprocess.Popen(command(out, steps, *more), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stderr is not None
        lines = [(time.perf_counter(), line.decode()) for line in process.stderr]
        if process.wait():
            raise SystemExit("".join(line for _, line in lines))
        whole_s = time.perf_counter() - started
        watch.end()
    finally:
        if cluster is not None:
            cluster.shutdown()
    begun = next(when for when, line in lines if line.startswith(("training on the cluster", "creating blocks: 3/3")))
    ended = next(when for when, line in lines if line.startswith("evaluating"))
    memory = [watch.peaks.get(kind, 0) / 1e6 for kind in ("command", "node", "beside")]
    return [ended - begun, whole_s, watch.processor_s, *memory], "".join(line for _, line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 1, 3])
    wanted = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found: dict[int, list[list[float]]] = {nodes: [] for nodes in wanted.nodes}
    folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
    try:
        for number in range(wanted.rounds):
            for nodes in wanted.nodes:
                row, _ = measured(folder / f"{number}-{nodes}", wanted.steps, nodes)
                found[nodes].append(row)
                print(f"round {number}, {nodes} nodes: {', '.join(f'{value:.1f}' for value in row)}", file=sys.stderr)
        size = sum(path.stat().st_size for path in next(folder.iterdir()).glob("blocks/*")) / HOW["blocks"]
        records = (next(folder.iterdir()) / "metrics.jsonl").stat().st_size
    finally:
        shutil.rmtree(folder)
    print(f"| where | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for nodes, rows in found.items():
        where = "one process" if not nodes else f"{nodes} node{'s' * (nodes > 1)}"
        middle = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"| {where} | {' | '.join(f'{value:.0f}' if value else '-' for value in middle)} |")
    print(f"\nsent home after a visit: a block of {size / 1e6:.1f} MB, and records of at most {records / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
