"""The chain in torch: at each noise level of `diffusion.solver.integrate`, run the block that owns it.

Because levels descend, the blocks come in order and each is loaded once for all samples, in Euler as in Heun (whose
correction at the next level belongs to the next level's block).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeblocks.diffusion.autoregression import TokenChain
from edgeblocks.diffusion.codebook import code_rows
from edgeblocks.diffusion.noise import NoisePartition
from edgeblocks.diffusion.solver import classes_in_turn, guide
from edgeblocks.diffusion.token_choice import Tokens, Values
from edgeblocks.families.block import Block
from edgeblocks.families.family import AnyFamily, FamilyOfContinuations
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Precision
from edgeblocks.offload.slots import slot_of

Denoise = Callable[[Tensor, float], Tensor]


class EmaWeights(Protocol):
    """EMA weights in memory, for a network's parameters to be views of."""

    @property
    def device(self) -> torch.device: ...

    def bind_(self, network: Block) -> None: ...


@runtime_checkable
class EmaSource(Protocol):
    """Whatever can put one block's EMA weights into memory: the slots while training, `EmaLoader` otherwise."""

    def ema_weights(self, block: int) -> AbstractContextManager[EmaWeights]: ...


class BlockRunner:
    """Runs the EMA weights of the block that owns a noise level, over samples in micro-batches."""

    def __init__(
        self,
        family: AnyFamily,
        layers: Sequence[int],
        partition: NoisePartition,
        source: EmaSource,
        *,
        micro_batch: int,
        residents: int = 1,
        together: int | None = None,
        precision: Precision = "fp32",
        shared_memory: bool = False,
    ) -> None:
        """
        Args:
            residents: blocks that stay in memory, as `offload.slots.slot_of` places them; the source must hold as many.
            shared_memory: whether the source has one block's weights at a time, whatever it holds, so that it is asked
                for them whenever another block is used.
            together: samples whose chain is walked at the same time, so that each block is loaded once for them; None:
                all. Their number changes no sample.
            precision: in which the networks compute.
        """
        self.partition, self.micro_batch, self.together = partition, micro_batch, together
        self.precision: Precision = precision
        self.budget_bytes: int | None = None
        """Of memory, where there is a bound."""
        self.device = torch.device("cpu")
        """Where the network is; the arguments and results of `denoise` are in the processor's memory."""
        self.loads: list[int] = []
        """The blocks made resident, in order."""
        self.family, self._layers, self._source = family, tuple(layers), source
        self._residents: list[tuple[int, nn.Module] | None] = [None] * residents
        self._shared_memory, self._expanded = shared_memory, -1

    def network(self, block: int) -> nn.Module:
        """A block as a module in evaluation, resident until another one needs its place."""
        slot = slot_of(block, len(self._residents))
        resident = self._residents[slot]
        if resident is None or resident[0] != block:
            # The former network's parameters are views of memory that the next one's weights come into.
            self._residents[slot] = None
            with torch.device("meta"):
                network = self.family.block(num_layers=self._layers[block], checkpointing=False)
            with self._source.ema_weights(block) as weights:
                # Views, no copies: they hold after this context until the source needs the place for another block.
                weights.bind_(network)
                self.device = weights.device
            with self.device:
                network.reset_tables_()
            resident = self._residents[slot] = (block, network.eval())
            self.loads.append(block)
        elif self._shared_memory and self._expanded != block:
            with self._source.ema_weights(block):  # into the memory that the network's parameters are views of
                pass
        self._expanded = block
        return resident[1]

    @torch.no_grad()
    def denoise(self, z: Tensor, sigma: float, condition: Tensor | None) -> Tensor:
        """D(z, sigma) for all samples, by the block that owns sigma.

        Args:
            condition: the conditioning, one a sample: a class, an image; None without.
        """
        network = self.network(self.partition.block_of(sigma))
        denoised = torch.empty_like(z)
        for start in range(0, len(z), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            # z comes and goes in the processor's memory, [samples, ...]; only a micro-batch of it is where the network
            # is.
            sigmas = torch.full((len(z[part]),), sigma, device=self.device)
            seen = None if condition is None else condition[part].to(self.device)
            with computing_in(self.precision, self.device):
                denoised[part] = network(z[part].to(self.device), sigmas, seen)
        return denoised

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64], t: float, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Logits [wanted, vocabulary] at the wanted places of tokens [some, length], by the block that owns t."""
        family, network = self.family, self.network(self.partition.block_of(t))
        assert family.task == "text"
        z = torch.from_numpy(tokens).to(self.device)
        times = torch.full((len(z),), t, device=self.device)
        with computing_in(self.precision, self.device):
            logits = family.logits(network, z, times, torch.from_numpy(wanted))
        found: NDArray[np.float32] = logits.cpu().numpy()
        return found

    @torch.no_grad()
    def continued(self, block: int, z: Values, sigma: Values, inputs: Tokens, past: Values) -> tuple[Values, Values]:
        """An `autoregression.Network`: logits of the last position, and the keys and values of all for the KV cache."""
        family, network = self.family, self.network(block)
        assert family.task == "continuation"
        given = [torch.from_numpy(array).to(self.device) for array in (z, sigma, inputs, past)]
        with computing_in(self.precision, self.device):
            logits, present = family.next_logits(network, *given)
        return logits.cpu().numpy(), present.cpu().numpy()


def token_chain(
    family: FamilyOfContinuations,
    layers: Sequence[int],
    partition: NoisePartition,
    levels: Sequence[float],
    *,
    length: int | None = None,
) -> TokenChain:
    """The chain of a family that writes token by token.

    Args:
        layers: of each block.
        levels: of each token's chain, descending.
        length: positions of a text; None: as many as it was trained on.
    """
    return TokenChain(
        codes=code_rows(family.data.vocabulary, family.code_width),
        length=family.data.length if length is None else length,
        levels=tuple(levels),
        blocks=tuple(partition.block_of(sigma) for sigma in levels),
        caches_per=family.caches_per,
        num_caches=tuple(family.num_caches(num_layers) for num_layers in layers),
        heads=family.heads,
        head_width=family.head_width,
    )


def guided(
    denoise: Callable[[Tensor, float, Tensor | None], Tensor],
    labels: Tensor | None,
    *,
    guidance: float,
    no_class: int,
) -> Denoise:
    """A denoiser with classifier-free guidance (`solver.guide`); at guidance 1 only D_class is run."""

    def run(z: Tensor, sigma: float) -> Tensor:
        # Each runs over all samples before the other, with the same block, so guidance loads no block twice.
        conditional = denoise(z, sigma, labels)
        if labels is None or guidance == 1.0:
            return conditional
        return guide(conditional, denoise(z, sigma, torch.full_like(labels, no_class)), guidance)

    return run


def class_labels(num_samples: int, *, num_classes: int, chosen: int | None) -> Int[Tensor, " samples"] | None:
    """`solver.classes_in_turn` as a tensor."""
    labels = classes_in_turn(num_samples, num_classes=num_classes, chosen=chosen)
    return None if labels is None else torch.from_numpy(labels)
