"""What `edgeblocks doctor` measures, what it calls a problem, and that nothing it meets ends it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from edgeblocks.config import preset_names
from edgeblocks.doctor import examination as doctor
from edgeblocks.doctor import probes, problems, surroundings
from edgeblocks.doctor.findings import Budgets, Disk, Gpu, Kernel, Memory, PresetFit, Processor, Report
from edgeblocks.doctor.kernels import KERNELS
from edgeblocks.errors import ConfigError, StorageError
from edgeblocks.listener import Silent
from edgeblocks.plans import Machine
from edgeblocks.registry import build_target

GB = 10**9
LIMIT_BYTES = 2 * GB
HOUR_S = 3600.0


class Stages(Silent):
    """Keeps the stages it is told of."""

    def __init__(self):
        self.seen = []

    def stage(self, text):
        self.seen.append(text)


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """A whole examination in a container of 2 GB, with time to spare: report, work directory and stages."""
    folder, cgroups = tmp_path_factory.mktemp("work"), groups(tmp_path_factory.mktemp("cgroups"))
    stages = Stages()
    return doctor.examine(folder, stages, limit_s=600, cgroups=cgroups), folder, stages.seen


def groups(folder, files=None):
    """A folder like /sys/fs/cgroup."""
    for name, content in (files or {"memory.max": LIMIT_BYTES, "memory.current": 0}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content}\n")
    return folder


def healthy():
    """A report of a machine without problems."""
    processor = Processor(
        name="a processor",
        cores=4,
        physical_cores=2,
        allowed_cores=4,
        quota_cores=None,
        load_1min=0.1,
        others_share=0.02,
        omp_num_threads=None,
    )
    memory = Memory(
        total_bytes=16 * GB,
        limit_bytes=None,
        limit_file=None,
        available_bytes=12 * GB,
        swap_total_bytes=2 * GB,
        swap_used_bytes=0,
        data_limit_bytes=None,
        address_limit_bytes=None,
    )
    disk = Disk(
        folder="/data",
        mount_point="/",
        file_system="ext4",
        total_bytes=500 * GB,
        free_bytes=200 * GB,
        file_limit_bytes=None,
        probe_bytes=2**28,
        write_bytes_per_s=400e6,
        read_bytes_per_s=900e6,
        read_way="direct",
        sync_s=0.002,
        reason=None,
    )
    kernel = Kernel(
        name="torch_bf16_matmul",
        what="torch bf16 matrix product",
        works=True,
        time_s=2e-3,
        fp32_time_s=1e-3,
        error=0.003,
        tolerance=0.02,
    )
    fit = PresetFit(
        preset="dit-tiny",
        image="8x8x1",
        parameters=3_800_000,
        smallest_bytes=318_000_000,
        budget_bytes=8 * GB,
        fits=True,
        sensible=True,
        blocks=3,
        layers_per_block=4,
        micro_batch=64,
        checkpointing=False,
        tier="ram",
        predicted_peak_bytes=500_000_000,
        disk_bytes=10**8,
        step_s=0.06,
        steps=1000,
        total_s=180.0,
    )
    return Report(
        system="Linux",
        processor=processor,
        memory=memory,
        disk=disk,
        gpus=(),
        gpu_note="torch is built without CUDA",
        machine=Machine(
            name="cpu",
            runtime_bytes=270_000_000,
            flops_per_s=2e11,
            memory_bytes_per_s=1e10,
            operator_s=2e-6,
            disk_read_bytes_per_s=1e9,
            disk_write_bytes_per_s=1e9,
        ),
        versions=surroundings.installed_versions(),
        kernels=(kernel,),
        presets=(fit,),
        budgets=Budgets(smallest_bytes=318_000_000, half_bytes=8 * GB, largest_bytes=11 * GB),
        problems=(),
        unknown={},
        seconds=12.0,
    )


def with_part(part, **changes):
    """The healthy report with a part's fields changed."""
    report = healthy()
    return replace(report, **{part: replace(getattr(report, part), **changes)})


# The whole examination.


@pytest.mark.slow
def test_the_json_has_what_was_promised(examined):
    """All findings are plain JSON values, without NaN, under the documented names."""
    found = json.loads(json.dumps(examined[0].to_json(), allow_nan=False))
    assert set(found) == {
        *("system", "processor", "memory", "disk", "gpus", "gpu_note", "machine", "versions", "kernels", "presets"),
        *("budgets", "problems", "unknown", "seconds"),
    }
    assert {"cores", "allowed_cores", "load_1min"} <= set(found["processor"])
    assert {"total_bytes", "limit_bytes", "available_bytes", "swap_used_bytes"} <= set(found["memory"])
    assert {"free_bytes", "read_bytes_per_s", "read_way", "write_bytes_per_s"} <= set(found["disk"])
    assert {"python", "edgeblocks", "torch", "onnxruntime", "bitsandbytes", "torchao"} <= set(found["versions"])
    assert all(set(item) == {"problem", "cure"} for item in found["problems"])


