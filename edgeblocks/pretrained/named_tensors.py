"""A model's tensors by the names that its modules have, wherever they lie in its folder's files.

Files may be older than the library's modules: tensors have other names there, or none has the prefix of the class; each
matrix of an expert is a tensor of its own, where the module has one of all experts; two matrices are one. The library
has a table for that, which it loads by. Here the table is asked once where values lie: of each tensor of the model the
spans of values in the files that it consists of, in its order. So it is read from there in pieces, whole or merged, and
what was trained is written back to where it came from.
"""

import copy
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeblocks.pretrained.model_folder import ModelFolder

_IN_ORDER = frozenset({"MergeModulelist", "Concatenate", "Chunk"})
"""The library's operations that put tensors one behind the other, or cut them, and change no value's place inside."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Values of a tensor in the files, which lie one behind the other: `count` of them from number `start` on."""

    stored: str
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class NamedTensor:
    """A tensor of the model, and where its values lie. `dtype` is the format's name."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]


class NamedTensors:
    """Like a `TensorFile` of a whole folder: tensors by the model's names, read as float32.

    Those that the model does not have keep the names of the files.
    """

    def __init__(self, folder: ModelFolder, model: Any) -> None:
        """
        Args:
            model: the library's, without weights.
        """
        self.folder, self.path = folder, folder.path
        self._loading = importlib.import_module("transformers.core_model_loading")
        steps = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        self._renamings, self._converters = (
            [step for step in steps if isinstance(step, kind)]
            for kind in (self._loading.WeightRenaming, self._loading.WeightConverter)
        )
        self._known: dict[str, Tensor] = model.state_dict()
        self._prefix: str = model.base_model_prefix
        self.tensors: dict[str, NamedTensor] = {}
        self.prefixed: set[str] = set()
        """Of the files' names those that lack the prefix of the model's class."""
        unused = model._keys_to_ignore_on_load_unexpected or ()
        sources: dict[str, dict[str, list[str]]] = {}
        for stored in sorted(folder.tensors, key=self._loading.dot_natural_key):
            own, pattern = self._own_name(stored)
            if own not in self._known and any(re.search(one, own) for one in unused):
                continue  # as the library does
            sources.setdefault(own, {}).setdefault(pattern or "", []).append(stored)
        for own, by_pattern in sources.items():
            if list(by_pattern) == [""] and len(by_pattern[""]) == 1:
                self.tensors[own] = self._whole(by_pattern[""][0])
            else:
                found = self._converted(model, own, by_pattern)
                self.tensors |= found or {name: self._whole(name) for names in by_pattern.values() for name in names}

    @property
    def num_bytes(self) -> int:
        """Of all files with tensors."""
        return self.folder.num_bytes

    @property
    def metadata(self) -> Mapping[str, str]:
        """Texts beside the tensors: none that concern a training."""
        return {}

    def sha256(self) -> str:
        """As of the folder."""
        return self.folder.sha256()

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor's values in order: (number of the first one, float32 [values]).

        Raises:
            OSError: a file cannot be read.
        """
        done = 0
        for span in self.tensors[name].spans:
            file = self.folder.file_of(span.stored)
            for start, piece in file.pieces(span.stored, span.start, span.count):
                yield done + start, piece
            done += span.count

    def read_(self, name: str, values: Tensor) -> None:
        """Fill a contiguous float32 tensor of the same shape.

        Raises:
            OSError: a file cannot be read.
        """
        flat = values.view(-1)
        for start, piece in self.pieces(name):
            flat[start : start + len(piece)] = piece

    def alone(self, name: str) -> str | None:
        """The files' name of a tensor that is one there as well; None where it is not."""
        there = self.tensors.get(name)
        if there is None or len(there.spans) != 1:
            return None
        (span,) = there.spans
        return span.stored if self.folder.tensors[span.stored].shape == there.shape else None

    def _own_name(self, stored: str) -> tuple[str, str | None]:
        """The model's name of what a tensor of the files is, or is a part of; and which pattern of a conversion."""
        rename = self._loading.rename_source_key
        plain, pattern = rename(stored, self._renamings, self._converters)
        own, _ = rename(stored, self._renamings, self._converters, self._prefix, self._known)
        if own not in self._known:
            plain, pattern = stored, None
            own, _ = rename(stored, [], [], self._prefix, self._known)
        if own not in self._known:
            return stored, None
        if own == f"{self._prefix}.{plain}":
            self.prefixed.add(stored)
        return own, pattern

    def _whole(self, stored: str) -> NamedTensor:
        there = self.folder.tensors[stored]
        span = Span(stored=stored, start=0, count=math.prod(there.shape))
        return NamedTensor(dtype=there.dtype, shape=there.shape, spans=(span,))

    def _converted(self, model: Any, own: str, by_pattern: dict[str, list[str]]) -> dict[str, NamedTensor] | None:
        """Tensors that a conversion makes of those of the files; None where they are no spans of these.

        It is run on tensors of one number each, or of one for each part that they are cut into, which tell where in
        its result the values come from.
        """
        first = next(iter(by_pattern))
        step = next((one for one in self._converters if first in one.source_patterns), None)
        if step is None or any(type(operation).__name__ not in _IN_ORDER for operation in step.operations):
            return None
        parts, stored = len(step.target_patterns), [name for names in by_pattern.values() for name in names]
        probe = copy.deepcopy(step)
        for pattern, names in by_pattern.items():
            for name in names:
                dimensions = len(self.folder.tensors[name].shape)
                codes = torch.arange(parts) + stored.index(name) * parts
                probe.add_tensor(own, name, pattern, codes.view(parts, *[1] * (dimensions - 1)))
        try:
            made = probe.convert(own, model=model, config=model.config)
        except Exception:  # whatever the library's operations raise on what they do not expect
            return None
        found = {}
        for name, codes in made.items():
            result = codes[0] if isinstance(codes, list) else codes
            shape = tuple(self._known[name].shape) if name in self._known else ()
            spans = []
            for code in result.flatten().tolist():
                source = stored[code // parts]
                count = math.prod(self.folder.tensors[source].shape) // parts
                spans.append(Span(stored=source, start=(code % parts) * count, count=count))
            if not _is_in_order(tuple(result.shape), shape) or sum(one.count for one in spans) != math.prod(shape):
                return None
            found[name] = NamedTensor(dtype=self.folder.tensors[stored[0]].dtype, shape=shape, spans=tuple(spans))
        return found


def in_spans(tensor: NamedTensor, values: Tensor) -> Iterator[tuple[Span, Tensor]]:
    """Values of a tensor by where they lie in the files, in one row each."""
    flat, done = values.reshape(-1), 0
    for span in tensor.spans:
        yield span, flat[done : done + span.count]
        done += span.count


def _is_in_order(grid: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether tensors that are put together in a grid lie one behind the other in a result of this shape.

    >>> _is_in_order((8, 2, 1), (8, 64, 32)), _is_in_order((1, 2), (64, 32)), _is_in_order((2, 1), (64, 32))
    (True, False, True)
    """
    if len(grid) != len(shape):
        return False
    last = max((number for number, count in enumerate(grid) if count > 1), default=0)
    return grid[:last] == shape[:last]
