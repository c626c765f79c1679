"""What the system says of itself: processor, memory, disk, libraries, and the limits that bind this process."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import psutil

from edgeblocks.doctor.findings import Disk, Memory, Processor
from edgeblocks.errors import StorageError
from edgeblocks.files.cgroups import CGROUPS, OWN_GROUPS, group_folders, number_in
from edgeblocks.registry import build_target
from edgeblocks.units import format_bytes

LIBRARIES = ("edgeblocks", "torch", "numpy", "safetensors", "onnx", "onnxruntime", "bitsandbytes", "torchao")
_DISK_PROBE_BYTES = 256 * 2**20
_DISK_PIECE_BYTES = 4 * 2**20


def examine_processor(cgroups: Path = CGROUPS, own_groups: Path = OWN_GROUPS) -> Processor:
    """Takes half a second, in which it looks how busy the others are."""
    cores = os.cpu_count() or 1
    others_share = psutil.cpu_percent(interval=0.5) / 100
    return Processor(
        name=_processor_name(),
        cores=cores,
        physical_cores=psutil.cpu_count(logical=False),
        allowed_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        quota_cores=_quota_cores(cgroups, own_groups),
        load_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        others_share=others_share,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
    )


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def examine_memory(cgroups: Path = CGROUPS, own_groups: Path = OWN_GROUPS) -> Memory:
    """Memory with all limits that bind this process."""
    machine = psutil.virtual_memory()
    total_bytes, available_bytes = int(machine.total), int(machine.available)
    limit_bytes, limit_file = None, None
    for folder in group_folders("memory", cgroups, own_groups):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = number_in(folder / limit_name)
            if limit is None or limit >= total_bytes:
                continue
            # Pages of files that nobody used lately are given back at once and do not count.
            used = (number_in(folder / usage_name) or 0) - _idle_file_bytes(folder / "memory.stat")
            available_bytes = max(0, min(available_bytes, limit - max(0, used)))
            if limit_bytes is None or limit < limit_bytes:
                limit_bytes, limit_file = limit, str(folder / limit_name)
    swap = psutil.swap_memory()
    return Memory(
        total_bytes=total_bytes,
        limit_bytes=limit_bytes,
        limit_file=limit_file,
        available_bytes=available_bytes,
        swap_total_bytes=swap.total,
        swap_used_bytes=swap.used,
        data_limit_bytes=_resource_limit("RLIMIT_DATA"),
        address_limit_bytes=_resource_limit("RLIMIT_AS"),
    )


def _quota_cores(cgroups: Path, own_groups: Path) -> float | None:
    """The smallest share of processor time that control groups allow, in cores."""
    quotas = []
    for folder in group_folders("cpu", cgroups, own_groups):
        with contextlib.suppress(OSError, ValueError):  # version 2; `max 100000` is none
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        quota_us, period_us = (number_in(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota_us is not None and period_us and quota_us > 0:
            quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def _idle_file_bytes(file: Path) -> int:
    try:
        match = re.search(r"^(?:total_)?inactive_file (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def _resource_limit(name: str) -> int | None:
    """A limit of this process (`ulimit`) in bytes, None without one."""
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    limit = resource.getrlimit(getattr(resource, name))[0]
    return None if limit == resource.RLIM_INFINITY else limit


def examine_disk(folder: Path) -> Disk:
    """Room, file system and speeds of a folder's disk. Takes at most some ten seconds on a very slow one.

    Raises:
        StorageError: it cannot be written to.
    """
    usage = psutil.disk_usage(str(folder))
    mount_point, file_system = _mount(folder)
    file_limit_bytes = _resource_limit("RLIMIT_FSIZE")
    room = min(usage.free // 4, file_limit_bytes or usage.free)
    probe_bytes = min(_DISK_PROBE_BYTES, room // _DISK_PIECE_BYTES * _DISK_PIECE_BYTES)
    disk = Disk(
        folder=str(folder.resolve()),
        mount_point=mount_point,
        file_system=file_system,
        total_bytes=usage.total,
        free_bytes=usage.free,
        file_limit_bytes=file_limit_bytes,
        probe_bytes=0,
        write_bytes_per_s=None,
        read_bytes_per_s=None,
        read_way=None,
        sync_s=None,
        reason=None,
    )
    if probe_bytes == 0:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise StorageError(
                f"cannot write to {folder}: {error.strerror}; choose another folder with --work-dir"
            ) from error
        return replace(disk, reason=f"there is room for a file of {format_bytes(room)} only, too small to measure with")
    speed = build_target("cpu").examine_disk(folder, probe_bytes=probe_bytes, limit_s=2.5)
    cold = speed.read_way != "page cache"
    return replace(
        disk,
        probe_bytes=speed.probe_bytes,
        write_bytes_per_s=speed.write_bytes_per_s,
        read_bytes_per_s=speed.read_bytes_per_s if cold else None,
        read_way=speed.read_way if cold else None,
        sync_s=speed.sync_s,
        reason=None if cold else "this system has no way to read past its page cache",
    )


def _mount(folder: Path) -> tuple[str, str]:
    """Mount point and file system of a folder; the last mount on a point is the one that is seen."""
    path = folder.resolve()
    found = ("unknown", "unknown")
    for part in psutil.disk_partitions(all=True):
        if path.is_relative_to(part.mountpoint) and (
            found[0] == "unknown" or len(Path(part.mountpoint).parts) >= len(Path(found[0]).parts)
        ):
            found = (part.mountpoint, part.fstype)
    return found


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and the libraries, None when not installed. Imports none of them."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def nvidia_gpus() -> tuple[str, ...]:
    """The GPUs that NVIDIA's driver sees; () without driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line for line in done.stdout.splitlines() if line.startswith("GPU ")) if done.returncode == 0 else ()
