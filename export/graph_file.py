"""What a graph's file refers to and does, without loading it: only the fields on the way to that are read.

onnxruntime takes weights from every file that a graph names. A graph from elsewhere may name one that is not its own.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from edgeblocks.files.untrusted import MalformedFileError, open_regular, shown
from edgeblocks.limits import MOST_ROUNDS

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


def problem_of_block(path: Path) -> str | None:
    """Why the graph of a block is not run: operators that are neither onnx's own nor the product with rounded weights.

    Raises:
        OSError: it cannot be read.
        MalformedFileError: it is no graph.
    """
    found = _Contents()
    return _read_model(path, found) or _foreign(found.operators)


def problem_of_classifier(path: Path) -> str | None:
    """Why the graph of a fine-tuned classifier is not run: operators as of a block, or a loop.

    Raises:
        OSError: it cannot be read.
        MalformedFileError: it is no graph.
    """
    found = _Contents()
    return _read_model(path, found) or _foreign(found.operators) or _looping(found)


def problem_of_language_model(path: Path) -> str | None:
    """Why the graph of a language model is not run: operators that are not onnx's or onnxruntime's own, or a loop.

    Raises:
        OSError: it cannot be read.
        MalformedFileError: it is no graph.
    """
    found = _Contents()
    problem = _read_model(path, found) or _foreign({one for one in found.operators if one[0] != _OF_ONNXRUNTIME})
    return problem or _looping(found)


def problem_of_chain(path: Path) -> str | None:
    """Why the graph of a whole chain is not run: operators as of a block, or a loop without a bound.

    A loop stands at the top, and how often it runs is the smaller of two numbers, one of which is a constant.

    Raises:
        OSError: it cannot be read.
        MalformedFileError: it is no graph.
    """
    found = _Contents()
    problem = _read_model(path, found) or _foreign(found.operators)
    if problem is not None:
        return problem
    if found.inner_loops:
        return "has a loop inside another part, which could run without an end"
    for times in found.loops:
        bounds = [found.numbers[name] for name in found.least.get(times, ()) if name in found.numbers]
        if not any(bound <= MOST_ROUNDS for bound in bounds):
            return f"has a loop that could run more than {MOST_ROUNDS} times"
    return None


def _looping(found: "_Contents") -> str | None:
    return "has a loop, which none of its kind has" if found.loops or found.inner_loops else None


def _foreign(operators: set[tuple[str, str]]) -> str | None:
    others = operators - _OF_ROUNDED_WEIGHTS
    foreign = sorted(domain for domain, _ in others if domain not in ("", "ai.onnx"))
    return f"has operators that are not onnx's own, of {shown(foreign[0])}" if foreign else None


_OF_ONNXRUNTIME = "com.microsoft"
_OF_ROUNDED_WEIGHTS = {(_OF_ONNXRUNTIME, "MatMulNBits")}
"""The only operator of onnxruntime's own that is run in a chain or a block."""
_GRAPH, _TRAINING, _FUNCTIONS = 7, 20, 25
"""Fields of ModelProto in onnx.proto. Those of the messages below are numbered in their readers."""
_INT64 = 7
"""A type of tensors."""


@dataclass
class _Contents:
    """What the nodes of a graph are.

    operators: domains and names.
    inner_loops: loops in branches and in other loops.
    loops: at the top, by the names of the numbers of their rounds.
    least: of each Min at the top what it takes, by what it gives.
    numbers: constants that are one whole number.
    """

    operators: set[tuple[str, str]] = field(default_factory=set)
    inner_loops: int = 0
    loops: list[str] = field(default_factory=list)
    least: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def _read_model(path: Path, found: _Contents) -> str | None:
    """Read the nodes of a file; what it has beside its graph is a problem."""
    with open_regular(path) as file:
        end = file.seek(0, 2)
        file.seek(0)
        for number, after in _messages(file, end):
            if number in (_TRAINING, _FUNCTIONS):
                return "has parts of a kind that no export has (functions or training)"
            if number == _GRAPH:
                _read_graph(file, after, found, 0)
    return None


def _read_graph(file: BufferedReader, end: int, found: _Contents, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise MalformedFileError(f"it is nested more than {_MOST_DEPTH} levels deep")
    for number, after in _messages(file, end):
        if number == 1:
            _read_node(file, after, found, depth)
        elif number == 5 and depth == 0:
            _read_constant(file, after, found)


def _read_node(file: BufferedReader, end: int, found: _Contents, depth: int) -> None:
    texts: defaultdict[int, list[str]] = defaultdict(list)
    for number, after in _messages(file, end):
        if number == 5:
            for inner, inner_after in _messages(file, after):
                if inner in (6, 11):  # the graphs of an attribute
                    _read_graph(file, inner_after, found, depth + 1)
        elif number in (1, 2, 4, 7):  # inputs, outputs, operator, domain
            texts[number].append(_text(file, after))
    # Of a field that is there twice the last counts.
    kind, domain = ((texts[number] or [""])[-1] for number in (4, 7))
    found.operators.add((domain, kind))
    if kind == "Loop" and depth > 0:
        found.inner_loops += 1
    elif kind == "Loop":
        found.loops.append((texts[1] or [""])[0])
    elif kind == "Min" and depth == 0:
        found.least.update(dict.fromkeys(texts[2], texts[1]))


def _read_constant(file: BufferedReader, end: int, found: _Contents) -> None:
    name, kind, raw = "", 0, b""
    while file.tell() < end:
        number, wire = divmod(_varint(file), 8)
        if number == 2 and wire == _VARINT:
            kind = _varint(file)
            continue
        after = _end_of(file, wire, end)
        if number == 8 and wire == _BYTES:
            name = _text(file, after)
        elif number == 9 and wire == _BYTES and after - file.tell() == 8:
            raw = file.read(8)
        file.seek(after)
    if kind == _INT64 and len(raw) == 8:
        value = int.from_bytes(raw, "little", signed=True)
        found.numbers[name] = max(value, found.numbers.get(name, value))


def _text(file: BufferedReader, after: int) -> str:
    return file.read(min(after - file.tell(), _MOST_NAME_BYTES)).decode(errors="surrogateescape")


def _messages(file: BufferedReader, end: int) -> Iterator[tuple[int, int]]:
    """The fields up to `end` that hold texts or messages: their numbers, and where they end; the file stands in one."""
    while file.tell() < end:
        number, wire = divmod(_varint(file), 8)
        after = _end_of(file, wire, end)
        if wire == _BYTES:
            yield number, after
        file.seek(after)


def _end_of(file: BufferedReader, wire: int, end: int) -> int:
    """Where a field ends whose number was read; of one with a length the file stands at its content."""
    if wire == _BYTES:
        length = _varint(file)
        if file.tell() + length > end:
            raise MalformedFileError("it is no ONNX graph, or is cut short")
        return file.tell() + length
    if wire == _VARINT:
        _varint(file)
        return file.tell()
    if wire in (_FIXED_32, _FIXED_64):
        return file.tell() + (4 if wire == _FIXED_32 else 8)
    raise MalformedFileError("it is no ONNX graph")


def _places(file: BufferedReader, kind: str, end: int, depth: int) -> Iterator[str]:
    if depth > _MOST_DEPTH:
        raise MalformedFileError(f"it is nested more than {_MOST_DEPTH} levels deep")
    texts = []
    for number, after in _messages(file, end):
        inner = _INNER[kind].get(number)
        if inner == "text":
            texts.append(_text(file, after))
        elif inner is not None:
            yield from _places(file, inner, after, depth + 1)
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
