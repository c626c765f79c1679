"""Half precision here: how much faster a network is in it, and what its library takes at its first use."""

import time
from collections.abc import Callable

import torch

from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Precision
from edgeblocks.offload.device import Target
from edgeblocks.profiling.warmup_step import zeros
from edgeblocks.seeds import generator_at
from edgeblocks.targets.cpu import run_every_kernel

WORTH_IT = 1.1
"""How many times as fast a step must be for `auto` to choose half precision."""
_ROUNDS, _LONGEST_S = 12, 1.0


def half_gain(family: Family, precision: Precision, *, samples: int, device: str = "cpu") -> float:
    """How many times as fast forward and backward of the family's smallest block are in half precision, here and now.

    Of the whole block and not of its products alone: with short sequences attention takes longer in bfloat16 than in
    float32. A dit on 16 tokens an image took 1.7 to 2.1 times as long while its products took 0.54 (width 96, a Xeon
    with AMX); on 256 tokens 0.55.
    """
    block = family.block(num_layers=family.layer_period, checkpointing=False)
    block.reset_tables_()
    block.init_(generator_at(0, "gain"))
    block.to(device)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there before the step, as in training
    batch = zeros(family, samples, device)

    def seconds(precision: Precision) -> float:
        started = time.perf_counter()
        with computing_in(precision, device):
            loss = family.loss(block, batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # a device is waited for here
        return time.perf_counter() - started

    return _ratio(lambda: seconds("fp32"), lambda: seconds(precision))


def _ratio(one: Callable[[], float], other: Callable[[], float]) -> float:
    """The shortest time of one call by that of another; both in turn, so that a busy processor slows both down."""
    one(), other()  # the first time of each loads and writes programs
    rounds: list[tuple[float, float]] = []
    until = time.perf_counter() + _LONGEST_S
    while not rounds or (len(rounds) < _ROUNDS and time.perf_counter() < until):
        rounds.append((one(), other()))
    return min(first for first, _ in rounds) / min(second for _, second in rounds)


def untouched_bytes(precision: Precision) -> int:
    """Memory that is mapped and not touched when half precision meets matrices of new shapes, as of a last micro-batch.

    See `warmup_step`: these are the products of two or three of them.
    """
    return 0 if precision == "fp32" else 48_000_000


def warm_up(target: Target, precision: Precision) -> None:
    """`Target.warm_up`, and of the kernels of half precision where that is computed in."""
    target.warm_up()
    if precision != "fp32":
        with computing_in(precision, target.torch_device):
            run_every_kernel(target.torch_device)
        target.give_back()
