"""Does torch.compile pay? A block's forward and backward pass as it is and compiled, in turns in one process.

    python tests/bench/compiled_block.py --family dit
    python tests/bench/compiled_block.py --family ar --set width=256

Printed: the ratio of the two steps; what the first compiled step takes with an empty cache and, in a second process,
with the cache of the first; the memory that compiling leaves behind; and after how many steps the time is won back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from versus_plain import SHAPES, data_settings, make_data, train_ours

from edgeblocks.offload.block_buffer import bind_parameters_
from edgeblocks.offload.block_slots import BlockSlots
from edgeblocks.offload.tiers import DiskTier
from edgeblocks.registry import family_type
from edgeblocks.runs.open_data import data_of
from edgeblocks.runs.opening import open_run
from edgeblocks.seeds import generator_at
from edgeblocks.targets.cpu import CpuTarget


def measure(run_path: Path, rounds: int) -> dict[str, Any]:
    """One process' figures."""
    target = CpuTarget()
    target.prepare()
    run = open_run(run_path)
    family, data = run.family(), data_of(run.settings.run, lambda *_: None)
    examples, labels = data.gather(data.order(batch=run.settings.run.batch, seed=0, block=0).indices(0))
    batch = family.draw(examples, labels, run.partition.ranges[0], generator_at(0))
    with BlockSlots(DiskTier(run.store()), slots=1).visit(0, then=None) as resident:
        with torch.device("meta"):
            network = family.block(num_layers=run.layers[0], checkpointing=False)
        network.reset_tables_()
        gradients = torch.zeros(sum(p.numel() for p in network.parameters()))
        bind_parameters_(network, resident.buffer.tensors("weights"), gradients)
        network.train()

        def eager() -> float:
            started = time.perf_counter()
            family.loss(network, batch).sum().backward()
            return time.perf_counter() - started

        for _ in range(2):
            eager()
        before = target.used_bytes()
        compiled_loss = torch.compile(family.loss)

        def compiled() -> float:
            started = time.perf_counter()
            compiled_loss(network, batch).sum().backward()
            return time.perf_counter() - started

        first_s = compiled()
        compiled()
        left_bytes = target.used_bytes() - before
        pairs = [(eager(), compiled()) for _ in range(rounds)]
    pairs.sort(key=lambda pair: pair[1] / pair[0])
    eager_s, compiled_s = (min(times) for times in zip(*pairs, strict=True))
    median = pairs[len(pairs) // 2]
    return {
        "ratio": median[1] / median[0],
        "eager_s": eager_s,
        "compiled_s": compiled_s,
        "first_s": first_s,
        "left_bytes": left_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(SHAPES), default="dit")
    parser.add_argument("--set", action="append", default=[], dest="given", help="another shape, such as patch=4")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--run", type=Path, help="for the second process: what the first one made")
    wanted = parser.parse_args()
    if wanted.run is not None:
        print(json.dumps(measure(wanted.run, wanted.rounds)))
        return
    changed = (setting.partition("=") for setting in wanted.given)
    shape = {**SHAPES[wanted.family], **{name: int(value) for name, _, value in changed}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = data_settings(wanted.family, make_data(folder, family_type(wanted.family).reads), 27)
        run = train_ours(folder, **settings, **shape, blocks=wanted.blocks, tier="ram", optimizer="adamw")
        command = [sys.executable, __file__, "--run", str(run), "--rounds", str(wanted.rounds)]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        cold, warm = (
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
            for _ in range(2)
        )
    won_s = cold["eager_s"] - cold["compiled_s"]
    steps = f"won back after {cold['first_s'] / won_s:.0f} steps" if won_s > 0 else "never won back"
    print(
        f"{wanted.family} {shape}, {wanted.blocks} blocks: compiled / as it is {cold['ratio']:.3f} and "
        f"{warm['ratio']:.3f} (fastest {cold['compiled_s']:.3f} and {cold['eager_s']:.3f} s); first step "
        f"{cold['first_s']:.0f} s, from the cache {warm['first_s']:.0f} s; {cold['left_bytes'] / 1e6:.0f} MB more "
        f"memory; {steps}"
    )


if __name__ == "__main__":
    main()
