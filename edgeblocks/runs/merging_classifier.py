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

from edgeblocks.errors import ConfigError
from edgeblocks.files.tensor_file import READABLE, TensorFile, encode_header, overwrite
from edgeblocks.files.untrusted import open_regular, parse_json
from edgeblocks.pretrained.model_folder import CONFIG, SINGLE, ModelFolder
from edgeblocks.pretrained.named_tensors import in_spans
from edgeblocks.pretrained.vision import Vision
from edgeblocks.pretrained.vision_folder import PROCESSOR
from edgeblocks.pretrained.vision_shell import VisionShell
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.trained_tensors import trained_names, trained_tensors

_PIECE_BYTES = 2**21


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor of the new file. `stored` is its name in the old ones, where it was not trained; else None."""

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
    entries = _entries(run, family, source)
    table: dict[str, object] = {}
    start = 0
    for name, entry in entries.items():
        end = start + math.prod(entry.shape) * READABLE[entry.dtype].itemsize
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    path = into / SINGLE
    with path.open("wb") as file:
        file.write(encode_header(table, {"format": "pt"}))
        data_start = file.tell()
        for entry in entries.values():  # those that were not trained come first
            if entry.stored is not None:
                for piece in _bytes_of(source, entry.stored):
                    file.write(piece)
        file.truncate(data_start + start)
    there, shell = TensorFile(path).tensors, family.shell("meta")
    with path.open("r+b") as file:
        for name, values in trained_tensors(run, last=last):
            if name.startswith(f"{shell.head_name}."):  # it may be of another number of classes
                overwrite(file, there[_name_of_head(shell, name)], 0, values.reshape(-1))
                continue
            for span, flat in in_spans(shell.stored.tensors[name], values):
                overwrite(file, there[shell.name_of_classifier(span.stored)], span.start, flat)
    (into / CONFIG).write_text(json.dumps(_config(run, family, source), indent=2, ensure_ascii=False) + "\n")
    if not (into / PROCESSOR).exists():
        (into / PROCESSOR).write_text(json.dumps(family.pictures.as_processor(), indent=2) + "\n")
    count = sum(entry.stored is None for entry in entries.values())
    return count, len(entries) - count


def _entries(run: RunDirectory, family: Vision, source: ModelFolder) -> dict[str, _Entry]:
    """The new file's tensors by their names: first those that were not trained."""
    shell = family.shell("meta")
    # That of layers; of a head that is new as well.
    usual = next(one.dtype for name, one in shell.stored.tensors.items() if name.startswith(f"{shell.layers_name}."))
    trained, head = trained_names(run), f"{shell.head_name}."
    frozen = [name for name in shell.model.state_dict() if name not in trained and not name.startswith(head)]
    entries = {}
    for own in (*frozen, *trained):
        if own.startswith(head):
            former = shell.stored.tensors.get(own)
            dtype = usual if former is None else former.dtype
            entries[_name_of_head(shell, own)] = _Entry(shape=trained[own], dtype=dtype, stored=None)
            continue
        for span in shell.stored.tensors[own].spans:
            one, stored = source.tensors[span.stored], None if own in trained else span.stored
            entries[shell.name_of_classifier(span.stored)] = _Entry(shape=one.shape, dtype=one.dtype, stored=stored)
    return entries


def _name_of_head(shell: VisionShell, own: str) -> str:
    """What a tensor of the head is called in the new file: as in the old ones, where they have it."""
    stored = shell.stored.alone(own)
    return own if stored is None else shell.name_of_classifier(stored)


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
