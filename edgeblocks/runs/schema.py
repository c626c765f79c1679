"""What may stand in the files of a run directory: checked value by value before anything is made from it.

A run directory may come from anywhere. The models below say which values are needed and how large they may be; keys
that they do not name are passed over, because a later edgeblocks may write more.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from edgeblocks.data.tokenizer import Kind
from edgeblocks.errors import RunError
from edgeblocks.files.checked import Checked, DeepRange, Sha256, in_short
from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json, read_object, read_text
from edgeblocks.limits import (
    LONGEST_SEQUENCE,
    LONGEST_SIDE,
    MOST_CHANNELS,
    MOST_CLASSES,
    MOST_LAYERS,
    MOST_PIXELS,
    MOST_SAMPLES,
    MOST_STEPS,
    MOST_TOKENS,
)
from edgeblocks.settings.limited_yaml import MOST_YAML_BYTES

_MOST_RECORD_BYTES = 2**16
_CHECKSUM = "# sha256 of the lines above: "
AGAIN = "put the file back from a copy, or train again with a new --out"

Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Seconds = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(max_length=2**15)]
PictureShape = Annotated[tuple[Side, Side, Annotated[int, Field(ge=1, le=MOST_CHANNELS)]], Field(strict=False)]
"""Height, width and channels."""


class ImageFields(Checked):
    """`data` in manifest.json: the images that the run is trained on."""

    channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
    height: Side
    width: Side
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)]
    mean: Annotated[float, Field(ge=-1e12, le=1e12)]
    scale: Annotated[float, Field(gt=0, le=1e12)]
    deep_range: DeepRange | None = None
    autoencoder: Sha256 | None = None
    picture: PictureShape | None = None
    source: Text
    fingerprint: Text

    @model_validator(mode="after")
    def _can_be_trained_on(self) -> Self:
        if self.height * self.width > MOST_PIXELS:
            raise ValueError(f"{self.height} x {self.width} pixels are more than {MOST_PIXELS}")
        if self.autoencoder is None and not 0 <= self.mean <= 1:
            raise ValueError(f"mean={self.mean:g}: of pixels it is from 0 to 1")
        if (self.autoencoder is None) != (self.picture is None):
            raise ValueError("autoencoder and picture are given together")
        return self


class TextFields(Checked):
    """`data` in manifest.json: the text that the run is trained on. tokenizer.json is there exactly for bpe."""

    vocabulary: Annotated[int, Field(ge=2, le=MOST_TOKENS)]
    length: Annotated[int, Field(ge=1, le=LONGEST_SEQUENCE)]
    packed: bool = False
    tokenizer: Kind
    tokenizer_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    source: Text
    fingerprint: Text


class InitFields(Checked):
    """`init` in manifest.json: the file that the weights began with. The run needs it no more."""

    file: Text
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Prolongation(Checked):
    """One of `prolonged` in manifest.json. It is in force once config.yaml asks for more steps than `steps_before`."""

    steps_before: Steps
    """That the run was to make until then."""
    began_at: Annotated[list[Count], Field(min_length=1, max_length=MOST_LAYERS)]
    """Each block's step when the run was prolonged."""


class SharedBy(Checked):
    """`shared_by` in manifest.json of a denoiser that the blocks of a run begin as (`runs.shared`)."""

    blocks: Layers
    steps: Steps
    """Of each block, when the run was created."""


class WindowFields(Checked):
    """`window` in manifest.json of a run whose network grows (`runs.growing`): the window that is trained now."""

    number: Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
    """Counted from 0."""
    first_step: Count
    """In which its training begins; those before it were of lower windows."""


class ManifestFields(Checked):
    """manifest.json."""

    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
    family: Text
    class_names: Annotated[list[Text], Field(max_length=MOST_CLASSES)]
    init: InitFields | None = None
    shared_by: SharedBy | None = None
    window: WindowFields | None = None
    prolonged: Annotated[list[Prolongation], Field(max_length=1000)] = Field(default_factory=list)


class ImageManifestFields(ManifestFields):
    """manifest.json of a family that reads images."""

    data: ImageFields

    @model_validator(mode="after")
    def _names_every_class(self) -> Self:
        if len(self.class_names) != self.data.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for data.num_classes={self.data.num_classes}")
        return self


class TextManifestFields(ManifestFields):
    """manifest.json of a family that reads text."""

    data: TextFields


class Diverging(Checked):
    """Measured values, which may be NaN where training diverged."""

    model_config = ConfigDict(allow_inf_nan=True)


