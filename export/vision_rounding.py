"""A fine-tuned classifier with rounded matrices, and what that costs on hold-out pictures; see `rounding`."""

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.dataset import DataSet
from edgeblocks.export.manifest import graph_facts
from edgeblocks.export.manifest_types import ModelFile
from edgeblocks.export.rounded_graph import RoundedWeights, write_rounded
from edgeblocks.export.rounding import FIRST_EXAMPLES, ROUNDED, as_fields, data_to_judge, judge, measured, take_place
from edgeblocks.export.verify import Listener
from edgeblocks.export.vision_model import VisionManifest, VisionModel
from edgeblocks.runs.directory import RunDirectory

_TINY = 1e-30
"""Stands for a probability of 0."""


def round_classifier(
    run: RunDirectory,
    exact: VisionModel,
    listener: Listener,
    *,
    weights: RoundedWeights,
    most_loss: float | None,
    external_above_bytes: int,
) -> VisionManifest:
    """Put a graph with rounded matrices in the place of that of an export that is being written.

    Args:
        exact: the export in float32.
        most_loss: by what share the probability of the right class may fall; None: by any.

    Returns:
        The manifest with the new file and its `rounding`.

    Raises:
        EdgeblocksError: it costs more than `most_loss`, by more than noise.
        RunError: there are no data to measure it with.
        OSError: the disk refused.
    """
    data = data_to_judge(run, listener, weights)
    listener.stage(f"rounding to {weights}")
    folder, file = exact.directory, exact.manifest.graph
    (folder / ROUNDED).mkdir()
    path = folder / ROUNDED / file.file
    data_path = write_rounded(folder / file.file, path, weights, external_above_bytes=external_above_bytes)
    manifest = exact.manifest.model_copy(update={"graph": ModelFile(**graph_facts(path, data_path))})
    rounded = VisionModel(folder / ROUNDED, manifest=manifest)
    listener.stage("measuring what rounding costs")
    try:
        rounding = measured(
            lambda indices: _figures(exact, rounded, data, indices, listener),
            data,
            listener,
            limit=most_loss or 0.0,
            weights=weights,
            bytes_fp32=file.bytes,
        )
    finally:
        exact.close()
        rounded.close()
    judge(rounding, most_loss, listener)
    take_place(folder, [file])
    return manifest.model_copy(update={"rounding": rounding})


def _figures(
    exact: VisionModel, rounded: VisionModel, data: DataSet, indices: NDArray[np.int64], listener: Listener
) -> dict[str, Any]:
    """Fields of a `Rounding`: of each picture its loss in nats, whether it is right, and its class's probability."""
    scores: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)
    for start in range(0, len(indices), FIRST_EXAMPLES):
        pixels, labels = data.gather(indices[start : start + FIRST_EXAMPLES])
        assert labels is not None
        both = {"": rounded.classify(pixels), "_fp32": exact.classify(pixels)}
        for end, probabilities in both.items():
            own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
            scores[f"probability{end}"].append(own)
            scores[f"loss{end}"].append(-np.log(np.maximum(own, _TINY)))
            scores[f"accuracy{end}"].append(probabilities.argmax(1) == labels)
        scores["difference"].append(np.abs(both[""] - both["_fp32"]).mean(1))
        scores["size"].append(both["_fp32"].mean(1))
        listener.advance(min(start + FIRST_EXAMPLES, len(indices)), len(indices), "measuring")
    return as_fields({name: np.concatenate(parts).astype(np.float64) for name, parts in scores.items()})
