"""A layer of a pretrained model, called alone."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from edgeblocks.pretrained.shell import shell_of


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
