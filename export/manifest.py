"""manifest.json of an exported directory: everything that running it needs besides the graphs.

Read on machines that have neither torch nor the run, so it is plain Python, and it checks all it reads: a manifest may
come from anywhere. File names are names inside the directory and nothing else; a file's checksum is compared each time
before the file is used.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from edgeblocks.bounds import MOST_NOISE
from edgeblocks.data.limits import LONGEST_SIDE, MOST_CHANNELS, MOST_CLASSES, MOST_PIXELS
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.noise import NoiseDistribution, NoisePartition, NoiseRange, sampler_levels
from edgeblocks.solver import Solver
from edgeblocks.untrusted import MalformedFileError, open_regular, read_object, shown

EXPORT_FORMAT_VERSION = 2
KIND = "edgeblocks export"
FILE_NAME = "manifest.json"
DEFAULT_STEPS = 18
MOST_STEPS = 10_000
MOST_NOISES = 1000
MOST_BLOCKS = 2**12
MOST_OPSET = 1000
_MOST_NAME_CHARACTERS = 255
_SHA256_DIGITS = 64
Task = Literal["images", "classes"]
_TASKS: dict[str, Task] = {"images": "images", "classes": "classes"}
_SOLVERS: dict[str, Solver] = {"euler": "euler", "heun": "heun"}
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class BlockFile:
    """One block's graph. `data_file` holds its weights when they are not in the graph's file; `bytes` counts both."""

    block: int
    file: str
    data_file: str | None
    sha256: str
    data_sha256: str | None
    bytes: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.file,) if self.data_file is None else (self.file, self.data_file)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How the chain is run unless the caller says otherwise. `noises` are the chains whose mean gives the classes."""

    steps: int = DEFAULT_STEPS
    solver: Solver = "heun"
    guidance: float = 1.0
    noises: int = 1


