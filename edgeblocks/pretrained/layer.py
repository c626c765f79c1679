"""A layer of a pretrained model, called alone."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from edgeblocks.pretrained.shell import shell_of

LARGEST_HEAP_BYTES = 4_000_000
"""Of tensors that share the heap while a model is trained, fewer than of networks of our own (`layer_costs`). Layers
are wide, and glibc before 2.38 seldom uses aligned memory again for as much, so that the heap of a step grew to 2.5
times of what lived (LoRA, width 768, 8 windows of 128); with this to 1.9 times, in the same time. With 2 MB it was 1.2
times, and fresh pages made the step 1.4 times as long."""


class PretrainedLayer(nn.Module, ABC):
    """One of the library's layers; where its weights are, a subclass says."""

    def __init__(self, model: str, number: int) -> None:
        super().__init__()
        # The trace of costs asks for three layers, whatever the model has.
        self.model, self.number = model, min(number, len(shell_of(model, "meta").layers) - 1)

    @abstractmethod
    def called(self, *args: Any, **kwargs: Any) -> Any:
        """What the library's layer gives when it is called with this."""

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """What the layer makes of the hidden values in a whole text; there is no condition."""
        args, kwargs = shell_of(self.model, hidden.device.type).calls(hidden)[self.number]
        out = self.called(hidden, *args, **kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found
