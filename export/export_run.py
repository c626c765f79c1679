"""From a run to an exported directory: a graph for each block, or for the whole chain, and a manifest.

All is verified against torch.
"""

from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import onnx

from edgeblocks.data.tokenizer import TOKENIZER_FILE, Kind
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.export.chain_file import write_chain
from edgeblocks.export.destination import check_destination, staged, synced
from edgeblocks.export.graph import (
    OPSET,
    Template,
    Tensors,
    decoder_signature,
    make_template,
    trace_own,
    trace_whole,
    write_graph,
)
from edgeblocks.export.manifest import block_file, sha256_of, write_manifest
from edgeblocks.export.manifest_types import (
    CHAIN_FORMAT_VERSION,
    BlockFile,
    CacheShape,
    ContinuationManifest,
    ContinuerSettings,
    Decoding,
    ImageManifest,
    ImageSize,
    Manifest,
    Noise,
    SamplerSettings,
    TextManifest,
    WriterSettings,
    masking_levels,
    noise_levels,
)
from edgeblocks.export.onnx_chain import ExportedChain
from edgeblocks.export.open_export import open_chain
from edgeblocks.export.rounding import most_loss_of, round_blocks, rounding_of
from edgeblocks.export.tolerances import NUM_OUTPUTS
from edgeblocks.export.usage import write_usage
from edgeblocks.export.verify import Listener, verify_export
from edgeblocks.export.verify_chain import verify_chain
from edgeblocks.families.base import ImageInfo, TextInfo
from edgeblocks.inference.block_runner import BlockRunner, token_chain
from edgeblocks.inference.staged_weights import loaded_ema
from edgeblocks.pretrained.autoencoder import LIBRARY_BYTES
from edgeblocks.profiling.budgets import check_needed
from edgeblocks.profiling.latents import decoding_bytes
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.latents import autoencoder_of
from edgeblocks.tasks import TASKS
from edgeblocks.units import format_bytes

DECODER_FILE = "decoder.onnx"
EXTERNAL_ABOVE_BYTES = 10**9  # a protobuf file ends at 2 GB, and reading one takes twice its size


LIBRARIES_BYTES = 490_000_000
BLOCK_COPIES = 5.3
"""What an export takes, measured: 471 MB with blocks of 1.5 MB, 821 MB (dit) and 881 MB (ar) with blocks of 79 MB. The
graph is traced with weights of its own, folded into constants, and written and verified beside the block's."""


ROUNDED_COPIES = 8.0
"""The same where weights are rounded: 1.15 GB with a block of 89 MB, by onnxruntime's tool."""
CHAIN_COPIES = 2.0
"""Of all blocks, while the whole chain is verified beside one of them: 1.00 GB was taken with three blocks of 79 MB."""


def export_run(
    run: RunDirectory,
    out: Path,
    listener: Listener,
    *,
    single_file: bool = False,
    weights: str | None = None,
    most_loss: str | None = None,
    overwrite: bool = False,
    mem_budget: str | None = None,
    external_above_bytes: int = EXTERNAL_ABOVE_BYTES,
) -> dict[str, object]:
    """Write a run's EMA weights as ONNX graphs with a manifest, verified against torch, and return the manifest.

    Args:
        out: a new or empty directory, or with `overwrite` a former export, which is replaced at the end.
        single_file: one graph for the whole chain, with its loop over the noise levels; else one a block.
        weights: int8 or int4: matrices are rounded after the verification; None or fp32: as they are.
        most_loss: a percentage by which rounding may worsen the figure that is judged (`Rounding.judged`) on hold-out
            data; None: 0.5% of int8, any of int4.
        mem_budget: what it may take of memory; None does not bound it.
        external_above_bytes: graphs with more bytes of weights keep them in a file of their own beside the graph.

    Raises:
        ConfigError: `out` holds something, `mem_budget` is no size, or arguments do not go together.
        DoesNotFitError: it takes more than `mem_budget`.
        RunError: the run is damaged.
        StorageError: the disk refused.
        EdgeblocksError: onnxruntime's numbers differ from torch's by more than is promised, or rounding costs more than
            `most_loss`.
    """
    rounding = rounding_of(weights, most_loss)
    out = out.resolve()
    check_destination(out, overwrite=overwrite)
    _check_memory(run, listener, mem_budget, single_file=single_file, rounded=rounding is not None)
    tell_unfinished(run, listener)
    micro_batch = min(NUM_OUTPUTS, run.plan.micro_batch)
    # Stages that were trained together are one block, all of it in memory.
    ema = loaded_ema(run, slots=len(run.file_layers) if run.method.one_network else 1)
    runner = BlockRunner(run.family(), run.layers, run.partition, ema, micro_batch=micro_batch)
    with staged(out) as folder:
        # A chain is made of blocks whose weights are in files of their own.
        block_above_bytes = 0 if single_file else external_above_bytes
        files = _write_blocks(run, runner, folder, listener, block_above_bytes)
        manifest = _describe(run, files, folder)
        if isinstance(manifest, ImageManifest):
            decoding = _write_decoder(run, folder, len(files), block_above_bytes)
            manifest = manifest.model_copy(update={"decoding": decoding})
        walk = open_chain(folder, manifest=manifest)
        verified = verify_export(run, runner, walk, listener)
        if rounding is not None:
            manifest = round_blocks(
                run,
                walk,
                listener,
                weights=rounding,
                most_loss=most_loss_of(most_loss, rounding),
                micro_batch=micro_batch,
                external_above_bytes=block_above_bytes,
            )
            walk = open_chain(folder, manifest=manifest)
        if single_file:
            manifest = _in_one_file(run, runner, walk, listener, external_above_bytes)
        # Last of all: a folder has a manifest only if its graphs give torch's numbers.
        manifest = manifest.model_copy(update={"verified": verified})
        write_usage(folder, manifest)
        write_manifest(folder, manifest)
    return manifest.to_json()


