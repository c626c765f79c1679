"""manifest.json of an exported directory: written, read, and compared with the files beside it.

All that is read is checked: a manifest may come from anywhere. File names are names inside the directory and nothing
else; a file's checksum is compared each time before the file is used.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgeblocks.data.tokenizer import Kind
from edgeblocks.diffusion import autoregression as generation
from edgeblocks.diffusion.autoregression import CachesPer
from edgeblocks.diffusion.noise import NoiseDistribution
from edgeblocks.diffusion.solver import Solver
from edgeblocks.diffusion.token_choice import HIGHEST_TEMPERATURE
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.export.fields import Fields, MalformedError
from edgeblocks.export.manifest_types import (
    EXPORT_FORMAT_VERSION,
    KIND,
    AnyManifest,
    BlockFile,
    CacheShape,
    ContinuationManifest,
    ContinuerSettings,
    ImageManifest,
    Manifest,
    SamplerSettings,
    TextManifest,
    Verified,
    WriterSettings,
)
from edgeblocks.files.untrusted import MalformedFileError, open_regular, read_object, shown
from edgeblocks.limits import (
    LONGEST_SEQUENCE,
    LONGEST_SIDE,
    MOST_CHANNELS,
    MOST_CLASSES,
    MOST_LAYERS,
    MOST_NOISE,
    MOST_PIXELS,
    MOST_TOKENS,
)
from edgeblocks.tasks import Task

FILE_NAME = "manifest.json"
MOST_STEPS = 10_000
MOST_NOISES = 1000
MOST_BLOCKS = 2**12
MOST_OPSET = 1000
MOST_CODE_WIDTH = 2**12
MOST_HEADS = 2**12
MOST_HEAD_WIDTH = 2**20
_TASKS: dict[str, Task] = {"images": "images", "classes": "classes", "text": "text", "continuation": "continuation"}
_CACHES_PER: dict[str, CachesPer] = {"block": "block", "step": "step"}
_TOKENIZERS: dict[str, Kind] = {"chars": "chars", "bytes": "bytes", "bpe": "bpe"}
_SOLVERS: dict[str, Solver] = {"euler": "euler", "heun": "heun"}
_CHUNK_BYTES = 2**20


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


def read_manifest(folder: Path) -> AnyManifest:
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
        manifest = _manifest(Fields(content, ""))
    except MalformedError as error:
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
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()


_AGAIN = "copy the directory again from where it was written, or export the run again"


def _manifest(fields: Fields) -> AnyManifest:
    task = _TASKS.get(fields.text("task"))
    if task is None:
        fields.fail("task", "'images', 'classes', 'text' or 'continuation'")
    common: dict[str, Any] = {
        "edgeblocks": fields.text("edgeblocks"),
        "family": fields.text("family"),
        "task": task,
        "opset": fields.integer("opset", least=1, most=MOST_OPSET),
        "boundaries": fields.numbers("boundaries"),
        "files": tuple(_block_file(inner, block) for block, inner in enumerate(fields.inners("files"))),
        "verified": _verified(fields.inner("verified")),
    }
    readers: dict[str, Callable[[Fields, dict[str, Any]], AnyManifest]] = {
        "text": _text_manifest,
        "continuation": _continuation_manifest,
    }
    manifest = readers.get(task, _image_manifest)(fields, common)
    _check_routing(fields, manifest)
    names = [name for file in manifest.files for name in file.names]
    if len(set(names)) != len(names):
        raise MalformedError("two of its files have the same name")
    return manifest


def _image_manifest(fields: Fields, common: dict[str, Any]) -> ImageManifest:
    image = fields.inner("image")
    manifest = ImageManifest(
        **common,
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
        sampler=_sampler(fields.inner("sampler")),
    )
    if math.prod(manifest.image_shape[1:]) > MOST_PIXELS:
        fields.fail("image", f"of at most {MOST_PIXELS} pixels")
    if fields.integer("num_classes", least=0, most=MOST_CLASSES) != manifest.num_classes:
        fields.fail("num_classes", f"{manifest.num_classes}, the number of class_names")
    if manifest.task == "classes":
        if manifest.num_classes < 2:
            fields.fail("class_names", "at least two classes")
        if manifest.sampler.solver != "euler" or manifest.sampler.guidance != 1.0:
            fields.fail("sampler", "euler without guidance, where classes are told")
    return manifest


def _worded(fields: Fields, common: dict[str, Any]) -> dict[str, Any]:
    """What all manifests of text have."""
    tokenizer = _TOKENIZERS.get(fields.text("tokenizer"))
    if tokenizer is None:
        fields.fail("tokenizer", f"one of {', '.join(_TOKENIZERS)}")
    if fields.absent("tokenizer_sha256") != (tokenizer != "bpe"):
        fields.fail("tokenizer_sha256", "given exactly for a bpe")
    return {
        **common,
        "vocabulary": fields.integer("vocabulary", least=2, most=MOST_TOKENS),
        "length": fields.integer("length", least=1, most=LONGEST_SEQUENCE),
        "tokenizer": tokenizer,
        "tokenizer_sha256": None if tokenizer != "bpe" else fields.sha256("tokenizer_sha256"),
    }


def _text_manifest(fields: Fields, common: dict[str, Any]) -> TextManifest:
    sampler = fields.inner("sampler")
    return TextManifest(
        **_worded(fields, common),
        sampler=WriterSettings(
            steps=sampler.integer("steps", least=1, most=MOST_STEPS), temperature=sampler.not_negative("temperature")
        ),
    )


def _continuation_manifest(fields: Fields, common: dict[str, Any]) -> ContinuationManifest:
    sampler = fields.inner("sampler")
    manifest = ContinuationManifest(
        **_worded(fields, common),
        code_width=fields.integer("code_width", least=8, most=MOST_CODE_WIDTH),
        caches=_caches(fields.inner("caches")),
        noise=_noise(fields.inner("noise")),
        sampler=ContinuerSettings(
            steps=sampler.integer("steps", least=1, most=generation.MOST_STEPS),
            temperature=sampler.not_negative("temperature"),
            top_p=sampler.positive("top_p"),
        ),
    )
    if manifest.code_width % 8:
        fields.fail("code_width", "divisible by 8")
    if manifest.sampler.temperature > HIGHEST_TEMPERATURE:
        sampler.fail("temperature", f"at most {HIGHEST_TEMPERATURE:g}")
    if manifest.sampler.top_p > 1:
        sampler.fail("top_p", "at most 1")
    if len(manifest.caches.num_caches) != len(manifest.files):
        fields.inner("caches").fail("num_caches", f"a number for each of the {len(manifest.files)} blocks")
    return manifest


def _caches(fields: Fields) -> CacheShape:
    per = _CACHES_PER.get(fields.text("per"))
    if per is None:
        fields.fail("per", "'block' or 'step'")
    return CacheShape(
        per=per,
        num_caches=fields.integers("num_caches", least=1, most=2 * MOST_LAYERS),
        heads=fields.integer("heads", least=1, most=MOST_HEADS),
        head_width=fields.integer("head_width", least=1, most=MOST_HEAD_WIDTH),
    )


def _check_routing(fields: Fields, manifest: Manifest) -> None:
    """That the boundaries, the blocks and the levels tell the same story."""
    boundaries, distribution = manifest.boundaries, manifest.distribution
    level_name, least = ("t", 0.0) if isinstance(manifest, TextManifest) else ("sigma", 1 / MOST_NOISE)
    descending = all(high > low for high, low in pairwise(boundaries))
    if len(boundaries) < 2 or not descending or boundaries[-1] < 0:
        fields.fail("boundaries", "at least two noise levels, none negative, strictly descending")
    if len(boundaries) > MOST_BLOCKS + 1 or boundaries[0] > MOST_NOISE or boundaries[-1] < least:
        fields.fail("boundaries", f"at most {MOST_BLOCKS + 1} noise levels from {least:g} to {MOST_NOISE:g}")
    if (boundaries[0], boundaries[-1]) != (distribution.top, distribution.bottom):
        fields.fail("boundaries", f"noise levels from {distribution.top:g} to {distribution.bottom:g}")
    if len(manifest.files) != len(boundaries) - 1:
        raise MalformedError(f"files lists {len(manifest.files)} blocks, boundaries tells of {len(boundaries) - 1}")
    if manifest.sampler.steps < len(manifest.files):
        fields.inner("sampler").fail("steps", f"at least {len(manifest.files)}, the number of blocks")
    listed = [
        (level.positive(level_name), level.integer("block", least=0, most=MOST_BLOCKS))
        for level in fields.inners("levels")
    ]
    try:
        expected = [(level[level_name], level["block"]) for level in manifest.levels()]
    except (ValueError, ArithmeticError, ConfigError) as error:
        raise MalformedError(f"no levels can be made from sampler.steps and boundaries ({error})") from error
    same = len(listed) == len(expected) and all(
        block == own_block and math.isclose(level, own_level, rel_tol=1e-9)
        for (level, block), (own_level, own_block) in zip(listed, expected, strict=True)
    )
    if not same:
        raise MalformedError("levels are not those of sampler.steps and boundaries")


def _noise(fields: Fields) -> NoiseDistribution:
    return NoiseDistribution(
        sigma_min=fields.positive("sigma_min"),
        sigma_max=fields.positive("sigma_max"),
        p_mean=fields.number("p_mean"),
        p_std=fields.positive("p_std"),
    )


def _sampler(fields: Fields) -> SamplerSettings:
    solver = _SOLVERS.get(fields.text("solver"))
    if solver is None:
        fields.fail("solver", "'euler' or 'heun'")
    return SamplerSettings(
        steps=fields.integer("steps", least=1, most=MOST_STEPS),
        solver=solver,
        guidance=fields.not_negative("guidance"),
        noises=fields.integer("noises", least=1, most=MOST_NOISES),
    )


def _block_file(fields: Fields, block: int) -> BlockFile:
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


def _verified(fields: Fields) -> Verified:
    return Verified(
        block_max_abs_error=fields.not_negative("block_max_abs_error"),
        block_limit=fields.positive("block_limit"),
        output_max_abs_error=fields.not_negative("output_max_abs_error"),
        output_limit=fields.positive("output_limit"),
        output_equal_share=fields.not_negative("output_equal_share"),
        outputs=fields.integer("outputs", least=1, most=2**63),
        real_inputs=fields.truth("real_inputs"),
    )
