"""The run directory: what is in it, how a run is created in it and found again.

    config.yaml  plan.json  env.json  manifest.json  metrics.jsonl  summary.json  blocks/*.safetensors  samples/*.png

`manifest.json` is written last when a run is created, so a directory with a manifest is whole. Each block file knows
its own step; there is no second place that could disagree with it, and so nothing to repair after a crash. While a run
with a `work_dir` is being trained its block files lie there; when it is finished they are brought home.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeblocks.config import Settings, read_yaml, resolve_settings
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.families.base import ImageInfo
from edgeblocks.noise import NoisePartition, partition_noise
from edgeblocks.registry import build_family, family_type
from edgeblocks.run_files import check_manifest, check_plan, is_up_to, read_json, read_records
from edgeblocks.store import BlockLayout, BlockStore, storage_error, write_atomically
from edgeblocks.untrusted import shown

RUN_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """A run on disk: its settings, its plan, its family and its block files."""

    path: Path
    run_id: str
    settings: Settings
    plan: dict[str, Any]
    data: ImageInfo
    data_source: str
    data_fingerprint: str
    class_names: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.plan["layers_per_block"])

    @property
    def partition(self) -> NoisePartition:
        run = self.settings.run
        return partition_noise(
            self.family().noise, num_blocks=len(self.layers), kind=run.partition, overlap=run.overlap
        )

    def family(self) -> Any:
        return build_family(self.settings.run.family, asdict(self.settings.family), asdict(self.data))

    def store(self) -> BlockStore:
        """The block files of this run."""
        import torch

        family, layouts = self.family(), {}
        for num_layers in set(self.layers):
            with torch.device("meta"):
                block = family.block(num_layers=num_layers, checkpointing=False)
            layouts[num_layers] = BlockLayout.of(block, self.settings.run.optimizer)
        return BlockStore(self.blocks_folder, [layouts[count] for count in self.layers], self.run_id)

    @property
    def blocks_folder(self) -> Path:
        """Where the block files are: at home, or in a folder of this run's own in the work directory."""
        home, work_dir = self.path / "blocks", self.settings.run.work_dir
        if work_dir is None or home.is_dir():
            return home
        return Path(work_dir).expanduser() / f"edgeblocks-{self.run_id[:12]}"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def changed(self, settings: dict[str, Any]) -> "RunDirectory":
        """The run with some of its settings changed; `save_settings` writes them down when they have proved sound.

        Raises:
            ConfigError: an impossible setting.
        """
        if not settings:
            return self
        resolved = resolve_settings(
            settings,
            family_settings=lambda name: family_type(name).settings_type,
            config={**self.settings.run.model_dump(), **asdict(self.settings.family)},
        )
        return replace(self, settings=resolved)

    def save_settings(self) -> None:
        write_text(self.path / "config.yaml", self.settings.to_yaml())

    def planned_again(self, plan: dict[str, Any]) -> "RunDirectory":
        """The run with another plan for the same blocks, here and in its plan.json."""
        assert plan["layers_per_block"] == list(self.layers)
        self.write_json("plan.json", plan)
        return replace(self, plan=plan)

    def append_metrics(self, record: dict[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise storage_error("cannot write metrics", path, error) from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl; a half-written last line is passed over."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            yield from read_records(path)

    def drop_metrics_after(self, steps: list[int]) -> None:
        """Forget records of steps that a crash undid, given each block's saved step."""
        kept = (json.dumps(record) + "\n" for record in self.metrics() if is_up_to(record, steps))
        write_text(self.path / "metrics.jsonl", "".join(kept))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        StorageError: the disk refused.
    """
    try:
        write_atomically(path, [text.encode()])
    except OSError as error:
        raise storage_error("cannot write", path, error) from error


def create_run(
    path: Path,
    settings: Settings,
    plan: dict[str, Any],
    data: ImageInfo,
    *,
    data_source: str,
    data_fingerprint: str,
    class_names: tuple[str, ...],
) -> RunDirectory:
    """Lay out a new run directory; `seal_run` makes it valid once its blocks exist.

    Raises:
        ConfigError: there is a run already.
        StorageError: the disk refused.
    """
    if (path / "manifest.json").exists():
        raise ConfigError(f"{path} holds a run already; go on with --resume {path}, or choose another --out")
    run = RunDirectory(
        path=path,
        run_id=uuid.uuid4().hex,
        settings=settings,
        plan=plan,
        data=data,
        data_source=data_source,
        data_fingerprint=data_fingerprint,
        class_names=class_names,
    )
    if settings.run.work_dir is not None and (path / "blocks").exists():
        raise ConfigError(f"{path} has a folder `blocks` already, which --work-dir replaces; choose another --out")
    try:
        run.blocks_folder.mkdir(parents=True, exist_ok=True)
        (path / "samples").mkdir(parents=True, exist_ok=True)
        (path / "metrics.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise storage_error("cannot create the run directory", path, error) from error
    run.save_settings()
    run.write_json("plan.json", plan)
    run.write_json("env.json", environment())
    return run


@contextlib.contextmanager
def locked(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps a second training process out of a run directory.

    The kernel holds the lock and drops it when the process ends in whatever way, so none survives a crash or a reboot.

    Raises:
        RunError: another process trains this run.
        StorageError: the directory cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error("cannot write in the run directory", path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "an unknown process"
            raise RunError(
                f"{path} is being trained by {holder}; wait until it ends, or stop it (Ctrl-C saves), then start again"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise storage_error("cannot lock the run directory", path, error) from error
            note(f"{path} is on a file system without locks: take care that only one process trains this run")
        with contextlib.suppress(OSError):  # the text is for people; a full disk must not stop a run here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(run: RunDirectory) -> None:
    """Delete the temporary files that killed processes left behind. The run must be locked."""
    for folder in (run.path, run.blocks_folder, run.path / "samples"):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def bring_blocks_home(run: RunDirectory) -> None:
    """Move a finished run's block files from its work directory into the run directory, which is then whole.

    Raises:
        StorageError: no room; the files stay where they are and the run stays usable.
    """
    source, home = run.blocks_folder, run.path / "blocks"
    if source == home:
        return
    arriving = run.path / "blocks.arriving"
    try:
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.copytree(source, arriving)
        for file in arriving.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        arriving.rename(home)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(arriving, ignore_errors=True)
        cause = error if isinstance(error, OSError) else OSError(str(error))
        raise storage_error(f"cannot move the blocks from {source}, where they stay,", home, cause) from error
    shutil.rmtree(source, ignore_errors=True)


def seal_run(run: RunDirectory) -> None:
    """Write the manifest: from now on the directory is a run that can be resumed."""
    run.write_json(
        "manifest.json",
        {
            "format_version": RUN_FORMAT_VERSION,
            "edgeblocks": metadata.version("edgeblocks"),
            "run_id": run.run_id,
            "family": run.settings.run.family,
            "data": {**asdict(run.data), "source": run.data_source, "fingerprint": run.data_fingerprint},
            "class_names": list(run.class_names),
        },
    )


def open_run(path: Path) -> RunDirectory:
    """A run directory that exists.

    Raises:
        RunError: not a run, damaged, or of another format version.
    """
    if not path.is_dir():
        raise RunError(f"there is no run directory {path}")
    if not (path / "manifest.json").exists():
        raise RunError(
            f"{path} is not a run directory: it has no manifest.json; start one with: edgeblocks train --out {path}"
        )
    content = read_json(path / "manifest.json")
    version = content.get("format_version")
    if type(version) is not int or version != RUN_FORMAT_VERSION:
        raise RunError(
            f"{path} has run format version {shown(version)}; this edgeblocks ({metadata.version('edgeblocks')}) reads "
            f"version {RUN_FORMAT_VERSION}. Use the edgeblocks that wrote it"
        )
    manifest = check_manifest(path / "manifest.json", content)
    try:
        settings = resolve_settings(
            {}, family_settings=lambda name: family_type(name).settings_type, config=read_yaml(path / "config.yaml")
        )
        if settings.run.family != manifest.family:
            raise ConfigError(f"manifest.json is of the family {manifest.family!r}, config.yaml of another")
        data = ImageInfo(**manifest.data.model_dump(exclude={"source", "fingerprint"}))
        family = build_family(manifest.family, asdict(settings.family), asdict(data))
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return RunDirectory(
        path=path,
        run_id=manifest.run_id,
        settings=settings,
        plan=check_plan(path / "plan.json", read_json(path / "plan.json"), num_layers=family.num_layers),
        data=data,
        data_source=manifest.data.source,
        data_fingerprint=manifest.data.fingerprint,
        class_names=tuple(manifest.class_names),
    )


def environment() -> dict[str, Any]:
    """Versions and machine, so that a result can be reproduced."""
    import torch

    packages = ("edgeblocks", "torch", "numpy", "safetensors")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in packages},
    }
