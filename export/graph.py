"""From trained blocks to ONNX: one graph a block, and a manifest.

torch's exporter takes seconds and several times a block's memory, and it folds weights into constants under names of its
own (a linear map on tokens becomes MatMul with a transposed copy). Blocks with the same number of layers have the same
graph. So a graph is traced once per number of layers, with random weights in the place of the trained ones. No two random
weights are alike, hence the graph's constants tell which parameter each came from, transposed or not; they get that
parameter's name. A block is then written by filling in its EMA weights by name. Where a parameter cannot be found like
that, each block is traced with its own weights instead. Every block is verified against torch in either case.

An export is written to a hidden folder beside the destination and renamed into place when it has been verified: under
the final name there is only ever a whole export.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from edgeblocks.chain import BlockRunner
from edgeblocks.checkpoint import RunDirectory
from edgeblocks.errors import ConfigError, RunError, StorageError
from edgeblocks.export.manifest import (
    DEFAULT_STEPS,
    FILE_NAME,
    BlockFile,
    Manifest,
    SamplerSettings,
    read_manifest,
    sha256_of,
    write_manifest,
)
from edgeblocks.export.sampler import Sampler
from edgeblocks.export.verify import NUM_IMAGES, Listener, verify_export
from edgeblocks.families.dit import SIGMA_DATA
from edgeblocks.randomness import generator_at
from edgeblocks.scheduler import EmaLoader
from edgeblocks.units import format_bytes

OPSET = 20  # GELU is one node from 20 on, which onnxruntime 1.20 runs; 23 (Attention nodes) is no faster
EXTERNAL_ABOVE_BYTES = 10**9  # a protobuf file ends at 2 GB, and reading one takes twice its size
_ALIGNMENT_BYTES = 4096  # so that onnxruntime can map a tensor instead of reading it
_SMALL_BYTES = 1024  # shapes and scalars stay in the graph


def export_run(
    run: RunDirectory, out: Path, listener: Listener, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES
) -> dict[str, Any]:
    """Write a run's EMA weights as ONNX graphs with a manifest, verified against torch, and return the manifest.

    Args:
        out: a new or empty directory, or a former export, which is replaced at the end.
        external_above_bytes: blocks with more bytes of weights keep them in a file of their own beside the graph.

    Raises:
        ConfigError: `out` holds something else.
        RunError: the run is damaged.
        StorageError: the disk refused.
        EdgeblocksError: onnxruntime's numbers differ from torch's by more than is promised.
    """
    out = out.resolve()
    _check_destination(out)
    steps = [run.store().header(block).step for block in range(len(run.layers))]
    if min(steps) < run.settings.run.steps:
        listener.note(
            f"the run is not finished: exporting its blocks as saved, at steps {', '.join(map(str, steps))} of "
            f"{run.settings.run.steps}"
        )
    micro_batch = min(NUM_IMAGES, run.plan["micro_batch"])
    runner = BlockRunner(
        run.family(), run.layers, run.partition, EmaLoader(run.store()), micro_batch=micro_batch
    )
    with _staged(out) as folder:
        files = _write_blocks(run, runner, folder, listener, external_above_bytes)
        manifest = _describe(run, files)
        verified = verify_export(run, runner, Sampler(folder, manifest=manifest), listener)
        manifest = replace(manifest, verified=verified)
        write_manifest(folder, manifest)
    return manifest.to_json()


def _describe(run: RunDirectory, files: tuple[BlockFile, ...]) -> Manifest:
    return Manifest(
        edgeblocks=metadata.version("edgeblocks"),
        family=run.settings.run.family,
        opset=OPSET,
        image_shape=(run.data.channels, run.data.height, run.data.width),
        mean=run.data.mean,
        scale=run.data.scale,
        sigma_data=SIGMA_DATA,
        class_names=run.class_names,
        noise=run.family().noise,
        boundaries=run.partition.boundaries,
        sampler=SamplerSettings(steps=max(DEFAULT_STEPS, len(files))),
        files=files,
    )


def _write_blocks(
    run: RunDirectory, runner: BlockRunner, folder: Path, listener: Listener, external_above_bytes: int
) -> tuple[BlockFile, ...]:
    """Write the graphs block by block. Blocks of the same depth follow each other, so that one template is kept."""
    listener.stage("exporting")
    family, files = run.family(), []
    template: Template | None = None
    for done, block in enumerate(sorted(range(len(run.layers)), key=lambda block: run.layers[block])):
        if template is None or template.num_layers != run.layers[block]:
            template = make_template(family, run.layers[block])
            if template is None:
                listener.note(f"the exporter changed a parameter of block {block}: tracing it with its own weights")
        network = runner.network(block)
        if template is None:
            graph, tensors = _with_own_weights(network, family)
        else:
            graph, tensors = template.graph, template.tensors_of(network)
        files.append(_write_block(folder, block, graph, tensors, external_above_bytes))
        listener.advance(done + 1, len(run.layers), "exporting")
    return tuple(sorted(files, key=lambda file: file.block))


def _write_block(
    folder: Path, block: int, graph: onnx.ModelProto, tensors: "Tensors", external_above_bytes: int
) -> BlockFile:
    path = folder / f"block_{block:03d}.onnx"
    external = sum(tensor.num_bytes for tensor in tensors.values()) > external_above_bytes
    data_path = write_graph(path, graph, tensors, external=external)
    return BlockFile(
        block=block,
        file=path.name,
        data_file=None if data_path is None else data_path.name,
        sha256=sha256_of(path),
        data_sha256=None if data_path is None else sha256_of(data_path),
        bytes=path.stat().st_size + (0 if data_path is None else data_path.stat().st_size),
    )


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A weight of a graph whose bytes are made when they are written, one weight at a time."""

    num_bytes: int
    array: Callable[[], np.ndarray]


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class Template:
    """The graph of all blocks with `num_layers` layers, without their weights.

    parameters: for each initializer that is to be filled in, the parameter and whether it is transposed.
    """

    num_layers: int
    graph: onnx.ModelProto
    parameters: Mapping[str, tuple[str, bool]]

    def tensors_of(self, network: nn.Module) -> Tensors:
        """The weights of a block under the names of the graph's initializers."""
        own = dict(network.named_parameters())

        def lazy(name: str, transposed: bool) -> LazyTensor:
            values = own[name].detach().numpy()
            return LazyTensor(num_bytes=values.nbytes, array=lambda: values.T if transposed else values)

        return {key: lazy(name, transposed) for key, (name, transposed) in self.parameters.items()}


def make_template(family: Any, num_layers: int) -> Template | None:  # noqa: ANN401 - families.base.Family
    """Trace a block with random weights and find each parameter among the graph's initializers.

    None when a parameter is not there as it is or transposed.
    """
    probe = family.block(num_layers=num_layers, checkpointing=False)
    probe.reset_tables_()
    generator = generator_at("export", num_layers)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=generator)
    program = _trace(probe.eval(), family)
    initializers = program.model.graph.initializers
    found = {
        key: match
        for key, value in initializers.items()
        if (match := _match(value.const_value.numpy(), probe)) is not None
    }
    if {name for name, _ in found.values()} != {name for name, _ in probe.named_parameters()}:
        return None
    for key, (name, _) in found.items():
        initializers[key].const_value = program.model.graph.initializers[key].const_value
    graph = _without_data(program, set(found))
    renamed = {key: f"{name}.transposed" if transposed else name for key, (name, transposed) in found.items()}
    _rename(graph, renamed)
    return Template(
        num_layers=num_layers, graph=graph, parameters={renamed[key]: match for key, match in found.items()}
    )
