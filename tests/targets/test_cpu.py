"""The CPU target: what is measured of this machine."""

import hashlib
import sys
import time

import pytest
from support.outside import measured_script

from edgeblocks.targets.cpu import checksum_s_per_byte

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's allocator is another one")


def test_the_speed_of_checksums_is_measured():
    """Seconds a byte of SHA-256, up to a factor of ten, which a busy machine needs."""
    data = bytes(2**22)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    here = (time.perf_counter() - started) / len(data)
    assert here / 10 < checksum_s_per_byte() < here * 10


@pytest.mark.usefixtures("one_thread")
def test_the_machine_that_is_planned_with_has_it(tmp_path):
    """Planning counts what checksums of block files take: the measured machine tells their speed."""
    from edgeblocks.targets.cpu import CpuTarget

    assert CpuTarget().measure(tmp_path).checksum_s_per_byte > 0


_FREED = """
import sys
from edgeblocks.registry import build_target
target = build_target("cpu")
target.prepare()
target.keep_heap(largest_bytes=int(sys.argv[1]))
import torch
before = target.used_bytes()
first, above = torch.ones(2_000_000), torch.ones(1_000)  # 8 MB, and what keeps the heap from shrinking
del first
print(target.used_bytes() - before)
"""


@linux
def test_memory_of_larger_tensors_is_given_back_with_them(tmp_path):
    """And that of smaller ones stays in the heap."""
    own_pages, heap = (int(measured_script(_FREED, size, cwd=tmp_path)["out"]) for size in (4_000_000, 32_000_000))
    assert own_pages < 4_000_000 < heap
