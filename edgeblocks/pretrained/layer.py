"""A layer of a pretrained model, called alone."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from edgeblocks.pretrained.library import without_values
from edgeblocks.pretrained.shells import any_shell

LARGEST_HEAP_BYTES = 4_000_000
"""Of tensors that share the heap while a model is trained, fewer than of networks of our own (`layer_costs`). Layers
are wide, and glibc before 2.38 seldom uses aligned memory again for as much, so that the heap of a step grew to 2.5
times of what lived (LoRA, width 768, 8 windows of 128); with this to 1.9 times, in the same time. With 2 MB it was 1.2
times, and fresh pages made the step 1.4 times as long."""


def as_condition(positions: Tensor | None, hidden: Tensor) -> Tensor:
    """Positions [batch, length] as numbers that go from stage to stage; [batch, 1] where there are none."""
    return hidden.new_zeros(len(hidden), 1) if positions is None else positions.to(torch.float32)


def positions_of(condition: Tensor) -> Tensor | None:
    """Positions of tokens int64 [batch, length], where windows hold several texts; None: one a window.

    >>> positions_of(torch.zeros(2, 1)), positions_of(torch.tensor([[0.0, 1.0, 0.0]]))
    (None, tensor([[0, 1, 0]]))
    """
    return None if condition.shape[1] == 1 else condition.detach().to(torch.int64)


class PretrainedLayer(nn.Module, ABC):
    """One of the library's layers; where its weights are, a subclass says."""

    def __init__(self, model: str, number: int, side: int | None = None) -> None:
        """
        Args:
            side: of pictures, where the model is an image classifier; see `any_shell`.
        """
        super().__init__()
        # The trace of costs asks for three layers, whatever the model has.
        self.model, self.side = model, side
        self.number = min(number, len(any_shell(model, "meta", side).layers) - 1)

    @abstractmethod
    def called(self, *args: Any, **kwargs: Any) -> Any:
        """What the library's layer gives when it is called with this."""

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """What the layer makes of the hidden values of texts, whose condition is `positions_of`'s, or pictures."""
        shell = any_shell(self.model, hidden.device.type, self.side)
        args, kwargs = shell.calls(hidden, positions_of(condition))[self.number]
        with without_values(hidden.device):
            out = self.called(hidden, *args, **kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


class TrainedLayer(PretrainedLayer):
    """A layer whose weights are the network's parameters."""

    def __init__(self, model: str, number: int, side: int | None = None) -> None:
        super().__init__(model, number, side)
        self.hf = any_shell(model, "meta", side).layer(self.number)

    def called(self, *args: Any, **kwargs: Any) -> Any:
        """What the library's layer gives when it is called with this."""
        return self.hf(*args, **kwargs)
