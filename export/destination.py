"""Where an export is written: a hidden folder beside the destination, renamed into place when all is verified.

Under the final name there is only ever a whole export.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edgeblocks.data.tokenizer import TOKENIZER_FILE
from edgeblocks.errors import ConfigError, RunError, StorageError
from edgeblocks.export.language_model import is_language_model, read_language_manifest
from edgeblocks.export.manifest import FILE_NAME, USAGE_NAME, read_manifest
from edgeblocks.export.manifest_types import WordedManifest
from edgeblocks.export.vision_model import is_vision_model, read_vision_manifest
from edgeblocks.files.durable import sync
from edgeblocks.files.own import create
from edgeblocks.units import format_bytes


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk when the block ends."""
    with create(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Nothing but a former export may stand where an export is written, and nothing else beside its files.

    Args:
        overwrite: a former export may be replaced.

    Raises:
        ConfigError: something stands there that may not be replaced.
    """
    check_replaceable(out, _files_of_an_export, flag="-o", what="export", overwrite=overwrite)


def check_replaceable(
    out: Path, files_of: Callable[[Path], Set[str]], *, flag: str, what: str, overwrite: bool
) -> None:
    """A folder may be written where nothing stands, or a former one of its kind with nothing else beside its files.

    Args:
        files_of: the paths of all files of a former one, relative to its folder; a RunError where it is none.
        flag: by which the user named `out`.
        what: is written.
        overwrite: a former one may be replaced.

    Raises:
        ConfigError: something stands there that may not be replaced.
    """
    if not out.exists():
        return
    article = "an" if what[0] in "aeiou" else "a"
    if not out.is_dir():
        raise ConfigError(f"{flag} {out} is a file; give the name of a directory to write the {what} to")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir() or path.is_symlink()}
    if not present:
        return
    try:
        own = files_of(out)
    except RunError as error:
        raise ConfigError(
            f"{flag} {out} holds something that is not {article} {what} that could be replaced ({error}); choose "
            f"another directory, or empty this one"
        ) from error
    others = sorted(present - own)
    if others:
        shown = ", ".join(others[:5]) + (", .." if len(others) > 5 else "")
        raise ConfigError(
            f"{flag} {out} holds files that are not of the {what} there, and they would be lost: {shown}; move them "
            f"away, or choose another directory"
        )
    if not overwrite:
        raise ConfigError(
            f"{flag} {out} holds {article} {what} already; add --force to replace it, or choose another name"
        )


def _files_of_an_export(folder: Path) -> set[str]:
    """The names of all its files.

    Raises:
        RunError: it holds no export.
    """
    if is_language_model(folder):
        return {FILE_NAME, *(file.name for file in read_language_manifest(folder).files)}
    if is_vision_model(folder):
        return {FILE_NAME, USAGE_NAME, *read_vision_manifest(folder).graph.names}
    manifest = read_manifest(folder)
    own = {FILE_NAME, USAGE_NAME, *(name for file in manifest.graphs for name in file.names)}
    if isinstance(manifest, WordedManifest) and manifest.tokenizer_sha256 is not None:
        own.add(TOKENIZER_FILE)
    return own


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and vanishes when it does not.

    A kill leaves `out` as it was and the hidden folder behind, which the next export to the same place removes. Between
    the two renames of a replacement the former export has the hidden name; the next export puts it back.

    Raises:
        StorageError: the disk refused.
    """
    folder, former = out.with_name(f".{out.name}.edgeblocks-new"), out.with_name(f".{out.name}.edgeblocks-former")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if former.exists() and not out.exists():
            former.rename(out)
        for leftover in (folder, former):
            if leftover.exists():
                shutil.rmtree(leftover)
        folder.mkdir()
        try:
            yield folder
            sync(folder)
            if out.exists():
                out.rename(former)
            folder.rename(out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            if former.exists() and not out.exists():
                former.rename(out)
            raise
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write the export {out}: {error.strerror or error}{_free_space(out)}; the run and a former export "
            "are untouched; make room, or choose another place with -o"
        ) from error


def _free_space(out: Path) -> str:
    try:
        return f"; {format_bytes(shutil.disk_usage(out.parent).free)} are free there"
    except OSError:
        return ""
