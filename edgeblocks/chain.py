"""The chain in torch: at each noise level of `solver.integrate`, run the block that owns it.

Because levels descend, the blocks come in order and each is loaded once for all samples, in Euler as in Heun (whose
correction at the next level belongs to the next level's block).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeblocks.noise import NoisePartition
from edgeblocks.solver import classes_in_turn, guide
from edgeblocks.store import BlockBuffer, bind_parameters_

Denoise = Callable[[Tensor, float], Tensor]


@runtime_checkable
class EmaSource(Protocol):
    """Whatever can put one block's EMA weights into memory: a scheduler while training, a loader otherwise."""

    def ema_weights(self, block: int) -> AbstractContextManager[BlockBuffer]: ...


class BlockRunner:
    """Runs the EMA weights of the block that owns a noise level, over samples in micro-batches."""

    def __init__(
        self,
        family: Any,
        layers: Sequence[int],
        partition: NoisePartition,
        source: EmaSource,
        *,
        micro_batch: int,
    ) -> None:
        self.partition, self.micro_batch = partition, micro_batch
        self.device = torch.device("cpu")
        """Where the network is; what `denoise` is given and gives lies in the processor's memory."""
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
            with self._source.ema_weights(block) as buffer:
                bind_parameters_(network, buffer.tensors("ema"))
                self.device = buffer.device
            with self.device:
                network.reset_tables_()
            self._network, self._block = network.eval(), block
            self.loads.append(block)
        return self._network

    @torch.no_grad()
    def denoise(self, z: Tensor, sigma: float, condition: Tensor | None) -> Tensor:
        """D(z, sigma) for all samples, by the block that owns sigma.

        Args:
            condition: what the network sees beside z, one a sample: a class, an image; None where it sees nothing.
        """
        network = self.network(self.partition.block_of(sigma))
        denoised = torch.empty_like(z)
        for start in range(0, len(z), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            sigmas = torch.full((len(z[part]),), sigma, device=self.device)
            seen = None if condition is None else condition[part].to(self.device)
            denoised[part] = network(z[part].to(self.device), sigmas, seen)
        return denoised

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64], t: float, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Logits [wanted, vocabulary] at the wanted places of tokens [some, length], by the block that owns t."""
        network: Any = self.network(self.partition.block_of(t))
        z = torch.from_numpy(tokens).to(self.device)
        hidden = network.hidden(z, torch.full((len(z),), t, device=self.device))
        found: NDArray[np.float32] = network.readout(hidden[torch.from_numpy(wanted)]).cpu().numpy()
        return found


def guided(
    denoise: Callable[[Tensor, float, Tensor | None], Tensor],
    labels: Tensor | None,
    *,
    guidance: float,
    no_class: int,
) -> Denoise:
    """A denoiser with classifier-free guidance (`solver.guide`); at guidance 1 only D_class is run."""

    def run(z: Tensor, sigma: float) -> Tensor:
        conditional = denoise(z, sigma, labels)
        if labels is None or guidance == 1.0:
            return conditional
        return guide(conditional, denoise(z, sigma, torch.full_like(labels, no_class)), guidance)

    return run


def class_labels(num_samples: int, *, num_classes: int, chosen: int | None) -> Int[Tensor, " samples"] | None:
    """`solver.classes_in_turn` as a tensor."""
    labels = classes_in_turn(num_samples, num_classes=num_classes, chosen=chosen)
    return None if labels is None else torch.from_numpy(labels)
