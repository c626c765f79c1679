"""The CUDA target: the compute device is a GPU with memory of its own, beside the host's.

The budget bounds what the process holds of the GPU's memory: what torch's caching allocator reserved, and the rest that
is not free (context, kernels, libraries' workspaces). What other programs hold counts as if it were ours: it cannot be
used either.
"""

import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeblocks.errors import ConfigError
from edgeblocks.methods import Precision
from edgeblocks.planning.plans import Host, Machine
from edgeblocks.targets.cpu import DISK_PROBE_BYTES, CpuTarget, checksum_s_per_byte, run_every_kernel
from edgeblocks.targets.disk import DiskSpeed, measure_disk
from edgeblocks.targets.profile import WRITTEN_BYTES_PER_UPDATE

if TYPE_CHECKING:
    from edgeblocks.offload.device import Target


_LINK_PROBE_BYTES = 64 * 2**20


class CudaTarget:
    """What the first visible GPU and its host can do (`CUDA_VISIBLE_DEVICES` chooses another one)."""

    name = "cuda"
    torch_device = "cuda"

    def __init__(self) -> None:
        self._host = CpuTarget()
        self._runtime_bytes = self._scratch_bytes = 0
        self._copies = threading.local()
        """A stream for each thread that copies: one does not wait for what another one copies."""

    @property
    def device(self) -> "CudaTarget":
        """The GPU."""
        return self

    def half_precision(self) -> Precision | None:
        """bfloat16 from compute capability 8 on (RTX 30), float16 before."""
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"

    def prepare(self) -> None:
        """Settings of the process that must come before the first large allocation.

        Raises:
            ConfigError: torch can use no GPU here.
        """
        # Before torch's allocator looks: segments that grow, of which only what is used is taken from the device. Usual
        # ones keep up to 20 MB for each size that was once needed.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        if not torch.cuda.is_available():
            built = (
                "is built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) sees no GPU"
            )
            raise ConfigError(
                f"--target cuda: torch {torch.__version__} {built}; train with --target cpu (a run that was begun on a "
                f"GPU goes on with --resume RUN --target cpu), or see what edgeblocks doctor says of the GPU"
            )
        self._host.prepare()

    def keep_heap(self, *, largest_bytes: int) -> None:
        """Of the host's memory, which no tensors of a step are in."""

    def give_back(self) -> None:
        """Return unused segments to the driver, and the host's unused pages to the system."""
        torch.cuda.empty_cache()
        self._host.give_back()

    def without_gaps(self) -> contextlib.AbstractContextManager[None]:
        """Of the host's memory; the device's has segments that grow."""
        return self._host.without_gaps()

    def total_bytes(self) -> int:
        """The GPU's memory."""
        return int(torch.cuda.mem_get_info()[1])

    def host_bytes(self) -> int | None:
        """The machine's memory, or what a control group (a container) allows of it."""
        return self._host.total_bytes()

    def available_bytes(self) -> int:
        """Memory of the GPU that nobody holds."""
        return int(torch.cuda.mem_get_info()[0])

    def used_bytes(self) -> int:
        """What of the GPU's memory can be used by nobody else now."""
        return self._runtime_bytes + int(torch.cuda.memory_reserved())

    def live_bytes(self) -> int:
        """The same without what torch keeps for the next allocation."""
        return self._runtime_bytes + int(torch.cuda.memory_allocated())

    def peak_bytes(self) -> int:
        """The largest `used_bytes` so far; what was loaded since the start counts as if it had always been there."""
        return max(self._runtime_bytes, self._outside_torch_bytes()) + int(torch.cuda.max_memory_reserved())

    def host_used_bytes(self) -> int:
        """The process's resident set now."""
        return self._host.used_bytes()

    def host_peak_bytes(self) -> int:
        """The process's largest resident set so far: what `/usr/bin/time -v` reports."""
        return self._host.peak_bytes()

    has_cap = True

    @contextlib.contextmanager
    def capped(self, budget_bytes: int, *, untouched_bytes: int = 0) -> Iterator[None]:
        """Let torch refuse memory that would carry the process past the budget; a smaller share that was set stays."""
        share = (budget_bytes - self._runtime_bytes) / self.total_bytes()
        former = torch.cuda.memory.get_per_process_memory_fraction()
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), former))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(former)

    def warm_up(self) -> None:
        """Run every kind of kernel that training uses once, so that context, code and workspaces are in memory."""
        self._host.warm_up()
        run_every_kernel(self.torch_device)
        self._note_runtime()

    def _note_runtime(self) -> None:
        """See what is there before any block is, and forget the peak until now."""
        torch.cuda.synchronize()
        gc.collect()  # networks that were tried before
        # cuBLAS takes scratch memory from torch's allocator, for each thread that calls it, and keeps it.
        self._scratch_bytes = int(torch.cuda.memory_allocated())
        self.give_back()
        self._runtime_bytes = self._outside_torch_bytes()
        torch.cuda.reset_peak_memory_stats()

    def _outside_torch_bytes(self) -> int:
        """Of the device's memory, what neither is free nor in the hands of torch's allocator."""
        free, total = torch.cuda.mem_get_info()
        return int(total - free - torch.cuda.memory_reserved())

    def measure(self, folder: Path | None) -> Machine:
        """Speeds of the GPU, its link and the disk, and what both memories hold before any block is loaded."""
        self.warm_up()
        flops_per_s, memory_bytes_per_s, operator_s = self._measure_arithmetic()
        link_bytes_per_s = min(self.link_bytes_per_s(_LINK_PROBE_BYTES))
        disk = measure_disk(folder, probe_bytes=DISK_PROBE_BYTES, limit_s=3)
        self._note_runtime()  # again: large matrices brought 72 MB of code on an H100
        return Machine(
            name=self.name,
            runtime_bytes=self._runtime_bytes + self._scratch_bytes,
            flops_per_s=flops_per_s,
            memory_bytes_per_s=memory_bytes_per_s,
            operator_s=operator_s,
            disk_read_bytes_per_s=disk.read_bytes_per_s,
            disk_write_bytes_per_s=disk.write_bytes_per_s,
            checksum_s_per_byte=checksum_s_per_byte(),
            update_s_per_parameter=WRITTEN_BYTES_PER_UPDATE / memory_bytes_per_s,
            host=Host(
                runtime_bytes=self.host_used_bytes(),
                memory_bytes=self._host.total_bytes(),
                link_bytes_per_s=link_bytes_per_s,
            ),
        )

    def examine_disk(self, folder: Path, *, probe_bytes: int, limit_s: float) -> DiskSpeed:
        """As `CpuTarget.examine_disk`."""
        return self._host.examine_disk(folder, probe_bytes=probe_bytes, limit_s=limit_s)

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the GPU."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in page-locked memory of the host, from which copies run at the link's speed.

        Registered rather than taken from torch's pool of page-locked memory, which gives the next power of two. Where
        the system does not allow that much to be locked, it stays pageable: slower, the same numbers.
        """
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if num_bytes and int(runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0)) == 0:
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def copy_(self, destination: Tensor, source: Tensor) -> None:
        """Copy between the memories after all work given to the GPU before; returns when it is done.

        On a stream of its own, so that a block moves while the other one is trained. From any thread.
        """
        if not hasattr(self._copies, "stream"):
            self._copies.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream = self._copies.stream
        # What fills the source, or still uses the destination, was given to the default stream before.
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)
        stream.synchronize()

    def _measure_arithmetic(self) -> tuple[float, float, float]:
        """fp32 operations and bytes written by an element-wise kernel per second, seconds of a small kernel."""
        size = 2048
        with torch.no_grad(), torch.device(self.torch_device):
            x, weight = torch.randn(size, size), torch.randn(size, size)
            large, small = torch.zeros(2**24), torch.zeros(16)
            flops_per_s = 2 * size**3 / self._time(lambda: F.linear(x, weight), 20)
            memory_bytes_per_s = large.nbytes / self._time(lambda: large * 2.0, 20)
            return flops_per_s, memory_bytes_per_s, self._time(lambda: small * 2.0, 200)

    def link_bytes_per_s(self, probe_bytes: int) -> tuple[float, float]:
        """Bytes per second to torch's current GPU and from it, as blocks are copied.

        Raises:
            RuntimeError: that much memory is not free.
        """
        here, there = self.host_memory(probe_bytes), self.empty(probe_bytes)
        to_gpu_s = self._time(lambda: self.copy_(there, here), 5)
        from_gpu_s = self._time(lambda: self.copy_(here, there), 5)
        return probe_bytes / to_gpu_s, probe_bytes / from_gpu_s

    def _time(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds of one of `repeats` calls given to the GPU in a row; the best of three such rows."""
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / repeats)
        return min(times)


if TYPE_CHECKING:
    _is_a_target: Target = CudaTarget()
