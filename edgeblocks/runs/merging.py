"""A fine-tuned model as a folder like the one that it was made of: the same files, the trained tensors in their places.

The folder's files are copied first, so that what was not trained is the same byte for byte. Then the trained tensors
are written over those of the copy, one stage in memory at a time, rounded to the type that the file has them in.
"""

import json
import shutil
from pathlib import Path
from typing import TypedDict

import torch

from edgeblocks.errors import ConfigError, RunError, StorageError
from edgeblocks.files.durable import sync, write_atomically
from edgeblocks.files.tensor_file import encode_header, overwrite, table_of
from edgeblocks.offload.block_buffer import bytes_of
from edgeblocks.pretrained.decoder import Decoder
from edgeblocks.pretrained.lora import PEFT_PREFIX, LoraDecoder, peft_targets
from edgeblocks.pretrained.model_folder import INDEX, TOKENIZER, ModelFolder, model_folder
from edgeblocks.pretrained.named_tensors import in_spans
from edgeblocks.pretrained.vision import Vision
from edgeblocks.pretrained.vision_lora import VisionLora
from edgeblocks.pretrained.writing import tokenizer_of
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.merging_classifier import write_classifier
from edgeblocks.runs.save_weights import check_finite, check_memory, part_of, read_weights
from edgeblocks.runs.trained_tensors import trained_tensors
from edgeblocks.units import format_bytes

_OTHER_WEIGHTS = (".gguf", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack")
"""Files beside the tensors that hold the model's weights as they were: a copy would be another model's."""


class Merged(TypedDict):
    """What was written."""

    path: str
    trained: int
    untouched: int
    files: list[str]
    left_out: list[str]


def merge_model(run: RunDirectory, out: Path, *, last: bool, mem_budget: str | None = None) -> Merged:
    """Write the fine-tuned model into a new folder, which whatever loads the model's own folder can load.

    Args:
        last: the weights as the last step left them, without the average.
        mem_budget: what the process may take of memory; None does not bound it.

    Raises:
        ConfigError: the run is no fine-tuned model, or there is something at `out`.
        DoesNotFitError: it takes more than `mem_budget`.
        RunError: a stage is damaged or holds values that are no numbers, or the model's folder, or its tokenizer, is
            another one now.
        StorageError: the disk refused.
    """
    if not run.family().only_exact:
        raise ConfigError(
            f"{run.path} is of the family {run.settings.run.family}, and no model of a folder; edgeblocks weights "
            f"writes its weights as one file"
        )
    _check_new(out)
    source = model_folder(run.settings.family.model)
    check_same_model(run, source)
    check_same_tokenizer(run, source)
    part = part_of(last)
    check_memory(run, part, mem_budget)
    arriving = out.with_name(f"{out.name}.arriving")
    try:
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir(parents=True)
        if isinstance(run.family(), Vision):
            copied, left_out = _copied(source, arriving, weights=False)
            trained, untouched = write_classifier(run, source, arriving, last=last)
            copied = sorted({*copied, *(path.name for path in arriving.iterdir())})
        else:
            copied, left_out = _copied(source, arriving)
            trained = _write_trained(run, source, arriving, last=last)
            untouched = len(source.tensors) - trained
        for path in arriving.iterdir():
            sync(path)
        if out.exists():
            out.rmdir()
        arriving.rename(out)
        sync(out.parent)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}; choose another place with -o") from error
    finally:
        shutil.rmtree(arriving, ignore_errors=True)
    return {
        "path": str(out),
        "trained": trained,
        "untouched": untouched,
        "files": copied,
        "left_out": left_out,
    }


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"-o {out}: there is something already; name a new folder")


def check_same_model(run: RunDirectory, source: ModelFolder) -> None:
    """That the model's folder holds what the run was begun with: tensors that are not trained are read from there.

    Raises:
        RunError: it holds another model.
    """
    if run.init is None:
        return
    try:
        is_same = source.num_bytes == run.init.bytes and source.sha256() == run.init.sha256
    except OSError as error:
        raise RunError(f"cannot read {source.path}: {error.strerror or error}") from error
    if not is_same:
        raise RunError(
            f"{source.path} is not the model that {run.path} was begun with ({format_bytes(run.init.bytes)}, sha256 "
            f"{run.init.sha256[:16]}..), and holds the tensors that are not trained; put that back in its place"
        )


