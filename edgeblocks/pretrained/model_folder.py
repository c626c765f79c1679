"""A model's folder as Hugging Face's libraries write it: config.json, safetensors files, tokenizer.json.

Anyone may have written it: nothing of it is executed, tables are checked before use, and tensors are read in pieces.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from edgeblocks.data.file_identity import file_identity
from edgeblocks.errors import ConfigError
from edgeblocks.files.tensor_file import READABLE, StoredTensor, TensorFile
from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json, shown
from edgeblocks.terminal import quoted

CONFIG, TOKENIZER, INDEX, SINGLE = "config.json", "tokenizer.json", "model.safetensors.index.json", "model.safetensors"
_MOST_CONFIG_BYTES = 2**24
_NO_WEIGHTS = ("I64", "BOOL")
"""Types of counters and positions, which some files have beside the weights; no quantized weights are of these."""
_QUANTIZED = "it is quantized ({kind}), which training cannot begin with; take the folder that it was made of"


class ModelFolder:
    """Config and tensors of a folder, by their names in its files."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: it is no such folder, or nothing that can be trained.
        """
        self.path = path
        self._known: dict[tuple[str, ...], str] = {}
        """The files' sha256, by what tells that they are the same."""
        self.config = _config(path)
        kind = _quantization(self.config)
        if kind is not None:
            raise ConfigError(f"{path}: {_QUANTIZED.format(kind=kind)}")
        names = _shards(path)
        self.files = [opened(path / name) for name in names]
        self.is_plan_only = not names
        """Whether it has a config alone, which is enough to plan."""
        self._file_of = {
            name: file
            for file in self.files
            for name, stored in file.tensors.items()
            if stored.dtype not in _NO_WEIGHTS
        }
        unreadable = sorted({one.dtype for one in self.tensors.values()} - READABLE.keys())
        if unreadable:
            raise ConfigError(f"{path}: {_QUANTIZED.format(kind=f'tensors of {shown(unreadable[0])}')}")

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors of numbers by their names."""
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    @property
    def num_bytes(self) -> int:
        """Of all files with tensors."""
        return sum(file.num_bytes for file in self.files)

    def file_of(self, name: str) -> TensorFile:
        """The file that has a tensor."""
        return self._file_of[name]

    def sha256(self) -> str:
        """Of the files' names and contents; they are read once in a process.

        Raises:
            OSError: one cannot be read.
        """
        identity = tuple(file_identity(file.path.stat()) for file in self.files)
        if identity not in self._known:
            together = hashlib.sha256()
            for file in self.files:
                together.update(f"{file.path.name} {file.sha256()}\n".encode())
            self._known[identity] = together.hexdigest()
        return self._known[identity]


class Table:
    """A matrix of which a plan needs the shape alone."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows by their numbers [n]: float32 [n, width] on their device."""
        assert ids.is_meta, "there is no file to read"
        return torch.empty(len(ids), self.shape[1], device="meta")

    def slices(self, device: torch.device, *, most_bytes: int) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time, float32 of at most `most_bytes`: each overwrites the former."""
        count = max(1, most_bytes // (4 * self.shape[1]))
        held = torch.empty(min(count, self.shape[0]), self.shape[1], device=device)
        for start in range(0, self.shape[0], count):
            part = held[: min(count, self.shape[0] - start)]
            self._fill_(part, start)
            yield slice(start, start + len(part)), part

    def _fill_(self, part: Tensor, start: int) -> None:
        assert part.is_meta, "there is no file to read"


class FileTable(Table):
    """A matrix that stays in its file: some rows of it at a time are read."""

    def __init__(self, file: TensorFile, name: str) -> None:
        self._path, self._stored = file.path, file.tensors[name]
        self.dtype = READABLE[self._stored.dtype]
        super().__init__(self._stored.shape)
        self._row_bytes = self.shape[1] * self.dtype.itemsize
        self._read_buffer = bytearray()
        self._held: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of the whole matrix as the file has it, which `hold_` takes."""
        return self.shape[0] * self._row_bytes

    def hold_(self) -> None:
        """Read the whole matrix, once; it stays in memory until `release_`."""
        if self._held is None:
            held = torch.empty(self.shape, dtype=self.dtype)
            with open_regular(self._path) as file:
                file.seek(self._stored.start)
                self._read_into(file, memoryview(held.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            self._held = held

    def release_(self) -> None:
        """Let go of what `hold_` has read."""
        self._held = None

    def rows(self, ids: Tensor) -> Tensor:
        """Rows by their numbers [n]: float32 [n, width] on their device."""
        if ids.is_meta:
            return super().rows(ids)
        if self._held is not None:
            return self._held[ids.cpu()].to(ids.device, torch.float32)
        found = torch.empty(len(ids), self.shape[1], dtype=self.dtype)
        with open_regular(self._path) as file:
            for row, number in enumerate(ids.tolist()):
                file.seek(self._stored.start + number * self._row_bytes)
                self._read_into(file, memoryview(found[row].view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return found.to(ids.device, torch.float32)

    def _fill_(self, part: Tensor, start: int) -> None:
        if part.is_meta:
            return
        if self._held is not None:
            part.copy_(self._held[start : start + len(part)])
            return
        size = len(part) * self._row_bytes
        if len(self._read_buffer) < size:
            self._read_buffer = bytearray(size)
        with open_regular(self._path) as file:
            file.seek(self._stored.start + start * self._row_bytes)
            self._read_into(file, memoryview(self._read_buffer)[:size])
        part.copy_(torch.frombuffer(self._read_buffer, dtype=self.dtype, count=part.numel()).view(part.shape))

    def _read_into(self, file: BinaryIO, room: memoryview) -> None:
        if file.readinto(room) != len(room):  # type: ignore[attr-defined]  # as files opened for bytes have it
            raise OSError(None, "it has become shorter", str(self._path))


@functools.lru_cache(maxsize=4)
def model_folder(path: str) -> ModelFolder:
    """A folder that was opened before in this process, or is now.

    Raises:
        ConfigError: as `ModelFolder`.
    """
    return ModelFolder(Path(path).expanduser())


def _config(path: Path) -> dict[str, Any]:
    if path.suffix == ".gguf":
        raise ConfigError(
            f"{path}: a GGUF file holds quantized weights for other programs; take the model's folder with "
            f"{CONFIG} and .safetensors files, which it was made of"
        )
    config = read_config(path)
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path / CONFIG} names no model_type, so it is no model's; download the model again")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a folder as hubs have them.

    Raises:
        ConfigError: there is no such folder, or it has none.
    """
    if not path.is_dir():
        name = str(path)
        if not path.is_absolute() and name.count("/") == 1:
            raise ConfigError(
                f"there is no folder {name}; if that is a model's name on a hub, download it first: "
                f"hf download {quoted(name)} --local-dir {quoted(path.name)}"
            )
        raise ConfigError(f"there is no folder {name}; name one that has {CONFIG} and .safetensors files")
    try:
        with open_regular(path / CONFIG) as file:
            config = parse_json(file.read(_MOST_CONFIG_BYTES).decode("utf-8", errors="replace"))
    except FileNotFoundError as error:
        ggufs = sorted(one.name for one in path.glob("*.gguf"))
        hint = f" It has {ggufs[0]}, which holds quantized weights for other programs." if ggufs else ""
        raise ConfigError(f"{path} has no {CONFIG}, so it is no model's folder; name one that has it.{hint}") from error
    except (OSError, MalformedFileError) as error:
        raise ConfigError(f"{path / CONFIG} cannot be read ({error}); download the model again") from error
    return config if isinstance(config, dict) else {}


def _quantization(config: Mapping[str, Any]) -> str | None:
    told = config.get("quantization_config")
    if told is None:
        return None
    return str(told.get("quant_method", "by an unknown method")) if isinstance(told, dict) else "by an unknown method"


def _shards(path: Path) -> list[str]:
    """Names of the files that have the tensors."""
    if not (path / INDEX).exists():
        if (path / SINGLE).exists():
            return [SINGLE]
        if sorted(path.glob("*.safetensors")):
            raise ConfigError(f"{path} has .safetensors files and no {INDEX}, which says what is in them; download it")
        others = sorted(one.name for one in (*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.pt")))
        if others:
            raise ConfigError(
                f"{path} has no {SINGLE}, the model's weights. It has {others[0]}: convert it with transformers' "
                f"save_pretrained"
            )
        return []  # a config alone
    try:
        with open_regular(path / INDEX) as file:
            index = parse_json(file.read(_MOST_CONFIG_BYTES).decode("utf-8", errors="replace"))
    except (OSError, MalformedFileError) as error:
        raise ConfigError(f"{path / INDEX} cannot be read ({error}); download it again") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and os.sep not in name for name in names.values()):
        raise ConfigError(f"{path / INDEX} is no table of the files' tensors; download it again")
    shards = sorted(set(names.values()))
    missing = [name for name in shards if not (path / name).exists()]
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} of its {len(shards)} files, {', '.join(missing[:3])}: the download was cut "
            f"short; complete it"
        )
    return shards


def opened(path: Path) -> TensorFile:
    """A file's table, checked.

    Raises:
        ConfigError: it cannot be read, or is damaged.
    """
    try:
        return TensorFile(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}; download it again") from error
    except MalformedFileError as error:
        raise ConfigError(f"{path}: {error}; download it again") from error
