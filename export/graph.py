"""A block as an ONNX graph.

torch's exporter takes seconds and several times a block's memory, and it folds weights into constants under names of
its own (a linear map on tokens becomes MatMul with a transposed copy). Blocks with the same number of layers have the
same graph. So a graph is traced once per number of layers, with random weights in the place of the trained ones. No two
random weights are alike, hence the graph's constants tell which parameter each came from, transposed or not; they get
that parameter's name, and a parameter that is used in several places is kept once. A block is then written by filling
in its EMA weights by name. Where a parameter cannot be found like that, each block is traced with its own weights
instead. Every block is verified against torch in either case.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from edgeblocks.export.destination import synced
from edgeblocks.families.family import AnyFamily, Family, FamilyOfContinuations
from edgeblocks.onnx_runtime import switch_telemetry_off
from edgeblocks.seeds import generator_at

OPSET = 20  # GELU is one node from 20 on, which onnxruntime 1.20 runs; 23 (Attention nodes) is no faster
ALIGNMENT_BYTES = 4096  # so that onnxruntime can map a tensor instead of reading it
_SMALL_BYTES = 1024  # shapes and scalars stay in the graph


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A weight of a graph whose bytes are made when they are written, one weight at a time."""

    num_bytes: int
    array: Callable[[], np.ndarray]


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class Template:
    """The graph of all blocks with a number of layers, without their weights.

    parameters: for each initializer that is to be filled in, the parameter and whether it is transposed.
    """

    graph: onnx.ModelProto
    parameters: Mapping[str, tuple[str, bool]]

    def tensors_of(self, network: nn.Module) -> Tensors:
        """The weights of a block under the names of the graph's initializers."""
        own = dict(network.named_parameters())

        def lazy(name: str, transposed: bool) -> LazyTensor:
            values = own[name].detach().numpy()
            return LazyTensor(num_bytes=values.nbytes, array=lambda: values.T if transposed else values)

        return {key: lazy(name, transposed) for key, (name, transposed) in self.parameters.items()}


def make_template(family: AnyFamily, num_layers: int) -> Template | None:
    """Trace a block with random weights and find each parameter among the graph's initializers.

    None when a parameter is not there as it is or transposed.
    """
    probe = family.block(num_layers=num_layers, checkpointing=False)
    probe.reset_tables_()
    generator = generator_at("export", num_layers)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=generator)
    program = _trace(probe.eval(), _signature_of(probe, family))
    # Constants that match nothing, such as positions, keep their values: they are the same in every block.
    matches = {key: _match(values, probe) for key, values in _constants(program).items()}
    found = {key: match for key, match in matches.items() if match is not None}
    renamed = {key: f"{name}.transposed" if transposed else name for key, (name, transposed) in found.items()}
    if {name for name, _ in found.values()} != {name for name, _ in probe.named_parameters()}:
        return None
    graph = _graph_without(program, set(found))
    _rename_initializers_(graph, renamed)
    return Template(graph=graph, parameters={renamed[key]: match for key, match in found.items()})


def write_graph(path: Path, graph: onnx.ModelProto, tensors: Tensors, *, external: bool) -> Path | None:
    """Write a graph with the values of the initializers named in `tensors`; `graph` itself stays without them.

    Returns:
        The file that holds the values when `external`, else None.

    Raises:
        OSError: the disk refused.
    """
    data_path = path.with_name(f"{path.name}.data") if external else None
    whole = onnx.ModelProto()  # a message keeps the memory of what is cleared in it, so each block gets its own
    whole.CopyFrom(graph)
    filled = [initializer for initializer in whole.graph.initializer if initializer.name in tensors]
    if data_path is None:
        for initializer in filled:
            initializer.raw_data = _bytes_of(initializer, tensors).tobytes()
    else:
        with synced(data_path) as file:
            for initializer in filled:
                values = _bytes_of(initializer, tensors)
                file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
                place = {"location": data_path.name, "offset": file.tell(), "length": values.nbytes}
                file.write(values.data)
                initializer.data_location = onnx.TensorProto.EXTERNAL
                for key, value in place.items():
                    initializer.external_data.add(key=key, value=str(value))
    with synced(path) as file:
        file.write(whole.SerializeToString())
    return data_path


def _bytes_of(initializer: onnx.TensorProto, tensors: Tensors) -> np.ndarray:
    values = np.ascontiguousarray(tensors[initializer.name].array(), dtype=np.dtype("<f4"))
    assert values.shape == tuple(initializer.dims), f"{initializer.name}: {values.shape} is not {initializer.dims}"
    return values


