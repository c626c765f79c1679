"""Memory and cores, as control groups allow them."""

import pytest
from support.made_up_machine import GB, LIMIT_BYTES, groups

from edgeblocks.doctor import surroundings
from edgeblocks.registry import build_target


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_control_groups_limit_is_the_real_size_of_the_memory(tmp_path, name):
    """Version 2 and version 1: the limit is found, named, and taken for the size of the memory."""
    memory = surroundings.examine_memory(groups(tmp_path, {name: LIMIT_BYTES}))
    assert memory.limit_bytes == memory.usable_bytes == LIMIT_BYTES
    assert memory.limit_file == str(tmp_path / name)
    assert memory.available_bytes <= LIMIT_BYTES


@pytest.mark.parametrize("content", ["max", 9223372036854771712])
def test_a_control_group_without_limit_changes_nothing(tmp_path, content):
    """`max`, and version 1's largest number, are no limits."""
    memory = surroundings.examine_memory(groups(tmp_path, {"memory.max": content}))
    assert memory.limit_bytes is None
    assert memory.usable_bytes == memory.total_bytes == build_target("cpu").total_bytes()


def test_the_smallest_limit_of_nested_groups_counts(tmp_path):
    """A group's parents bind it too; other processes' groups do not."""
    own = tmp_path / "own"
    own.write_text("3:cpuset:/\n0::/pod/container\n")
    top = groups(
        tmp_path / "cgroup",
        {"pod/memory.max": LIMIT_BYTES, "pod/container/memory.max": 3 * GB, "other/memory.max": 10**6},
    )
    assert surroundings.examine_memory(top, own).limit_bytes == LIMIT_BYTES


def test_memory_that_the_group_uses_is_not_available(tmp_path):
    """Available is the limit less what is used; idle file pages do not count as used."""
    files = {"memory.max": LIMIT_BYTES, "memory.current": 1_500_000_000}
    files["memory.stat"] = "anon 1000\ninactive_file 500000000\nactive_file 7"
    memory = surroundings.examine_memory(groups(tmp_path, files))
    assert memory.available_bytes == 1_000_000_000


@pytest.mark.parametrize(
    "files", [{"cpu.max": "150000 100000"}, {"cpu/cpu.cfs_quota_us": 150000, "cpu/cpu.cfs_period_us": 100000}]
)
def test_a_quota_of_processor_time_is_given_in_cores(tmp_path, files):
    """Version 2 and version 1: 150 ms of every 100 ms are one and a half cores."""
    assert surroundings.examine_processor(groups(tmp_path, files)).quota_cores == 1.5
