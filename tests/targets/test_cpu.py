"""The CPU target: what is measured of this machine."""

import hashlib
import time

import pytest

from edgeblocks.targets.cpu import checksum_s_per_byte


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
