"""A fine-tuned image classifier in onnxruntime: numpy in, numpy out, no torch and no transformers.

The folder holds one graph that takes pictures as they are and normalises them itself, and our manifest: the classes,
the size of pictures, what every file's content must be, and how close the graph was to torch.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from edgeblocks.errors import ConfigError, RunError
from edgeblocks.export.loaded_graphs import LoadedGraphs
from edgeblocks.export.manifest import FILE_NAME, kind_of, read_content, write_content
from edgeblocks.export.manifest_figures import Rounding
from edgeblocks.export.manifest_types import MOST_OPSET, ImageSize, ModelFile
from edgeblocks.export.onnx_chain import parts
from edgeblocks.export.picture_classes import PictureClassifier, Pixels, Values
from edgeblocks.files.checked import AnyText, Checked, DeepRange, ListOf, NotNegative, Positive, Text
from edgeblocks.limits import MOST_CLASSES
from edgeblocks.onnx_runtime import PROCESSOR, Hardware

KIND: Literal["edgeblocks image classifier"] = "edgeblocks image classifier"
GRAPH = "model.onnx"
INPUT, OUTPUTS = "pixels", ("logits", "probabilities")


class VerifiedClassifier(Checked):
    """How close the graph was to torch when it was written, in float32.

    logits_limit: what it may be from torch's logits at most, which goes with their size.
    top1_equal: of so many pictures the likeliest class was the same.
    real_pictures: whether they are hold-out pictures of the run's data, not random ones.
    """

    logits_max_abs_error: NotNegative
    logits_limit: Positive
    top1_equal: Annotated[int, Field(ge=0)]
    pictures: Annotated[int, Field(ge=1, le=2**31)]
    real_pictures: bool


class VisionManifest(Checked):
    """What running the classifier needs besides its graph.

    image: the size of pictures.
    deep_range: values of grey of more than 8 bits that become pixels of 0 and 255; None: its upper eight bits of 16 do.
    verified: None only while the directory is being written.
    rounding: None where the weights are float32.
    """

    kind: Literal["edgeblocks image classifier"] = KIND
    format_version: Literal[1] = 1
    edgeblocks: Text
    model_type: Text
    opset: Annotated[int, Field(ge=1, le=MOST_OPSET)]
    image: ImageSize
    deep_range: DeepRange | None
    class_names: Annotated[ListOf[AnyText], Field(min_length=2, max_length=MOST_CLASSES)]
    graph: ModelFile
    verified: VerifiedClassifier | None = None
    rounding: Rounding | None = None

    @property
    def task(self) -> Literal["classes"]:
        """What it makes."""
        return "classes"

    @property
    def graphs(self) -> tuple[ModelFile]:
        """What is in the directory beside the manifest."""
        return (self.graph,)

    @property
    def weights(self) -> str:
        """As what matrices are written."""
        return "fp32" if self.rounding is None else self.rounding.weights

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.image.channels, self.image.height, self.image.width

    def to_json(self) -> dict[str, object]:
        """As it stands in the file."""
        return self.model_dump(mode="json", exclude={"rounding"} if self.rounding is None else None)

    def write(self, folder: Path) -> None:
        """Write manifest.json and wait until it is on the disk.

        Raises:
            OSError: the disk refused.
        """
        assert self.verified is not None, "only a verified export is finished"
        write_content(folder, self.to_json())

    @model_validator(mode="after")
    def _has_no_more_right_than_there_are(self) -> Self:
        if self.verified is not None and self.verified.top1_equal > self.verified.pictures:
            raise ValueError("verified.top1_equal is more than verified.pictures")
        return self


def is_vision_model(folder: Path) -> bool:
    """Whether a folder says that it is one; what it holds is looked at when it is opened."""
    return kind_of(folder) == KIND


def read_vision_manifest(folder: Path) -> VisionManifest:
    """The manifest of an exported classifier; its graph is looked at when it is used.

    Raises:
        RunError: it is damaged.
    """
    manifest = read_content(folder, VisionManifest)
    if manifest.verified is None:
        raise RunError(
            f"{folder / FILE_NAME} is damaged: verified is missing, so the export was never finished; export the run "
            f"again"
        )
    return manifest


class VisionModel(PictureClassifier, LoadedGraphs):
    """An exported classifier; its graph stays loaded from the first picture on. Not thread-safe."""

    manifest: VisionManifest

    def __init__(
        self, directory: Path, *, manifest: VisionManifest | None = None, hardware: Hardware = PROCESSOR
    ) -> None:
        """
        Args:
            manifest: given only while the directory is being written; else it is read.

        Raises:
            RunError: it is damaged.
        """
        self.manifest = read_vision_manifest(directory) if manifest is None else manifest
        super().__init__(directory, self.manifest.graphs, opset=self.manifest.opset, hardware=hardware)

    def run(self, pixels: Pixels, *, micro_batch: int | None = None) -> tuple[Values, Values]:
        """Logits and probabilities of the classes, float32 [N, classes] each, of pictures uint8 [N, H, W, C].

        Raises:
            ConfigError: the pictures have another size.
            RunError: the graph is missing, damaged or refused, or is of another model than the manifest describes.
        """
        self.taken.check(pixels)
        found = np.empty((2, len(pixels), len(self.manifest.class_names)), dtype=np.float32)
        for part in parts(len(pixels), micro_batch):
            needed = [(np.dtype(np.float32), found[one, part].shape) for one in (0, 1)]
            found[:, part] = self.run_file(self.manifest.graph, {INPUT: pixels[part]}, needed)
        return found[0], found[1]

    def classify(
        self,
        pixels: Pixels,
        *,
        steps: int | None = None,
        noises: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
    ) -> Values:
        """Probabilities of the classes, float32 [N, classes], of pictures uint8 [N, H, W, C].

        Args:
            steps, noises: refused; they belong to chains.
            seed: nothing is drawn.

        Raises:
            ConfigError, RunError: as `run`.
        """
        for name, value in (("steps", steps), ("noises", noises)):
            if value is not None:
                raise ConfigError(f"--{name} {value}: a fine-tuned classifier has no noise levels; leave it out")
        return self.run(pixels, micro_batch=micro_batch)[1]
