"""From a fine-tuned model to a folder that onnxruntime runs: merged, converted by onnxruntime-genai's builder, and
compared with torch."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeblocks.children import python_module
from edgeblocks.data.text import TextSet
from edgeblocks.diffusion.next_token import write
from edgeblocks.diffusion.token_choice import Tokens, Values
from edgeblocks.errors import ConfigError, DataError, EdgeblocksError, RunError
from edgeblocks.export.destination import check_destination, staged
from edgeblocks.export.language_model import (
    GRAPH,
    TOKENIZER,
    ExportedFile,
    LanguageManifest,
    LanguageModel,
    VerifiedModel,
    Weights,
)
from edgeblocks.export.manifest import sha256_of
from edgeblocks.export.usage import write_text
from edgeblocks.export.usage_language import language_usage_text
from edgeblocks.files.untrusted import read_object
from edgeblocks.onnx_runtime import TELEMETRY_OFF
from edgeblocks.pretrained.decoder import Decoder
from edgeblocks.pretrained.library import library
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.pretrained.writing import end_tokens
from edgeblocks.profiling.budgets import check_needed
from edgeblocks.progress import Listener
from edgeblocks.run import Run
from edgeblocks.runs.open_data import data_of
from edgeblocks.units import format_bytes

BUILDER = "onnxruntime_genai.models.builder"
_LIBRARY = "onnxruntime_genai"
LIBRARIES_BYTES = 1_100_000_000
BYTES_A_PARAMETER = 8.5
"""What two processes take, ours and the builder's, measured with SmolLM2-135M: 0.48 and 1.74 GB for int8; and 2.10 GB
for fp32 where the graph is compared with torch."""
GREEDY_TOKENS = 32
WINDOWS = 8
_PROMPT = "Once upon a time"
_SHOWN_CHARACTERS = 600


def export_model(
    run: Run,
    out: Path,
    listener: Listener,
    *,
    weights: Weights = "int8",
    overwrite: bool = False,
    mem_budget: str | None = None,
) -> dict[str, object]:
    """Write a fine-tuned model as an ONNX graph with a KV cache, compare it with torch, and return its manifest.

    Args:
        out: a new or empty folder, or with `overwrite` a former export, which is replaced at the end.
        weights: of the matrices: int8 and int4 in groups of 32 by onnxruntime's MatMulNBits, or fp32.
        mem_budget: what it may take of memory; None does not bound it. The builder holds the whole model.

    Raises:
        ConfigError: the library is missing, or `out` holds something.
        DoesNotFitError: it takes more than `mem_budget`.
        RunError: the run is damaged, or the builder does not know the model.
        StorageError: the disk refused.
        EdgeblocksError: a graph of fp32 writes another text than torch.
    """
    directory = run.directory
    family = directory.family()
    assert isinstance(family, Decoder)
    if importlib.util.find_spec(_LIBRARY) is None:
        raise ConfigError(
            "a fine-tuned model is exported by onnxruntime-genai, which is not installed: pip install "
            "'edgeblocks[genai]'"
        )
    out = out.resolve()
    check_destination(out, overwrite=overwrite)
    source = model_folder(family.settings.model)
    values = sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    needed_bytes = LIBRARIES_BYTES + int(BYTES_A_PARAMETER * values)
    why = "the builder, a process beside this one, holds the whole model"
    check_needed(mem_budget, needed_bytes, f"exporting {directory.path}", why)
    listener.note(f"exporting takes up to {format_bytes(needed_bytes)} of memory")
    with staged(out) as folder:
        merged, graph = folder / "merged", folder / "graph"
        listener.stage("merging")
        run.merge(merged)
        listener.stage(f"converting to {weights}")
        _build(merged, graph, weights)
        manifest = _describe(run, family, merged, graph, weights)
        listener.stage("comparing with torch")
        verified = _verified(run, merged, graph, manifest, listener)
        shutil.rmtree(merged)
        for path in sorted(graph.iterdir()):
            path.rename(folder / path.name)
        graph.rmdir()
        manifest = manifest.model_copy(update={"verified": verified})
        manifest.write(folder)
    return manifest.model_dump(mode="json")


def _build(merged: Path, graph: Path, weights: Weights) -> None:
    """Have the builder write a graph."""
    cache = merged / ".cache"
    environment = {**TELEMETRY_OFF, **os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    asked = ["-m", str(merged), "-o", str(graph), "-p", weights, "-e", "cpu", "-c", str(cache)]
    done = subprocess.run(python_module(BUILDER, *asked), env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not (graph / GRAPH).is_file():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise RunError(
            f"onnxruntime-genai's builder does not convert the model (exit code {done.returncode}): "
            f"{(lines[-1] if lines else 'it says nothing')[:_SHOWN_CHARACTERS]}; edgeblocks merge makes a folder that "
            f"other programs convert"
        )


def _describe(run: Run, family: Decoder, merged: Path, graph: Path, weights: Weights) -> LanguageManifest:
    config: dict[str, Any] = dict(read_object(graph / "genai_config.json"))
    told = config["model"]
    decoder = told["decoder"]
    # The builder leaves out what it has no use for; ours reads the tokenizer as it was.
    shutil.copyfile(merged / TOKENIZER, graph / TOKENIZER)
    model_type = str(model_folder(family.settings.model).config["model_type"])
    length = min(family.data.length, told["context_length"])
    write_text(graph, language_usage_text(model_type=model_type, weights=weights, length=length))
    files = [
        ExportedFile(name=path.name, sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in sorted(graph.iterdir())
    ]
    return LanguageManifest(
        edgeblocks=metadata.version("edgeblocks"),
        model_type=model_type,
        weights=weights,
        layers=decoder["num_hidden_layers"],
        heads=decoder["num_key_value_heads"],
        head_width=decoder["head_size"],
        vocabulary=told["vocab_size"],
        positions=told["context_length"],
        length=length,
        ends=tuple(sorted(end_tokens(model_folder(family.settings.model)))),
        files=tuple(files),
    )


def _verified(run: Run, merged: Path, graph: Path, manifest: LanguageManifest, listener: Listener) -> VerifiedModel:
    """Greedy text of transformers and of the graph, and their losses on windows of the run's data."""
    model = LanguageModel(graph, manifest=manifest)
    theirs = library().AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    data = _windows(run, listener)
    given = model.tokenizer.encode(_PROMPT)
    if data is not None:
        first, counted = data[0][0], data[1][0]
        given = first[: max(1, (int(np.flatnonzero(counted)[-1]) + 1) // 2)]
    length = min(len(given) + GREEDY_TOKENS, manifest.positions)
    drawing = model.drawing(length=length, temperature=0.0)

    def next_logits(tokens: Tokens, cache: object | None) -> tuple[Values, object]:
        out = theirs(input_ids=torch.from_numpy(tokens), use_cache=True, **({} if cache is None else {"cache": cache}))
        return out.logits[:, -1].numpy(), out.cache

    with torch.no_grad():
        (expected,) = write(next_logits, given, drawing, n=1, piece=len(given))
        (found,) = model.written(given, drawing, n=1)
        equal = next((at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
        equal = min(len(expected), len(found)) if equal is None else equal
        most = max(len(expected), len(found))
        if manifest.weights == "fp32" and equal < most:
            raise EdgeblocksError(
                f"the graph writes another text than torch after {equal} of {most} tokens "
                f"({model.tokenizer.decode(found)!r} and {model.tokenizer.decode(expected)!r}); nothing was exported"
            )
        losses: list[float] | None = None
        if data is not None:
            whole = (
                lambda rows: theirs(torch.from_numpy(rows)).logits.numpy(),
                lambda rows: model.logits(rows, None)[0],
            )
            losses = [_loss(logits, *data) for logits in whole]
    return VerifiedModel(
        greedy_equal=equal,
        greedy_tokens=most,
        loss_torch=None if losses is None else losses[0],
        loss_graph=None if losses is None else losses[1],
        windows=0 if data is None else len(data[0]),
    )


def _windows(run: Run, listener: Listener) -> tuple[np.ndarray, np.ndarray] | None:
    """Some windows of the run's data and which tokens count; None where the data are not there."""
    directory = run.directory
    try:
        data = data_of(directory.data_settings.run, listener.advance)
    except (ConfigError, DataError) as error:
        listener.note(f"the run's data are not there ({error}): the graph's loss is not compared with torch's")
        return None
    if data.fingerprint != directory.data_fingerprint:
        listener.note(f"{directory.data_source} is another text now: the graph's loss is not compared with torch's")
        return None
    assert isinstance(data, TextSet)
    tokens, counts = data.gather(data.evaluation_indices(WINDOWS))
    counted = np.ones(tokens.shape, dtype=bool) if counts is None else np.asarray(counts)
    return tokens, counted


def _loss(logits_of: Callable[[Tokens], Values], tokens: np.ndarray, counts: np.ndarray) -> float:
    """The mean over windows of each one's mean loss of the tokens that count, in nats.

    Args:
        logits_of: logits [1, n, vocabulary] of tokens [1, n].
    """
    means = []
    for row, counted in zip(tokens, counts, strict=True):
        wanted = logits_of(row[None, :-1])[0].astype(np.float64)
        largest = wanted.max(axis=1)
        sums = largest + np.log(np.exp(wanted - largest[:, None]).sum(axis=1))
        losses = sums - np.take_along_axis(wanted, row[1:, None], axis=1)[:, 0]
        means.append(float((losses * counted[1:]).sum() / max(1, counted[1:].sum())))
    return float(np.mean(means))
