"""What a run's settings are, and what each may be.

Resolved settings are written to the run directory as config.yaml.
"""

import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from edgeblocks.errors import ConfigError
from edgeblocks.files.checked import is_text, whole_text
from edgeblocks.limits import LONGEST_SEQUENCE, MOST_LAYERS, MOST_SAMPLES, MOST_STEPS, MOST_TOKENS
from edgeblocks.methods import (
    FEWEST_SHARED_STEPS,
    USUAL_SHARE,
    BoundaryDtype,
    Clipping,
    Frozen,
    Master,
    MethodName,
    Precision,
)
from edgeblocks.tasks import PYTHON_DATA, TASKS
from edgeblocks.terminal import one_line, quoted
from edgeblocks.units import parse_size

BUILT_IN_DATA = ("digits", "moby-dick")
TOKENIZERS = ("chars", "bytes", "bpe")
_MOST_SIZE_CHARACTERS = 40
_MOST_COUNTS = {"blocks": MOST_LAYERS, "window": MOST_LAYERS, "micro_batch": MOST_SAMPLES, "visit_steps": MOST_STEPS}


def _may_be(text: str) -> dict[str, JsonValue]:
    """What a setting may be, where its type does not say it."""
    return {"allowed": text}


class RunSettings(BaseModel):
    """Settings that every family has. `auto` leaves the choice to the planner.

    From what stands at the fields `edgeblocks settings` and the tables of docs/settings.md are made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    family: str = Field(
        default="dit",
        description="kind of model",
        json_schema_extra=_may_be("`dit`, `vit`, `mdlm`, `ar`, `looped`, or one of your own"),
    )
    preset: str = Field(
        default="dit-tiny",
        description="a named size; each family's own -tiny where none is given",
        json_schema_extra=_may_be("a name, such as `dit-s`"),
    )
    data: str = Field(
        default="digits",
        description="images: digits, a folder, an .npz; text: moby-dick, a file or folder, .jsonl, .parquet",
        json_schema_extra=_may_be("a name or a path"),
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="side to which images are scaled; none: as they are",
    )
    vae: str | None = Field(
        default=None,
        description="of images: folder of an autoencoder of diffusers, whose latents are trained on instead of pixels",
        json_schema_extra=_may_be("none, or a folder"),
    )
    hold_out: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="share of the data that is kept for evaluation",
    )
    tokenizer: str = Field(
        default="chars",
        description="how text is cut into tokens",
        json_schema_extra=_may_be("`chars` (a to z and space), `bytes`, `bpe`, or a tokenizer.json"),
    )
    vocab: int = Field(
        default=4096,
        ge=2,
        le=MOST_TOKENS,
        description="with tokenizer=bpe: tokens that are learned from the text",
    )
    text_key: str = Field(
        default="text",
        max_length=200,
        description="of records of text: the key or column that holds it",
        json_schema_extra=_may_be("a name of at most 200 characters"),
    )
    length: int = Field(
        default=256,
        ge=1,
        le=LONGEST_SEQUENCE,
        description="tokens of one example of text",
    )
    packing: bool = Field(
        default=False,
        description="of conversations to fine-tune on: short ones share a window, and do not see each other",
    )
    mem_budget: str = Field(
        default="50%",
        description="largest resident memory of the process; with target=cuda of the GPU's memory",
        json_schema_extra=_may_be("a size, such as `6GB`, or a share of the memory"),
    )
    ram_budget: str | None = Field(
        default=None,
        description="with a GPU: largest resident memory of the process in the host's RAM",
        json_schema_extra=_may_be("none, or as mem_budget"),
    )
    work_dir: str | None = Field(
        default=None,
        description="folder on a fast disk for the blocks while they are trained",
        json_schema_extra=_may_be("none, or a folder"),
    )
    max_disk_writes: str | None = Field(
        default=None,
        description="most that the run may write to disk",
        json_schema_extra=_may_be("none, or a size, such as `200GB`"),
    )
    steps: int = Field(
        default=1000,
        ge=1,
        le=MOST_STEPS,
        description="optimizer steps of each block; with method=exact of the whole network, with method=greedy of all "
        "windows",
    )
    batch: int = Field(
        default=64,
        ge=1,
        le=MOST_SAMPLES,
        description="images or sequences a step",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="decides all randomness",
    )
    method: MethodName = Field(
        default="diffusion",
        description="each block alone, as a denoiser of its own noise levels; end to end with true gradients; or a "
        "window of layers at a time, from the bottom up",
    )
    blocks: int | Literal["auto"] = Field(
        default="auto",
        description="number of blocks, or of stages with method=exact",
        json_schema_extra=_may_be(f"`auto`, or 1 to {_MOST_COUNTS['blocks']:,}"),
    )
    init: str | None = Field(
        default=None,
        description="a .safetensors file that the weights begin with",
        json_schema_extra=_may_be("none, or a file"),
    )
    init_fresh: str | None = Field(
        default=None,
        description="parts of the network that begin with random values all the same, with commas between",
        json_schema_extra=_may_be("none, or names, such as `readout`"),
    )
    train_blocks: str | None = Field(
        default=None,
        description="with method=exact: the stages that are trained; none: all",
        json_schema_extra=_may_be("none, or numbers, such as `2,3`; the first is 0"),
    )
    shared: float | Literal["auto"] = Field(
        default="auto",
        description="with method=diffusion: share of the steps in which one denoiser learns all noise levels, before "
        f"it is copied into every block; auto: {USUAL_SHARE:g} where blocks can be of equal depth and make "
        f"{FEWEST_SHARED_STEPS} steps or more",
        json_schema_extra=_may_be("`auto`, or 0 to less than 1"),
    )
    window: int | Literal["auto"] = Field(
        default="auto",
        description="with method=greedy: layers that are trained at a time; auto: as many as the budget holds",
        json_schema_extra=_may_be(f"`auto`, or 1 to {_MOST_COUNTS['window']:,}"),
    )
    grow: Literal["auto", "equal"] = Field(
        default="auto",
        description="with method=greedy: layers are added when the loss on hold-out examples has flattened, or after "
        "equal shares of the steps",
    )
    frozen: Frozen = Field(
        default="none",
        description="with method=greedy: as what frozen layers are in memory; none: as they are, int8: in a quarter of "
        "it, nf4: in a seventh",
    )
    partition: Literal["equal-probability", "uniform"] = Field(
        default="equal-probability",
        description="how noise levels are shared: so that blocks train on as many, or in equal widths in log "
        "sigma or time",
    )
    overlap: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="by how much a block's range of noise levels is widened in training",
    )
    target: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="kind of machine; auto is the processor",
    )
    optimizer: Literal["adamw8bit", "adamw"] = Field(
        default="adamw8bit",
        description="AdamW with moments of 8 bits, or with fp32 ones",
    )
    learning_rate: float = Field(
        default=1e-3,
        gt=0,
        description="its highest value; it falls to zero along a cosine",
    )
    warmup: int = Field(
        default=50,
        ge=0,
        le=MOST_STEPS,
        description="steps over which it rises, at most half of all",
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="of AdamW; vectors have none",
    )
    clip: float = Field(
        default=1.0,
        gt=0,
        description="largest norm of a gradient",
    )
    clip_by: Clipping = Field(
        default="stage",
        description="with method=exact: by the norm of each stage, or of the whole gradient",
    )
    boundaries: Literal["auto", "ram", "disk"] = Field(
        default="auto",
        description="with method=exact: where the activations at the stage boundaries are kept",
    )
    boundary_dtype: BoundaryDtype = Field(
        default="float32",
        description="with method=exact: as what they are kept; bfloat16 halves them and rounds the gradients",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(  # in one, so that an error names them all
        default="fp32",
        description="numbers in which the network computes: bf16 and fp16 take half of the memory for activations, and "
        "less time where there are instructions for them; auto takes what pays here",
    )
    master: Master = Field(
        default="fp32",
        description="numbers in which weights and their average are kept: with bf16, rounded at random, a block that "
        "waits takes 6 bytes a parameter and not 10",
    )
    ema_length: float = Field(
        default=0.1,
        ge=0,
        lt=0.28,
        description="relative width of the weights' average over the training (arXiv 2312.02696, 3.1), which is what "
        "is evaluated; 0: none is kept, and a block takes 6 bytes a parameter and not 10",
    )
    micro_batch: int | Literal["auto"] = Field(
        default="auto",
        description="samples that go through a block at a time",
        json_schema_extra=_may_be(f"`auto`, or 1 to {_MOST_COUNTS['micro_batch']:,}"),
    )
    checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="whether layers are run again in the backward pass to save memory",
    )
    visit_steps: int | Literal["auto"] = Field(
        default="auto",
        description="steps of a block before the next one has its turn",
        json_schema_extra=_may_be(f"`auto`, or 1 to {_MOST_COUNTS['visit_steps']:,}"),
    )
    tier: Literal["auto", "ram", "disk"] = Field(
        default="auto",
        description="where blocks wait",
    )
    sample_grids: int = Field(
        default=4,
        ge=0,
        le=10_000,
        description="grids of samples that are made during training",
    )
    evaluations: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="how often quality is measured during training, into quality.jsonl",
    )
    sample_steps: int = Field(
        default=TASKS["images"].steps,
        ge=1,
        le=10_000,
        description="noise levels of those grids",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and info.field_name not in ("checkpointing", "packing"):
            raise ValueError("true or false is no answer here")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _is_whole_text(cls, value: object) -> object:
        return whole_text(value) if isinstance(value, str) else value

    @field_validator("train_blocks", mode="before")
    @classmethod
    def _is_list_of_numbers(cls, value: object) -> object:
        """One number, which YAML reads as such, is a list as well."""
        text = str(value) if isinstance(value, int) else value
        if isinstance(text, str):
            numbers_in(text)
        return text

    @field_validator("mem_budget", "ram_budget")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text, whole_bytes=1_000_000)
        return text

    @field_validator("max_disk_writes")
    @classmethod
    def _is_plain_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text

    @field_validator("blocks", "window", "micro_batch", "visit_steps", mode="before")
    @classmethod
    def _is_count_or_auto(cls, value: object, info: ValidationInfo) -> object:
        if value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError("a whole number of at least 1, or auto, is needed")
        most = _MOST_COUNTS[str(info.field_name)]
        if value > most:
            raise ValueError(f"at most {most} are possible")
        return value

    @field_validator("shared", mode="before")
    @classmethod
    def _is_share_or_auto(cls, value: object) -> object:
        if value != "auto" and (not isinstance(value, int | float) or not 0 <= value < 1):
            raise ValueError("a number from 0 to less than 1, or auto, is needed")
        return value

    @field_validator("mem_budget", "ram_budget", "max_disk_writes", mode="before")
    @classmethod
    def _is_short(cls, value: object) -> object:
        if isinstance(value, str) and len(value) > _MOST_SIZE_CHARACTERS:
            raise ValueError(f"a size of at most {_MOST_SIZE_CHARACTERS} characters is needed, for example 6GB")
        return value

    @field_validator("data", "vae", "tokenizer", "work_dir", "init", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and not is_text(value):
            raise ValueError(_why_no_text(value))
        return value

    @field_validator("vae", "work_dir", "init")
    @classmethod
    def _is_path(cls, text: str | None) -> str | None:
        if text is not None and "\0" in text:
            raise ValueError("a path cannot hold a NUL character")
        try:
            Path(text or "").expanduser()
        except RuntimeError as error:
            raise ValueError(f"{error}; write the whole path") from error
        return text

    @field_validator("data", "vae", "family", "preset", "tokenizer", "text_key", "init", "init_fresh")
    @classmethod
    def _is_not_empty(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("it must not be empty")
        return text

    @property
    def keeps_ema(self) -> bool:
        """Whether an average of the weights is kept beside them; else the last ones are what is evaluated."""
        return self.ema_length > 0

    @property
    def trained_blocks(self) -> tuple[int, ...] | None:
        """Numbers of the blocks that are trained, ascending; None: all."""
        if self.train_blocks is None:
            return None
        return numbers_in(self.train_blocks)


def numbers_in(text: str) -> tuple[int, ...]:
    """The numbers of blocks in a text, ascending, each once.

    Raises:
        ValueError: it is no list of numbers.

    >>> numbers_in("3, 2,3")
    (2, 3)
    """
    if not re.fullmatch(r"\d{1,6}( *, *\d{1,6})*", text):
        raise ValueError("numbers of blocks are needed, the first being 0, for example 2,3")
    return tuple(sorted({int(number) for number in text.split(",")}))


def precision_of(run: RunSettings) -> Precision:
    """In which a network computes once `auto` has been decided."""
    assert run.precision != "auto", "the precision is decided before anything is planned"
    return run.precision


def share_of(run: RunSettings) -> float:
    """The share of a block's steps that one denoiser makes for all; none where it was not decided that it does."""
    return 0.0 if run.shared == "auto" else run.shared


