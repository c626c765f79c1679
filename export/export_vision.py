"""From a fine-tuned image classifier to one ONNX graph that takes pictures as they are, compared with torch.

The model is merged first, as `edgeblocks merge` does it, so that the graph is that of what is merged: adapters are in
their matrices, and weights have been rounded to the type that the model's files have them in.
"""

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeblocks.export.destination import check_destination, staged
from edgeblocks.export.export_run import EXTERNAL_ABOVE_BYTES, LIBRARIES_BYTES, tell_unfinished
from edgeblocks.export.graph import OPSET, Signature, trace_whole, write_graph
from edgeblocks.export.manifest import graph_facts
from edgeblocks.export.manifest_types import ImageSize, ModelFile
from edgeblocks.export.picture_classes import Pixels
from edgeblocks.export.rounding import most_loss_of, rounding_of
from edgeblocks.export.tolerances import check_finite, largest_difference
from edgeblocks.export.usage_vision import write_vision_usage
from edgeblocks.export.verify import enforce, real_data
from edgeblocks.export.vision_model import (
    GRAPH,
    INPUT,
    OUTPUTS,
    VerifiedClassifier,
    VisionManifest,
    VisionModel,
)
from edgeblocks.export.vision_rounding import round_classifier
from edgeblocks.pretrained.library import library
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.pretrained.vision import Vision
from edgeblocks.pretrained.vision_folder import Pictures
from edgeblocks.profiling.budgets import check_needed
from edgeblocks.progress import Listener
from edgeblocks.run import Run
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.units import format_bytes

COPIES, ROUNDED_COPIES = 4.2, 5.8
"""Of the model, what an export takes, beside torch's exporter and transformers; measured with ViT-B's shape, 342 MB:
1.97 GB, and 2.49 GB with int8."""
LOGITS_LIMIT = 1e-3
"""Of a difference from torch's logits, as a share of the largest one or of 1."""
PICTURES = 16
"""On which both are compared."""
_TOGETHER = 8


def export_vision(
    run: Run,
    out: Path,
    listener: Listener,
    *,
    weights: str | None = None,
    most_loss: str | None = None,
    overwrite: bool = False,
    mem_budget: str | None = None,
    external_above_bytes: int = EXTERNAL_ABOVE_BYTES,
) -> dict[str, object]:
    """Write a fine-tuned classifier as an ONNX graph, compare it with torch, and return its manifest.

    Args:
        out: a new or empty folder, or with `overwrite` a former export, which is replaced at the end.
        weights, most_loss, external_above_bytes: as of `export_run`.
        mem_budget: what it may take of memory; None does not bound it. The whole model is in memory.

    Raises:
        ConfigError: `out` holds something, or arguments do not go together.
        DoesNotFitError: it takes more than `mem_budget`.
        RunError: the run is damaged, or the model's folder is another one now.
        StorageError: the disk refused.
        EdgeblocksError: the graph's logits are others than torch's, or rounding costs more than `most_loss`.
    """
    directory, rounding = run.directory, rounding_of(weights, most_loss)
    family = directory.family()
    assert isinstance(family, Vision)
    out = out.resolve()
    check_destination(out, overwrite=overwrite)
    needed_bytes = export_bytes(family, rounded=rounding is not None)
    check_needed(mem_budget, needed_bytes, f"exporting {run.path}", "the whole model is traced and verified in memory")
    listener.note(f"exporting takes up to {format_bytes(needed_bytes)} of memory")
    tell_unfinished(directory, listener)
    with staged(out) as folder:
        listener.stage("merging")
        merged = folder / "merged"
        run.merge(merged)
        network = OnPixels(_loaded(merged), family.pictures).eval()
        listener.stage("exporting")
        manifest = _written(directory, family, network, folder, external_above_bytes)
        model = VisionModel(folder, manifest=manifest)
        listener.stage("verifying against torch")
        verified = _verified(directory, network, model, listener)
        del network
        shutil.rmtree(merged)
        if rounding is not None:
            manifest = round_classifier(
                directory,
                model,
                listener,
                weights=rounding,
                most_loss=most_loss_of(most_loss, rounding),
                external_above_bytes=external_above_bytes,
            )
        # Last of all: a folder has a manifest only if its graph gives torch's numbers.
        manifest = manifest.model_copy(update={"verified": verified})
        write_vision_usage(folder, manifest)
        manifest.write(folder)
    return manifest.to_json()