@pytest.mark.slow
def test_nothing_is_left_in_the_work_directory(examined):
    """The file that measured the disk is gone."""
    assert list(examined[1].iterdir()) == []


@pytest.mark.slow
def test_speeds_are_positive_and_their_way_is_told(examined):
    """Disk and processor have speeds, and the report says how the page cache was avoided."""
    report = examined[0]
    assert report.disk.write_bytes_per_s > 0
    assert report.disk.read_bytes_per_s > 0
    assert report.disk.sync_s > 0
    assert report.disk.read_way in ("direct", "cache dropped")
    assert report.machine.flops_per_s > 0
    assert report.machine.memory_bytes_per_s > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "edgeblocks_adamw8bit",
        "torch_fused_adamw",
        "bitsandbytes_adamw8bit",
        "torch_int8_linear",
        "torch_bf16_matmul",
        "onnxruntime_matmul",
        "onnxruntime_int8",
    ],
)
def test_kernels_that_are_expected_here_work(examined, name):
    """Each was run, was right within its tolerance, and has a time."""
    kernel = next(kernel for kernel in examined[0].kernels if kernel.name == name)
    assert kernel.works, kernel.reason
    assert 0 < kernel.error <= kernel.tolerance
    assert kernel.time_s > 0


@pytest.mark.slow
def test_a_library_that_is_missing_is_called_so(examined):
    """A kernel whose library is not installed is neither working nor broken, and says why."""
    missing = [kernel for kernel in examined[0].kernels if kernel.works is None]
    assert all(kernel.reason == "not installed" for kernel in missing)
    absent = {name for name, version in examined[0].versions.items() if version is None}
    assert {KERNELS[kernel.name].library for kernel in missing} <= absent


@pytest.mark.slow
def test_every_preset_is_planned_for_half_of_the_containers_memory(examined):
    """The budget is half of the container's limit; what fits stays below it, what does not says what it needs."""
    report = examined[0]
    assert {fit.preset for fit in report.presets} == set(preset_names())
    assert report.memory.limit_bytes == LIMIT_BYTES
    assert report.budgets.half_bytes == LIMIT_BYTES // 2
    for fit in report.presets:
        assert fit.reason is None
        assert fit.budget_bytes == report.budgets.half_bytes
        assert fit.fits == (fit.smallest_bytes <= fit.budget_bytes)
        if fit.fits:
            assert fit.predicted_peak_bytes <= fit.budget_bytes
            assert fit.step_s > 0
    assert report.presets[0].sensible
    assert any("a control group allows 2 GB" in item.problem for item in report.problems)


@pytest.mark.slow
def test_the_listener_hears_the_stages(examined):
    """What takes long is announced before it begins."""
    assert {"measuring the disk", "planning the presets"} <= set(examined[2])


@pytest.mark.slow
def test_the_text_of_a_real_report_names_everything(examined):
    """Each kernel, preset, library, problem and cure stands in the text."""
    report = examined[0]
    text = doctor.report_text(report)
    for words in (
        *(kernel.what for kernel in report.kernels),
        *(fit.preset for fit in report.presets),
        *report.versions,
        *(item.problem for item in report.problems),
        *(item.cure for item in report.problems),
    ):
        assert words in text


# The disk.


def test_a_folder_that_is_missing_is_named(tmp_path):
    """The error names the folder and how to create it."""
    with pytest.raises(ConfigError, match=r"--work-dir .*nowhere does not exist; create it with: mkdir -p .*nowhere"):
        doctor.examine(tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path):
    """A file as work directory is refused by name."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"file is not a directory"):
        doctor.examine(file)


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that even root cannot write to is needed: /proc")
def test_a_folder_that_cannot_be_written_to_is_named():
    """The error names the folder and the option, whether the file system has room or not."""
    with pytest.raises(StorageError, match=r"cannot write to /proc/self: .*--work-dir"):
        build_target("cpu").examine_disk(Path("/proc/self"), probe_bytes=2**20, limit_s=1)
    with pytest.raises(StorageError, match=r"cannot write to /proc/self: .*--work-dir"):
        doctor.examine(Path("/proc/self"))


def test_ctrl_c_leaves_no_file(tmp_path, monkeypatch):
    """The disk's probe has no name while it is written: whatever interrupts it, the folder is empty."""
    names = []

    def interrupt(file):
        names.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_target("cpu").examine_disk(tmp_path, probe_bytes=2**20, limit_s=1)
    assert names == []
    assert list(tmp_path.iterdir()) == []


def test_without_direct_reads_the_cache_is_dropped(tmp_path, monkeypatch):
    """Where O_DIRECT does not exist the file is read after the system forgot it, and the report says so."""
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    speed = build_target("cpu").examine_disk(tmp_path, probe_bytes=2**22, limit_s=1)
    assert speed.read_way == ("cache dropped" if hasattr(os, "posix_fadvise") else "page cache")
    assert speed.read_bytes_per_s > 0


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT here")
def test_a_file_system_that_refuses_direct_reads_is_read_all_the_same(tmp_path, monkeypatch):
    """Some open a file with O_DIRECT and then refuse to read it; then the cache is dropped instead."""
    usual = os.open

    def open_unreadably(name, flags, *mode, **at):
        return usual(name, os.O_WRONLY if flags & os.O_DIRECT else flags, *mode, **at)

    monkeypatch.setattr(os, "open", open_unreadably)
    speed = build_target("cpu").examine_disk(tmp_path, probe_bytes=2**22, limit_s=1)
    assert speed.read_way == "cache dropped"
    assert speed.read_bytes_per_s > 0


