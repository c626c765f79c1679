"""What rounding weights to bfloat16 costs an update, with AdamW and EMA: beside float32 weights, in turns.

    OMP_NUM_THREADS=1 python tests/bench/rounded_update.py                    # a block of 9M parameters
    OMP_NUM_THREADS=1 python tests/bench/rounded_update.py --layers 2 --rounds 3

Printed for either optimizer: ns of processor time a parameter, the median round; and what the float32 copy takes that a
network of bfloat16 weights computes with. Threads of torch that wait count, too, hence one of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, Optimizer
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.update import update_

WIDTH = 1024


def cpu_s(work: Callable[[], object]) -> float:
    """Processor time of the whole process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(layers: int, rounds: int, optimizer: Optimizer) -> dict[str, float]:
    """Seconds a parameter: of an update by the numbers of its weights, and of a float32 copy."""
    with torch.device("meta"):
        block = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    layouts = {master: BlockLayout.of(block, optimizer, master=master) for master in ("fp32", "bf16")}
    buffers = {master: BlockBuffer(layout).touched() for master, layout in layouts.items()}
    numel = layouts["fp32"].num_parameters
    for buffer in buffers.values():
        for part in ("weights", "ema"):
            buffer.flat(part).copy_(0.05 * torch.randn(numel))
    gradients, copy = 0.01 * torch.randn(numel), Float32Copy([layouts["bf16"]], torch.device("cpu"))
    workspaces = {master: Workspace.for_device("cpu", rounds=master == "bf16") for master in buffers}
    taken: dict[str, list[float]] = {"fp32": [], "bf16": [], "copy": []}
    for step in range(rounds + 1):
        for master, buffer in buffers.items():
            taken[master].append(
                cpu_s(
                    lambda master=master, buffer=buffer, step=step: update_(
                        buffer,
                        gradients,
                        step=step,
                        learning_rate=1e-4,
                        weight_decay=0.01,
                        exponent=6.94,
                        workspace=workspaces[master],
                        position=(0, "round", 0, step),
                    )
                )
            )
        taken["copy"].append(cpu_s(lambda: copy.hold_(buffers["bf16"], "weights")))
    # The first round loads code.
    return {name: statistics.median(seconds[1:]) / numel for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help=f"linear maps of width {WIDTH}")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    optimizers: tuple[Optimizer, ...] = ("adamw8bit", "adamw")
    for optimizer in optimizers:
        found = measure(arguments.layers, arguments.rounds, optimizer)
        print(
            f"{optimizer}, {torch.get_num_threads()} thread(s): fp32 {found['fp32'] * 1e9:.1f} ns a parameter, bf16 "
            f"{found['bf16'] * 1e9:.1f}, {found['bf16'] / found['fp32']:.2f}x; copy {found['copy'] * 1e9:.2f}"
        )


if __name__ == "__main__":
    main()
