"""An export's blocks with rounded matrices, and how much worse they are: on hold-out data, by the family's own loss.

The tolerances of `verify` are for graphs that compute what torch computes. Rounded weights are another network, so the
blocks are verified in float32 first, and then those of rounded weights are compared with them on the same noised
examples.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.noise import NoisePartition
from edgeblocks.errors import ConfigError, EdgeblocksError, RunError
from edgeblocks.export.classifier import Classifier
from edgeblocks.export.continuer import Continuer
from edgeblocks.export.manifest import block_file
from edgeblocks.export.manifest_figures import Rounding
from edgeblocks.export.manifest_types import GraphFile, Manifest
from edgeblocks.export.onnx_chain import ExportedChain, ImageChain, Values
from edgeblocks.export.open_export import open_chain
from edgeblocks.export.rounded_graph import RoundedWeights, write_rounded
from edgeblocks.export.verify import Listener, real_data
from edgeblocks.export.writer import Writer
from edgeblocks.families.base import Level
from edgeblocks.families.family import AnyFamily
from edgeblocks.inference.metrics import part_of, scores_by_level, standard_error
from edgeblocks.methods import Precision
from edgeblocks.runs.directory import RunDirectory

USUAL_MOST_LOSS: dict[RoundedWeights, float | None] = {"int8": 0.005, "int4": None}
"""By what share the judged figure may become worse; None: it is only told."""
FIRST_EXAMPLES, MOST_EXAMPLES = 64, 512
"""Of the data. Most are looked at where noise could decide with the first ones: with 180 an export of a `dit` of 22M
parameters took 293 s, on two cores that others used, and 64 tell what rounding costs a loss that is not near 0."""
_ERRORS = 2.0
"""Standard errors from which a difference is none of noise: 19 of 20 lie nearer."""
_FINE = 0.001
"""To this share a cost is known well enough, whatever the limit."""
ROUNDED = "rounded"
_TINY = 1e-30
"""Stands for a probability, or a loss, of 0."""


def rounding_of(weights: str | None, most_loss: str | None) -> RoundedWeights | None:
    """As what matrices are written; None: as they are.

    Raises:
        ConfigError: arguments do not go together.
    """
    if weights is None or weights == "fp32":
        if most_loss is not None:
            raise ConfigError(f"--most-loss {most_loss}: float32 loses nothing; give --weights int8 or int4 with it")
        return None
    rounded = next((known for known in USUAL_MOST_LOSS if known == weights), None)
    if rounded is None:
        raise ConfigError(f"--weights {weights}: int8, int4 or fp32 can be written")
    most_loss_of(most_loss, rounded)
    return rounded


def most_loss_of(text: str | None, weights: RoundedWeights) -> float | None:
    """By what share the loss may rise, of a percentage as text; None: any.

    Raises:
        ConfigError: no percentage.

    >>> most_loss_of("2%", "int4"), most_loss_of(None, "int8")
    (0.02, 0.005)
    """
    if text is None:
        return USUAL_MOST_LOSS[weights]
    try:
        share = float(text.strip().removesuffix("%")) / 100 if text.strip().endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise ConfigError(f"--most-loss {text}: a percentage is needed, for example 0.5%")
    return share


def round_blocks(
    run: RunDirectory,
    walk: ExportedChain,
    listener: Listener,
    *,
    weights: RoundedWeights,
    most_loss: float | None,
    micro_batch: int,
    external_above_bytes: int,
) -> Manifest:
    """Put blocks with rounded matrices in the place of those of an export that is being written.

    Args:
        walk: the export in float32.
        most_loss: by what share the judged figure may become worse, see `Rounding`; None: any.

    Returns:
        The manifest with the new files and their `rounding`.

    Raises:
        EdgeblocksError: it costs more than `most_loss`, by more than noise.
        RunError: there are no data to measure it with.
        OSError: the disk refused.
    """
    data = data_to_judge(run, listener, weights)
    listener.stage(f"rounding to {weights}")
    folder, exact = walk.directory, walk.manifest
    (folder / ROUNDED).mkdir()
    files = []
    for done, file in enumerate(exact.files):
        path = folder / ROUNDED / file.file
        data_path = write_rounded(folder / file.file, path, weights, external_above_bytes=external_above_bytes)
        files.append(block_file(path, data_path, file.block))
        listener.advance(done + 1, len(exact.files), "rounding")
    rounded = exact.model_copy(update={"files": tuple(files)})
    listener.stage("measuring what rounding costs")
    chains = (walk, open_chain(folder / ROUNDED, manifest=rounded))
    try:
        rounding = measured(
            lambda indices: _figures(run, *chains, data, indices, listener, micro_batch),
            data,
            listener,
            limit=most_loss or 0.0,
            weights=weights,
            bytes_fp32=sum(file.bytes for file in exact.graphs),
        )
    finally:
        for chain in chains:
            chain.close()
    judge(rounding, most_loss, listener)
    take_place(folder, exact.files)
    return rounded.model_copy(update={"rounding": rounding})


def take_place(folder: Path, files: Sequence[GraphFile]) -> None:
    """Have what is in the folder ROUNDED take the place of these files.

    Raises:
        OSError: the disk refused.
    """
    for name in (name for file in files for name in file.names):
        (folder / name).unlink()
    for path in sorted((folder / ROUNDED).iterdir()):
        path.rename(folder / path.name)
    (folder / ROUNDED).rmdir()


def data_to_judge(run: RunDirectory, listener: Listener, weights: RoundedWeights) -> DataSet:
    """The run's data, on which is measured what rounding costs.

    Raises:
        RunError: they cannot be read, or have changed.
    """
    data = real_data(run, listener)
    if data is None:
        raise RunError(
            f"--weights {weights}: what rounding costs is measured on {run.data_source}, which cannot be read or has "
            f"changed; put the run's data back, or leave --weights out"
        )
    return data


class _Numbered(nn.Module):
    """A block by its number: the graphs compute it."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block


