"""How a run directory comes to be: laid out, and made valid by its manifest once its blocks exist."""

import contextlib
import hashlib
import platform
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from edgeblocks.data.tokenizer import TOKENIZER_FILE, Tokenizer
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.families.base import DataInfo
from edgeblocks.families.precision import bf16_instructions
from edgeblocks.files.own import make_folder
from edgeblocks.files.untrusted import shown
from edgeblocks.methods import METHODS, Precision
from edgeblocks.offload.block_files import BlockStore, storage_error
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.offload.sections import init_section_
from edgeblocks.optim.cuda_step import choice_on
from edgeblocks.registry import build_target
from edgeblocks.runs.directory import (
    OWN_FOLDERS,
    OWN_NAMES,
    RUN_FORMAT_VERSION,
    RunDirectory,
    remove_leftovers,
    write_text,
)
from edgeblocks.runs.load_weights import InitialWeights
from edgeblocks.runs.schema import InitFields, SharedBy, WindowFields, read_json
from edgeblocks.runs.written_plan import WrittenPlan
from edgeblocks.seeds import generator_at
from edgeblocks.settings.fields import RunSettings, Settings
from edgeblocks.terminal import quoted

_MOST_NAMED = 5


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
    shared_by: SharedBy | None = None,
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
        shared_by=shared_by,
        window=WindowFields(number=0, first_step=0) if METHODS[settings.run.method].grows else None,
    )
    if settings.run.work_dir is not None and (path / "blocks").exists():
        raise ConfigError(f"{path} has a folder `blocks` already, which --work-dir replaces; choose another --out")
    try:
        make_folder(path / "samples")
        # First: it says whose the blocks are.
        run.write_json("env.json", {"run_id": run.run_id, **environment(settings.run)})
        make_folder(run.blocks_folder)
        for stale in run.blocks_folder.glob("block_*.safetensors"):
            # Of a process that was killed before it wrote the manifest: without one there is no run that they could
            # belong to.
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
    """That a new run may be created in a directory: a new one, an empty one, or one of ours that was never finished.

    Raises:
        ConfigError: there is a run already, or what was one before it lost its manifest; or something else.
    """
    try:
        present = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        file = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be used: {error.strerror}; choose another --out") from error
    if file is not None:
        raise ConfigError(f"--out {path}: {file} is a file, not a folder; choose another --out")
    if "manifest.json" in present:
        raise ConfigError(f"{path} holds a run already; go on with --resume {quoted(path)}, or choose another --out")
    if "metrics.jsonl" in present and "env.json" in present:  # which is written when the manifest exists
        raise ConfigError(
            f"{path} holds trained blocks, but no manifest.json; put that file back from a copy and go on with "
            f"--resume {quoted(path)}, or choose another --out"
        )
    ours = {"lock", "lock.pid", "samples"} if _unfinished_id(path) is None else {*OWN_NAMES, *OWN_FOLDERS}
    others = sorted(name for name in present - ours if not re.fullmatch(r"\..*\.tmp", name))
    if others or (_unfinished_id(path) is None and _holds_anything(path / "samples")):
        named = ", ".join(others[:_MOST_NAMED] or ["samples"]) + (", .." if len(others) > _MOST_NAMED else "")
        raise ConfigError(
            f"--out {path} holds files that are not of a run ({named}), and a run's files would be mixed with them; "
            f"name a new folder, such as --out {quoted(path / 'run')}"
        )


def check_apart(path: Path, data: str) -> None:
    """Check that a new run is not among its own data, which are read again when it goes on and when it is evaluated.

    Args:
        data: as a run keeps it: the whole path of a folder, or what is none.

    Raises:
        ConfigError: it is.
    """
    source = Path(data)
    if not (source.is_absolute() and source.is_dir()):
        return
    within, folder = path.resolve(), source.resolve()
    hidden = within.is_relative_to(folder) and any(part.startswith(".") for part in within.relative_to(folder).parts)
    if within.is_relative_to(folder) and not hidden:  # what is hidden is not read
        raise ConfigError(
            f"--out {path} lies in the folder of the data, {source}: when the run goes on its own files would be read "
            f"with them; name a place outside, such as --out {quoted(folder.parent / 'run')}"
        )


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


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
            **({} if run.shared_by is None else {"shared_by": run.shared_by.model_dump()}),
            **({} if run.window is None else {"window": run.window.model_dump()}),
            **({"prolonged": [one.model_dump() for one in run.prolonged]} if run.prolonged else {}),
        },
    )


