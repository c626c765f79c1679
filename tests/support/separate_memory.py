"""A machine whose compute device has memory of its own, made of a processor: for tests of a GPU's tiers.

Everything is as on a GPU (a budget for each memory, slots on the device, copies in RAM, one staging buffer), but both
memories are the processor's, so the numbers must be the processor's to the last bit.
"""

import contextlib
from dataclasses import replace

import torch

from edgeblocks.planning.plans import Host
from edgeblocks.targets.cpu import CpuTarget

DEVICE_BYTES = 3_000_000_000
RUNTIME_BYTES = 50_000_000


class SeparateMemory(CpuTarget):
    """A target; `device_buffers` and `host_buffers` are the sizes of what was allocated for blocks."""

    name = "cuda"
    host_growth_bytes = 0
    """What the host's resident set seems to have grown by."""
    newest = None
    """The target that was made last."""

    def __init__(self):
        self.device_buffers, self.host_buffers, self.copied_bytes = [], [], 0
        self._on_host = set()
        SeparateMemory.newest = self

    @property
    def device(self):
        return self

    def total_bytes(self):
        return DEVICE_BYTES

    def host_bytes(self):
        return super().total_bytes()

    def used_bytes(self):
        return RUNTIME_BYTES + sum(self.device_buffers)

    live_bytes = used_bytes

    def peak_bytes(self):
        return self.used_bytes()

    def host_used_bytes(self):
        return super().used_bytes() + self.host_growth_bytes

    def host_peak_bytes(self):
        return super().peak_bytes()

    @contextlib.contextmanager
    def capped(self, budget_bytes, *, untouched_bytes=0):
        yield

    def measure(self, folder):
        here = super().measure(folder)
        host = Host(
            runtime_bytes=here.runtime_bytes, memory_bytes=self.host_bytes(), link_bytes_per_s=here.memory_bytes_per_s
        )
        return replace(here, name=self.name, runtime_bytes=RUNTIME_BYTES, host=host)

    def empty(self, num_bytes):
        self.device_buffers.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def host_memory(self, num_bytes):
        self.host_buffers.append(num_bytes)
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._on_host.add(memory.untyped_storage().data_ptr())
        return memory

    def copy_(self, destination, source):
        """What does not come from `host_memory` is on the device, a gradient as well."""
        here = [tensor.untyped_storage().data_ptr() in self._on_host for tensor in (destination, source)]
        assert sorted(here) == [False, True], "bytes move between the two memories"
        destination.copy_(source)
        self.copied_bytes += source.numel()
