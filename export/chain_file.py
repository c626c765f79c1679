"""A whole chain as one ONNX file: a loop over the noise levels around the blocks that were exported.

It is written weight by weight, from the files of the blocks: no more of them than a piece is in memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto, helper

from edgeblocks.export import chain_graphs, chain_text_graphs
from edgeblocks.export.chain_graphs import Signature
from edgeblocks.export.destination import synced
from edgeblocks.export.graph import ALIGNMENT_BYTES
from edgeblocks.export.graph_builder import Nodes
from edgeblocks.export.linked_blocks import LinkedBlocks, StoredTensor
from edgeblocks.export.manifest import graph_facts
from edgeblocks.export.manifest_types import ChainFile, ContinuationManifest, ImageManifest, Manifest, TextManifest

FILE_NAME = "chain.onnx"
_PIECE_BYTES = 2**20
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Fields of ModelProto, GraphProto and TensorProto in onnx.proto."""


def write_chain(folder: Path, manifest: Manifest, *, external_above_bytes: int) -> ChainFile:
    """Write chain.onnx beside the blocks, whose weights are in files of their own.

    Args:
        external_above_bytes: more bytes of weights than this are kept in a file beside the graph.

    Raises:
        OSError: the disk refused.
    """
    model, weights = _linked(folder, manifest)
    path = folder / FILE_NAME
    data_path: Path | None = None
    if sum(weight.num_bytes for weight in weights) > external_above_bytes:
        data_path = folder / f"{FILE_NAME}.data"
        _write_data(data_path, weights)
        model.graph.initializer.extend(weight.tensor for weight in weights)
        with synced(path) as file:
            file.write(model.SerializeToString())
    else:
        _write_whole(path, model, weights)
    return ChainFile(**graph_facts(path, data_path))


def _linked(folder: Path, manifest: Manifest) -> tuple[onnx.ModelProto, list[StoredTensor]]:
    """The chain without its weights, and these."""
    decoder = manifest.decoding.graph if isinstance(manifest, ImageManifest) and manifest.decoding else None
    blocks = LinkedBlocks(folder, manifest.files, manifest.boundaries, decoder=decoder)
    nodes = Nodes()
    inputs, outputs = _signature(nodes, blocks, manifest)
    graph = helper.make_graph(nodes.nodes, "chain", inputs, outputs, value_info=nodes.shapes)
    used = set(_values_read(graph))
    graph.initializer.extend(constant for constant in nodes.constants if constant.name in used)
    first = onnx.load(folder / manifest.files[0].file, load_external_data=False)
    model = helper.make_model(
        graph, opset_imports=first.opset_import, ir_version=first.ir_version, producer_name="edgeblocks"
    )
    return model, blocks.weights


def _signature(nodes: Nodes, blocks: LinkedBlocks, manifest: Manifest) -> Signature:
    """Write the nodes of what a manifest describes."""
    if isinstance(manifest, TextManifest):
        return chain_text_graphs.text(nodes, blocks, manifest)
    if isinstance(manifest, ContinuationManifest):
        return chain_text_graphs.continuation(nodes, blocks, manifest)
    assert isinstance(manifest, ImageManifest)
    write = chain_graphs.classes if manifest.task == "classes" else chain_graphs.images
    return write(nodes, blocks, manifest)


def _values_read(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of all that the nodes of a graph take, and those inside them."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _values_read(attribute.g)


def _write_data(path: Path, weights: Sequence[StoredTensor]) -> None:
    """One file with the bytes of all weights, each of which is told its place."""
    with synced(path) as file:
        for weight in weights:
            file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
            weight.tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": path.name, "offset": file.tell(), "length": weight.num_bytes}.items():
                weight.tensor.external_data.add(key=key, value=str(value))
            _copy(weight, file)


def _write_whole(path: Path, model: onnx.ModelProto, weights: Sequence[StoredTensor]) -> None:
    """The model's message with the weights in it, which protobuf would make of all of them in memory."""
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    tensors = [weight.tensor.SerializeToString() + _head(_RAW_DATA, weight.num_bytes) for weight in weights]
    heads = [
        _head(_INITIALIZER, len(tensor) + weight.num_bytes) + tensor
        for tensor, weight in zip(tensors, weights, strict=True)
    ]
    num_bytes = len(graph) + sum(map(len, heads)) + sum(weight.num_bytes for weight in weights)
    with synced(path) as file:
        file.write(model.SerializeToString() + _head(_GRAPH, num_bytes) + graph)
        for head, weight in zip(heads, weights, strict=True):
            file.write(head)
            _copy(weight, file)


def _head(field: int, num_bytes: int) -> bytes:
    """What stands before so many bytes of a field in a protobuf message."""
    return bytes([field << 3 | 2, *_varint(num_bytes)])


def _varint(number: int) -> Iterator[int]:
    while number > 127:
        yield number & 127 | 128
        number >>= 7
    yield number


def _copy(weight: StoredTensor, file: BinaryIO) -> None:
    with weight.path.open("rb") as source:
        source.seek(weight.offset)
        left = weight.num_bytes
        while left:
            piece = source.read(min(left, _PIECE_BYTES))
            assert piece, f"{weight.path} ends before {weight.tensor.name}"
            file.write(piece)
            left -= len(piece)
