"""The chain: from noise to a sample, walking the noise levels from high to low and running at each the block that owns it.

Because levels descend, the blocks come in order and each is loaded once for all samples, in Euler as in Heun (whose
correction at the next level belongs to the next level's block). Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from edgeblocks.noise import NoisePartition
from edgeblocks.store import BlockBuffer, bind_parameters_

Solver = Literal["euler", "heun"]
Denoise = Callable[[Tensor, float], Tensor]


@runtime_checkable
class EmaSource(Protocol):
    """Whatever can put one block's EMA weights into memory: a scheduler while training, a loader otherwise."""

    def ema_weights(self, block: int) -> AbstractContextManager[BlockBuffer]: ...


class BlockRunner:
    """Runs the EMA weights of the block that owns a noise level, over samples in micro-batches."""

    def __init__(
        self,
        family: Any,  # noqa: ANN401 - families.base.Family
        layers: Sequence[int],
        partition: NoisePartition,
        source: EmaSource,
        *,
        micro_batch: int,
    ) -> None:
        self.partition, self.micro_batch = partition, micro_batch
        self.loads: list[int] = []
        """The blocks made resident, in order."""
        self._family, self._layers, self._source = family, tuple(layers), source
        self._network: nn.Module | None = None
        self._block: int | None = None

    def network(self, block: int) -> nn.Module:
        """A block as a module in evaluation, resident until another one is asked for."""
        if self._block != block or self._network is None:
            with torch.device("meta"):
                network = self._family.block(num_layers=self._layers[block], checkpointing=False)
            network.reset_tables_()
            with self._source.ema_weights(block) as buffer:
                bind_parameters_(network, buffer.tensors("ema"))
            self._network, self._block = network.eval(), block
            self.loads.append(block)
        return self._network

    @torch.no_grad()
    def denoise(self, z: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        """D(z, sigma) for all samples, by the block that owns sigma."""
        network = self.network(self.partition.block_of(sigma))
        denoised = torch.empty_like(z)
        for start in range(0, len(z), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            sigmas = torch.full((len(z[part]),), sigma)
            denoised[part] = network(z[part], sigmas, None if labels is None else labels[part])
        return denoised


def guided(
    denoise: Callable[[Tensor, float, Tensor | None], Tensor],
    labels: Tensor | None,
    *,
    guidance: float,
    no_class: int,
) -> Denoise:
    """A denoiser with classifier-free guidance: D_null + guidance (D_class - D_null); at 1 only D_class is run.

    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """

    def run(z: Tensor, sigma: float) -> Tensor:
        conditional = denoise(z, sigma, labels)
        if labels is None or guidance == 1.0:
            return conditional
        unconditional = denoise(z, sigma, torch.full_like(labels, no_class))
        return unconditional.add_(conditional.sub_(unconditional), alpha=guidance)

    return run


@torch.no_grad()
def sample_chain(
    denoise: Denoise,
    z: Float[Tensor, "samples ..."],
    levels: Sequence[float],
    *,
    solver: Solver,
    on_level: Callable[[int], None] | None = None,
) -> Float[Tensor, "samples ..."]:
    """Integrate the probability-flow ODE from levels[0] down to 0.

    Args:
        z: standard normal noise; it is not changed.
        levels: descending, each strictly inside its block's range.
        solver: `euler` runs the network once a level, `heun` twice except at the last (EDM, algorithm 1).
        on_level: called with the number of levels done.
    """
    z = z * levels[0]
    for i, sigma in enumerate(levels):
        sigma_next = levels[i + 1] if i + 1 < len(levels) else 0.0
        slope = (z - denoise(z, sigma)) / sigma
        z_next = torch.add(z, slope, alpha=sigma_next - sigma)
        if solver == "heun" and sigma_next > 0:
            slope_next = (z_next - denoise(z_next, sigma_next)) / sigma_next
            z_next = torch.add(z, slope.add_(slope_next), alpha=(sigma_next - sigma) / 2)
        z = z_next
        if on_level is not None:
            on_level(i + 1)
    return z


def class_labels(num_samples: int, *, num_classes: int, chosen: int | None) -> Int[Tensor, " samples"] | None:
    """The class of each sample: the chosen one, or all classes in turn; None for an unconditional network."""
    if num_classes == 0:
        return None
    if chosen is not None:
        return torch.full((num_samples,), chosen, dtype=torch.int64)
    return torch.from_numpy(np.arange(num_samples) % num_classes)
