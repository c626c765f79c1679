"""An exported directory as what it is: a sampler of images, a classifier of them, or one of two writers of text; or a
fine-tuned classifier."""

from pathlib import Path
from typing import TYPE_CHECKING

from edgeblocks.export.manifest import read_manifest
from edgeblocks.export.manifest_types import Manifest
from edgeblocks.export.onnx_chain import ExportedChain
from edgeblocks.onnx_runtime import PROCESSOR, Hardware

if TYPE_CHECKING:
    from edgeblocks.export.vision_model import VisionModel


def open_graphs(directory: Path | str, *, hardware: Hardware = PROCESSOR) -> "ExportedChain | VisionModel":
    """The chain, or the fine-tuned classifier, of an exported directory.

    Raises:
        RunError: as `open_chain`.
    """
    from edgeblocks.export.vision_model import VisionModel, is_vision_model

    directory = Path(directory)
    if is_vision_model(directory):
        return VisionModel(directory, hardware=hardware)
    return open_chain(directory, hardware=hardware)


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