def _trace(network: nn.Module, signature: "Signature") -> torch.onnx.ONNXProgram:
    """The network as an ONNX program for any batch size."""
    switch_telemetry_off()  # the exporter may import onnxruntime
    with _quiet():
        program = torch.onnx.export(
            network,
            tuple(tensor for tensor, _ in signature.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(signature.inputs),
            output_names=signature.outputs,
            dynamic_shapes=tuple(dimensions for _, dimensions in signature.inputs.values()),
        )
    assert program is not None
    return program


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a graph takes and gives. Inputs by their name: an example, and which of its dimensions are free."""

    inputs: dict[str, tuple[torch.Tensor, dict[int, Any]]]
    outputs: list[str]


def decoder_signature(latent_shape: tuple[int, int, int]) -> Signature:
    """Latents [b, C, h, w], and the pictures that they become."""
    batch = torch.export.Dim("batch", min=1)
    return Signature(inputs={"latents": (torch.zeros(2, *latent_shape), {0: batch})}, outputs=["pictures"])


def _signature_of(network: nn.Module, family: AnyFamily) -> Signature:
    """Inputs and outputs of a block, by its family's task."""
    return _continuation_signature(network, family) if family.task == "continuation" else _signature(family)


def _signature(family: Family) -> Signature:
    """z, the noise level, and what a block sees beside them."""
    of_text = family.task == "text"
    examples = {
        "z": torch.zeros(2, *family.state_shape, dtype=torch.int64 if of_text else torch.float32),
        "t" if of_text else "sigma": torch.ones(2),
    }
    if family.condition_spec is not None:
        name, shape, dtype = family.condition_spec
        examples[name] = torch.zeros(2, *shape, dtype=dtype)
    batch = torch.export.Dim("batch", min=1)
    return Signature(
        inputs={name: (example, {0: batch}) for name, example in examples.items()},
        outputs=["logits" if of_text else "denoised"],
    )


def _continuation_signature(network: nn.Module, family: FamilyOfContinuations) -> Signature:
    """Any number of positions, behind any number of others (none, too) whose keys and values are `past`."""
    num_caches = family.num_caches(len(network.get_submodule("layers")))  # type: ignore[arg-type]  # a ModuleList
    code_width, heads = family.code_width, family.heads
    batch, new, before = (torch.export.Dim(name, min=least) for name, least in (("batch", 1), ("n", 1), ("past", 0)))
    return Signature(
        inputs={
            "z": (torch.zeros(2, 3, code_width), {0: batch, 1: new}),
            "sigma": (torch.ones(2), {0: batch}),
            "tokens": (torch.zeros(2, 3, dtype=torch.int64), {0: batch, 1: new}),
            "past": (torch.zeros(num_caches, 2, heads, 5, family.head_width), {1: batch, 3: before}),
        },
        outputs=["logits", "present"],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's advice on packages that are not installed and on its own names is not for our users."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)


def _constants(program: torch.onnx.ONNXProgram) -> dict[str, np.ndarray]:
    initializers = program.model.graph.initializers.items()
    return {key: value.const_value.numpy() for key, value in initializers if value.const_value is not None}


def _match(values: np.ndarray, probe: nn.Module) -> tuple[str, bool] | None:
    """The parameter whose values these are, and whether they are transposed."""
    for name, parameter in probe.named_parameters():
        own = parameter.detach().numpy()
        if values.dtype == own.dtype and np.array_equal(values, own):
            return name, False
        if values.dtype == own.dtype and own.ndim == 2 and np.array_equal(values, own.T):
            return name, True
    return None


def _graph_without(program: torch.onnx.ONNXProgram, keys: set[str]) -> onnx.ModelProto:
    """The program as a graph in which the initializers `keys` have their shapes but no values.

    What the exporter noted on each node goes, too: source lines and paths of this machine.
    """
    import onnx_ir

    shapes = {}
    for key in keys:
        initializer = program.model.graph.initializers[key]
        assert initializer.const_value is not None
        shapes[key] = tuple(initializer.const_value.shape)
        initializer.const_value = onnx_ir.tensor(np.empty(0, dtype=np.float32), name=key)
    graph: onnx.ModelProto = program.model_proto
    for tensor in graph.graph.initializer:
        if tensor.name in shapes:
            tensor.dims[:] = shapes[tensor.name]
            tensor.ClearField("raw_data")
    parts: list[Any] = [graph, graph.graph, *graph.graph.node, *graph.graph.initializer]
    parts += [*graph.graph.input, *graph.graph.output, *graph.graph.value_info]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return graph


def _rename_initializers_(graph: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Those that get one name are one: layers that are run several times have as many transposed copies of a weight."""
    for parts in (graph.graph.initializer, graph.graph.value_info):
        for part in parts:
            part.name = names.get(part.name, part.name)
        found = [part.name for part in parts]
        for place in reversed(range(len(found))):
            if found.index(found[place]) < place:
                del parts[place]
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def trace_own(network: nn.Module, family: AnyFamily) -> tuple[onnx.ModelProto, Tensors]:
    """The graph of one block traced as it is, and its constants, which may be any function of its weights."""
    return trace_whole(network, _signature_of(network, family))


def trace_whole(network: nn.Module, signature: Signature) -> tuple[onnx.ModelProto, Tensors]:
    """The same of a network with these inputs and outputs."""
    program = _trace(network, signature)
    constants = {
        key: values
        for key, values in _constants(program).items()
        if values.nbytes >= _SMALL_BYTES and values.dtype == np.float32
    }
    tensors = {
        key: LazyTensor(num_bytes=values.nbytes, array=partial(constants.__getitem__, key))
        for key, values in constants.items()
    }
    return _graph_without(program, set(constants)), tensors
