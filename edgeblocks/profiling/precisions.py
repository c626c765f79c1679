"""Half precision here: how much faster a network is in it, and what its library takes at its first use."""

from functools import partial

from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Precision
from edgeblocks.offload.device import Target
from edgeblocks.profiling.block_step import BlockStep, example_batch, rounds_s
from edgeblocks.targets.cpu import run_every_kernel

WORTH_IT = 1.1
"""How many times as fast a step must be for `auto` to choose half precision."""
_LONGEST_S = 1.0


def half_gain(family: Family, precision: Precision, *, samples: int, device: str = "cpu") -> float:
    """How many times as fast forward and backward of the family's smallest block are in half precision, here and now.

    Of the whole block and not of its products alone: with short sequences attention takes longer in bfloat16 than in
    float32. A dit on 16 tokens an image took 1.7 to 2.1 times as long while its products took 0.54 (width 96, a Xeon
    with AMX); on 256 tokens 0.55.
    """
    step = BlockStep(family, device, num_layers=family.layer_period, optimizer=None)
    batch = example_batch(family, samples, device)
    one, other = (partial(step.forward_and_backward, batch, numbers) for numbers in ("fp32", precision))
    # The shortest times, in turn, so that a busy processor slows both down.
    rounds = rounds_s([one, other], most_s=_LONGEST_S)
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
