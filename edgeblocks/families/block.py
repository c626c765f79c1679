"""What the runtime asks of a network: `Block`. Every kind of family builds its own kind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeblocks.families.layers import run_layers


class Block(nn.Module, ABC):
    """A network of some layers between a stem and a readout: one block, or a whole network that is cut into stages.

    It is built without values, and initialised when its parameters are bound to memory. `stem_parts` and
    `readout_parts` name the sub-modules that only the first, or only the last, of several stages has.
    """

    layers: nn.ModuleList
    """Each takes (hidden, condition) and gives hidden."""
    checkpointing: bool
    """Whether activations are computed again on the way back."""
    stem_parts: tuple[str, ...] = ()
    readout_parts: tuple[str, ...] = ()
    branch_outputs: tuple[str, ...] = ("attention.out", "mlp.down")
    """Of a layer, the linear maps whose output is added to the hidden values. Where a network grows, a new layer begins
    as a copy with these made small; a layer that has none of them begins with random values."""

    @abstractmethod
    def init_(self, generator: torch.Generator) -> None:
        """Initialise all parameters in place."""

    def begin_at(self, layer: int) -> None:
        """The network is a stage whose layers are those from `layer` on; for networks whose layers differ by number."""

    def held_elsewhere(self) -> Sequence[Tensor]:
        """Memory that it uses and other networks share, which a plan counts apart."""
        return ()

    def reset_tables_(self) -> None:
        """Make the fixed tables, which are not stored, on torch's default device; needed before use."""

    def through_stage(self, hidden: Tensor, condition: Tensor, *, checkpointing: bool) -> Tensor:
        """Through the layers of a stage of end-to-end training, one after the other."""
        # The guard may turn checkpointing on between two steps, so it comes with the call and not from the block.
        return run_layers(self.layers, hidden, condition, checkpointing=checkpointing)