def check_same_tokenizer(run: RunDirectory, source: ModelFolder) -> None:
    """That the model's folder has the tokenizer that the run was trained with.

    Raises:
        RunError: it has another one.
        DataError: it has none that can be read.
    """
    if run.tokenizer is None:
        return
    found = tokenizer_of(source)
    if found.to_json() != run.tokenizer.to_json():
        raise RunError(
            f"{source.path / TOKENIZER} ({found.vocabulary:,} tokens) is not the tokenizer that {run.path} was trained "
            f"with ({run.tokenizer.vocabulary:,} tokens), and would read its tokens as other text; put that back in "
            f"its place"
        )


def _copied(source: ModelFolder, into: Path, *, weights: bool = True) -> tuple[list[str], list[str]]:
    """Copy the folder's files, with or without those of tensors; names of those that were copied, and that were not."""
    copied, left_out = [], []
    shards = {file.path.name for file in source.files}
    for path in sorted(source.path.iterdir()):
        if not weights and path.name in {*shards, INDEX}:
            continue
        is_weights = path.suffix in _OTHER_WEIGHTS or (path.suffix == ".safetensors" and path.name not in shards)
        if path.is_file() and not is_weights:
            shutil.copyfile(path, into / path.name)
            copied.append(path.name)
        elif not path.name.startswith("."):
            left_out.append(path.name)
    return copied, left_out


def _write_trained(run: RunDirectory, source: ModelFolder, into: Path, *, last: bool) -> int:
    """Write trained tensors over those of the copy; the number of tensors in the files."""
    family, written = run.family(), set[str]()
    assert isinstance(family, Decoder)
    stored = family.shell("meta").stored
    for name, values in trained_tensors(run, last=last):
        for span, flat in in_spans(stored.tensors[name], values):
            with (into / source.file_of(span.stored).path.name).open("r+b") as file:
                overwrite(file, source.tensors[span.stored], span.start, flat)
            written.add(span.stored)
    return len(written)


def write_adapter(run: RunDirectory, out: Path, *, last: bool) -> Merged:
    """Write what was trained beside a model into a new folder, as the library PEFT has it.

    Raises:
        ConfigError: the run has no adapter, or there is something at `out`.
        RunError: the block is damaged or holds values that are no numbers.
        StorageError: the disk refused.
    """
    family = run.family()
    if not isinstance(family, LoraDecoder | VisionLora):
        raise ConfigError(f"{run.path} was not trained with --tune lora, so there is no adapter; leave --adapter out")
    _check_new(out)
    part = part_of(last)
    (buffer,) = list(read_weights(run, last=last))
    check_finite(run, 0, buffer, part)
    named = [(family.name_in_file(run.tensor_name(0, own)), values) for own, values in buffer.tensors(part)]
    named = [(name if name.startswith(PEFT_PREFIX) else f"{PEFT_PREFIX}{name}", values) for name, values in named]
    header = encode_header(table_of((name, torch.float32, values.shape) for name, values in named), {"format": "pt"})
    pieces: list[bytes | memoryview] = [header]
    pieces += [bytes_of(values.float().contiguous().view(-1).view(torch.uint8)) for _, values in named]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "adapter_model.safetensors", pieces)
        write_atomically(out / "adapter_config.json", [json.dumps(_adapter_config(family), indent=2).encode()])
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}; choose another place with -o") from error
    files = ["adapter_config.json", "adapter_model.safetensors"]
    return {"path": str(out), "trained": len(named), "untouched": 0, "files": files, "left_out": []}


def _adapter_config(family: LoraDecoder | VisionLora) -> dict[str, object]:
    """What PEFT needs to know beside the tensors."""
    settings = family.settings
    side: int | None = None
    task: str | None = "CAUSAL_LM"
    head: str | None = None
    if isinstance(family, VisionLora):
        side, task, head = family.data.height, None, family.shell("meta").head_name
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": settings.model,
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": peft_targets(settings.model, settings.lora_targets, side, saved=head),
        "modules_to_save": None if head is None else [head],
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