def tell_unfinished(run: RunDirectory, listener: Listener) -> None:
    """Note where a run has steps to make."""
    steps = run.saved_steps(run.store())
    if min(steps) < run.settings.run.steps:
        listener.note(
            f"the run is not finished: exporting its blocks as saved, at steps {', '.join(map(str, steps))} of "
            f"{run.settings.run.steps}"
        )


def _in_one_file(
    run: RunDirectory, runner: BlockRunner, walk: ExportedChain, listener: Listener, external_above_bytes: int
) -> Manifest:
    """Link the blocks of an export to one graph, which takes their place when it gives what they give."""
    listener.stage("linking the blocks")
    folder, blocks = walk.directory, walk.manifest
    written = write_chain(folder, blocks, external_above_bytes=external_above_bytes)
    changed: dict[str, object] = {"format_version": CHAIN_FORMAT_VERSION, "files": (), "chain": written}
    if isinstance(blocks, ImageManifest) and blocks.decoding is not None:
        changed["decoding"] = blocks.decoding.model_copy(update={"graph": None})
    linked = blocks.model_copy(update=changed)
    verified = verify_chain(run, runner, walk, open_chain(folder, manifest=linked), listener)
    for name in (name for file in blocks.graphs for name in file.names):
        (folder / name).unlink()
    return linked.model_copy(update={"chain": written.model_copy(update={"verified": verified})})


def export_bytes(run: RunDirectory, *, single_file: bool = False, rounded: bool = False) -> int:
    """What an export takes of memory at most, about: it goes with the largest block, or with all stages together.

    Of a chain in one file all blocks are in memory once it is verified.
    """
    layouts = run.store().layouts
    sizes = [4 * layout.num_parameters for layout in layouts]
    largest = sum(sizes) if run.method.one_network else max(sizes)
    copies = ROUNDED_COPIES if rounded else BLOCK_COPIES
    autoencoder, beside = autoencoder_of(run), 0
    if autoencoder is not None:
        sizes.append(sum(4 * parameter.numel() for parameter in autoencoder.decoder("meta").parameters()))
        beside = LIBRARY_BYTES + 2 * decoding_bytes(run.settings.run, run.data, NUM_OUTPUTS)  # by both libraries
    chain_bytes = int(CHAIN_COPIES * sum(sizes)) + max(sizes) if single_file else 0
    return LIBRARIES_BYTES + beside + max(int(copies * max(largest, *sizes)), chain_bytes)


def _check_memory(
    run: RunDirectory, listener: Listener, mem_budget: str | None, *, single_file: bool, rounded: bool
) -> None:
    """Tell what an export will take, and refuse it where that is more than it may."""
    needed_bytes = export_bytes(run, single_file=single_file, rounded=rounded)
    why = f"a graph is traced and verified beside its weights, {run.method.part} by {run.method.part}"
    check_needed(mem_budget, needed_bytes, f"exporting {run.path}", why)
    listener.note(f"exporting takes up to {format_bytes(needed_bytes)} of memory")


