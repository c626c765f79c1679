"""A run's network as one torch module with its trained weights, for use outside of edgeblocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeblocks.diffusion.noise import NoisePartition
from edgeblocks.families.block import Block
from edgeblocks.offload.block_buffer import Part, bind_parameters_
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.save_weights import read_weights


class BlocksAsOne(nn.Module):
    """Blocks that were trained alone as the one network that they make: each sample goes to the block of its noise."""

    def __init__(self, blocks: Sequence[Block], partition: NoisePartition) -> None:
        super().__init__()
        for number, block in enumerate(blocks):
            self.add_module(f"block_{number}", block)
        self._partition = partition

    def block_of(self, level: float) -> int:
        """The number of the block that owns a noise level: sigma, or t of masked text."""
        highest, lowest = self._partition.boundaries[0], self._partition.boundaries[-1]
        return self._partition.block_of(min(max(level, lowest), highest))  # a float32 level can be rounded past an end

    def forward(self, z: Tensor, level: Tensor, *others: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        """What each sample's block gives for it.

        Args:
            z: noised samples, [batch, ..].
            level: of each sample, [batch].
            others: what the family's blocks get besides, such as classes or images, [batch, ..].
        """
        owners = [self.block_of(float(one)) for one in level]
        used = sorted(set(owners))
        if len(used) == 1:
            return self._given(used[0], z, level, *others)
        rows = [
            torch.tensor([row for row, owner in enumerate(owners) if owner == block], device=level.device)
            for block in used
        ]
        parts = [
            self._given(block, z[own], level[own], *(None if one is None else one[own] for one in others))
            for block, own in zip(used, rows, strict=True)
        ]
        order = torch.cat(rows).argsort()
        if isinstance(parts[0], Tensor):
            return torch.cat([part for part in parts if isinstance(part, Tensor)])[order]
        logits, present = zip(*parts, strict=True)  # keys and values have the batch second
        return torch.cat(logits)[order], torch.cat(present, dim=1)[:, order]

    def _given(self, block: int, *inputs: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        found: Tensor | tuple[Tensor, ...] = self.get_submodule(f"block_{block}")(*inputs)
        return found


def trained_network(run: RunDirectory, *, last: bool) -> nn.Module:
    """See `Run.network`."""
    family = run.family()
    with torch.device("meta"):  # no memory is taken for parameters that are replaced at once
        networks = [family.block(num_layers=count, checkpointing=False) for count in run.layers]
    whole: nn.Module = networks[0] if run.method.one_network else BlocksAsOne(networks, run.partition)
    for number, buffer in enumerate(read_weights(run, last=last)):
        part: Part = "weights" if last else "ema"
        bind_parameters_(
            whole,
            [(run.tensor_name(number, own), value.to(torch.float32, copy=True)) for own, value in buffer.tensors(part)],
        )
    with torch.device("cpu"):
        for network in networks:
            network.reset_tables_()
    return whole.requires_grad_().eval()
