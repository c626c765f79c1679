"""The disk as `edgeblocks doctor` measures it."""

import os
import sys
from pathlib import Path

import pytest

from edgeblocks.doctor import examination as doctor
from edgeblocks.errors import ConfigError, StorageError
from edgeblocks.registry import build_target


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


def test_a_bound_of_the_size_of_files_is_called_so(tmp_path):
    """Another folder would not help. (The signal that the system sends as well is ignored by Python.)"""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write to .*: File too large; .* ulimit -f unlimited lifts it"):
            build_target("cpu").examine_disk(tmp_path, probe_bytes=2**20, limit_s=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
