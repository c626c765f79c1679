"""An exported directory as what it is: a sampler of images, or a classifier of them."""

from pathlib import Path

from edgeblocks.export.chain import ExportedChain
from edgeblocks.export.manifest import Manifest, read_manifest


def open_chain(directory: Path | str, *, manifest: Manifest | None = None) -> ExportedChain:
    """The chain of an exported directory.

    Args:
        manifest: given only while the directory is being written; else it is read.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """
    from edgeblocks.export.classifier import Classifier
    from edgeblocks.export.sampler import Sampler

    manifest = read_manifest(Path(directory)) if manifest is None else manifest
    kinds = {"images": Sampler, "classes": Classifier}
    return kinds[manifest.task](directory, manifest=manifest)