def test_a_slow_disk_gets_a_smaller_file(tmp_path):
    """Writing ends with the time, at the end of 32 MiB, not with the file's full size."""
    speed = build_target("cpu").examine_disk(tmp_path, probe_bytes=2**28, limit_s=0)
    assert speed.probe_bytes == 2**25


# Memory and cores.


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


# Child processes.


def fake_torchao(folder, monkeypatch, code):
    """A library named torchao, whose import does this."""
    (folder / "torchao").mkdir()
    (folder / "torchao" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", r"it crashed (SIGABRT)"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise SystemExit(7)", "its process ended with 7"),
        ("print('a library may print'); import os; os._exit(3)", "its process ended with 3"),
    ],
)
def test_a_library_that_breaks_is_a_result(tmp_path, monkeypatch, code, reason):
    """A crash, an exception and an exit are reasons, and the probe behind them runs all the same."""
    fake_torchao(tmp_path, monkeypatch, code)
    answers = ask("torchao_int8_linear", "onnxruntime_matmul", limit_s=60)
    assert answers["torchao_int8_linear"].failed
    assert reason in answers["torchao_int8_linear"].reason
    assert answers["onnxruntime_matmul"].value["works"]


def test_a_library_that_hangs_is_a_result(tmp_path, monkeypatch):
    """A probe without an answer ends with its time. It is not called broken: a busy machine looks the same."""
    fake_torchao(tmp_path, monkeypatch, "import time; time.sleep(600)")
    answers = ask("torchao_int8_linear", "onnxruntime_matmul", limit_s=2)
    assert "no answer within 2 s" in answers["torchao_int8_linear"].reason
    assert answers["onnxruntime_matmul"].reason == "not tried: the time was up"
    assert not any(answer.failed for answer in answers.values())


def test_nothing_begins_after_the_deadline():
    """When the time is up all answers are `not tried`."""
    answers = probes.ask(("onnxruntime_matmul",), limit_s=60, deadline=0.0)
    assert answers["onnxruntime_matmul"].reason == "not tried: the time was up"


def ask(*names, limit_s):
    return probes.ask(names, limit_s=limit_s, deadline=float("inf"))


def test_the_asking_process_stays_small():
    """The module imports neither torch nor onnxruntime."""
    code = (
        "import sys, edgeblocks.doctor.examination; sys.exit(bool({'torch', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Problems.


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


# The text.


def test_the_text_says_what_could_not_be_found_out():
    """Unknown values are question marks, and their reasons stand below."""
    report = replace(
        with_part("disk", read_bytes_per_s=None, read_way=None),
        machine=None,
        gpus=None,
        unknown={"disk.read_bytes_per_s": "this system has no way to read past its page cache", "gpus": "it crashed"},
    )
    text = doctor.report_text(report)
    assert "read ?," in text
    assert "disk.read_bytes_per_s  this system has no way" in text
    assert "gpu             not found out" in text


def test_the_text_of_a_gpu():
    """Name, memory and both directions of the link; and how to train on it."""
    gpu = Gpu(
        name="RTX 3060", total_bytes=12 * GB, free_bytes=11 * GB, to_gpu_bytes_per_s=12e9, from_gpu_bytes_per_s=None
    )
    text = doctor.report_text(replace(healthy(), gpus=(gpu,)))
    assert "RTX 3060, 11 GB free of 12 GB; 12 GB/s to it and ? from it" in text
    assert "--target cuda uses it (not yet run on a GPU)" in text


def test_the_text_of_presets_that_do_not_fit_or_take_too_long():
    """What does not fit says so, long times are days, and no preset is called sensible."""
    fit = healthy().presets[0]
    slow = replace(fit, preset="dit-b", sensible=False, steps=20000, total_s=500 * HOUR_S)
    large = PresetFit(
        preset="dit-xl",
        image="32x32x3",
        parameters=682_000_000,
        smallest_bytes=9 * GB,
        budget_bytes=8 * GB,
        fits=False,
        sensible=False,
    )
    unknown = PresetFit(preset="other", budget_bytes=8 * GB, reason="ValueError: no images")
    text = doctor.report_text(replace(healthy(), presets=(slow, large, unknown)))
    assert "20000: 21 days" in text
    assert re.search(r"9000MB +does not fit", text)
    assert "not found out: ValueError: no images" in text
    assert "no preset finishes its own steps within 7 days" in text


def test_the_versions_are_those_that_are_installed():
    """Versions come from the packages' metadata; what is not installed is None."""
    versions = surroundings.installed_versions()
    assert versions["torch"] == metadata.version("torch")
    assert set(versions) == {"python", *surroundings.LIBRARIES}
