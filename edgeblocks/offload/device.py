"""What the runtime asks of a machine (`Target`), and of a device of it that has memory of its own (`Device`)."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, device

from edgeblocks.methods import Precision
from edgeblocks.planning.plans import Machine

if TYPE_CHECKING:
    from edgeblocks.targets.disk import DiskSpeed


@runtime_checkable
class Device(Protocol):
    """What moving blocks needs to know of a device with memory of its own."""

    @property
    def torch_device(self) -> str | device:
        """As torch names it."""
        ...

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in the device's memory."""
        ...

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in the host's memory, from and to which the device copies fast."""
        ...

    def copy_(self, destination: Tensor, source: Tensor) -> None:
        """Copy between the two memories after all work that was given to the device before; returns when it is done."""
        ...

    def link_bytes_per_s(self, probe_bytes: int) -> tuple[float, float]:
        """Speeds of copies of `probe_bytes`: from the host to the device, and back.

        Raises:
            RuntimeError: that much memory is not free.
        """
        ...


class Target(Protocol):
    """A kind of machine that training runs on: its memory, its speeds, its cap. `targets.cpu` and `targets.cuda` are.

    A budget bounds the compute device's memory. The host's memory is another one, or the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def torch_device(self) -> str:
        """What torch calls the compute device."""
        ...

    @property
    def device(self) -> Device | None:
        """The compute device where it has memory of its own; None where its memory is the process's."""
        ...

    def half_precision(self) -> Precision | None:
        """The numbers of 16 bits that the device computes fast in; None where only a measurement tells."""
        ...

    def prepare(self) -> None:
        """Settings of the process that must come before the first large allocation.

        Raises:
            ConfigError: there is no such device here.
        """
        ...

    def keep_heap(self, *, largest_bytes: int) -> None:
        """From now on, larger tensors in the memory of the process get pages of their own, which are given back with
        them; smaller ones share its heap."""
        ...

    def warm_up(self) -> None:
        """Run every kind of kernel that training uses once, so that their code and scratch memory are resident."""
        ...

    def measure(self, folder: Path | None) -> Machine:
        """Speeds of the device and of a folder's disk (None: none is used), and what is occupied before any block is
        loaded."""
        ...

    def examine_disk(self, folder: Path, *, probe_bytes: int, limit_s: float) -> "DiskSpeed":
        """A closer look at a folder's disk than the planner's.

        Raises:
            StorageError: the folder cannot be written to or is full.
        """
        ...

    @property
    def has_cap(self) -> bool:
        """Whether the system refuses memory past the budget at all."""
        ...

    def capped(self, budget_bytes: int, *, untouched_bytes: int = 0) -> AbstractContextManager[None]:
        """Memory of the device past the budget is refused inside, as an error that can be caught.

        Args:
            untouched_bytes: memory that libraries will map inside and never touch, where the system counts that too.
        """
        ...

    def give_back(self) -> None:
        """Return memory that is kept for later and unused."""
        ...

    def without_gaps(self) -> AbstractContextManager[None]:
        """Inside, the process's memory follows the live tensors: for passes whose tensors differ much in size, and that
        take so long that fresh pages do not matter."""
        ...

    def total_bytes(self) -> int:
        """The device's memory."""
        ...

    def available_bytes(self) -> int:
        """Of it, what can be taken now."""
        ...

    def used_bytes(self) -> int:
        """What the process holds of the device's memory now."""
        ...

    def live_bytes(self) -> int:
        """The same without what is kept for the next allocation."""
        ...

    def peak_bytes(self) -> int:
        """The largest `used_bytes` so far."""
        ...

    def host_bytes(self) -> int | None:
        """The host's memory where the device has its own; None where both are one."""
        ...

    def host_used_bytes(self) -> int:
        """The process's resident set now."""
        ...

    def host_peak_bytes(self) -> int:
        """The process's largest resident set so far."""
        ...
