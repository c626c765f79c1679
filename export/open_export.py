"""An exported directory as what it is: a sampler of images, a classifier of them, or one of two writers of text."""

from pathlib import Path

from edgeblocks.export.manifest import read_manifest
from edgeblocks.export.manifest_types import Manifest
from edgeblocks.export.onnx_chain import ExportedChain
from edgeblocks.onnx_runtime import PROCESSOR, Hardware


def open_chain(
    directory: Path | str, *, manifest: Manifest | None = None, hardware: Hardware = PROCESSOR
) -> ExportedChain:
    """The chain of an exported directory.

    Args:
        manifest: given only while the directory is being written; else it is read.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """
    from edgeblocks.export.classifier import Classifier
    from edgeblocks.export.continuer import Continuer
    from edgeblocks.export.sampler import Sampler
    from edgeblocks.export.writer import Writer

    manifest = read_manifest(Path(directory)) if manifest is None else manifest
    kinds: dict[str, type[ExportedChain]] = {
        "images": Sampler,
        "classes": Classifier,
        "text": Writer,
        "continuation": Continuer,
    }
    return kinds[manifest.task](directory, manifest=manifest, hardware=hardware)