class FamilySettings(Protocol):
    """A family's own settings: a frozen dataclass whose fields all have defaults."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def problems(self) -> list[str]:
        """What is wrong with them together."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings and its family's, resolved and checked one by one."""

    run: RunSettings
    family: Any
    """The family's own frozen settings dataclass."""

    def with_whole_paths(self) -> "Settings":
        """The settings as a run keeps them: its data and its work directory are found from everywhere.

        Raises:
            ConfigError: the folder that this process is in is gone, or a path through it is no text.
        """
        whole = {
            name: _whole_path(name, text)
            for name, text, known in (
                ("data", self.run.data, BUILT_IN_DATA),
                ("vae", self.run.vae, (None,)),
                ("tokenizer", self.run.tokenizer, TOKENIZERS),
                ("work_dir", self.run.work_dir, (None,)),
                ("init", self.run.init, (None,)),
            )
            if text is not None and text not in known and not text.startswith(PYTHON_DATA)
        }
        family = self.family
        if getattr(family, "model", ""):  # of a pretrained network
            family = replace(family, model=_whole_path("model", family.model))
        return replace(self, run=self.run.model_copy(update=whole), family=family)

    def to_yaml(self) -> str:
        """Flat YAML that `resolve_settings` reads back to the same settings."""
        return yaml.safe_dump({**self.run.model_dump(), **asdict(self.family)}, sort_keys=False)


def _why_no_text(path: str) -> str:
    encoding = sys.getfilesystemencoding()
    if is_text(os.fsencode(path).decode("utf-8", errors="surrogateescape")):
        return f"names are read as {encoding} here; set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    link = f"ln -s {quoted(path)} LINK"
    return f"its path holds bytes that are not UTF-8, and a run keeps paths as text; rename it, or name a link: {link}"


def _whole_path(name: str, text: str) -> str:
    try:
        whole = str(Path(text).expanduser().absolute())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{name}={text}: the folder that this command was started in is gone; cd to another"
        ) from error
    if not is_text(whole):
        raise ConfigError(f"{name}={one_line(whole)}: {_why_no_text(whole)}")
    return whole