@dataclass(frozen=True, kw_only=True)
class Verified:
    """How far onnxruntime was from torch when the directory was written.

    output_max_abs_error: of `outputs` final images in model space, or of the classes' probabilities of as many images.
    output_equal_share: the share of pixel values that were the same after rounding, or of images with the same class.
    real_inputs: whether the blocks also saw images of the run's data, not only random ones.
    """

    block_max_abs_error: float
    block_limit: float
    output_max_abs_error: float
    output_limit: float
    output_equal_share: float
    outputs: int
    real_inputs: bool


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An exported chain of blocks.

    task: what the chain makes: `images`, or the probabilities of an image's `classes`.
    image_shape: (channels, height, width) of what it makes, or is given.
    mean, scale: model space is x = (pixel/255 - mean) * scale, with standard deviation sigma_data.
    class_names: () for an unconditional network; a graph takes class numbers, and `num_classes` for "no class".
    boundaries: block b owns the noise levels [boundaries[b+1], boundaries[b]).
    verified: None only while the directory is being written.
    """

    edgeblocks: str
    family: str
    task: Task
    opset: int
    image_shape: tuple[int, int, int]
    mean: float
    scale: float
    sigma_data: float
    class_names: tuple[str, ...]
    noise: NoiseDistribution
    boundaries: tuple[float, ...]
    sampler: SamplerSettings
    files: tuple[BlockFile, ...]
    verified: Verified | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def condition_name(self) -> str | None:
        """The graphs' input beside z and sigma; None where there is none."""
        if self.task == "classes":
            return "images"
        return "labels" if self.num_classes else None

    @property
    def partition(self) -> NoisePartition:
        """Which block owns which noise level. Its training ranges are not widened: nothing is trained here."""
        ends = pairwise(self.boundaries)
        ranges = tuple(NoiseRange(low=low, high=high, train_low=low, train_high=high) for high, low in ends)
        return NoisePartition(distribution=self.noise, boundaries=self.boundaries, ranges=ranges)

    def levels(self) -> list[dict[str, Any]]:
        """The default sampler's noise levels, descending, each with the block that owns it."""
        partition = self.partition
        levels = sampler_levels(partition, num_steps=self.sampler.steps)
        return [{"sigma": sigma, "block": partition.block_of(sigma)} for sigma in levels]

    def to_json(self) -> dict[str, Any]:
        channels, height, width = self.image_shape
        return {
            "kind": KIND,
            "format_version": EXPORT_FORMAT_VERSION,
            "edgeblocks": self.edgeblocks,
            "family": self.family,
            "task": self.task,
            "opset": self.opset,
            "image": {"channels": channels, "height": height, "width": width},
            "mean": self.mean,
            "scale": self.scale,
            "sigma_data": self.sigma_data,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "noise": asdict(self.noise),
            "boundaries": list(self.boundaries),
            "sampler": asdict(self.sampler),
            "levels": self.levels(),
            "files": [asdict(file) for file in self.files],
            "verified": None if self.verified is None else asdict(self.verified),
        }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json and wait until it is on the disk.

    Raises:
        OSError: the disk refused.
    """
    assert manifest.verified is not None, "only a verified export is finished"
    with (folder / FILE_NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported directory, checked; the block files are only looked at when they are used.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise RunError(f"there is no exported directory {folder}; write one with: edgeblocks export RUN -o {folder}")
    try:
        content = read_object(path, finite=False)  # each number is looked at below, and then has a name
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} is not an exported directory: it has no {FILE_NAME}; write one with: "
            f"edgeblocks export RUN -o DIR"
        ) from error
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except MalformedFileError as error:
        raise RunError(f"{path} is damaged: {error}; {_AGAIN}") from error
    if content.get("kind") != KIND:
        raise RunError(
            f"{folder} is not an exported directory: its {FILE_NAME} is of another kind; a run is exported with: "
            f"edgeblocks export RUN -o DIR"
        )
    version = content.get("format_version")
    if type(version) is not int or version != EXPORT_FORMAT_VERSION:
        raise RunError(
            f"{folder} has export format version {shown(version)}; this edgeblocks "
            f"({metadata.version('edgeblocks')}) reads version {EXPORT_FORMAT_VERSION}. Use the edgeblocks that wrote "
            "it, or export the run again"
        )
    try:
        manifest = _manifest(_Fields(content, ""))
    except _MalformedError as error:
        raise RunError(f"{path} is damaged: {error}; {_AGAIN}") from error
    return manifest


def checked_path(folder: Path, file: BlockFile) -> Path:
    """A block's graph file, after comparing its bytes, and those of its data file, with the manifest's checksums.

    Raises:
        RunError: missing or damaged.
    """
    digests = (file.sha256, file.data_sha256)
    present_bytes = sum(_bytes_inside(folder, name, file.block) for name in file.names)
    if present_bytes != file.bytes:
        raise RunError(
            f"block {file.block} is damaged: {' and '.join(file.names)} in {folder} have {present_bytes} bytes where "
            f"{file.bytes} belong; {_AGAIN}"
        )
    for name, expected in zip(file.names, digests, strict=False):
        try:
            digest = sha256_of(folder / name)
        except OSError as error:
            raise RunError(f"cannot read block {file.block}: {folder / name}: {error.strerror}") from error
        if digest != expected:
            raise RunError(f"block {file.block} is damaged: {folder / name} does not match its checksum; {_AGAIN}")
    return folder / file.file


def _bytes_inside(folder: Path, name: str, block: int) -> int:
    """Size of a regular file that lies in the folder itself, which a link need not."""
    try:
        found = (folder / name).resolve(strict=True)
        status = found.stat()
    except FileNotFoundError as error:
        raise RunError(f"block {block} is missing: there is no file {folder / name}; {_AGAIN}") from error
    except RuntimeError as error:  # links in a circle
        raise RunError(f"cannot read block {block}: {folder / name} is a link to itself; {_AGAIN}") from error
    except OSError as error:
        raise RunError(f"cannot read block {block}: {folder / name}: {error.strerror}") from error
    if not found.is_relative_to(folder.resolve()):
        raise RunError(
            f"block {block} is refused: {folder / name} is a link that leaves the directory, to {found}; copy the file "
            "itself to its place"
        )
    if not stat.S_ISREG(status.st_mode):
        raise RunError(f"block {block} is refused: {folder / name} is no regular file; {_AGAIN}")
    return status.st_size


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, a megabyte at a time."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(chunk):  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
            digest.update(chunk[:count])
    return digest.hexdigest()


_AGAIN = "copy the directory again from where it was written, or export the run again"


class _MalformedError(ValueError):
    """What is wrong with a manifest's content."""