def _describe(run: RunDirectory, files: tuple[BlockFile, ...], folder: Path) -> Manifest:
    family, partition = run.family(), run.partition
    common: dict[str, Any] = {
        "edgeblocks": metadata.version("edgeblocks"),
        "family": run.settings.run.family,
        "task": family.task,
        "opset": OPSET,
        "boundaries": partition.boundaries,
        "files": files,
    }
    if family.task == "text":
        writer = WriterSettings(steps=max(WriterSettings().steps, len(files)))
        levels = masking_levels(partition, num_steps=writer.steps)
        return TextManifest(**common, **_wording(run, family.data, folder), sampler=writer, levels=levels)
    common["noise"] = Noise(**asdict(family.noise))
    if family.task == "continuation":
        continuer = ContinuerSettings(steps=max(ContinuerSettings().steps, len(files)))
        chain = token_chain(family, run.layers, partition, sampler_levels(partition, num_steps=continuer.steps))
        return ContinuationManifest(
            **common,
            **_wording(run, family.data, folder),
            code_width=family.code_width,
            caches=CacheShape(
                per=chain.caches_per, num_caches=chain.num_caches, heads=chain.heads, head_width=chain.head_width
            ),
            sampler=continuer,
            levels=noise_levels(partition, num_steps=continuer.steps),
        )
    usual = TASKS[family.task]
    sampler = SamplerSettings(steps=max(usual.steps, len(files)), solver=usual.solver, noises=usual.noises)
    return ImageManifest(
        **common,
        image=ImageSize(channels=family.data.channels, height=family.data.height, width=family.data.width),
        mean=family.data.mean,
        scale=family.data.scale,
        deep_range=family.data.deep_range,
        sigma_data=family.sigma_data,
        num_classes=len(run.class_names),
        class_names=run.class_names,
        sampler=sampler,
        levels=noise_levels(partition, num_steps=sampler.steps),
    )


class Wording(TypedDict):
    """A text's facts in a manifest."""

    vocabulary: int
    length: int
    tokenizer: Kind
    tokenizer_sha256: str | None


def _wording(run: RunDirectory, data: TextInfo, folder: Path) -> Wording:
    """A text's facts in a manifest; writes tokenizer.json where the tokenizer was trained."""
    assert run.tokenizer is not None
    definition = run.tokenizer.to_json()
    if definition is not None:
        with synced(folder / TOKENIZER_FILE) as file:
            file.write(definition.encode())
    return {
        "vocabulary": data.vocabulary,
        "length": data.length,
        "tokenizer": run.tokenizer.kind,
        "tokenizer_sha256": None if definition is None else sha256_of(folder / TOKENIZER_FILE),
    }


def _write_blocks(
    run: RunDirectory, runner: BlockRunner, folder: Path, listener: Listener, external_above_bytes: int
) -> tuple[BlockFile, ...]:
    """Write the graphs block by block. Blocks of the same depth follow each other, so that one template is kept."""
    listener.stage("exporting")
    family, files = run.family(), []
    template: Template | None = None
    template_layers = 0
    for done, block in enumerate(sorted(range(len(run.layers)), key=lambda block: run.layers[block])):
        if run.layers[block] != template_layers:
            template_layers = run.layers[block]
            template = make_template(family, template_layers)
        network = runner.network(block)
        if template is None:
            listener.note(f"the exporter changed a parameter of block {block}: tracing it with its own weights")
            graph, tensors = trace_own(network, family)
        else:
            graph, tensors = template.graph, template.tensors_of(network)
        files.append(_write_block(folder, block, graph, tensors, external_above_bytes))
        listener.advance(done + 1, len(run.layers), "exporting")
    return tuple(sorted(files, key=lambda file: file.block))


def _write_decoder(run: RunDirectory, folder: Path, number: int, external_above_bytes: int) -> Decoding | None:
    """Write the graph that makes pictures of latents; None where samples are pictures."""
    autoencoder = autoencoder_of(run)
    if autoencoder is None:
        return None
    data = run.data
    assert isinstance(data, ImageInfo)
    signature = decoder_signature((data.channels, data.height, data.width))
    graph, tensors = trace_whole(autoencoder.decoder("cpu"), signature)
    file = _write_graph(folder / DECODER_FILE, number, graph, tensors, external_above_bytes)
    height, width, channels = data.picture_shape
    return Decoding(graph=file, picture=ImageSize(channels=channels, height=height, width=width))


def _write_block(
    folder: Path, block: int, graph: onnx.ModelProto, tensors: Tensors, external_above_bytes: int
) -> BlockFile:
    return _write_graph(folder / f"block_{block:03d}.onnx", block, graph, tensors, external_above_bytes)


def _write_graph(
    path: Path, number: int, graph: onnx.ModelProto, tensors: Tensors, external_above_bytes: int
) -> BlockFile:
    external = sum(tensor.num_bytes for tensor in tensors.values()) > external_above_bytes
    data_path = write_graph(path, graph, tensors, external=external)
    return block_file(path, data_path, number)
