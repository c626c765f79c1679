"""The CPU target: the compute device's memory is the process's resident set."""

import contextlib
import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import psutil

from edgeblocks.files.cgroups import memory_limit_bytes
from edgeblocks.methods import Precision
from edgeblocks.planning.layer_costs import LARGEST_HEAP_BYTES
from edgeblocks.planning.plans import Machine
from edgeblocks.targets.disk import DiskSpeed, measure_disk

if TYPE_CHECKING:
    from edgeblocks.offload.device import Target

# glibc's default raises its own threshold and gives memory back at the top of the heap whenever it can: the resident
# set then depends on history. Pages of their own for all tensors over 256 KB follow the live tensors best, but fresh
# pages made a small network's step almost twice as long (143 ms against 79 ms). Hence fixed thresholds: tensors over
# 32 MB get pages of their own, smaller ones reuse the heap, which is kept.
KEPT_HEAP_BYTES = 2**30
_OWN_PAGES_BYTES = 2**18
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_FILE_PAGES_TO_COME_BYTES = 8_000_000
"""Code of libraries that is touched for the first time after the cap is set, measured 2 to 6 MB."""
DISK_PROBE_BYTES = 32 * 2**20


def _keep_heap(*, largest_bytes: int, kept_bytes: int) -> None:
    """Take smaller memory from the heap, of which so much is kept, and larger memory from the system (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, largest_bytes)
            libc.mallopt(_M_TRIM_THRESHOLD, kept_bytes)


class CpuTarget:
    """What this machine's processor, memory and disk can do."""

    name = "cpu"
    torch_device = "cpu"
    device = None
    """There is none with memory of its own."""
    _largest_heap_bytes = LARGEST_HEAP_BYTES

    def half_precision(self) -> Precision | None:
        """Only a measurement tells: processors without instructions for it emulate it."""
        return None

    def prepare(self) -> None:
        """Settings of the process that must come before the first large allocation."""
        self.keep_heap(largest_bytes=LARGEST_HEAP_BYTES)

    def keep_heap(self, *, largest_bytes: int) -> None:
        """Take tensors of fewer bytes from the heap, which keeps what they leave; larger ones get pages of their own,
        which are given back with them."""
        self._largest_heap_bytes = largest_bytes
        _keep_heap(largest_bytes=largest_bytes, kept_bytes=KEPT_HEAP_BYTES)

    @contextlib.contextmanager
    def without_gaps(self) -> Iterator[None]:
        """Inside, tensors of more than 256 KB get pages of their own, which are given back with them."""
        self.give_back()
        _keep_heap(largest_bytes=_OWN_PAGES_BYTES, kept_bytes=KEPT_HEAP_BYTES)
        try:
            yield
        finally:
            self.keep_heap(largest_bytes=self._largest_heap_bytes)

    def give_back(self) -> None:
        """Return the heap's unused pages to the system."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)

    def total_bytes(self) -> int:
        """The machine's memory, or what a control group (a container) allows of it."""
        total = int(psutil.virtual_memory().total)
        return min(total, memory_limit_bytes() or total)

    def available_bytes(self) -> int:
        """Memory that can be taken now without swapping."""
        return int(psutil.virtual_memory().available)

    def used_bytes(self) -> int:
        """The process's resident set now."""
        with contextlib.suppress(OSError):  # asked before every step: one read of the kernel, 20 us
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return int(psutil.Process().memory_info().rss)

    def live_bytes(self) -> int:
        """The resident set without heap pages that are free for the next allocation."""
        return self.used_bytes() - _free_heap_bytes()

    @property
    def has_cap(self) -> bool:
        """Whether `capped` bounds anything here."""
        return _limits() is not None

    @contextlib.contextmanager
    def capped(self, budget_bytes: int, *, untouched_bytes: int = 0) -> Iterator[None]:
        """Let the system refuse memory that would carry the resident set past the budget (Linux; elsewhere no cap).

        RLIMIT_DATA counts private writable memory whether touched or not, and no file pages; the budget bounds what is
        resident. Hence: budget - resident file pages (and those to come) + what is counted and will never be touched,
        such as the rest of thread stacks. Buffers must have been touched before, and threads started.
        """
        resource = _limits()
        if resource is None:
            yield
            return
        former = resource.getrlimit(resource.RLIMIT_DATA)
        status = _process_status()
        untouched = untouched_bytes + max(0, status["VmData"] - status["RssAnon"] - _untouched_heap_bytes())
        cap = budget_bytes - status["RssFile"] - _FILE_PAGES_TO_COME_BYTES + untouched
        most = min((size for size in former if size != resource.RLIM_INFINITY), default=cap)
        resource.setrlimit(resource.RLIMIT_DATA, (max(min(cap, most), 0), former[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, former)

    def peak_bytes(self) -> int:
        """The process's largest resident set so far: what `/usr/bin/time -v` reports."""
        with contextlib.suppress(OSError):
            return _process_status()["VmHWM"]
        try:
            import resource
        except ImportError:  # Windows
            memory = psutil.Process().memory_info()
            return int(getattr(memory, "peak_wset", memory.rss))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def host_bytes(self) -> int | None:
        """The memory beside the device's: there is none."""
        return None

    def host_used_bytes(self) -> int:
        return self.used_bytes()

    def host_peak_bytes(self) -> int:
        return self.peak_bytes()

    def warm_up(self) -> None:
        """Run every kind of kernel that training uses once, so that their code and scratch memory are resident."""
        run_every_kernel()
        self.give_back()

    def measure(self, folder: Path | None) -> Machine:
        """Speeds of this machine, and what the process occupies before any block is loaded.

        The kernels are warmed up first: their code and scratch memory are part of `runtime_bytes`. Takes about half a
        second.
        """
        flops_per_s, memory_bytes_per_s, operator_s = _measure_arithmetic()
        self.give_back()  # the disk's probe takes memory of its own
        disk = measure_disk(folder, probe_bytes=DISK_PROBE_BYTES, limit_s=3)
        self.give_back()
        return Machine(
            name=self.name,
            runtime_bytes=self.used_bytes(),
            flops_per_s=flops_per_s,
            memory_bytes_per_s=memory_bytes_per_s,
            operator_s=operator_s,
            disk_read_bytes_per_s=disk.read_bytes_per_s,
            disk_write_bytes_per_s=disk.write_bytes_per_s,
            checksum_s_per_byte=checksum_s_per_byte(),
        )

    def examine_disk(self, folder: Path, *, probe_bytes: int, limit_s: float) -> DiskSpeed:
        """A closer look at a folder's disk than the planner's: a larger file, and how long a sync takes.

        Raises:
            StorageError: the folder cannot be written to or is full.
        """
        return measure_disk(folder, probe_bytes=probe_bytes, limit_s=limit_s, num_syncs=10)


if TYPE_CHECKING:
    _is_a_target: Target = CpuTarget()


def _limits() -> ModuleType | None:
    """The module that bounds a process's memory; None where there is none, or where it bounds addresses only."""
    if sys.platform != "linux":
        return None
    try:
        import resource
    except ImportError:
        return None
    return resource


def _process_status() -> dict[str, int]:
    """The sizes in /proc/self/status (Linux), in bytes."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if len(field) == 3 and field[2] == "kB"}


def _untouched_heap_bytes() -> int:
    """Pages of the heap that are not resident: they were given back, and the next allocations will touch them again."""
    sizes: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if inside and name in ("Size", "Rss"):
            sizes[name] = int(rest.split()[0]) * 1024
            if len(sizes) == 2:
                return sizes["Size"] - sizes["Rss"]
        inside = inside or line.endswith("[heap]")
    return 0


class _HeapFigures(ctypes.Structure):
    """glibc's `struct mallinfo2` (mallinfo(3))."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _free_heap_bytes() -> int:
    """Bytes of the heap that hold nothing and wait for the next allocation; 0 where glibc does not say."""
    if sys.platform != "linux":
        return 0
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo2.restype = _HeapFigures
    return int(mallinfo2().fordblks)


def run_every_kernel(device: str = "cpu") -> None:
    """One small step with every kind of kernel that training uses, on a torch device; some 10 MB of tensors."""
    import torch
    import torch.nn.functional as F

    tokens, width, hidden_width = 128, 256, 1024
    x = torch.randn(tokens, width, requires_grad=True, device=device)
    weight = torch.randn(hidden_width, width, requires_grad=True, device=device)
    for _ in range(2):
        heads = x.view(4, tokens // 4, 4, width // 4).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(tokens, width)
        hidden = F.gelu(F.linear(F.layer_norm(attended + x, (width,)), weight), approximate="tanh")
        torch.addcmul(hidden, hidden, F.silu(hidden)).square().mean().backward()  # type: ignore[no-untyped-call]
    torch.special.ndtri(torch.rand(64, dtype=torch.float64))
    # What is loaded at its first use, or takes scratch memory then, is refused it later, under the cap. numpy's matrix
    # product belongs to chains that write text, its random numbers to every order of examples.
    np.random.default_rng(0).standard_normal((tokens, width), dtype=np.float32) @ np.ones((width, width), np.float32)


def _measure_arithmetic() -> tuple[float, float, float]:
    """fp32 operations per second, bytes per second that an element-wise kernel writes, seconds of a small kernel."""
    import torch
    import torch.nn.functional as F

    run_every_kernel()
    # Small enough to stay below what any plan needs, large enough to keep the processor busy.
    tokens, width, hidden_width = 512, 256, 1024
    with torch.no_grad():
        x, weight = torch.randn(tokens, width), torch.randn(hidden_width, width)
        flops_per_s = 2 * tokens * width * hidden_width / _best_time(lambda: F.linear(x, weight), 20)
        large = torch.zeros(2**20)
        memory_bytes_per_s = large.nbytes / _best_time(lambda: large * 2.0, 20)
        small = torch.zeros(16)
        operator_s = _best_time(lambda: small * 2.0, 200)
    return flops_per_s, memory_bytes_per_s, operator_s


def checksum_s_per_byte() -> float:
    """Seconds a byte of SHA-256 on one thread."""
    data = bytes(2**20)
    return _best_time(lambda: hashlib.sha256(data).digest(), 10) / len(data)


def _best_time(call: Callable[[], object], repeats: int) -> float:
    """The shortest time of a call: what the machine can do when nobody else uses it."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
