"""The CPU target: the compute device's memory is the process's resident set."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from edgeblocks.errors import StorageError
from edgeblocks.layer_costs import LARGEST_HEAP_BYTES
from edgeblocks.planner import Machine

# glibc's default raises its own threshold and gives memory back at the top of the heap whenever it can: the resident
# set then depends on history. Pages of their own for all tensors over 256 KB follow the live tensors best, but fresh
# pages made a small network's step almost twice as long (143 ms against 79 ms). Hence fixed thresholds: tensors over
# 32 MB get pages of their own, smaller ones reuse the heap, which is kept.
KEPT_HEAP_BYTES = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_DISK_PROBE_BYTES = 32 * 2**20


class CpuTarget:
    """What this machine's processor, memory and disk can do."""

    name = "cpu"

    def prepare(self) -> None:
        """Settings of the process that must come before the first large allocation."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                libc = ctypes.CDLL(None)
                libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_HEAP_BYTES)
                libc.mallopt(_M_TRIM_THRESHOLD, KEPT_HEAP_BYTES)

    def give_back(self) -> None:
        """Return the heap's unused pages to the system."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)

    def total_bytes(self) -> int:
        """The machine's memory."""
        return int(psutil.virtual_memory().total)

    def available_bytes(self) -> int:
        """Memory that can be taken now without swapping."""
        return int(psutil.virtual_memory().available)

    def used_bytes(self) -> int:
        """The process's resident set now."""
        return int(psutil.Process().memory_info().rss)

    def peak_bytes(self) -> int:
        """The process's largest resident set so far: what `/usr/bin/time -v` reports."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def measure(self, folder: Path) -> Machine:
        """Speeds of this machine, and what the process occupies before any block is loaded.

        The arithmetic probe also runs every kind of kernel that training uses once, so that their code and the threads'
        scratch memory are part of `runtime_bytes`. Takes about half a second.
        """
        flops_per_s, memory_bytes_per_s, operator_s = _measure_arithmetic()
        read_bytes_per_s, write_bytes_per_s = _measure_disk(folder)
        self.give_back()
        return Machine(
            name=self.name,
            runtime_bytes=self.used_bytes(),
            flops_per_s=flops_per_s,
            memory_bytes_per_s=memory_bytes_per_s,
            operator_s=operator_s,
            disk_read_bytes_per_s=read_bytes_per_s,
            disk_write_bytes_per_s=write_bytes_per_s,
        )


def _measure_arithmetic() -> tuple[float, float, float]:
    """fp32 operations per second, bytes per second that an element-wise kernel writes, seconds of a small kernel."""
    import torch
    import torch.nn.functional as F

    # Small enough to stay below what any plan needs, large enough to keep the processor busy.
    tokens, width, hidden_width = 512, 256, 1024
    x = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(hidden_width, width, requires_grad=True)
    for _ in range(2):
        heads = x.view(4, tokens // 4, 4, width // 4).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(tokens, width)
        hidden = F.gelu(F.linear(F.layer_norm(attended + x, (width,)), weight), approximate="tanh")
        torch.addcmul(hidden, hidden, F.silu(hidden)).square().mean().backward()  # type: ignore[no-untyped-call]
    torch.special.ndtri(torch.rand(64, dtype=torch.float64))

    with torch.no_grad():
        flops_per_s = 2 * tokens * width * hidden_width / _best_time(lambda: F.linear(x, weight), 20)
        large = torch.zeros(2**20)
        memory_bytes_per_s = large.nbytes / _best_time(lambda: large * 2.0, 20)
        small = torch.zeros(16)
        operator_s = _best_time(lambda: small * 2.0, 200)
    return flops_per_s, memory_bytes_per_s, operator_s


def _best_time(call: Callable[[], object], repeats: int) -> float:
    """The shortest time of a call: what the machine can do when nobody else uses it."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _measure_disk(folder: Path) -> tuple[float, float]:
    """Bytes read and written per second in a folder, with sync. The read comes out of the page cache where it can."""
    probe = folder / f".edgeblocks-probe.{os.getpid()}"
    data = os.urandom(2**20)
    pieces = _DISK_PROBE_BYTES // len(data)
    try:
        started = time.perf_counter()
        with probe.open("wb", buffering=0) as file:
            for _ in range(pieces):
                file.write(data)
            os.fsync(file.fileno())
        write_s = time.perf_counter() - started
        buffer = bytearray(2**20)
        with probe.open("rb", buffering=0) as file:
            with contextlib.suppress(AttributeError, OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while file.readinto(buffer):
                pass
            read_s = time.perf_counter() - started
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder}: {error.strerror or error}; choose a folder with room with --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return _DISK_PROBE_BYTES / read_s, _DISK_PROBE_BYTES / write_s
