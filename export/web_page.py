"""From a run to a folder that is a page: the network runs in the browser of whoever opens it, and nothing is sent.

In it are an ordinary export, which `edgeblocks run` runs as well, onnxruntime-web, and the scripts of `export/web`.
"""

import json
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from edgeblocks.errors import ConfigError, RunError
from edgeblocks.export.destination import check_replaceable, staged, synced
from edgeblocks.export.export_run import export_run
from edgeblocks.export.manifest import sha256_of
from edgeblocks.export.web_runtime import BYTES, PACKAGE, SHA256, VERSION, WASM, runtime_files
from edgeblocks.files.untrusted import MalformedFileError, read_object
from edgeblocks.progress import Listener
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.units import format_bytes

KIND = "edgeblocks page"
FILE_NAME = "site.json"
NETWORK, RUNTIME = "network", "runtime"
"""Folders in a page's folder."""
MOST_GRAPH_BYTES = 10**9
"""WebAssembly has 4 GB at most, and a graph is there three times while it is loaded."""
MANY_BYTES = 10**8
_SHARES = {None: 1.0, "fp32": 1.0, "int8": 0.28, "int4": 0.16}
"""Of float32, what weights take."""


def export_page(
    run: RunDirectory,
    out: Path,
    listener: Listener,
    *,
    runtime: Path | None = None,
    weights: str | None = None,
    most_loss: str | None = None,
    overwrite: bool = False,
    mem_budget: str | None = None,
) -> dict[str, object]:
    """Write a run as a page, and return the manifest of its network.

    Args:
        out: a new or empty directory, or with `overwrite` a former page, which is replaced at the end.
        runtime: where onnxruntime-web is, see `web_runtime.runtime_files`.
        weights, most_loss, mem_budget: as of `export_run`.

    Raises:
        ConfigError: `out` holds something, the runtime is not there, or a browser could not run the network.
        EdgeblocksError: as of `export_run`.
    """
    out = out.resolve()
    check_replaceable(out, _files_of_a_page, flag="--web", what="page", overwrite=overwrite)
    # A chain that writes token by token runs all of its blocks for each: one graph is quicker, and its page is simpler.
    single_file = run.family().task == "continuation"
    _check_network(run, weights, single_file=single_file)
    files = {f"{RUNTIME}/{name}": content for name, content in runtime_files(runtime, listener).items()}
    web = resources.files("edgeblocks.export") / "web"
    files |= {file.name: file.read_bytes() for file in web.iterdir() if file.is_file()}
    with staged(out) as folder:
        manifest = export_run(
            run,
            folder / NETWORK,
            listener,
            single_file=single_file,
            weights=weights,
            most_loss=most_loss,
            mem_budget=mem_budget,
        )
        (folder / RUNTIME).mkdir()
        for name, content in files.items():
            with synced(folder / name) as file:
                file.write(content)
        _write_contents(folder)
    _tell_size(out, listener)
    return manifest


def _check_network(run: RunDirectory, weights: str | None, *, single_file: bool) -> None:
    """That a browser can run it.

    Raises:
        ConfigError: it cannot.
    """
    if run.family().only_exact:
        raise ConfigError(f"--web: {run.path} is a fine-tuned model, and pages run networks that were trained here")
    if single_file and weights not in (None, "fp32"):
        raise ConfigError(
            f"--web with --weights {weights}: a page runs a network that writes token by token as one graph, whose "
            f"weights are float32; leave --weights out"
        )
    sizes = [4 * layout.num_parameters for layout in run.store().layouts]
    largest = (sum if single_file or run.method.one_network else max)(sizes) * _SHARES.get(weights, 1.0)
    if largest > MOST_GRAPH_BYTES:
        cure = "train with more blocks" if single_file or weights == "int4" else "write rounded weights: --weights int8"
        raise ConfigError(
            f"--web: a graph of {format_bytes(int(largest))} is more than the {format_bytes(MOST_GRAPH_BYTES)} that a "
            f"page can load, as a browser's WebAssembly has 4 GB and a graph takes three times its size; {cure}"
        )
    definition = None if run.tokenizer is None else run.tokenizer.to_json()
    if definition is not None and not _is_plain(json.loads(definition)):
        raise ConfigError(
            "--web: the page reads byte pairs as `--tokenizer bpe` learns them, and this tokenizer.json has other parts"
        )


def _is_plain(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is one of byte pairs over bytes, with nothing around them."""
    splitting, decoding = definition.get("pre_tokenizer") or {}, definition.get("decoder") or {}
    return (
        definition["model"]["type"] == "BPE"
        and not definition.get("added_tokens")
        and not definition.get("normalizer")
        and (splitting.get("type"), decoding.get("type")) == ("ByteLevel", "ByteLevel")
        and (splitting.get("add_prefix_space"), splitting.get("use_regex", True)) == (False, True)
    )


def _write_contents(folder: Path) -> None:
    """site.json: all files and their checksums, and what the page fetches of the runtime."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "kind": KIND,
        "edgeblocks": metadata.version("edgeblocks"),
        "runtime": {
            "package": PACKAGE,
            "version": VERSION,
            "wasm": {"file": f"{RUNTIME}/{WASM}", "bytes": BYTES[WASM], "sha256": SHA256[WASM]},
        },
        "files": {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths},
    }
    with synced(folder / FILE_NAME) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())


def _files_of_a_page(folder: Path) -> set[str]:
    """The paths of all its files.

    Raises:
        RunError: it holds no page.
    """
    try:
        content = read_object(folder / FILE_NAME)
    except (OSError, MalformedFileError) as error:
        raise RunError(str(error)) from error
    files = content.get("files")
    if content.get("kind") != KIND or not isinstance(files, dict):
        raise RunError(f"its {FILE_NAME} is of another kind")
    return {FILE_NAME, *files}


def _tell_size(out: Path, listener: Listener) -> None:
    network = sum(path.stat().st_size for path in (out / NETWORK).glob("*.onnx"))
    whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    listener.note(f"the page has {format_bytes(whole)}, {format_bytes(network)} of them the network's graphs")
    if network > MANY_BYTES:
        listener.note("each visitor fetches all of that before the first result; --weights int8 is 0.28 of its size")
