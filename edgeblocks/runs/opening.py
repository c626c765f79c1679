"""A run directory that exists: read, and every value of its files checked before anything is made from it."""

from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path

from edgeblocks.data.tokenizer import Tokenizer, stored_tokenizer
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.files.untrusted import shown
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.registry import build_family, family_type
from edgeblocks.runs.directory import RUN_FORMAT_VERSION, RunDirectory
from edgeblocks.runs.schema import (
    AGAIN,
    TextManifestFields,
    check_checksum,
    check_config,
    check_manifest,
    read_json,
)
from edgeblocks.runs.written_plan import check_plan
from edgeblocks.settings.reading import read_yaml, resolve_settings
from edgeblocks.terminal import command


def open_run(path: Path) -> RunDirectory:
    """A run directory that exists.

    Raises:
        RunError: not a run, damaged, or of another format version.
    """
    if not path.is_dir():
        raise RunError(f"there is no run directory {path}")
    if not (path / "manifest.json").exists():
        trained = (path / "metrics.jsonl").exists()
        cure = "put it back from a copy" if trained else f"start a run with: {command('train', '--out', path)}"
        raise RunError(f"{path} is not a run directory: it has no manifest.json; {cure}")
    content = read_json(path / "manifest.json")
    if "files" in content:
        raise RunError(f"{path} is an exported network, not a run; use it with: {command('run', path)}")
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
    plan = read_json(path / "plan.json")
    run = RunDirectory(
        path=path,
        run_id=manifest.run_id,
        settings=settings,
        plan=check_plan(path / "plan.json", plan, num_layers=family.num_layers),
        data=data,
        data_source=manifest.data.source,
        data_fingerprint=manifest.data.fingerprint,
        class_names=tuple(manifest.class_names),
        tokenizer=_tokenizer_of(path, manifest) if isinstance(manifest, TextManifestFields) else None,
        init=manifest.init,
        shared_by=manifest.shared_by,
        window=manifest.window,
        prolonged=tuple(manifest.prolonged),
    )
    if (run.window is not None) != run.method.grows or (
        run.window is not None and run.window.number >= len(run.plan.layers_per_block)
    ):
        raise RunError(
            f"{path} is damaged: manifest.json has the window {shown(manifest.window and manifest.window.number)} of a "
            f"network of --method {run.method.name} in {len(run.plan.layers_per_block)} parts; {AGAIN}"
        )
    if max(settings.run.trained_blocks or (0,)) >= len(run.file_layers):
        raise RunError(
            f"{path} is damaged: config.yaml trains the blocks {settings.run.train_blocks} and plan.json has "
            f"{len(run.file_layers)}; put both back from a copy, or train again with a new --out"
        )
    if any(len(one.began_at) != len(run.file_layers) for one in run.prolonged):
        raise RunError(f"{path} is damaged: manifest.json was prolonged with another number of blocks; {AGAIN}")
    # Checksums come last: what the other checks find they say better.
    check_checksum(path / "manifest.json", content)
    check_checksum(path / "plan.json", plan)
    check_config(path / "config.yaml")
    return run


def _tokenizer_of(path: Path, manifest: TextManifestFields) -> Tokenizer:
    data, cure = manifest.data, "put it back from a copy"
    return stored_tokenizer(
        path, data.tokenizer, definition_sha256=data.tokenizer_sha256, vocabulary=data.vocabulary, cure=cure
    )


def check_whole(run: RunDirectory, store: BlockStore) -> None:
    """Check that all stages of a run have made the same steps.

    Raises:
        RunError: a checkpoint was cut short while its files were put in place.
    """
    steps = set(run.saved_steps(store))
    if len(steps) > 1:
        raise RunError(
            f"the stages of {run.path} are of different steps ({', '.join(map(str, sorted(steps)))}): saving them was "
            f"cut short; {command('train', '--resume', run.path)} completes it"
        )