def environment(run: RunSettings) -> dict[str, object]:
    """Versions, and the machine that is here for these settings, so that a result can be reproduced."""
    device = torch.device(build_target(run.target).torch_device)
    packages, rounds = ("edgeblocks", "torch", "numpy", "safetensors"), run.master == "bf16"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": bf16_instructions(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}),
        # Asked only where it is used: to try a library takes memory that a plan without it has not counted.
        **({"adamw8bit": choice_on(device, rounds=rounds).name} if run.optimizer == "adamw8bit" else {}),
        "packages": {name: metadata.version(name) for name in packages},
    }


def changed_environment(run: RunDirectory) -> str | None:
    """What of the machine or of torch is not as it was when a run was created, of which the bits of its sums depend.

    None where nothing is, or where env.json is gone; one of an earlier edgeblocks names no instructions.
    """
    try:
        former = _sums_depend_on(read_json(run.path / "env.json"), run.precision)
    except RunError:
        return None
    found = [
        f"{what} {shown(former[what])}, now {shown(value)}"
        for what, value in _sums_depend_on(environment(run.settings.run), run.precision).items()
        if former.get(what, value) != value
    ]
    return "; ".join(found) or None


def _sums_depend_on(environment: Mapping[str, object], precision: Precision) -> dict[str, object]:
    """The entries of an env.json that decide how sums are rounded, under the names that people know."""
    packages = environment.get("packages")
    torch_version = packages.get("torch") if isinstance(packages, dict) else None
    found = {
        "the processor": environment.get("processor"),
        "its vector instructions": environment.get("instructions"),
        "its instructions for bf16": environment.get("bf16_instructions") if precision == "bf16" else None,
        "torch": torch_version,
        "the GPU": environment.get("gpu"),
        "the 8-bit AdamW step by": environment.get("adamw8bit"),
    }
    return {what: value for what, value in found.items() if value is not None}


def create_blocks(
    run: RunDirectory,
    *,
    only: Sequence[int] | None = None,
    initial: InitialWeights | None = None,
    on_block: Callable[[int], None] | None = None,
    former: BlockStore | None = None,
) -> None:
    """Initialise a run's blocks (all, or `only` these) one at a time and write each to its file.

    What `initial` does not give comes from the block's own seed. A block that is made again and trained again gets the
    weights it had: its numbers depend on no other block.

    Args:
        former: whose count of bytes written goes on.
    """
    family, store, sections, seed = run.family(), run.store(), run.sections, run.settings.run.seed
    if former is not None:
        store.continue_meter(former.header(block) for block in range(len(former.layouts)))
    buffer = store.buffer()
    # Random values are drawn in float32, and a file's values are rounded once, to the nearest.
    copy = Float32Copy(store.layouts, buffer.device) if run.master == "bf16" else None
    for done, block in enumerate(range(len(sections)) if only is None else only):
        buffer.adopt_(store.layouts[block])
        for part in buffer.parts:
            # One buffer for all blocks; moments and their scales start as zeros, which is all bits zero in every part.
            buffer.part_bytes(part).zero_()
        weights = buffer if copy is None else copy.room_for_(buffer.layout)
        if initial is None or not initial.cover(block, (name for name, _ in weights.tensors("weights"))):
            init_section_(family, sections[block], weights.tensors("weights"), generator_at(seed, "init", block))
        if initial is not None:
            initial.fill_(block, weights.tensors("weights"))
        if copy is not None:
            buffer.flat("weights").copy_(copy.flat)
        # A block that was never visited can be sampled, too.
        buffer.flat("ema").copy_(buffer.flat("weights"))
        store.write(block, buffer, step=0)
        if on_block is not None:
            on_block(done + 1)
