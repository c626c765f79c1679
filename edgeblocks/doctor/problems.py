"""What is wrong with a machine, and the commands that mend it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from edgeblocks.doctor.findings import Budgets, Disk, Gpu, Kernel, Memory, Problem, Processor, Report
from edgeblocks.doctor.kernels import KERNELS
from edgeblocks.units import format_bytes, format_duration

_LEAST_FREE_DISK_BYTES = 5 * 10**9
_LEAST_WRITE_BYTES_PER_S = 50 * 10**6
_LEAST_AVAILABLE_BYTES = 10**9
_MOST_SYNC_S = 0.1


def find_problems(report: Report, *, nvidia_gpus: Sequence[str] = ()) -> list[Problem]:
    """What is wrong with a machine, most pressing first.

    Args:
        nvidia_gpus: those that NVIDIA's driver sees.
    """
    return [
        *_memory_problems(report.memory, report.budgets),
        *_disk_problems(report.disk),
        *_processor_problems(report.processor),
        *_library_problems(report.versions, report.kernels),
        *_gpu_problems(report.gpus, report.gpu_note, nvidia_gpus),
    ]


def _memory_problems(memory: Memory, budgets: Budgets) -> Iterator[Problem]:
    if memory.limit_bytes is not None:
        yield Problem(
            problem=f"a control group allows {format_bytes(memory.limit_bytes)} of this machine's "
            f"{format_bytes(memory.total_bytes)} ({memory.limit_file}); what passes the limit is killed, and the "
            f"page cache counts too",
            cure=f"edgeblocks train --mem-budget {budgets.half_bytes // 10**6}MB",
        )
    if memory.available_bytes < _LEAST_AVAILABLE_BYTES:
        yield Problem(
            problem=f"{format_bytes(memory.available_bytes)} of memory are free; other programs hold the rest",
            cure="ps -eo pid,rss,comm --sort=-rss | head   # then close what you do not need",
        )
    for name, letter, option, limit in (
        ("the size of a process's data", "d", "data", memory.data_limit_bytes),
        ("a process's address space", "v", "as", memory.address_limit_bytes),
    ):
        if limit is not None:
            yield _limit_problem(name, letter, option, limit)
    if memory.swap_used_bytes > max(256 * 10**6, memory.total_bytes // 50):
        free = memory.available_bytes > 1.2 * memory.swap_used_bytes
        yield Problem(
            problem=f"{format_bytes(memory.swap_used_bytes)} of swap are in use: memory was short, and a step that "
            f"waits for swap is slower by orders of magnitude",
            cure="sudo swapoff -a && sudo swapon -a"
            if free
            else "ps -eo pid,rss,comm --sort=-rss | head   # then close what you do not need",
        )


def _limit_problem(name: str, letter: str, option: str, limit: int) -> Problem:
    """A limit of `ulimit`. Its owner may raise it up to the hard limit, beyond that only root."""
    import resource

    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{option.upper()}"))[1]
    raisable = hard == resource.RLIM_INFINITY
    return Problem(
        problem=f"this shell limits {name} to {format_bytes(limit)} (ulimit -{letter})",
        cure=f"ulimit -{letter} unlimited" if raisable else f"sudo prlimit --pid $$ --{option}=unlimited:unlimited",
    )


def _disk_problems(disk: Disk) -> Iterator[Problem]:
    elsewhere = "df -hT   # then: edgeblocks doctor --work-dir DIRECTORY_ON_ANOTHER_DISK"
    if disk.is_memory:
        yield Problem(
            problem=f"{disk.folder} lies on {disk.file_system}: it is memory, and what is written there is gone "
            f"after a restart",
            cure=elsewhere,
        )
    if disk.free_bytes < _LEAST_FREE_DISK_BYTES:
        yield Problem(
            problem=f"{format_bytes(disk.free_bytes)} are free on the disk of {disk.folder}",
            cure=f"du -xh --max-depth=2 {disk.mount_point} | sort -h | tail   # then delete what you do not need",
        )
    if disk.write_bytes_per_s is not None and disk.write_bytes_per_s < _LEAST_WRITE_BYTES_PER_S:
        yield Problem(
            problem=f"{disk.folder} takes {format_bytes(disk.write_bytes_per_s)}/s: blocks wait for the disk "
            f"unless all of them stay in memory",
            cure=elsewhere,
        )
    if disk.sync_s is not None and disk.sync_s > _MOST_SYNC_S:
        yield Problem(
            problem=f"4 KiB are safe on the disk after {format_duration(disk.sync_s)}, and every save waits for it",
            cure=elsewhere,
        )
    if disk.file_limit_bytes is not None:
        yield _limit_problem("the size of a file", "f", "fsize", disk.file_limit_bytes)


def _processor_problems(processor: Processor) -> Iterator[Problem]:
    usable = processor.usable_cores
    load = processor.load_1min or 0.0
    if processor.others_share > 0.3 or load > processor.cores:
        yield Problem(
            problem=f"other programs use {processor.others_share:.0%} of the {processor.cores} cores (load average "
            f"{load:.1f}): speeds below are what they leave",
            cure="ps -eo pid,pcpu,comm --sort=-pcpu | head   # then: renice 19 -p PID, or end it",
        )
    if processor.allowed_cores < processor.cores:
        yield Problem(
            problem=f"this process may use {processor.allowed_cores} of {processor.cores} cores",
            cure=f"taskset -cp 0-{processor.cores - 1} $$",
        )
    threads = processor.omp_num_threads
    if threads is not None and threads.isdigit() and int(threads) > usable:
        yield Problem(
            problem=f"OMP_NUM_THREADS is {threads}, but {usable:g} cores can be used: threads wait for each other",
            cure=f"export OMP_NUM_THREADS={max(1, math.floor(usable))}",
        )
    elif threads is None and usable < processor.allowed_cores:
        yield Problem(
            problem=f"the container may use {usable:g} cores' time, but torch sees {processor.allowed_cores} and "
            f"starts as many threads",
            cure=f"export OMP_NUM_THREADS={max(1, math.floor(usable))}",
        )


def _library_problems(versions: Mapping[str, str | None], kernels: Sequence[Kernel]) -> Iterator[Problem]:
    for requirement in metadata.requires("edgeblocks") or []:
        needed = re.fullmatch(r"([\w.-]+)\s*((?:[<>=!~]+[\d.]+,?)+)", requirement)
        if needed is None or needed[1] not in versions:
            continue
        version, cure = versions[needed[1]], f"pip install '{requirement}'"
        if version is None:
            yield Problem(problem=f"{needed[1]} is not installed", cure=cure)
        elif not _version_fits(version, needed[2]):
            yield Problem(problem=f"{needed[1]} {version} is not {needed[2]}", cure=cure)
    for kernel in kernels:
        if kernel.works is False:
            library = KERNELS[kernel.name].library
            cure = f"pip install --upgrade --force-reinstall {library}"
            if kernel.name == "edgeblocks_adamw8bit":
                cure = "edgeblocks train --set optimizer=adamw   # and please report it"
            yield Problem(problem=f"{kernel.what} does not work: {kernel.reason}", cure=cure)


def _version_fits(version: str, bounds: str) -> bool:
    """Whether a version is within bounds such as `>=2.9,<2.14`; other kinds of bounds are left to pip.

    >>> _version_fits("2.13.0+cpu", ">=2.9,<2.14"), _version_fits("2.8.1", ">=2.9")
    (True, False)
    """
    numbers = _numbers(version.partition("+")[0])
    for bound in bounds.split(","):
        if bound.startswith(">=") and numbers < _numbers(bound[2:]):
            return False
        if bound.startswith("<") and not bound.startswith("<=") and numbers >= _numbers(bound[1:]):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _gpu_problems(gpus: Sequence[Gpu] | None, note: str | None, nvidia_gpus: Sequence[str]) -> list[Problem]:
    if gpus or not nvidia_gpus:
        return []
    return [
        Problem(
            problem=f"the driver sees {len(nvidia_gpus)} GPU ({nvidia_gpus[0]}), torch does not: {note or 'no answer'}",
            cure="pip install --upgrade --force-reinstall 'torch>=2.9,<2.14' && "
            "python -c 'import torch; print(torch.version.cuda, torch.cuda.is_available())'",
        )
    ]
