"""manifest.json of an exported directory: written, read, and compared with the files beside it.

All that is read is checked: a manifest may come from anywhere. File names are names inside the directory and nothing
else; a file's checksum is compared each time before the file is used.
"""

import errno
import hashlib
import json
import os
import stat
from importlib import metadata
from pathlib import Path
from typing import TypedDict, TypeVar

from pydantic import ValidationError

from edgeblocks.data.tokenizer import Tokenizer, stored_tokenizer
from edgeblocks.errors import RunError
from edgeblocks.export.graph_file import files_named_in, problem_of_block, problem_of_chain, problem_of_classifier
from edgeblocks.export.manifest_types import (
    BLOCKS_FORMAT_VERSION,
    CHAIN_FORMAT_VERSION,
    KIND,
    MANIFESTS,
    AnyManifest,
    BlockFile,
    ChainFile,
    GraphFile,
    Manifest,
    ModelFile,
    WordedManifest,
)
from edgeblocks.files.checked import Checked, in_short
from edgeblocks.files.own import create
from edgeblocks.files.untrusted import MalformedFileError, open_regular, read_object, shown
from edgeblocks.terminal import quoted

FILE_NAME = "manifest.json"
USAGE_NAME = "USE.md"
"""For people: how the graphs are run without this package."""
_CHUNK_BYTES = 2**20
_AGAIN = "copy the directory again from where it was written, or export the run again"
_PROBLEMS = {BlockFile: problem_of_block, ChainFile: problem_of_chain, ModelFile: problem_of_classifier}
"""Why a graph is not run, by what it is a graph of."""
_Kind = TypeVar("_Kind", bound=Checked)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json and wait until it is on the disk.

    Raises:
        OSError: the disk refused.
    """
    assert all(part.verified for part in (manifest, manifest.chain) if part is not None), (
        "only a verified export is finished"
    )
    write_content(folder, manifest.to_json())


def write_content(folder: Path, content: dict[str, object]) -> None:
    """Write manifest.json of any kind, and wait until it is on the disk.

    Raises:
        OSError: the disk refused.
    """
    with create(folder / FILE_NAME) as file:
        file.write(f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def kind_of(folder: Path) -> object:
    """The kind that manifest.json says it is of; None where it does not say. It is looked at when it is opened."""
    try:
        return read_object(folder / FILE_NAME, finite=False).get("kind")
    except (OSError, MalformedFileError):
        return None


def read_content(folder: Path, kind: type[_Kind]) -> _Kind:
    """manifest.json as one of a kind.

    Raises:
        RunError: it cannot be read, or is damaged.
    """
    path = folder / FILE_NAME
    try:
        return kind.model_validate(read_object(path, finite=False))
    except (OSError, MalformedFileError) as error:
        raise RunError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {in_short(error)}; {_AGAIN}") from error


def read_manifest(folder: Path) -> AnyManifest:
    """The manifest of an exported directory, checked; the block files are only looked at when they are used.

    Raises:
        RunError: not an exported directory, of another version, or damaged.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise RunError(
            f"there is no exported directory {folder}; write one with: edgeblocks export RUN -o {quoted(folder)}"
        )
    try:
        content = read_object(path, finite=False)  # the models look at each number, and then it has a name
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
    if type(version) is not int or version not in (BLOCKS_FORMAT_VERSION, CHAIN_FORMAT_VERSION):
        raise RunError(
            f"{folder} has export format version {shown(version)}; this edgeblocks "
            f"({metadata.version('edgeblocks')}) reads versions {BLOCKS_FORMAT_VERSION} and "
            f"{CHAIN_FORMAT_VERSION}. Use the edgeblocks that wrote it, or export the run again"
        )
    task = content.get("task")
    if not isinstance(task, str) or task not in MANIFESTS:
        raise RunError(f"{path} is damaged: task={shown(task)}: one of {', '.join(MANIFESTS)} is needed; {_AGAIN}")
    try:
        manifest = MANIFESTS[task].model_validate(content)
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {in_short(error)}; {_AGAIN}") from error
    if manifest.verified is None or (manifest.chain is not None and manifest.chain.verified is None):
        raise RunError(f"{path} is damaged: verified is missing, so the export was never finished; {_AGAIN}")
    return manifest


