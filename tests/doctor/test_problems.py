"""What `edgeblocks doctor` calls a problem, each with its cure."""

from dataclasses import replace

import pytest
from support.made_up_machine import GB, healthy, with_part

from edgeblocks.doctor import problems


def test_a_healthy_machine_has_no_problems():
    """Nothing is called a problem without need."""
    assert problems.find_problems(healthy()) == []


PROBLEMS = {
    "container": (
        "memory",
        {"limit_bytes": 2 * GB, "limit_file": "/sys/fs/cgroup/memory.max"},
        "a control group allows 2 GB of this machine's 16 GB",
        "edgeblocks train --mem-budget 8000MB",
    ),
    "little free memory": ("memory", {"available_bytes": 500_000_000}, "500 MB of memory are free", "ps -eo pid,rss"),
    "ulimit -d": ("memory", {"data_limit_bytes": GB}, "a process's data to 1 GB (ulimit -d)", "data=unlimited|-d unl"),
    "ulimit -v": ("memory", {"address_limit_bytes": GB}, "address space to 1 GB (ulimit -v)", "as=unlimited|-v unl"),
    "swap in use": ("memory", {"swap_used_bytes": GB}, "1 GB of swap are in use", "sudo swapoff -a && sudo swapon -a"),
    "swap that does not fit": (
        "memory",
        {"swap_used_bytes": 2 * GB, "available_bytes": 2 * GB},
        "2 GB of swap are in use",
        "ps -eo pid,rss",
    ),
    "work directory in memory": ("disk", {"file_system": "tmpfs"}, "/data lies on tmpfs: it is memory", "df -hT"),
    "full disk": ("disk", {"free_bytes": 2 * GB}, "2 GB are free on the disk of /data", "du -xh --max-depth=2 / "),
    "slow disk": ("disk", {"write_bytes_per_s": 20e6}, "/data takes 20 MB/s", "edgeblocks doctor --work-dir"),
    "slow sync": ("disk", {"sync_s": 0.3}, "safe on the disk after 300 ms", "edgeblocks doctor --work-dir"),
    "ulimit -f": ("disk", {"file_limit_bytes": GB}, "size of a file to 1 GB (ulimit -f)", "fsize=unlimited|-f unl"),
    "busy now": ("processor", {"others_share": 0.8}, "other programs use 80% of the 4 cores", "renice 19 -p PID"),
    "busy lately": ("processor", {"load_1min": 9.0}, "load average 9.0", "ps -eo pid,pcpu"),
    "fewer cores allowed": ("processor", {"allowed_cores": 1}, "may use 1 of 4 cores", "taskset -cp 0-3 $$"),
    "too many threads": (
        "processor",
        {"omp_num_threads": "16"},
        "OMP_NUM_THREADS is 16, but 4 cores can be used",
        "export OMP_NUM_THREADS=4",
    ),
    "quota": (
        "processor",
        {"quota_cores": 1.5},
        "may use 1.5 cores' time, but torch sees 4",
        "export OMP_NUM_THREADS=1",
    ),
}


@pytest.mark.parametrize(("part", "changes", "problem", "cure"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_comes_with_the_command_that_mends_it(part, changes, problem, cure):
    """One thing is wrong: one problem is found, with its numbers, and its cure is a command."""
    found = problems.find_problems(with_part(part, **changes))
    assert len(found) == 1
    assert problem in found[0].problem
    assert any(form in found[0].cure for form in cure.split("|"))


def test_an_old_library_is_found():
    """A version outside of what edgeblocks requires comes with the pip command for the right one."""
    report = healthy()
    found = problems.find_problems(replace(report, versions={**report.versions, "torch": "2.1.2+cu118", "onnx": None}))
    assert [item.problem.split(" is not")[0] for item in found] == ["torch 2.1.2+cu118", "onnx"]
    assert found[0].cure.startswith("pip install 'torch")
    assert ">=2.9" in found[0].cure


def test_a_broken_kernel_is_a_problem():
    """Its library is to be installed again; for edgeblocks' own optimizer there is another one."""
    broken = replace(healthy().kernels[0], works=False, reason="it crashed (SIGILL)")
    own = replace(broken, name="edgeblocks_adamw8bit", what="edgeblocks AdamW 8-bit")
    found = problems.find_problems(replace(healthy(), kernels=(broken, own)))
    assert "torch bf16 matrix product does not work: it crashed (SIGILL)" in found[0].problem
    assert found[0].cure == "pip install --upgrade --force-reinstall torch"
    assert "optimizer=adamw" in found[1].cure


def test_a_gpu_that_torch_does_not_see_is_a_problem():
    """The driver knows a GPU and torch is built without CUDA: the cure installs another torch."""
    found = problems.find_problems(healthy(), nvidia_gpus=["GPU 0: NVIDIA GeForce RTX 3060"])
    assert "the driver sees 1 GPU (GPU 0: NVIDIA GeForce RTX 3060), torch does not: torch is built" in found[0].problem
    assert "pip install" in found[0].cure
