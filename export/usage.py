"""USE.md of an exported directory: how other programs run its graphs, with onnxruntime and nothing of this package."""

from pathlib import Path

from edgeblocks.export.destination import synced
from edgeblocks.export.manifest import USAGE_NAME
from edgeblocks.export.manifest_types import Manifest, WordedManifest
from edgeblocks.export.usage_chain import Example, chain_example
from edgeblocks.export.usage_walk import walk_example

_MAKES = {
    "images": "makes images out of noise",
    "classes": "tells how likely each class of an image is",
    "text": "writes text by filling in masked tokens",
    "continuation": "writes text token by token",
}
_TOKENS = {
    "chars": "0 is a space, 1 to 26 are the letters a to z",
    "bytes": "the bytes of the text in UTF-8",
    "bpe": 'those of `tokenizer.json`, which the library tokenizers reads: `Tokenizer.from_file("tokenizer.json")`',
}


def write_usage(folder: Path, manifest: Manifest) -> None:
    """Write USE.md.

    Raises:
        OSError: the disk refused.
    """
    write_text(folder, usage_text(manifest))


def write_text(folder: Path, text: str) -> None:
    """Write USE.md of any export.

    Raises:
        OSError: the disk refused.
    """
    with synced(folder / USAGE_NAME) as file:
        file.write(text.encode())


def usage_text(manifest: Manifest) -> str:
    """What USE.md says of an export."""
    example = walk_example(manifest) if manifest.chain is None else chain_example(manifest)
    parts = [f"# How to run this {manifest.family} network", _opening(manifest), *programs(example)]
    if manifest.chain is None:
        parts.append(
            "A graph of the whole chain, which a program runs in one call, is written by `edgeblocks export RUN -o DIR "
            "--single-file`."
        )
    parts.append("A page that runs the network in a browser is written by `edgeblocks export RUN --web DIR`.")
    return "\n\n".join(parts) + "\n"


def programs(example: Example) -> list[str]:
    """Paragraphs on what graphs take and give, and with the programs that run them."""
    values = [f"- `{name}`: {meaning}" for name, meaning in example.values.items()]
    return [
        "\n".join(values),
        "In Python, in this directory:",
        f"```python\n{example.python.strip()}\n```",
        "In JavaScript, with `onnxruntime-node` (in a browser `onnxruntime-web`, and the file's address):",
        f"```js\n{example.javascript.strip()}\n```",
    ]


def _opening(manifest: Manifest) -> str:
    high, low = manifest.boundaries[0], manifest.boundaries[-1]
    if manifest.chain is None:
        how = f"{manifest.num_blocks} graphs, each for the noise levels that it owns, are run one after the other"
    else:
        how = f"`{manifest.chain.file}` is the whole chain, with its loop over the noise levels"
    lines = [
        f"The network {_MAKES[manifest.task]}. {how}. It needs onnxruntime (opset {manifest.opset}) and nothing else.",
        f"Noise levels descend from {high:g} to {low:g}; those of the manifest are good ones, and so are others.",
    ]
    if isinstance(manifest, WordedManifest):
        lines.append(f"Tokens: {_TOKENS[manifest.tokenizer]}.")
    return "\n".join(lines)
