"""Blocks' graphs as parts of one graph. Their weights are never loaded: it is known where they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.compose import add_prefix_graph

from edgeblocks.export.graph_builder import INT, Nodes
from edgeblocks.export.manifest_types import BlockFile


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor without its values, which are bytes of a file."""

    tensor: TensorProto
    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a value, of its first axis: those from `first` on, a single whole number, and before `end`.

    A block that takes single ones of them takes them from the value itself, so that nothing is copied.
    """

    value: str
    first: str
    end: str


Inputs = Mapping[str, str | Rows]
"""Values by the names of the blocks' inputs."""


class LinkedBlocks:
    """The blocks of a folder, to be called in a graph that is made of them."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[BlockFile],
        boundaries: Sequence[float],
        *,
        decoder: BlockFile | None = None,
    ) -> None:
        self._folder, self._files, self._boundaries = folder, files, boundaries
        self._decoder = decoder
        self.weights: list[StoredTensor] = []
        """Of all blocks that were called."""

    def owner(self, nodes: Nodes, sigma: str) -> str:
        """The blocks that own noise levels of any shape, in float64, as `NoisePartition.block_of` finds them."""
        if len(self._files) == 1:  # onnxruntimes differ in what the sum of nothing is
            return nodes("Mul", nodes.cast(sigma, INT), nodes.constant(0, "int64"))
        inner = nodes.constant(self._boundaries[1:-1], "float64")
        below = nodes("Less", nodes("Unsqueeze", sigma, nodes.whole(-1)), inner)
        return nodes("ReduceSum", nodes.cast(below, INT), nodes.whole(-1), keepdims=0)

    def call(self, nodes: Nodes, owner: str, inputs: Inputs, types: Sequence[int]) -> list[str]:
        """What the block gives whose number is `owner`; no other one runs.

        Args:
            types: of the outputs.
        """
        return self._choose(nodes, owner, inputs, types, 0, len(self._files))

    def _choose(
        self, nodes: Nodes, owner: str, inputs: Inputs, types: Sequence[int], first: int, end: int
    ) -> list[str]:
        if end - first == 1:
            return self._graph(nodes, self._files[first], f"block_{first:03d}.", inputs)
        # In halves: branches inside each other are few, however many blocks there are.
        middle = (first + end) // 2
        return nodes.branch(
            nodes("Less", owner, nodes.constant(middle, "int64")),
            lambda inner: self._choose(inner, owner, inputs, types, first, middle),
            lambda inner: self._choose(inner, owner, inputs, types, middle, end),
            types,
        )

    def decode(self, nodes: Nodes, latents: str) -> str:
        """Pictures of latents, by the decoder."""
        assert self._decoder is not None
        (pictures,) = self._graph(nodes, self._decoder, "decoder.", {"latents": latents})
        return pictures

    def _graph(self, nodes: Nodes, file: BlockFile, prefix: str, inputs: Inputs) -> list[str]:
        path = self._folder / file.file
        graph = onnx.load(path, load_external_data=False).graph
        names = {name: given if isinstance(given, str) else given.value for name, given in inputs.items()}
        graph = add_prefix_graph(graph, prefix, rename_inputs=False, inplace=True, name_map=names)
        for given in inputs.values():
            if isinstance(given, Rows):
                _take_rows_(nodes, graph, given)
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                self.weights.append(_stored(tensor, path.parent))
            else:
                nodes.constants.append(tensor)
        nodes.nodes.extend(graph.node)
        nodes.shapes.extend(graph.value_info)
        return [output.name for output in graph.output]


def _stored(tensor: TensorProto, folder: Path) -> StoredTensor:
    place = {entry.key: entry.value for entry in tensor.external_data}
    bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return StoredTensor(
        tensor=bare, path=folder / place["location"], offset=int(place["offset"]), num_bytes=int(place["length"])
    )


def _take_rows_(nodes: Nodes, graph: onnx.GraphProto, rows: Rows) -> None:
    """Have a graph that reads `rows.value` read those rows."""
    part = ""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name != rows.value:
                continue
            settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            if node.op_type == "Gather" and place == 0 and settings.get("axis", 0) == 0:
                node.input[1] = nodes("Add", node.input[1], rows.first)
            elif node.op_type != "Shape" or settings.get("start", 0) < 1:
                first, end = (nodes("Reshape", one, nodes.whole(1)) for one in (rows.first, rows.end))
                part = part or nodes.part(rows.value, first, end, axis=0)
                node.input[place] = part
