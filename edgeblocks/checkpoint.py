"""The run directory: what is in it, how a run is created in it and found again.

    config.yaml  plan.json  env.json  manifest.json  metrics.jsonl  summary.json  blocks/*.safetensors
    samples/*.png or *.txt  tokenizer.json (of a vocabulary that was trained or given)  quality.jsonl (`evaluations`)

`manifest.json` is written last when a run is created, so a directory with a manifest is whole. Each block file knows
its own step; there is no second place that could disagree with it, and so nothing to repair after a crash. While a run
with a `work_dir` is being trained its block files lie there; when it is finished they are brought home.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeblocks.config import TOKENIZERS, Settings, read_yaml, resolve_settings
from edgeblocks.data.tokenizer import TOKENIZER_FILE, Tokenizer, stored_tokenizer
from edgeblocks.durable import sync, write_atomically
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.noise import NoisePartition, partition_noise
from edgeblocks.plans import trained_stages
from edgeblocks.registry import build_family, family_type
from edgeblocks.run_files import (
    InitFields,
    QualityFields,
    RecordFields,
    TextManifestFields,
    check_checksum,
    check_config,
    check_manifest,
    check_plan,
    checked_record,
    config_with_checksum,
    is_up_to,
    read_json,
    read_records,
    with_checksum,
)
from edgeblocks.sections import Section, blocks_of, network_of, stages_of, tensor_name
from edgeblocks.store import BlockLayout, BlockStore, storage_error
from edgeblocks.untrusted import shown

RUN_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """A run on disk: its settings, its plan, its family and its block files."""

    path: Path
    run_id: str
    settings: Settings
    plan: dict[str, Any]
    data: Any
    """What the network knows of the data: the family's `data_type`."""
    data_source: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    tokenizer: Tokenizer | None = None
    """How text becomes tokens; None for a family that reads images."""
    init: InitFields | None = None
    """The file that the weights began with; None where they came from the seed."""

    @property
    def file_layers(self) -> tuple[int, ...]:
        """Layers in each block file."""
        return tuple(self.plan["layers_per_block"])

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each denoiser: of each block, or of the one that stages trained end to end make together."""
        return (sum(self.file_layers),) if self.is_exact else self.file_layers

    @property
    def sections(self) -> tuple[Section, ...]:
        """What is in each block file."""
        return (stages_of if self.is_exact else blocks_of)(self.file_layers)

    @property
    def trained(self) -> tuple[bool, ...]:
        """Of each block whether it is trained; the others are frozen."""
        return trained_stages(self.settings.run.trained_blocks, len(self.file_layers))

    def saved_steps(self, store: BlockStore) -> list[int]:
        """The step of each block as its file has it; a frozen one is what it is at every step, and counts as far as the
        least of the others.

        Raises:
            RunError: a file is missing or damaged.
        """
        steps = [store.header(block).step for block in range(len(self.file_layers))]
        least = min(step for step, trained in zip(steps, self.trained, strict=True) if trained)
        return [step if trained else least for step, trained in zip(steps, self.trained, strict=True)]

    @property
    def is_exact(self) -> bool:
        """Whether the block files hold stages of one network."""
        return self.settings.run.method == "exact"

    def tensor_name(self, block: int, name: str) -> str:
        """What a block's parameter is called in a file of all weights."""
        return tensor_name(block, name, self.file_layers, end_to_end=self.is_exact)

    @property
    def partition(self) -> NoisePartition:
        run = self.settings.run
        return partition_noise(
            self.family().noise, num_blocks=len(self.layers), kind=run.partition, overlap=run.overlap
        )

    def family(self) -> Any:
        run = self.settings.run
        return build_family(run.family, asdict(self.settings.family), asdict(self.data), run.method)

    def store(self) -> BlockStore:
        """The block files of this run."""
        import torch

        family, layouts = self.family(), {}
        kinds = list(zip(self.sections, self.trained, strict=True))
        for section, trained in set(kinds):
            with torch.device("meta"):
                network = network_of(family, section)
            layouts[section, trained] = BlockLayout.of(network, self.settings.run.optimizer, frozen=not trained)
        of_blocks = [layouts[kind] for kind in kinds]
        return BlockStore(self.blocks_folder, of_blocks, self.run_id, trained_together=self.is_exact)

    @property
    def blocks_folder(self) -> Path:
        """Where the block files are: at home, or in a folder of this run's own in the work directory."""
        home, away = self.path / "blocks", self.away_folder
        return home if away is None or home.is_dir() else away

    @property
    def away_folder(self) -> Path | None:
        """This run's folder in its work directory."""
        work_dir = self.settings.run.work_dir
        return None if work_dir is None else Path(work_dir).expanduser() / f"edgeblocks-{self.run_id[:12]}"

    @property
    def data_settings(self) -> Settings:
        """The settings with which the data are opened: a tokenizer.json that was given is the run's own copy of it."""
        run = self.settings.run
        if self.tokenizer is None or run.tokenizer in TOKENIZERS:
            return self.settings
        return replace(self.settings, run=run.model_copy(update={"tokenizer": str(self.path / TOKENIZER_FILE)}))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(with_checksum(content), indent=1) + "\n")

    def changed(self, settings: dict[str, Any]) -> "RunDirectory":
        """The run with some of its settings changed; `save_settings` writes them down when they have proved sound.

        Raises:
            ConfigError: an impossible setting.
        """
        if not settings:
            return self
        kept = {**self.settings.run.model_dump(), **asdict(self.settings.family)}
        resolved = resolve_settings(
            settings,
            family_settings=lambda name: family_type(name).settings_type,
            config={name: value for name, value in kept.items() if name not in settings},
        )
        return replace(self, settings=resolved.with_whole_paths())

    def save_settings(self) -> None:
        write_text(self.path / "config.yaml", config_with_checksum(self.settings.to_yaml()))

    def forget_summary(self) -> None:
        """The run is not finished any more, and its blocks may be made again where there is no folder of them.

        Raises:
            StorageError: the disk refused.
        """
        try:
            (self.path / "summary.json").unlink(missing_ok=True)
            self.blocks_folder.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error("cannot make blocks again in", self.path, error) from error

    def planned_again(self, plan: dict[str, Any]) -> "RunDirectory":
        """The run with another plan for the same blocks, here and in its plan.json."""
        assert plan["layers_per_block"] == list(self.file_layers)
        self.write_json("plan.json", plan)
        return replace(self, plan=plan)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl: `run_files.RecordFields` says what is in it."""
        self._append("metrics.jsonl", record)

    def append_quality(self, record: dict[str, Any]) -> None:
        """Add a line to quality.jsonl: `run_files.QualityFields` says what is in it."""
        self._append("quality.jsonl", record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        path = self.path / name
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

    def quality(self) -> list[QualityFields]:
        """The records of quality.jsonl; none where the quality was not measured on the way."""
        path = self.path / "quality.jsonl"
        found = (checked_record(QualityFields, content) for content in read_records(path)) if path.exists() else ()
        return [record for record in found if record is not None]

    def records(self) -> Iterator[RecordFields]:
        """The same, checked; what is no record of a step is passed over."""
        for content in self.metrics():
            record = checked_record(RecordFields, content)
            if record is not None:
                yield record

    def trained_s(self) -> float | None:
        """How long the run has been trained, as its records tell; None where one of them does not."""
        longest = 0.0
        for record in self.records():
            if record.seconds is None:
                return None
            longest = max(longest, record.seconds)
        return longest

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
    data: Any,
    *,
    data_source: str,
    data_fingerprint: str,
    class_names: tuple[str, ...],
    tokenizer: Tokenizer | None = None,
    init: InitFields | None = None,
) -> RunDirectory:
    """Lay out a new run directory; `seal_run` makes it valid once its blocks exist.

    What a process left that was killed while it created a run here is used again or removed.

    Raises:
        ConfigError: there is a run already.
        StorageError: the disk refused.
    """
    check_free(path)
    run = RunDirectory(
        path=path,
        run_id=_unfinished_id(path) or uuid.uuid4().hex,
        settings=settings,
        plan=plan,
        data=data,
        data_source=data_source,
        data_fingerprint=data_fingerprint,
        class_names=class_names,
        tokenizer=tokenizer,
        init=init,
    )
    if settings.run.work_dir is not None and (path / "blocks").exists():
        raise ConfigError(f"{path} has a folder `blocks` already, which --work-dir replaces; choose another --out")
    try:
        (path / "samples").mkdir(parents=True, exist_ok=True)
        run.write_json("env.json", {"run_id": run.run_id, **environment()})  # first: it tells whose the blocks are
        run.blocks_folder.mkdir(parents=True, exist_ok=True)
        for stale in run.blocks_folder.glob("block_*.safetensors"):
            stale.unlink()
    except OSError as error:
        raise storage_error("cannot create the run directory", path, error) from error
    remove_leftovers(run)
    run.save_settings()
    run.write_json("plan.json", plan)
    if tokenizer is not None and (definition := tokenizer.to_json()) is not None:
        write_text(path / TOKENIZER_FILE, definition)
    return run


def check_free(path: Path) -> None:
    """That a new run may be created in a directory.

    Raises:
        ConfigError: there is a run already, or what was one before it lost its manifest.
    """
    if (path / "manifest.json").exists():
        raise ConfigError(f"{path} holds a run already; go on with --resume {path}, or choose another --out")
    if (path / "metrics.jsonl").exists():  # which is written when the manifest exists
        raise ConfigError(
            f"{path} holds trained blocks, but no manifest.json; put that file back from a copy and go on with "
            f"--resume {path}, or choose another --out"
        )


def _unfinished_id(path: Path) -> str | None:
    """The identity of a run whose creation was interrupted: its folder in a work directory is used again."""
    with contextlib.suppress(RunError):
        run_id = read_json(path / "env.json").get("run_id")
        return run_id if isinstance(run_id, str) and re.fullmatch(r"[0-9a-f]{32}", run_id) else None
    return None


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


@contextlib.contextmanager
def locked_away(run: RunDirectory, note: Callable[[str], None]) -> Iterator[None]:
    """Keeps copies of a run directory, which name the same work directory, from using it at the same time.

    Raises:
        RunError: another process trains there.
    """
    away = run.away_folder
    if away is None or not away.is_dir():
        yield
        return
    with locked(away, note):
        yield


def remove_leftovers(run: RunDirectory) -> None:
    """Delete the temporary files that killed processes left behind. The run must be locked.

    Raises:
        StorageError: the folder cannot be written.
    """
    for folder in (run.path, run.blocks_folder, run.path / "samples"):
        for leftover in folder.glob(".*.tmp"):
            try:
                leftover.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error("cannot remove what a killed process left", leftover, error) from error


def bring_blocks_home(run: RunDirectory) -> None:
    """Move a finished run's block files from its work directory into the run directory, which is then whole.

    Raises:
        StorageError: no room; the files stay where they are and the run stays usable.
    """
    away, home = run.away_folder, run.path / "blocks"
    if away is None:
        return
    if not home.is_dir():
        arriving = run.path / "blocks.arriving"
        try:
            shutil.rmtree(arriving, ignore_errors=True)
            shutil.copytree(away, arriving, ignore=shutil.ignore_patterns("lock"))
            for path in (*arriving.iterdir(), arriving):
                sync(path)
            arriving.rename(home)
            sync(run.path)  # the name must be on the disk before the other files go
        except (OSError, shutil.Error) as error:
            shutil.rmtree(arriving, ignore_errors=True)
            cause = error if isinstance(error, OSError) else OSError(str(error))
            raise storage_error(f"cannot move the blocks from {away}, where they stay,", home, cause) from error
    shutil.rmtree(away, ignore_errors=True)


def seal_run(run: RunDirectory) -> None:
    """Write the manifest: from now on the directory is a run that can be resumed."""
    data = {**asdict(run.data), "source": run.data_source, "fingerprint": run.data_fingerprint}
    if run.tokenizer is not None:
        definition = run.tokenizer.to_json()
        digest = None if definition is None else hashlib.sha256(definition.encode()).hexdigest()
        data |= {"tokenizer": run.tokenizer.kind, "tokenizer_sha256": digest}
    run.write_json(
        "manifest.json",
        {
            "format_version": RUN_FORMAT_VERSION,
            "edgeblocks": metadata.version("edgeblocks"),
            "run_id": run.run_id,
            "family": run.settings.run.family,
            "data": data,
            "class_names": list(run.class_names),
            **({} if run.init is None else {"init": run.init.model_dump()}),
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
        trained = (path / "metrics.jsonl").exists()
        cure = "put it back from a copy" if trained else f"start a run with: edgeblocks train --out {path}"
        raise RunError(f"{path} is not a run directory: it has no manifest.json; {cure}")
    content = read_json(path / "manifest.json")
    if "files" in content:
        raise RunError(f"{path} is an exported network, not a run; use it with: edgeblocks run {path}")
    version = content.get("format_version")
    if type(version) is not int or version != RUN_FORMAT_VERSION:
        raise RunError(
            f"{path} has run format version {shown(version)}; this edgeblocks ({metadata.version('edgeblocks')}) reads "
            f"version {RUN_FORMAT_VERSION}. Use the edgeblocks that wrote it"
        )
    try:
        settings = resolve_settings(
            {}, family_settings=lambda name: family_type(name).settings_type, config=read_yaml(path / "config.yaml")
        )
        manifest = check_manifest(path / "manifest.json", content, reads=family_type(settings.run.family).reads)
        if settings.run.family != manifest.family:
            raise ConfigError(f"manifest.json is of the family {manifest.family!r}, config.yaml of another")
        data_type = family_type(manifest.family).data_type
        known = {field.name for field in fields(data_type)}
        data = data_type(**manifest.data.model_dump(include=known))
        family = build_family(manifest.family, asdict(settings.family), asdict(data), settings.run.method)
    except ConfigError as error:
        raise RunError(
            f"{path} is damaged: {error}; put config.yaml back from a copy, or train again with a new --out"
        ) from error
    run = RunDirectory(
        path=path,
        run_id=manifest.run_id,
        settings=settings,
        plan=check_plan(path / "plan.json", read_json(path / "plan.json"), num_layers=family.num_layers),
        data=data,
        data_source=manifest.data.source,
        data_fingerprint=manifest.data.fingerprint,
        class_names=tuple(manifest.class_names),
        tokenizer=_tokenizer_of(path, manifest) if isinstance(manifest, TextManifestFields) else None,
        init=manifest.init,
    )
    if max(settings.run.trained_blocks or (0,)) >= len(run.file_layers):
        raise RunError(
            f"{path} is damaged: config.yaml trains the blocks {settings.run.train_blocks} and plan.json has "
            f"{len(run.file_layers)}; put both back from a copy, or train again with a new --out"
        )
    # Checksums come last: what the other checks find they say better.
    check_checksum(path / "manifest.json", content)
    check_checksum(path / "plan.json", run.plan)
    check_config(path / "config.yaml")
    return run


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


def _tokenizer_of(path: Path, manifest: TextManifestFields) -> Tokenizer:
    data, cure = manifest.data, "put it back from a copy"
    return stored_tokenizer(
        path, data.tokenizer, definition_sha256=data.tokenizer_sha256, vocabulary=data.vocabulary, cure=cure
    )
