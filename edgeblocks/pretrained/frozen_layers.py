"""A model's layers as they are, one in memory at a time: read from its files, or from a cache of them in 8 or 4 bits.

The cache lies beside the decoded data, one row a layer, and is made once for a model and a kind. What is read stays in
the system's own cache of files as long as there is memory to spare, so that nothing has to be planned for it. The one
layer that is used is float32, in memory that all networks of a process share. Where all layers fit, they can be held,
so that each is read once: text is written with all of them for every token.
"""

import functools
import hashlib
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, cache_folder, open_or_build, read_meta
from edgeblocks.methods import Frozen
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout, bind_parameters_, largest_of
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.offload.quantized import quantize_, quantized_layouts
from edgeblocks.pretrained.layer import PretrainedLayer
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.pretrained.shells import any_shell

_KIND = CacheKind(
    name="cache of frozen layers", content="frozen layers", row="a layer", remedy="use --quantize none", version=1
)
_MOST_LAYERS = 2**16
LAYERS_READING_BYTES = 38_000_000
"""Of reading layers and a slice of the head; the least that kept runs at their smallest budget from being refused
memory (docs/tuning_grid.md)."""


class FrozenLayers:
    """Gives a model's layers their weights, one layer after the other."""

    def __init__(self, model: str, kind: Frozen, device: torch.device, side: int | None = None) -> None:
        """
        Args:
            kind: as what they are read; none: from the model's own files.
            side: of pictures, where the model is an image classifier; see `any_shell`.
        """
        self._folder, self._shell, self._kind = model_folder(model), any_shell(model, "meta", side), kind
        made = {kind: BlockLayout.of(self._shell.layers[kind], "adamw", frozen=True) for kind in {*self._shell.kind_of}}
        self.layouts = [made[kind] for kind in self._shell.kind_of]
        """Of each layer."""
        self._copies, self._holds = [Float32Copy(self.layouts, device)], [-1]
        self._bound: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        """The layers whose parameters are views of the copies, and their numbers."""
        self._buffer: BlockBuffer | None = None
        if kind != "none":
            self._codes = quantized_layouts(self.layouts, kind)
            largest = largest_of(self._codes, ("ema",))
            self._row = _memory(largest.part_span("ema")[1], device)
            self._buffer = BlockBuffer(largest, ("ema",), allocate=lambda _: self._row)
        self._rows: RowFile[np.uint8] | None = None

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """All memory that it keeps: a layer as float32, and its codes."""
        return (*(copy.memory for copy in self._copies), *(() if self._buffer is None else (self._row,)))

    @property
    def all_bytes(self) -> int:
        """Of all layers as float32, which `hold_all_` takes."""
        return 4 * sum(layout.num_parameters for layout in self.layouts)

    def hold_all_(self) -> None:
        """From now on, keep every layer that was read."""
        self._hold_(len(self._shell.layers))

    def hold_one_(self) -> None:
        """From now on, keep the layer that was read last."""
        self._hold_(1)

    def _hold_(self, count: int) -> None:
        device = self._copies[0].device
        self._copies = [Float32Copy(self.layouts[number : number + 1] if count > 1 else self.layouts, device)
                        for number in range(count)]  # fmt: skip
        self._holds = [-1] * count
        for layer, number in self._bound.items():
            self.bind_(layer, number)

    def bind_(self, layer: nn.Module, number: int) -> None:
        """Make a layer's parameters views of the memory that it will lie in, whichever that is."""
        bind_parameters_(layer, self._copies[self._slot(number)].room_for_(self.layouts[number]).tensors("weights"))
        self._bound[layer] = number

    def _slot(self, number: int) -> int:
        return number if len(self._copies) > 1 else 0

    def load_(self, number: int) -> None:
        """Put a layer's weights into its memory.

        Raises:
            StorageError: the cache cannot be written or read.
            OSError: the model's files cannot be read.
        """
        slot = self._slot(number)
        copy = self._copies[slot]
        if copy.device.type == "meta" or number == self._holds[slot]:
            return
        self._holds[slot] = -1
        if self._buffer is None:
            self._read_(number, copy)
        else:
            self._rows = self._rows or self._cached()
            # Straight into its place; a device gets a copy of what is read beside it.
            row = self._row if self._row.device.type == "cpu" else torch.empty(self._row.shape, dtype=torch.uint8)
            self._rows.read_into(number, row.numpy())
            if row is not self._row:
                self._row.copy_(row)
            self._buffer.adopt_(self._codes[number])
            copy.hold_(self._buffer, "ema")
        self._holds[slot] = number

    def _read_(self, number: int, copy: Float32Copy) -> None:
        """From the model's files."""
        for name, values in copy.room_for_(self.layouts[number]).tensors("weights"):
            self._shell.stored.read_(f"{self._shell.layers_name}.{number}.{name}", values)

    def _cached(self) -> RowFile[np.uint8]:
        """The cache, which is made now where there is none."""
        count, size, copy = len(self.layouts), len(self._row), self._copies[0]
        key = hashlib.sha256(f"layers {_KIND.version} {self._kind} {self._folder.sha256()}".encode()).hexdigest()

        def build(files: CacheFiles) -> None:
            assert self._buffer is not None
            files.begin({"layers.npy": (np.dtype(np.uint8), (size,))}, count * size)
            for number in range(count):
                self._read_(number, copy)
                self._buffer.adopt_(self._codes[number])
                quantize_(self._buffer, copy.flat)
                files.append("layers.npy", self._row.cpu().numpy()[None])  # all rows are as long as the longest
            files.finish({"layers": count})

        def read(folder: Path) -> RowFile[np.uint8]:
            read_meta(folder, _KIND.version)
            rows = RowFile(folder / "layers.npy", np.uint8, row=_KIND.row, most_rows=_MOST_LAYERS)
            if rows.shape != (count, size):
                raise ValueError("another number of layers")
            return rows

        return open_or_build(_KIND, cache_folder(), key, build=build, read=read)


class FrozenLayer(PretrainedLayer):
    """A layer whose weights come when it is run, into memory that the others use as well."""

    def __init__(self, model: str, number: int, kind: Frozen, side: int | None = None) -> None:
        super().__init__(model, number, side)
        self._kind = kind
        # In a list: its weights are no parameters of the network, which are those that are trained.
        self._frozen = [any_shell(model, "meta", side).layer(self.number)]

    def bind_(self, device: torch.device) -> None:
        """Use the memory that frozen layers are read into on a device, and the tables of that device."""
        # Kept, because others may have taken its place among those that are remembered.
        self._source = frozen_layers(self.model, self._kind, device.type, self.side)
        self._source.bind_(self._frozen[0], self.number)
        any_shell(self.model, device.type, self.side).restore_tables_(self._frozen[0], self.number)

    def called(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the library's layer gives when it is called with this."""
        self._source.load_(self.number)
        return self._frozen[0](hidden, *args, **kwargs)


@functools.lru_cache(maxsize=4)
def frozen_layers(model: str, kind: Frozen, device: str, side: int | None) -> FrozenLayers:
    """Those of a model on a kind of device; one a process.

    Args:
        side: as of `FrozenLayers`; without a default, so that one call is remembered in one way.

    Raises:
        ConfigError, UnsupportedModelError: as of `shell.Shell`.
    """
    return FrozenLayers(model, kind, torch.device(device), side)


def _memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device).zero_()  # touched
