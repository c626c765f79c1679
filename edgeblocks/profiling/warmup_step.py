"""A training step in small, on a device that loads its code when it is first used.

CUDA loads a kernel when it is first launched, into the device's memory and the host's, and takes scratch memory for
libraries and threads at their first use. Measured on an H100, a training took 130 MB more of the device and 270 to 470
MB more of the host than the process had after a few kernels of another network. After a warm-up step both are there
before anything is planned.
"""

import torch

from edgeblocks.families.family import Family
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, Optimizer, bind_parameters_
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.update import adamw_, clip_, follow_


def run_warmup_step(family: Family, optimizer: Optimizer, device: str) -> None:
    """Train the smallest block of a family on one example of zeros for two steps, and look at it; nothing is kept."""
    with torch.device("meta"):
        network = family.block(num_layers=family.layer_period, checkpointing=False)
    with torch.device(device):
        network.reset_tables_()
    layout = BlockLayout.of(network, optimizer)
    buffer = BlockBuffer(layout, allocate=lambda size: torch.zeros(size, dtype=torch.uint8, device=device))
    gradients = torch.zeros(layout.num_parameters, device=device)
    bind_parameters_(network, buffer.tensors("weights"), gradients)
    batch = {
        name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in family.batch_spec(1).items()
    }
    workspace = Workspace.for_device(device) if layout.num_quantized else None
    buffer.flat("weights").normal_(std=0.02)
    for step in range(2):
        family.loss(network, batch).sum().backward()  # type: ignore[no-untyped-call]
        # A noise level of 0 has an infinite logarithm: gradients are NaN, and the update is to run on numbers.
        gradients.nan_to_num_()
        clip_(gradients, 1.0)
        adamw_(buffer, gradients, step=step, learning_rate=1e-3, weight_decay=0.1, workspace=workspace)
        follow_(buffer, step=step, exponent=6.94)
        gradients.zero_()
    with torch.no_grad():
        family.loss(network.eval(), batch)
