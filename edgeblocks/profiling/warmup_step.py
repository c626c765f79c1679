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

from edgeblocks.families.base import Batch
from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Master, Precision
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, Optimizer, bind_parameters_
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.update import clip_, update_


def run_warmup_step(
    family: Family,
    optimizer: Optimizer,
    device: str,
    *,
    samples: Sequence[int] = (1,),
    precision: Precision = "fp32",
    master: Master = "fp32",
) -> None:
    """Train the smallest block of a family on zeros for a few steps, and look at it; nothing is kept.

    Args:
        samples: examples of a step, one number a kind of step that is to come.
    """
    with torch.device("meta"):
        network = family.block(num_layers=family.layer_period, checkpointing=False)
    with torch.device(device):
        network.reset_tables_()
    layout = BlockLayout.of(network, optimizer, master=master)
    buffer = BlockBuffer(layout, allocate=lambda size: torch.zeros(size, dtype=torch.uint8, device=device))
    gradients = torch.zeros(layout.num_parameters, device=device)
    rounds = layout.is_rounded
    workspace = Workspace.for_device(device, rounds=rounds) if layout.num_quantized or rounds else None
    buffer.flat("weights").normal_(std=0.02)
    weights = Float32Copy([layout], buffer.device).hold_(buffer, "weights") if rounds else buffer
    bind_parameters_(network, weights.tensors("weights"), gradients)
    # Twice at least: some kernels are only loaded when there are moments.
    for step, count in enumerate((samples[0], *samples)):
        batch = zeros(family, count, device)
        with computing_in(precision, device):
            loss = family.loss(network, batch)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        del loss  # its activations are gone before the next, larger ones come
        # A noise level of 0 has an infinite logarithm: gradients are NaN, and the update is to run on numbers.
        gradients.nan_to_num_()
        clip_(gradients, 1.0)
        update_(
            buffer,
            gradients,
            step=step,
            learning_rate=1e-3,
            weight_decay=0.1,
            exponent=6.94,
            workspace=workspace,
            position=(0, "warm-up"),
        )
        gradients.zero_()
    with torch.no_grad(), computing_in(precision, device):
        family.loss(network.eval(), zeros(family, 1, device))


def zeros(family: Family, count: int, device: str) -> Batch:
    """A batch of so many examples, all zeros."""
    spec = family.batch_spec(count).items()
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in spec}
