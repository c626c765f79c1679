"""What a graph's file refers to, without loading it: only the fields on the way to the names are read.

onnxruntime takes weights from every file that a graph names. A graph from elsewhere may name one that is not its own.
"""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from edgeblocks.files.untrusted import MalformedFileError, open_regular

_MOST_DEPTH = 64
_MOST_NAME_BYTES = 2**12
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
"""Kinds of fields that protobuf has."""
_INNER = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "place"},
    "place": {1: "text", 2: "text"},
}
"""Of each message the fields that lead to a place of weights, by their numbers in onnx.proto."""


def files_named_in(path: Path) -> set[str]:
    """The files that a graph takes weights from.

    Raises:
        OSError: it cannot be read.
        MalformedFileError: it is no graph.
    """
    with open_regular(path) as file:
        end = file.seek(0, 2)
        file.seek(0)
        return set(_places(file, "model", end, 0))


def _places(file: BufferedReader, kind: str, end: int, depth: int) -> Iterator[str]:
    if depth > _MOST_DEPTH:
        raise MalformedFileError(f"it is nested more than {_MOST_DEPTH} levels deep")
    texts = []
    while file.tell() < end:
        number, wire = divmod(_varint(file), 8)
        if wire == _BYTES:
            length = _varint(file)
            after = file.tell() + length
            if after > end:
                raise MalformedFileError("it is no ONNX graph, or is cut short")
            inner = _INNER[kind].get(number)
            if inner == "text":
                texts.append(file.read(min(length, _MOST_NAME_BYTES)).decode(errors="surrogateescape"))
            elif inner is not None:
                yield from _places(file, inner, after, depth + 1)
            file.seek(after)
        elif wire == _VARINT:
            _varint(file)
        elif wire in (_FIXED_32, _FIXED_64):
            file.seek(4 if wire == _FIXED_32 else 8, 1)
        else:
            raise MalformedFileError("it is no ONNX graph")
    if "location" in texts:  # the key may follow its value, and of two values the last counts: all are looked at
        yield from (text for text in texts if text != "location")


def _varint(file: BufferedReader) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise MalformedFileError("it is no ONNX graph, or is cut short")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise MalformedFileError("it is no ONNX graph")
