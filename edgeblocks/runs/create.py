"""How a run directory comes to be: laid out, and made valid by its manifest once its blocks exist."""

import contextlib
import hashlib
import platform
import re
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from edgeblocks.config import Settings
from edgeblocks.data.tokenizer import TOKENIZER_FILE, Tokenizer
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.families.base import DataInfo
from edgeblocks.offload.block_files import storage_error
from edgeblocks.offload.sections import init_section_
from edgeblocks.runs.directory import RUN_FORMAT_VERSION, RunDirectory, remove_leftovers, write_text
from edgeblocks.runs.load_weights import InitialWeights
from edgeblocks.runs.schema import InitFields, read_json
from edgeblocks.runs.written_plan import WrittenPlan
from edgeblocks.seeds import generator_at


def create_run(
    path: Path,
    settings: Settings,
    plan: WrittenPlan,
    data: DataInfo,
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
        run.write_json("env.json", {"run_id": run.run_id, **environment()})  # first: it says whose the blocks are
        run.blocks_folder.mkdir(parents=True, exist_ok=True)
        for stale in run.blocks_folder.glob("block_*.safetensors"):
            stale.unlink()
    except OSError as error:
        raise storage_error("cannot create the run directory", path, error) from error
    remove_leftovers(run)
    run.save_settings()
    run.write_json("plan.json", plan.to_json())
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


def seal_run(run: RunDirectory) -> None:
    """Write the manifest: from now on the directory is a run that can be resumed."""
    known = {name: value for name, value in asdict(run.data).items() if value is not None}
    data = {**known, "source": run.data_source, "fingerprint": run.data_fingerprint}
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


def environment() -> dict[str, object]:
    """Versions and machine, so that a result can be reproduced."""

    packages = ("edgeblocks", "torch", "numpy", "safetensors")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def create_blocks(
    run: RunDirectory,
    *,
    only: Sequence[int] | None = None,
    initial: InitialWeights | None = None,
    on_block: Callable[[int], None] | None = None,
) -> None:
    """Initialise a run's blocks (all, or `only` these) one at a time and write each to its file.

    What `initial` does not give comes from the block's own seed. A block that is made again and trained again gets the
    weights it had: its numbers depend on no other block.
    """
    family, store, sections, seed = run.family(), run.store(), run.sections, run.settings.run.seed
    buffer = store.buffer()
    for done, block in enumerate(range(len(sections)) if only is None else only):
        buffer.adopt_(store.layouts[block])
        for part in buffer.parts:
            buffer.part_bytes(part).zero_()
        if initial is None or not initial.cover(block, (name for name, _ in buffer.tensors("weights"))):
            init_section_(family, sections[block], buffer.tensors("weights"), generator_at(seed, "init", block))
        if initial is not None:
            initial.fill_(block, buffer.tensors("weights"))
        buffer.flat("ema").copy_(buffer.flat("weights"))
        store.write(block, buffer, step=0)
        if on_block is not None:
            on_block(done + 1)
