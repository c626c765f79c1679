"""A training step in small, on a device that loads its code when it is first used.

CUDA loads a kernel when it is first launched, into the device's memory and the host's, and takes scratch memory for
libraries and threads at their first use. Measured on an H100, a training took 130 MB more of the device and 270 to 470
MB more of the host than the process had after a few kernels of another network. After a warm-up step both are there
before anything is planned. So is bitsandbytes, 125 MB of the host, where it is installed and makes the 8-bit step.

On a processor the library that multiplies bfloat16 matrices writes a program for each shape of two matrices when it
first meets them, into memory that it maps and hardly touches: 18 MB for the products of one micro-batch, 1.3 MB of it
resident. Under the cap it is refused that, and it does not take a refusal well.
"""

from collections.abc import Sequence

import torch

from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Master, Precision
from edgeblocks.offload.block_buffer import Optimizer
from edgeblocks.profiling.block_step import BlockStep, example_batch


def run_warmup_step(
    family: Family,
    optimizer: Optimizer,
    device: str,
    *,
    samples: Sequence[int] = (1,),
    precision: Precision = "fp32",
    master: Master = "fp32",
) -> None:
    """Train the smallest block of a family on made-up examples for a few steps, and look at it; nothing is kept.

    Args:
        samples: examples of a step, one number a kind of step that is to come.
    """
    step = BlockStep(family, device, num_layers=family.layer_period, optimizer=optimizer, master=master)
    # Twice at least: some kernels are only loaded when there are moments.
    for count in (samples[0], *samples):
        step.forward_and_backward(example_batch(family, count, device), precision)
        step.update_()
    with torch.no_grad(), computing_in(precision, device):
        family.loss(step.network.eval(), example_batch(family, 1, device))