class _Fields:
    """A JSON object whose fields are taken with their types checked; `where` names the object in messages."""

    def __init__(self, content: Any, where: str) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise _MalformedError(f"{where or 'the manifest'} must be an object, found {shown(content)}")
        self._content = content

    def fail(self, name: str, expected: str) -> NoReturn:
        raise _MalformedError(f"{self._path(name)} must be {expected}, found {shown(self._content.get(name))}")

    def _path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def _get(self, name: str) -> Any:
        if name not in self._content:
            raise _MalformedError(f"{self._path(name)} is missing")
        return self._content[name]

    def integer(self, name: str, *, least: int, most: int) -> int:
        value = self._get(name)
        if type(value) is not int or value < least:
            self.fail(name, f"a whole number of at least {least}")
        if value > most:
            self.fail(name, f"a whole number of at most {most}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name)
        if not _is_number(value):
            self.fail(name, "a finite number")
        return float(value)

    def positive(self, name: str) -> float:
        value = self.number(name)
        if value <= 0:
            self.fail(name, "larger than 0")
        return value

    def not_negative(self, name: str) -> float:
        value = self.number(name)
        if value < 0:
            self.fail(name, "at least 0")
        return value

    def truth(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self._get(name)
        if not _is_text(value) or not value:
            self.fail(name, "a text")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._get(name)
        if not isinstance(values, list) or not all(map(_is_text, values)):
            self.fail(name, "a list of texts")
        return tuple(values)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self._get(name)
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            self.fail(name, "a list of finite numbers")
        return tuple(map(float, values))

    def inner(self, name: str) -> "_Fields":
        return _Fields(self._get(name), self._path(name))

    def inners(self, name: str) -> "Iterator[_Fields]":
        values = self._get(name)
        if not isinstance(values, list):
            self.fail(name, "a list")
        for index, value in enumerate(values):
            yield _Fields(value, f"{self._path(name)}[{index}]")

    def file_name(self, name: str) -> str:
        """A name inside the directory: it can lead nowhere else, on any system."""
        value = self.text(name)
        if value.startswith(".") or any(bad in value for bad in "/\\:\0") or len(value) > _MOST_NAME_CHARACTERS:
            self.fail(name, "the plain name of a file in the directory")
        return value

    def sha256(self, name: str) -> str:
        value = self.text(name)
        if len(value) != _SHA256_DIGITS or not set(value) <= set("0123456789abcdef"):
            self.fail(name, f"a SHA-256 of {_SHA256_DIGITS} lower-case hexadecimal digits")
        return value

    def absent(self, name: str) -> bool:
        return self._get(name) is None


def _is_number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be printed and written: JSON can name halves of characters, too."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _manifest(fields: _Fields) -> Manifest:
    image = fields.inner("image")
    manifest = Manifest(
        edgeblocks=fields.text("edgeblocks"),
        family=fields.text("family"),
        task=_task(fields),
        opset=fields.integer("opset", least=1, most=MOST_OPSET),
        image_shape=(
            image.integer("channels", least=1, most=MOST_CHANNELS),
            image.integer("height", least=1, most=LONGEST_SIDE),
            image.integer("width", least=1, most=LONGEST_SIDE),
        ),
        mean=fields.number("mean"),
        scale=fields.positive("scale"),
        sigma_data=fields.positive("sigma_data"),
        class_names=fields.texts("class_names"),
        noise=_noise(fields.inner("noise")),
        boundaries=fields.numbers("boundaries"),
        sampler=_sampler(fields.inner("sampler")),
        files=tuple(_block_file(inner, block) for block, inner in enumerate(fields.inners("files"))),
        verified=_verified(fields.inner("verified")),
    )
    if math.prod(manifest.image_shape[1:]) > MOST_PIXELS:
        fields.fail("image", f"of at most {MOST_PIXELS} pixels")
    if fields.integer("num_classes", least=0, most=MOST_CLASSES) != manifest.num_classes:
        fields.fail("num_classes", f"{manifest.num_classes}, the number of class_names")
    _check_task(fields, manifest)
    _check_routing(fields, manifest)
    names = [name for file in manifest.files for name in file.names]
    if len(set(names)) != len(names):
        raise _MalformedError("two of its files have the same name")
    return manifest


def _task(fields: _Fields) -> Task:
    task = _TASKS.get(fields.text("task"))
    if task is None:
        fields.fail("task", "'images' or 'classes'")
    return task


def _check_task(fields: _Fields, manifest: Manifest) -> None:
    """That a chain for classes has some, and is run as such chains are."""
    if manifest.task == "images":
        return
    if manifest.num_classes < 2:
        fields.fail("class_names", "at least two classes")
    sampler = manifest.sampler
    if sampler.solver != "euler" or sampler.guidance != 1.0:
        fields.fail("sampler", "euler without guidance, where classes are told")


def _check_routing(fields: _Fields, manifest: Manifest) -> None:
    """That the boundaries, the blocks and the levels tell the same story."""
    boundaries = manifest.boundaries
    descending = all(high > low for high, low in pairwise(boundaries))
    if len(boundaries) < 2 or not descending or boundaries[-1] <= 0:
        fields.fail("boundaries", "at least two positive noise levels, strictly descending")
    if len(boundaries) > MOST_BLOCKS + 1 or boundaries[0] > MOST_NOISE or boundaries[-1] < 1 / MOST_NOISE:
        fields.fail("boundaries", f"at most {MOST_BLOCKS + 1} noise levels from {1 / MOST_NOISE:g} to {MOST_NOISE:g}")
    if (boundaries[0], boundaries[-1]) != (manifest.noise.sigma_max, manifest.noise.sigma_min):
        fields.fail("boundaries", "noise levels from noise.sigma_max to noise.sigma_min")
    if len(manifest.files) != len(boundaries) - 1:
        raise _MalformedError(f"files lists {len(manifest.files)} blocks, boundaries tells of {len(boundaries) - 1}")
    if manifest.sampler.steps < len(manifest.files):
        fields.inner("sampler").fail("steps", f"at least {len(manifest.files)}, the number of blocks")
    listed = [
        (level.positive("sigma"), level.integer("block", least=0, most=MOST_BLOCKS))
        for level in fields.inners("levels")
    ]
    try:
        expected = [(level["sigma"], level["block"]) for level in manifest.levels()]
    except (ValueError, ArithmeticError, ConfigError) as error:
        raise _MalformedError(f"no levels can be made from sampler.steps and boundaries ({error})") from error
    same = len(listed) == len(expected) and all(
        block == own_block and math.isclose(sigma, own_sigma, rel_tol=1e-9)
        for (sigma, block), (own_sigma, own_block) in zip(listed, expected, strict=True)
    )
    if not same:
        raise _MalformedError("levels are not those of sampler.steps and boundaries")


def _noise(fields: _Fields) -> NoiseDistribution:
    return NoiseDistribution(
        sigma_min=fields.positive("sigma_min"),
        sigma_max=fields.positive("sigma_max"),
        p_mean=fields.number("p_mean"),
        p_std=fields.positive("p_std"),
    )


def _sampler(fields: _Fields) -> SamplerSettings:
    solver = _SOLVERS.get(fields.text("solver"))
    if solver is None:
        fields.fail("solver", "'euler' or 'heun'")
    return SamplerSettings(
        steps=fields.integer("steps", least=1, most=MOST_STEPS),
        solver=solver,
        guidance=fields.not_negative("guidance"),
        noises=fields.integer("noises", least=1, most=MOST_NOISES),
    )


def _block_file(fields: _Fields, block: int) -> BlockFile:
    if fields.integer("block", least=0, most=MOST_BLOCKS) != block:
        fields.fail("block", f"{block}: blocks are listed in order")
    inline = fields.absent("data_file")
    if fields.absent("data_sha256") != inline:
        fields.fail("data_sha256", "given exactly when data_file is")
    return BlockFile(
        block=block,
        file=fields.file_name("file"),
        data_file=None if inline else fields.file_name("data_file"),
        sha256=fields.sha256("sha256"),
        data_sha256=None if inline else fields.sha256("data_sha256"),
        bytes=fields.integer("bytes", least=1, most=2**63),
    )


def _verified(fields: _Fields) -> Verified:
    return Verified(
        block_max_abs_error=fields.not_negative("block_max_abs_error"),
        block_limit=fields.positive("block_limit"),
        output_max_abs_error=fields.not_negative("output_max_abs_error"),
        output_limit=fields.positive("output_limit"),
        output_equal_share=fields.not_negative("output_equal_share"),
        outputs=fields.integer("outputs", least=1, most=2**63),
        real_inputs=fields.truth("real_inputs"),
    )