def export_bytes(family: Vision, *, rounded: bool = False) -> int:
    """What an export takes of memory at most, about: it goes with the whole model."""
    weight_bytes = sum(value.nbytes for value in family.shell("meta").model.state_dict().values())
    copies = ROUNDED_COPIES if rounded else COPIES
    return LIBRARIES_BYTES + family.library_bytes + int(copies * weight_bytes)


class OnPixels(nn.Module):
    """A classifier of the library's that is given pictures as they are, uint8 [batch, height, width, channels]."""

    def __init__(self, network: Any, pictures: Pictures) -> None:
        super().__init__()
        self.network, self._pictures = network, pictures

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities [batch, classes]."""
        logits = self.network(pixel_values=self._pictures.of_tensor(pixels)).logits
        return logits, logits.softmax(dim=-1)


def _loaded(merged: Path) -> Any:
    """The merged model, in float32."""
    return library().AutoModelForImageClassification.from_pretrained(merged, dtype=torch.float32)


def _written(
    directory: RunDirectory, family: Vision, network: OnPixels, folder: Path, external_above_bytes: int
) -> VisionManifest:
    """Write the graph; its manifest, but for what is verified."""
    data = family.data
    shape = (2, data.height, data.width, data.channels)
    batch = torch.export.Dim("batch", min=1)
    signature = Signature(inputs={INPUT: (torch.zeros(shape, dtype=torch.uint8), {0: batch})}, outputs=list(OUTPUTS))
    graph, tensors = trace_whole(network, signature)
    path = folder / GRAPH
    external = sum(tensor.num_bytes for tensor in tensors.values()) > external_above_bytes
    data_path = write_graph(path, graph, tensors, external=external)
    return VisionManifest(
        edgeblocks=metadata.version("edgeblocks"),
        model_type=str(model_folder(family.settings.model).config["model_type"]),
        opset=OPSET,
        image=ImageSize(channels=data.channels, height=data.height, width=data.width),
        deep_range=data.deep_range,
        class_names=directory.class_names,
        graph=ModelFile(**graph_facts(path, data_path)),
    )


def _verified(directory: RunDirectory, network: OnPixels, model: VisionModel, listener: Listener) -> VerifiedClassifier:
    """Logits by torch and by the graph, of hold-out pictures where the run's data are there.

    Raises:
        EdgeblocksError: they differ by more than the limit.
        RunError: the network gives values that are no numbers.
    """
    pixels, are_real = _pictures(directory, model, listener)
    parts = []
    for start in range(0, len(pixels), _TOGETHER):
        with torch.no_grad():
            parts.append(network(torch.from_numpy(pixels[start : start + _TOGETHER]))[0].numpy())
        listener.advance(min(start + _TOGETHER, len(pixels)), len(pixels), "verifying")
    expected = np.concatenate(parts)
    check_finite(expected, "the model")
    found, _ = model.run(pixels, micro_batch=_TOGETHER)
    difference = largest_difference(found, expected)
    limit = LOGITS_LIMIT * max(1.0, float(np.abs(expected).max()))
    enforce("the model", difference, limit, f"logits of {len(pixels)} pictures")
    equal = int((found.argmax(1) == expected.argmax(1)).sum())
    listener.note(
        f"onnxruntime against torch: logits differ by at most {difference:.1e} (limit {limit:.1e}), and the likeliest "
        f"class of {equal} of {len(pixels)} pictures is the same"
    )
    return VerifiedClassifier(
        logits_max_abs_error=difference,
        logits_limit=limit,
        top1_equal=equal,
        pictures=len(pixels),
        real_pictures=are_real,
    )


def _pictures(directory: RunDirectory, model: VisionModel, listener: Listener) -> tuple[Pixels, bool]:
    """Hold-out pictures [N, H, W, C] of the run's data, or random ones; and which of both."""
    data = real_data(directory, listener)
    if data is not None:
        return data.gather(data.evaluation_indices(PICTURES))[0], True
    channels, height, width = model.manifest.image_shape
    random = np.random.default_rng(directory.settings.run.seed)
    return random.integers(0, 256, (PICTURES, height, width, channels), dtype=np.uint8), False
