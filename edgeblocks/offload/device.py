"""What moving blocks asks of a device with memory of its own."""

from typing import Any, Protocol

from torch import Tensor


class Device(Protocol):
    """What moving blocks needs to know of a device with memory of its own."""

    torch_device: Any
    """A `torch.device`, or its name."""

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in the device's memory."""
        ...

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in the host's memory, from and to which the device copies fast."""
        ...

    def copy_(self, destination: Tensor, source: Tensor) -> None:
        """Copy between the two memories after all work that was given to the device before; returns when it is done."""
        ...
