"""A model's layers as they are, one in memory at a time: read from its files, or from a cache of them in 8 or 4 bits.

The cache lies beside the decoded data, one row a layer, and is made once for a model and a kind. What is read stays in
the system's own cache of files as long as there is memory to spare, so that nothing has to be planned for it. The one
layer that is used is float32, in memory that all networks of a process share.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, cache_folder, open_or_build, read_meta
from edgeblocks.methods import Frozen
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, bind_parameters_
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.offload.quantized import quantize_, quantized_layout
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.pretrained.shell import shell_of

_KIND = CacheKind(
    name="cache of frozen layers", content="frozen layers", row="a layer", remedy="use --quantize none", version=1
)
_MOST_LAYERS = 2**16


class FrozenLayers:
    """Gives a model's layers their weights, one layer after the other."""

    def __init__(self, model: str, kind: Frozen, device: torch.device) -> None:
        """
        Args:
            kind: as what they are read; none: from the model's own files.
        """
        self._folder, self._shell, self._kind = model_folder(model), shell_of(model, "meta"), kind
        self.layout = BlockLayout.of(self._shell.layers[0], "adamw", frozen=True)
        self._copy, self._holds = Float32Copy([self.layout], device), -1
        self._buffer: BlockBuffer | None = None
        if kind != "none":
            codes = quantized_layout(self.layout, kind)
            self._buffer = BlockBuffer(codes, ("ema",), allocate=lambda size: _memory(size, device))
        self._rows: RowFile[np.uint8] | None = None

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """All memory that it keeps: a layer as float32, and its codes."""
        return self._copy.flat, *(() if self._buffer is None else (self._buffer.content,))

    def bind_(self, layer: nn.Module) -> None:
        """Make a layer's parameters views of the memory that whatever layer is loaded lies in."""
        bind_parameters_(layer, self._copy.room_for_(self.layout).tensors("weights"))

    def load_(self, number: int) -> None:
        """Put a layer's weights into that memory.

        Raises:
            StorageError: the cache cannot be written or read.
            OSError: the model's files cannot be read.
        """
        if self._copy.device.type == "meta" or number == self._holds:
            return
        self._holds = -1
        if self._buffer is None:
            self._read_(number)
        else:
            self._rows = self._rows or self._cached()
            codes = self._buffer.part_bytes("ema")
            # Straight into its place; a device gets a copy of what is read beside it.
            row = codes if codes.device.type == "cpu" else torch.empty(codes.shape, dtype=torch.uint8)
            self._rows.read_into(number, row.numpy())
            if row is not codes:
                codes.copy_(row)
            self._copy.hold_(self._buffer, "ema")
        self._holds = number

    def _read_(self, number: int) -> None:
        """From the model's files."""
        for name, values in self._copy.room_for_(self.layout).tensors("weights"):
            stored = f"{self._shell.layers_name}.{number}.{name}"
            for start, piece in self._folder.pieces(stored):
                values.view(-1)[start : start + len(piece)] = piece

    def _cached(self) -> RowFile[np.uint8]:
        """The cache, which is made now where there is none."""
        count, size = len(self._shell.layers), self._row_bytes
        key = hashlib.sha256(f"layers {_KIND.version} {self._kind} {self._folder.sha256()}".encode()).hexdigest()

        def build(files: CacheFiles) -> None:
            assert self._buffer is not None
            files.begin({"layers.npy": (np.dtype(np.uint8), (size,))}, count * size)
            for number in range(count):
                self._read_(number)
                quantize_(self._buffer, self._copy.flat)
                files.append("layers.npy", self._buffer.part_bytes("ema").cpu().numpy()[None])
            files.finish({"layers": count})

        def read(folder: Path) -> RowFile[np.uint8]:
            read_meta(folder, _KIND.version)
            rows = RowFile(folder / "layers.npy", np.uint8, row=_KIND.row, most_rows=_MOST_LAYERS)
            if rows.shape != (count, size):
                raise ValueError("another number of layers")
            return rows

        return open_or_build(_KIND, cache_folder(), key, build=build, read=read)

    @property
    def _row_bytes(self) -> int:
        assert self._buffer is not None
        return self._buffer.layout.part_span("ema")[1]


@functools.lru_cache(maxsize=4)
def frozen_layers(model: str, kind: Frozen, device: str) -> FrozenLayers:
    """Those of a model on a kind of device; one a process.

    Raises:
        ConfigError, UnsupportedModelError: as of `shell.Shell`.
    """
    return FrozenLayers(model, kind, torch.device(device))


def _memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device).zero_()  # touched
