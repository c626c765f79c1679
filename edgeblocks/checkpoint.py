"""The run directory: what is in it, how a run is created in it and found again.

    config.yaml  plan.json  env.json  manifest.json  metrics.jsonl  summary.json  blocks/*.safetensors  samples/*.png

`manifest.json` is written last when a run is created, so a directory with a manifest is whole. Each block file knows
its own step; there is no second place that could disagree with it, and so nothing to repair after a crash.
"""

import json
import platform
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeblocks.config import Settings, read_yaml, resolve_settings
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.families.base import ImageInfo
from edgeblocks.noise import NoisePartition, partition_noise
from edgeblocks.registry import build_family, family_type
from edgeblocks.store import BlockLayout, BlockStore, storage_error, write_atomically

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
        return BlockStore(self.path / "blocks", [layouts[count] for count in self.layers], self.run_id)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")

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
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def drop_metrics_after(self, steps: list[int]) -> None:
        """Forget records of steps that a crash undid, given each block's saved step."""
        kept = [record for record in self.metrics() if record["step"] <= steps[record["block"]]]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


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
    try:
        (path / "blocks").mkdir(parents=True, exist_ok=True)
        (path / "samples").mkdir(exist_ok=True)
        (path / "metrics.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise storage_error("cannot create the run directory", path, error) from error
    write_text(path / "config.yaml", settings.to_yaml())
    run.write_json("plan.json", plan)
    run.write_json("env.json", environment())
    return run


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
    manifest = read_json(path / "manifest.json")
    version = manifest.get("format_version")
    if version != RUN_FORMAT_VERSION:
        raise RunError(
            f"{path} has run format version {version}; this edgeblocks ({metadata.version('edgeblocks')}) reads "
            f"version {RUN_FORMAT_VERSION}. Use the edgeblocks that wrote it"
        )
    plan = read_json(path / "plan.json")
    try:
        settings = resolve_settings(
            {}, family_settings=lambda name: family_type(name).settings_type, config=read_yaml(path / "config.yaml")
        )
        described = dict(manifest["data"])
        source, fingerprint = described.pop("source"), described.pop("fingerprint")
        run = RunDirectory(
            path=path,
            run_id=manifest["run_id"],
            settings=settings,
            plan=plan,
            data=ImageInfo(**described),
            data_source=source,
            data_fingerprint=fingerprint,
            class_names=tuple(manifest["class_names"]),
        )
        if sum(run.layers) != run.family().num_layers or plan["micro_batch"] < 1 or plan["slots"] < 1:
            raise ValueError(f"its blocks have {sum(run.layers)} layers, the network {run.family().num_layers}")
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: config.yaml, plan.json and manifest.json do not agree ({error})") from error
    return run


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run directory.

    Raises:
        RunError: unreadable or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: an object is expected, found {type(content).__name__}")
    return content


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