class RecordFields(Diverging):
    """A line of metrics.jsonl: one training step of a block, or of the whole network, which is block 0 then.

    `loss` is of that step's batch, `examples_per_s` of that step alone.
    """

    block: Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
    step: Steps
    """Counted from 1."""
    loss: float
    gradient_norm: float | None = None
    """Before clipping."""
    learning_rate: float | None = None
    examples_per_s: float | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Wall time that the run had been trained: waiting for blocks counts; previews, starting and planning do not.

    A resumed run goes on from the last record that it keeps. None where an earlier record has none, as those of an
    earlier edgeblocks.
    """
    used_bytes: Count | None = None
    """Of the device's memory, as measured before the step: on a processor the process's resident set."""
    smoothed_loss: float | None = None
    """Of the last 20 steps of the block or so."""
    machine: Text | None = None
    """The name of the machine that made the step."""


class QualityFields(Diverging):
    """A line of quality.jsonl: how good the network was after some training, see `quality`."""

    step: Steps
    """Made by every block."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Of training until then, without previews and evaluations."""
    value: float
    standard_error: float | None = None
    """None where the examples were too few for one."""
    examples: Count | None = None
    """Those that were looked at; None in the records of an earlier edgeblocks."""


class GrowthFields(Checked):
    """A line of growth.jsonl: the loss of a network that grows, see `training.growth`."""

    step: Steps
    loss: Annotated[float, Field(allow_inf_nan=False)]
    """On hold-out examples."""
    layers: Layers
    """That the network had then."""


Fields = TypeVar("Fields", bound=Checked)


def read_json(path: Path, *, finite: bool = True) -> dict[str, object]:
    """A JSON object of a run directory.

    Raises:
        RunError: unreadable, too large, or not an object.
    """
    try:
        return read_object(path, finite=finite)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; {AGAIN}") from error
    except MalformedFileError as error:
        raise RunError(f"{path} is damaged: {error}; {AGAIN}") from error


def with_checksum(content: Mapping[str, object]) -> dict[str, object]:
    """A JSON object as a run directory keeps it: a flipped byte that no other check sees is found before use."""
    return {**content, "sha256": _json_digest(content)}


def check_checksum(path: Path, content: Mapping[str, object]) -> None:
    """That a JSON object is what its `sha256`, if it has one, is of.

    Raises:
        RunError: it is not.
    """
    if "sha256" in content and content["sha256"] != _json_digest(content):
        raise RunError(
            f'{path} is damaged: it does not match its checksum; {AGAIN}. Who changed it on purpose takes "sha256" out'
        )


def _json_digest(content: Mapping[str, object]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def config_with_checksum(text: str) -> str:
    """YAML as a run directory keeps it, with a comment at its end."""
    return f"{text}{_CHECKSUM}{hashlib.sha256(text.encode()).hexdigest()}\n"


def check_config(path: Path) -> None:
    """That config.yaml is what the comment at its end, if there is one, is the checksum of.

    Raises:
        RunError: it is not.
    """
    text, comment, claimed = read_text(path, most_bytes=MOST_YAML_BYTES).rpartition(_CHECKSUM)
    if comment and claimed.strip() != hashlib.sha256(text.encode()).hexdigest():
        raise RunError(
            f"{path} is damaged: it does not match its checksum; {AGAIN}. Who changed it on purpose takes its last "
            f"line out"
        )


def check_manifest(
    path: Path, content: Mapping[str, object], *, reads: Literal["images", "text"]
) -> ImageManifestFields | TextManifestFields:
    """The content of manifest.json with its types and ranges checked.

    Args:
        reads: what the family is trained on.

    Raises:
        RunError: names the file and the values.
    """
    if reads == "text":
        return checked(TextManifestFields, path, content)
    return checked(ImageManifestFields, path, content)


def read_records(path: Path) -> Iterator[dict[str, object]]:
    """The objects of a file with one JSON object a line; any other line (the last one half-written) is passed over.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            while line := file.readline(_MOST_RECORD_BYTES):
                # Longer than any record: passed over in pieces, so that a file without line ends is never in memory.
                if len(line) == _MOST_RECORD_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(_MOST_RECORD_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    continue
                try:
                    # A diverged step has a loss that is NaN, and its record counts.
                    record = parse_json(line.decode("utf-8", errors="replace"), finite=False)
                except MalformedFileError:
                    continue
                if isinstance(record, dict):
                    yield record
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def checked_record(model: type[Fields], record: Mapping[str, object]) -> Fields | None:
    """A line of a file of records, as `model` describes it; None where it is something else."""
    try:
        return model.model_validate(record)
    except ValidationError:
        return None


def is_up_to(record: Mapping[str, object], steps: list[int]) -> bool:
    """Whether a record of metrics.jsonl is of a step (from 1) that its block has made, given the saved steps."""
    block, step = record.get("block"), record.get("step")
    return type(block) is int and type(step) is int and 0 <= block < len(steps) and 1 <= step <= steps[block]


def checked(model: type[Fields], path: Path, content: Mapping[str, object]) -> Fields:
    """The content of a file as `model` describes it.

    Raises:
        RunError: names the file and the values.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {in_short(error)}; {AGAIN}") from error
