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


class LinkedBlocks:
    """The blocks of a folder, to be called in a graph that is made of them."""

    def __init__(self, folder: Path, files: Sequence[BlockFile], boundaries: Sequence[float]) -> None:
        self._folder, self._files, self._boundaries = folder, files, boundaries
        self.weights: list[StoredTensor] = []
        """Of all blocks that were called."""

    def owner(self, nodes: Nodes, sigma: str) -> str:
        """The blocks that own noise levels of any shape, in float64, as `NoisePartition.block_of` finds them."""
        if len(self._files) == 1:  # onnxruntimes differ in what the sum of nothing is
            return nodes("Mul", nodes.cast(sigma, INT), nodes.constant(0, "int64"))
        inner = nodes.constant(self._boundaries[1:-1], "float64")
        below = nodes("Less", nodes("Unsqueeze", sigma, nodes.whole(-1)), inner)
        return nodes("ReduceSum", nodes.cast(below, INT), nodes.whole(-1), keepdims=0)

    def call(self, nodes: Nodes, owner: str, inputs: Mapping[str, str], types: Sequence[int]) -> list[str]:
        """What the block gives whose number is `owner`; no other one runs.

        Args:
            inputs: values by the names of the blocks' inputs.
            types: of the outputs.
        """
        return self._choose(nodes, owner, inputs, types, 0, len(self._files))

    def _choose(
        self, nodes: Nodes, owner: str, inputs: Mapping[str, str], types: Sequence[int], first: int, end: int
    ) -> list[str]:
        if end - first == 1:
            return self._block(nodes, first, inputs)
        # In halves: branches inside each other are few, however many blocks there are.
        middle = (first + end) // 2
        return nodes.branch(
            nodes("Less", owner, nodes.constant(middle, "int64")),
            lambda inner: self._choose(inner, owner, inputs, types, first, middle),
            lambda inner: self._choose(inner, owner, inputs, types, middle, end),
            types,
        )

    def _block(self, nodes: Nodes, block: int, inputs: Mapping[str, str]) -> list[str]:
        path = self._folder / self._files[block].file
        graph = onnx.load(path, load_external_data=False).graph
        names = dict(inputs)
        graph = add_prefix_graph(graph, f"block_{block:03d}.", rename_inputs=False, inplace=True, name_map=names)
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