def exported_tokenizer(folder: Path, manifest: WordedManifest) -> Tokenizer:
    """How an exported directory turns text into tokens and back.

    Raises:
        RunError: its file is missing, damaged, or of another vocabulary.
    """
    return stored_tokenizer(
        folder,
        manifest.tokenizer,
        definition_sha256=manifest.tokenizer_sha256,
        vocabulary=manifest.vocabulary,
        cure="copy the directory again, or export again",
    )


def block_file(path: Path, data_path: Path | None, number: int) -> BlockFile:
    """What a manifest says of a block's graph that was written."""
    return BlockFile(block=number, **graph_facts(path, data_path))


class GraphFacts(TypedDict):
    """Fields of a `GraphFile`."""

    file: str
    data_file: str | None
    sha256: str
    data_sha256: str | None
    bytes: int


def graph_facts(path: Path, data_path: Path | None) -> GraphFacts:
    """What a manifest says of any graph that was written."""
    return {
        "file": path.name,
        "data_file": None if data_path is None else data_path.name,
        "sha256": sha256_of(path),
        "data_sha256": None if data_path is None else sha256_of(data_path),
        "bytes": path.stat().st_size + (0 if data_path is None else data_path.stat().st_size),
    }


def checked_path(folder: Path, file: GraphFile) -> Path:
    """A graph's file, after comparing its bytes, and those of its data file, with the manifest's checksums.

    Raises:
        RunError: missing or damaged.
    """
    digests = (file.sha256, file.data_sha256)
    present_bytes = sum(_bytes_of(folder / name, file.title) for name in file.names)
    if present_bytes != file.bytes:
        raise RunError(
            f"{file.title} is damaged: {' and '.join(file.names)} in {folder} have {present_bytes} bytes where "
            f"{file.bytes} belong; {_AGAIN}"
        )
    for name, expected in zip(file.names, digests, strict=False):
        try:
            digest = sha256_of(folder / name)
        except OSError as error:
            raise RunError(f"cannot read {file.title}: {folder / name}: {error.strerror}") from error
        if digest != expected:
            raise RunError(f"{file.title} is damaged: {folder / name} does not match its checksum; {_AGAIN}")
    _check_named_files(folder, file)
    _check_nodes(folder / file.file, file)
    return folder / file.file


def _check_nodes(path: Path, file: GraphFile) -> None:
    """That a graph has the operators of an export only, and that loops of a chain end."""
    try:
        problem = _PROBLEMS[type(file)](path)
    except MalformedFileError as error:
        raise RunError(f"{file.title} is damaged: {path}: {error}; {_AGAIN}") from error
    except OSError as error:
        raise RunError(f"cannot read {file.title}: {path}: {error.strerror}") from error
    if problem is not None:
        raise RunError(f"{file.title} is refused: {path} {problem}; {_AGAIN}")


def _check_named_files(folder: Path, file: GraphFile) -> None:
    """That a graph takes its weights from its own files: others could be anybody's, and have no checksum."""
    path = folder / file.file
    try:
        named = files_named_in(path)
    except MalformedFileError as error:
        raise RunError(f"{file.title} is damaged: {path}: {error}; {_AGAIN}") from error
    except OSError as error:
        raise RunError(f"cannot read {file.title}: {path}: {error.strerror}") from error
    foreign = sorted(named - {file.data_file})
    if foreign:
        raise RunError(
            f"{file.title} is refused: {path} takes weights from {shown(foreign[0])}, which is not among its "
            f"files in {FILE_NAME}; {_AGAIN}"
        )


def _bytes_of(path: Path, what: str) -> int:
    """Size of a regular file, or of the one that a link leads to: stores lay out a folder as links to their files.

    Wherever that one is, it is used only when it has the checksum that the manifest names.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise RunError(f"{what} is missing: there is no file {path}; {_AGAIN}") from error
    except OSError as error:
        why = "is a link to itself" if error.errno == errno.ELOOP else error.strerror
        raise RunError(f"cannot read {what}: {path} {why}; {_AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise RunError(f"{what} is refused: {path} is no regular file; {_AGAIN}")
    return status.st_size


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, a megabyte at a time."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()