class _Given(nn.Module):
    """A block that gives what a graph has computed."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = values

    def forward(self, *_: Any) -> Tensor:
        return self._values


class _Graphs:
    """A `NetworkSource` of numbers of blocks."""

    device = torch.device("cpu")
    precision: Precision = "fp32"

    def __init__(self, partition: NoisePartition, micro_batch: int) -> None:
        self.partition, self.micro_batch = partition, micro_batch

    def network(self, block: int) -> nn.Module:
        return _Numbered(block)


class _InBoth:
    """A family's scores by two exports of it: `loss` and `accuracy` by the rounded one, with `_fp32` by the other, and
    the mean sizes of the other's outputs and of what they differ by."""

    def __init__(self, family: AnyFamily, fp32: ExportedChain, rounded: ExportedChain) -> None:
        self._family, self._fp32, self._rounded = family, fp32, rounded

    def evaluation_levels(self, partition: NoisePartition) -> Sequence[Level]:
        return self._family.evaluation_levels(partition)

    def at_level(
        self, examples: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return self._family.at_level(examples, labels, level, generator)

    def scores(self, block: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(block, _Numbered)
        expected = self._outputs(self._fp32, block.block, batch)
        found = self._outputs(self._rounded, block.block, batch)
        scores = self._scores(found, batch)
        scores |= {f"{name}_fp32": values for name, values in self._scores(expected, batch).items()}
        if self._family.task != "images":
            expected, found = expected.exp(), found.exp()
        sizes = {"difference": (found - expected).abs(), "size": expected.abs()}
        return scores | {name: values.flatten(1).mean(1) for name, values in sizes.items()}

    def _outputs(self, chain: ExportedChain, block: int, batch: dict[str, Tensor]) -> Tensor:
        """Denoised images, or the logarithms of probabilities [b, .., answers]."""
        given, condition = self._family.inputs(batch)
        z, seen = given.numpy(), None if condition is None else condition.numpy()
        if isinstance(chain, Writer):
            return torch.from_numpy(chain.run_block(block, z, batch["t"].numpy())).log_softmax(-1)
        sigma = batch["sigma"].numpy()
        if isinstance(chain, Continuer):
            assert seen is not None
            caches = chain.manifest.caches
            nothing = np.zeros((caches.num_caches[block], len(z), caches.heads, 0, caches.head_width), np.float32)
            return torch.from_numpy(chain.run_block(block, z, sigma, seen, nothing)[0]).log_softmax(-1)
        assert isinstance(chain, ImageChain)
        values = torch.from_numpy(chain.run_block(block, z, sigma, seen))
        return values.clamp(min=_TINY).log() if isinstance(chain, Classifier) else values

    def _scores(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the family's `scores` are of a block with these outputs."""
        family = self._family
        if family.task == "images":
            return {"loss": family.loss(_Given(outputs), batch)}
        answers = batch["labels"] if family.task == "classes" else batch["tokens"]
        losses = F.nll_loss(outputs.movedim(-1, 1), answers, reduction="none").view(len(answers), -1)
        right = (outputs.argmax(-1) == answers).float().view(len(answers), -1)
        if family.task == "text":
            # w(t) = 1/t, of the masked tokens alone, as `Mdlm.loss` has it.
            weight = batch["masked"] / batch["t"].unsqueeze(1)
            losses, right = losses * weight, right * weight
        return {"loss": losses.mean(1), "accuracy": right.mean(1)}


def measured(
    figures_of: Callable[[NDArray[np.int64]], dict[str, Any]],
    data: DataSet,
    listener: Listener,
    *,
    limit: float,
    **given: Any,
) -> Rounding:
    """What rounding costs, on so many examples that noise does not decide whether it is more than `limit`.

    Args:
        figures_of: fields of a `Rounding`, of the examples with these numbers.
        given: what else it has.
    """
    wanted = FIRST_EXAMPLES
    while True:
        indices = data.evaluation_indices(wanted)
        found = Rounding(**figures_of(indices), examples=len(indices), part=part_of(data), **given)
        share, error = found.cost
        known = error is not None and _ERRORS * error <= max(abs(share - limit), _FINE)
        if known or len(indices) < wanted or wanted >= MOST_EXAMPLES:
            return found
        wanted = MOST_EXAMPLES
        listener.note(f"{len(indices)} examples leave open what rounding costs: more are looked at")


def _figures(
    run: RunDirectory,
    fp32: ExportedChain,
    rounded: ExportedChain,
    data: DataSet,
    indices: NDArray[np.int64],
    listener: Listener,
    micro_batch: int,
) -> dict[str, Any]:
    """Fields of a `Rounding`."""
    family = run.family()
    both, networks = _InBoth(family, fp32, rounded), _Graphs(run.partition, micro_batch)
    totals: dict[str, NDArray[np.float64]] = {}
    num_levels = len(family.evaluation_levels(run.partition))
    levels = scores_by_level(both, networks, data, indices, seed=run.settings.run.seed)
    for done, (level, _, scores) in enumerate(levels):
        for name, values in scores.items():
            totals[name] = totals.get(name, 0.0) + level.share * values
        listener.advance(done + 1, num_levels, "measuring")
    if isinstance(rounded, Classifier):
        assert isinstance(fp32, Classifier)
        for end, chain in (("", rounded), ("_fp32", fp32)):
            totals |= {f"{name}{end}": values for name, values in _answers(chain, data, indices, micro_batch).items()}
    return as_fields(totals)


def as_fields(totals: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Fields of a `Rounding`.

    Args:
        totals: of each example its loss, accuracy and probability by the rounded network, the same with `_fp32` by the
            other, and the mean sizes of the other's outputs (`size`) and of what they differ by (`difference`). Of a
            classifier the probability is judged.
    """
    difference, size = (float(totals.pop(name).mean()) for name in ("difference", "size"))
    return {
        "judged": "probability" if "probability" in totals else "loss",
        **{name: float(values.mean()) for name, values in totals.items()},
        **{
            f"{name}_error": standard_error(totals[name] - totals[f"{name}_fp32"])
            for name in ("loss", "accuracy", "probability")
            if name in totals
        },
        "mean_abs_difference": difference,
        "relative_difference": difference / max(size, _TINY),
    }


def _answers(
    chain: Classifier, data: DataSet, indices: NDArray[np.int64], micro_batch: int
) -> dict[str, NDArray[np.float64]]:
    """Of each example, whether the whole chain gives it its class, and how likely it takes that for."""
    found: dict[str, list[Values]] = {"accuracy": [], "probability": []}
    for start in range(0, len(indices), FIRST_EXAMPLES):
        pixels, labels = data.gather(indices[start : start + FIRST_EXAMPLES])
        assert labels is not None
        probabilities = chain.classify(pixels, micro_batch=micro_batch)
        found["accuracy"].append((probabilities.argmax(1) == labels).astype(np.float32))
        found["probability"].append(np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0])
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}


def judge(rounding: Rounding, limit: float | None, listener: Listener) -> None:
    """Refuse what surely costs more than is allowed, and tell where that cannot be told.

    Raises:
        EdgeblocksError: it costs more.
    """
    if limit is None:
        return
    share, error = rounding.cost
    name = "probability of the right class" if rounding.judged == "probability" else "loss"
    about = f"{share:.2%}" if error is None else f"{share:.2%} ± {_ERRORS * error:.2%}"
    before, after = (getattr(rounding, f"{rounding.judged}{end}") for end in ("_fp32", ""))
    measured = (
        f"{name} on {rounding.examples} examples of the {rounding.part} part is {after:.5g} where float32 "
        f"has {before:.5g}, worse by {about}, and {limit:.2%} are allowed"
    )
    if error is not None and share - _ERRORS * error > limit:
        raise EdgeblocksError(
            f"weights in {rounding.weights} are refused: the {measured}. Nothing was written. Allow more with "
            f"--most-loss, or leave --weights out"
        )
    if error is None or share + _ERRORS * error > limit:
        listener.note(f"whether {rounding.weights} keeps its limit cannot be told from noise: the {measured}")
