"""A graph of ONNX written as code: nodes in the order in which they run, branches and loops as functions.

Constants stand at the top of the graph, where every branch and loop sees them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT, DOUBLE, INT, BOOL = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL
BYTE = TensorProto.UINT8

Body = Callable[["Nodes"], Sequence[str]]
"""Writes nodes, and says which of their values come out."""


class Nodes:
    """The nodes of a graph, of a branch or of a loop's body. A value is known by its name."""

    def __init__(self, outer: "Nodes | None" = None) -> None:
        self.nodes: list[NodeProto] = []
        self.shapes: list[onnx.ValueInfoProto] = []
        """What is known of values in between; onnxruntime needs none of it."""
        self.constants: list[TensorProto] = [] if outer is None else outer.constants
        self._numbers: Iterator[int] = count() if outer is None else outer._numbers

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The one output of a new node; an input that is left out is ""."""
        return self.several(kind, *inputs, num_outputs=1, **attributes)[0]

    def several(self, kind: str, *inputs: str, num_outputs: int, **attributes: Any) -> list[str]:
        outputs = [self._name(kind.lower()) for _ in range(num_outputs)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def constant(self, value: ArrayLike, dtype: DTypeLike) -> str:
        array = np.asarray(value, dtype=dtype)
        for known in self.constants:
            same_type = known.data_type == helper.np_dtype_to_tensor_dtype(array.dtype)
            if same_type and tuple(known.dims) == array.shape and known.raw_data == array.tobytes():
                return known.name
        self.constants.append(numpy_helper.from_array(array, self._name("constant")))
        return self.constants[-1].name

    def whole(self, *values: int) -> str:
        """A list of whole numbers, as shapes and places are given."""
        return self.constant(values, np.int64)

    def cast(self, value: str, to: int) -> str:
        return self("Cast", value, to=to)

    def item(self, values: str, place: str, *, axis: int = 0) -> str:
        """One entry, without its axis; `place` is a single whole number."""
        return self("Gather", values, place, axis=axis)

    def part(self, value: str, start: str, stop: str, *, axis: int) -> str:
        """A slice; `start` and `stop` are lists of one whole number."""
        return self("Slice", value, start, stop, self.whole(axis))

    def length(self, value: str, axis: int) -> str:
        """A list of one: how long an axis is."""
        return self("Shape", value, start=axis, end=axis + 1)

    def single(self, values: str) -> str:
        """The entry of a list of one."""
        return self("Squeeze", values, self.whole(0))

    def branch(self, condition: str, then: Body, otherwise: Body, types: Sequence[int]) -> list[str]:
        """What one of two branches gives; only that one runs."""
        branches = {"then_branch": then, "else_branch": otherwise}
        attributes = {name: self._inner(name, [], body, types) for name, body in branches.items()}
        return self.several("If", condition, num_outputs=len(types), **attributes)

    def loop(
        self,
        times: str,
        carried: Sequence[tuple[str, int]],
        body: Callable[["Nodes", str, Sequence[str]], Sequence[str]],
    ) -> list[str]:
        """The carried values after the last round.

        Args:
            times: how often the body runs.
            carried: values before the first round, and their types.
            body: given the number of the round and the carried values, the next carried values.
        """
        number, going, *names = (self._name(what) for what in ("round", "going", *("carried" for _ in carried)))
        types = [kind for _, kind in carried]
        inputs = [helper.make_tensor_value_info(number, INT, []), helper.make_tensor_value_info(going, BOOL, [])]
        inputs += [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, types, strict=True)]

        def inside(nodes: Nodes) -> Sequence[str]:
            return [going, *body(nodes, number, names)]

        graph = self._inner("body", inputs, inside, [BOOL, *types])
        starts = [start for start, _ in carried]
        return self.several("Loop", times, "", *starts, num_outputs=len(carried), body=graph)

    def each(self, times: str, kind: int, body: Callable[["Nodes", str], str]) -> str:
        """What the body gives for each number of a round, below each other on a new first axis."""
        number, going = self._name("round"), self._name("going")
        inputs = [helper.make_tensor_value_info(number, INT, []), helper.make_tensor_value_info(going, BOOL, [])]
        graph = self._inner("body", inputs, lambda nodes: [going, body(nodes, number)], [BOOL, kind])
        return self("Loop", times, "", body=graph)

    def _inner(self, name: str, inputs: list[onnx.ValueInfoProto], body: Body, types: Sequence[int]) -> GraphProto:
        nodes = Nodes(self)
        # A value from outside cannot be an output itself, nor can an input be one.
        outputs = [nodes("Identity", value) for value in body(nodes)]
        infos = [helper.make_tensor_value_info(value, kind, None) for value, kind in zip(outputs, types, strict=True)]
        return helper.make_graph(nodes.nodes, name, inputs, infos, value_info=nodes.shapes)

    def _name(self, what: str) -> str:
        return f"{what}_{next(self._numbers)}"
