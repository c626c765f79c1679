"""A fine-tuned image classifier as a folder: one file of tensors with the head in it, a config with the classes.

Tensors that were not trained are copied byte for byte, the trained ones are rounded to the type that the folder has
them in, one stage in memory at a time. Names are those of the folder; where its checkpoint had no classifier, with the
prefix that the classifier's class puts before them. What a classifier does not have, as a pooler or a text tower, is
left out.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgeblocks.errors import ConfigError
from edgeblocks.files.tensor_file import READABLE, TensorFile, encode_header
from edgeblocks.files.untrusted import open_regular, parse_json
from edgeblocks.pretrained.model_folder import CONFIG, SINGLE, ModelFolder
from edgeblocks.pretrained.vision import Vision
from edgeblocks.pretrained.vision_folder import PROCESSOR
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.save_weights import check_finite, part_of, read_weights

_PIECE_BYTES = 2**21


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor of the new file: its name and shape, and its name in the old files; None where that has none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str | None


def write_classifier(run: RunDirectory, source: ModelFolder, into: Path, *, last: bool) -> tuple[int, int]:
    """Write tensors and config into a folder that has copies of the other files; how many were trained, and not.

    Raises:
        RunError: a stage is damaged or holds values that are no numbers.
        OSError: the disk refused.
    """
    family = run.family()
    assert isinstance(family, Vision)
    frozen, trained = _entries(run, family, source)
    table: dict[str, object] = {}
    start = 0
    for entry in (*frozen, *trained.values()):
        end = start + math.prod(entry.shape) * READABLE[entry.dtype].itemsize
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    path = into / SINGLE
    with path.open("wb") as file:
        file.write(encode_header(table, {"format": "pt"}))
        for entry in frozen:
            assert entry.stored is not None
            for piece in _bytes_of(source, entry.stored):
                file.write(piece)
        file.truncate(
            file.tell() + sum(math.prod(one.shape) * READABLE[one.dtype].itemsize for one in trained.values())
        )
    there, part = TensorFile(path).tensors, part_of(last)
    with path.open("r+b") as file:
        for stage, buffer in enumerate(read_weights(run, last=last)):
            check_finite(run, stage, buffer, part)
            for own, values in buffer.tensors(part):
                stored = there[trained[run.tensor_name(stage, own)].name]
                file.seek(stored.start)
                for rounded in _rounded(values, READABLE[stored.dtype]):
                    file.write(memoryview(rounded.view(torch.uint8).numpy()))  # type: ignore[arg-type]  # numpy's stubs
    (into / CONFIG).write_text(json.dumps(_config(run, family, source), indent=2, ensure_ascii=False) + "\n")
    if not (into / PROCESSOR).exists():
        (into / PROCESSOR).write_text(json.dumps(family.pictures.as_processor(), indent=2) + "\n")
    return len(trained), len(frozen)


def _entries(run: RunDirectory, family: Vision, source: ModelFolder) -> tuple[list[_Entry], dict[str, _Entry]]:
    """Tensors that were not trained, and those that were by their name in the whole network."""
    shell = family.shell("meta")
    # Those of layers; of a head that is new as well.
    usual = next(
        one.dtype for name, one in source.tensors.items() if shell.renamed[name].startswith(f"{shell.layers_name}.")
    )

    def entry(own: str, shape: tuple[int, ...]) -> _Entry:
        stored = shell.file_names.get(own)
        there = None if stored is None else source.tensors[stored]
        name = own if stored is None else shell.name_of_classifier(stored)
        return _Entry(name=name, shape=shape, dtype=usual if there is None else there.dtype, stored=stored)

    trained = {}
    for stage, layout in enumerate(run.store().layouts):
        for one in layout.of_part("weights"):
            whole = run.tensor_name(stage, one.name.removeprefix("weights."))
            trained[whole] = entry(family.name_in_library(whole), tuple(one.shape))
    outside = (f"{shell.layers_name}.", f"{shell.head_name}.")
    frozen = [
        entry(own, tuple(value.shape)) for own, value in shell.model.state_dict().items() if not own.startswith(outside)
    ]
    return frozen, trained


def _config(run: RunDirectory, family: Vision, source: ModelFolder) -> dict[str, object]:
    """The folder's, as one of a classifier of the run's classes."""
    with open_regular(source.path / CONFIG) as file:
        config = parse_json(file.read().decode("utf-8", errors="replace"))
    if not isinstance(config, dict):
        raise ConfigError(f"{source.path / CONFIG} is no table; put the model's own back")
    for name in ("num_labels", "problem_type"):  # of the head that it had
        config.pop(name, None)
    return {
        **config,
        "architectures": [type(family.shell("meta").model).__name__],
        "id2label": {str(number): name for number, name in enumerate(run.class_names)},
        "label2id": {name: number for number, name in enumerate(run.class_names)},
    }


def _bytes_of(source: ModelFolder, name: str) -> Iterator[bytes]:
    stored = source.tensors[name]
    with open_regular(source.file_of(name).path) as file:
        file.seek(stored.start)
        left = stored.num_bytes
        while left:
            piece = file.read(min(left, _PIECE_BYTES))
            if not piece:
                raise OSError(None, "it has become shorter", str(source.path))
            yield piece
            left -= len(piece)


def _rounded(values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    flat, count = values.reshape(-1), _PIECE_BYTES // 4
    for start in range(0, len(flat), count):
        yield flat[start : start + count].to(dtype)
