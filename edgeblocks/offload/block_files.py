"""The file that holds a block's bytes, and the folder of such files.

A block lives in one safetensors file: weights, EMA and optimizer state, with plain names. The data section of the file
is exactly the memory of a `BlockBuffer`, so a block is read with one `readinto` and written with one `write`, without
a second copy (safetensors' own reader maps the file and doubles the resident bytes; its writer is several times slower
with fsync). Any safetensors reader opens the file.

Every part carries a SHA-256 of its bytes, and the header one of itself: a flipped byte is found before use. A part is
hashed when it is read for the first time, and again once the file is another one by inode, times or size, also where
this process wrote it: what came back from the disk is checked, not what was sent there. Bytes that a disk changes
without a write, after this process found them sound, are found by the next process. A write goes to a temporary name,
is synced, and then renamed: at any instant the file under the final name is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

from torch import Tensor

from edgeblocks.errors import RunError, StorageError
from edgeblocks.files.durable import write_atomically
from edgeblocks.files.tensor_file import encode_header, read_header, table_of
from edgeblocks.files.untrusted import MalformedFileError, open_regular, shown
from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, BlockLayout, Part, bytes_of, largest_of
from edgeblocks.optim.loss_scale import GROWTH_INTERVAL, LARGEST_EXPONENT, LossScale
from edgeblocks.units import format_bytes

FORMAT_VERSION = 1
_CLOCK_TICK_NS = 2 * 10**9
"""How coarse a file system's times may be (FAT's are): a later change within this of the last one may not show."""


_PIECE_BYTES = 2**21
"""Of a file that is copied, at a time in memory."""
_Identity = tuple[int, int, int, int, int]
"""A file's device, inode, times of the last change (of its bytes, of its entry) and size."""


@dataclass(frozen=True, kw_only=True)
class BlockHeader:
    """What a block file says of itself."""

    run_id: str
    block: int
    step: int
    digests: dict[Part, str]
    run_bytes_written: int
    """Bytes of blocks that the run had written when this file was complete."""
    loss_scale: LossScale | None = None
    """Of the next step, where the block is trained in float16."""
    made_of: str | None = None
    """Of a quantized block, the checksum of the EMA that it was made of."""


class BlockStore:
    """The files of a run's blocks, in one folder."""

    def __init__(
        self, folder: Path, layouts: Sequence[BlockLayout], run_id: str, *, trained_together: bool = False
    ) -> None:
        """
        Args:
            trained_together: as stages of one network, of which none can be trained again alone.
        """
        self.folder, self._together = folder, trained_together
        self.layouts = tuple(layouts)
        self.run_id = run_id
        self.bytes_written = 0
        self._former_bytes_written = 0
        self._held_folder: int | None = None
        self._sound: dict[int, tuple[_Identity, set[Part]]] = {}
        """Of each block's file, which one it was and which of its parts matched their checksums."""

    def buffer(self, parts: Sequence[Part] = PARTS) -> BlockBuffer:
        """Memory for these parts of any of the blocks."""
        return BlockBuffer(largest_of(self.layouts, parts), parts)

    def _kept(self, block: int) -> str:
        """What is not lost with a damaged file, and what to do."""
        if self._together:
            return (
                "the others are not touched, but all were trained together. Put the file back from a copy, or train "
                "again from the beginning, with another --out"
            )
        return (
            f"the other blocks are not touched. Put the file back from a copy, or train this block alone again with "
            f"edgeblocks train --resume RUN --reinit-block {block}"
        )

    def path(self, block: int) -> Path:
        return self.folder / f"block_{block:03d}.safetensors"

    def file_bytes(self, block: int) -> int:
        """The most bytes that a block's file has on disk."""
        # Numbers of the most digits, as their text is part of the header.
        most, digests = 10**18, dict.fromkeys(self.layouts[block].stored(PARTS), "0" * 64)
        header = BlockHeader(
            run_id=self.run_id,
            block=block,
            step=most,
            digests=digests,
            run_bytes_written=most,
            loss_scale=LossScale(exponent=LARGEST_EXPONENT, steps=GROWTH_INTERVAL),
        )
        return len(_encode_header(self.layouts[block], header)) + self.layouts[block].num_bytes

    @property
    def run_bytes_written(self) -> int:
        """Bytes of blocks written in the run's whole life, earlier processes included."""
        return self._former_bytes_written + self.bytes_written

    def continue_meter(self, headers: Iterable["BlockHeader"]) -> None:
        """Count on from what earlier processes wrote, as the newest of the block files has it."""
        self._former_bytes_written = max((header.run_bytes_written for header in headers), default=0)

    def write(
        self,
        block: int,
        buffer: BlockBuffer,
        step: int,
        loss_scale: LossScale | None = None,
        made_of: str | None = None,
    ) -> None:
        """Replace a block's file by the buffer's content, atomically.

        Raises:
            StorageError: the disk refused, or the folder is not the one that was written before; the former file is
                untouched.
        """
        self.check_folder()
        layout = self.layouts[block]
        parts = layout.stored(PARTS)
        digests = {part: _digest(buffer.part_bytes(part)) for part in parts}
        # With this file included, as a bound: its own size is not known before the header is written.
        meter = self.run_bytes_written + self.file_bytes(block)
        header = _encode_header(
            layout,
            BlockHeader(
                run_id=self.run_id,
                block=block,
                step=step,
                digests=digests,
                run_bytes_written=meter,
                loss_scale=loss_scale,
                made_of=made_of,
            ),
        )
        payload: list[bytes | memoryview] = [header, *(bytes_of(buffer.part_bytes(part)) for part in parts)]
        total = sum(len(piece) for piece in payload)
        path = self.path(block)
        try:
            write_atomically(path, payload)
        except OSError as error:
            raise storage_error(f"cannot write block {block} ({format_bytes(total)})", path, error) from error
        self.bytes_written += total

    def hold_folder(self) -> None:
        """Write into this very folder only from now on; while it is open no other folder is given its inode number."""
        self._held_folder = os.open(self.folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        weakref.finalize(self, os.close, self._held_folder)

    def check_folder(self) -> None:
        """A folder that was deleted and made anew belongs to another run, whose lock this process does not hold."""
        if self._held_folder is None:
            return
        with contextlib.suppress(OSError):  # the write that follows says it better
            if not os.path.samestat(self.folder.lstat(), os.fstat(self._held_folder)):
                raise StorageError(
                    f"{self.folder} was deleted and made anew while this run was trained; nothing is written there. "
                    f"Put this run back from a copy, or leave the new one alone"
                )

    def header(self, block: int) -> BlockHeader:
        """A block file's header, checked against this run and layout.

        Raises:
            RunError: missing, damaged, of another run, of another format version.
        """
        path = self.path(block)
        try:
            with open_regular(path) as file:
                return self._read_header(block, file)[0]
        except FileNotFoundError as error:
            raise RunError(f"block {block} is missing: there is no file {path}; {self._kept(block)}") from error
        except OSError as error:
            raise storage_error(f"cannot read block {block}", path, error) from error

    def read(self, block: int, buffer: BlockBuffer, parts: Sequence[Part] | None = None) -> int:
        """Fill the buffer with the parts it holds, or with some of them, and return the block's step.

        Raises:
            RunError: as `header`, or the bytes do not match their checksum.
            StorageError: the disk refused, or the whole folder is gone.
        """
        layout, path = self.layouts[block], self.path(block)
        buffer.adopt_(layout)
        wanted = buffer.parts if parts is None else layout.stored(parts)
        try:
            with open_regular(path) as file:
                header, data_start = self._read_header(block, file)
                # Of the file that is open, and before its bytes are read: a later change shows in its times, and it is
                # hashed again.
                sound = self._sound_parts(block, os.fstat(file.fileno()))
                for part in wanted:
                    file.seek(data_start + layout.part_span(part)[0])
                    # Straight into the buffer: with a copy in between, loading a block would take its room twice.
                    _read_exactly(file, bytes_of(buffer.part_bytes(part)))
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.folder.is_dir():
                raise RunError(f"block {block} is missing: there is no file {path}; {self._kept(block)}") from error
            raise storage_error(f"cannot read block {block}", path, error) from error
        for part in wanted:
            if part in sound:
                continue
            if _digest(buffer.part_bytes(part)) != header.digests[part]:
                raise self._does_not_match(block, part)
            sound.add(part)
        return header.step

    def sound_pieces(self, block: int) -> Iterator[bytes]:
        """The bytes of a block's file in their order, checked as they go by: for a copy of it.

        Raises:
            RunError: as `read`; a part that does not match its checksum is told after its last piece.
            StorageError: the disk refused.
        """
        path = self.path(block)
        try:
            with open_regular(path) as file:
                header, data_start = self._read_header(block, file)
                file.seek(0)
                yield file.read(data_start)
                for part in self.layouts[block].stored(PARTS):
                    digest, left = hashlib.sha256(), self.layouts[block].part_span(part)[1]
                    while left and (piece := file.read(min(left, _PIECE_BYTES))):
                        digest.update(piece)
                        yield piece
                        left -= len(piece)
                    if digest.hexdigest() != header.digests[part]:
                        raise self._does_not_match(block, part)
        except OSError as error:
            raise storage_error(f"cannot read block {block}", path, error) from error

    def stand_in(self, block: int, step: int) -> bytes:
        """The beginning of a file that stands for a block of which nothing but the step is read, here or elsewhere."""
        return _encode_header(self.layouts[block], replace(self.header(block), step=step))

    def _does_not_match(self, block: int, part: Part) -> RunError:
        return RunError(
            f"block {block} is damaged: the {part} in {self.path(block)} do not match their checksum; "
            f"{self._kept(block)}"
        )

    def _sound_parts(self, block: int, status: os.stat_result) -> set[Part]:
        """Parts of this very file that need not be hashed again; what is added to them is remembered."""
        # A file that was just written could be changed within the same tick of the clock, with the same identity.
        if time.time_ns() - status.st_mtime_ns < _CLOCK_TICK_NS:
            return set()
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if block not in self._sound or self._sound[block][0] != identity:
            self._sound[block] = identity, set()
        return self._sound[block][1]

    def _read_header(self, block: int, file: BufferedReader) -> tuple[BlockHeader, int]:
        path = self.path(block)
        damaged = f"block {block} is damaged: {path}"
        try:
            table, data_start = read_header(file)
        except MalformedFileError as error:
            raise RunError(f"{damaged}: {error}; {self._kept(block)}") from error
        try:
            metadata = table.pop("__metadata__")
            version = int(metadata["format_version"])
            if version != FORMAT_VERSION:
                raise RunError(
                    f"{path} has block format version {version}; this edgeblocks reads version {FORMAT_VERSION}. "
                    f"Use the edgeblocks that wrote it"
                )
            claimed = metadata.pop("header_sha256")
            if claimed != _header_digest(table, metadata):
                raise RunError(f"{damaged} has a header that does not match its checksum; {self._kept(block)}")
            header = BlockHeader(
                run_id=metadata["run_id"],
                block=_count(metadata["block"]),
                step=_count(metadata["step"]),
                digests={part: metadata[f"{part}_sha256"] for part in self.layouts[block].stored(PARTS)},
                run_bytes_written=_count(metadata.get("run_bytes_written", "0")),
                loss_scale=_loss_scale(metadata),
                made_of=metadata.get("made_of_sha256"),
            )
            if not isinstance(header.run_id, str) or not isinstance(header.made_of, str | None):
                raise TypeError(f"run_id={shown(header.run_id)}, made_of_sha256={shown(header.made_of)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{damaged} has an unreadable header; {self._kept(block)}") from error
        if header.run_id != self.run_id or header.block != block:
            raise RunError(
                f"{path} is block {header.block} of run {header.run_id[:8]}, but block {block} of run "
                f"{self.run_id[:8]} belongs here; put this run's own file back"
            )
        layout = self.layouts[block]
        # The header's checksum says that the table is what was written; these say that it is of this network, and
        # whole.
        size, expected = os.fstat(file.fileno()).st_size, data_start + layout.num_bytes
        if table != _table(layout):
            raise RunError(f"{path} holds tensors of another network than config.yaml describes; {self._kept(block)}")
        if size != expected:
            raise RunError(f"{damaged} has {size} bytes where {expected} belong: it was cut short; {self._kept(block)}")
        return header, data_start


def _count(text: str) -> int:
    """A number as the header has it: digits, no more than any count of steps or bytes needs."""
    if not isinstance(text, str) or not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ValueError(f"{shown(text)} is no count")
    return int(text)


def _loss_scale(metadata: Mapping[str, str]) -> LossScale | None:
    if "loss_scale_exponent" not in metadata:
        return None
    exponent, steps = (_count(metadata[name]) for name in ("loss_scale_exponent", "loss_scale_steps"))
    if exponent > LARGEST_EXPONENT:
        raise ValueError(f"a loss scale of 2^{exponent}")
    return LossScale(exponent=exponent, steps=steps)


def _table(layout: BlockLayout) -> dict[str, object]:
    return table_of((entry.name, entry.dtype, entry.shape) for entry in layout.entries)


def _header_digest(table: Mapping[str, object], metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([table, metadata], sort_keys=True).encode()).hexdigest()


def _encode_header(layout: BlockLayout, header: BlockHeader) -> bytes:
    table = _table(layout)
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "run_id": header.run_id,
        "block": str(header.block),
        "step": str(header.step),
        "run_bytes_written": str(header.run_bytes_written),
        **{f"{part}_sha256": digest for part, digest in header.digests.items()},
    }
    if header.loss_scale is not None:
        metadata["loss_scale_exponent"] = str(header.loss_scale.exponent)
        metadata["loss_scale_steps"] = str(header.loss_scale.steps)
    if header.made_of is not None:
        metadata["made_of_sha256"] = header.made_of
    metadata["header_sha256"] = _header_digest(table, metadata)
    return encode_header(table, metadata)


def _digest(data: Tensor) -> str:
    return hashlib.sha256(bytes_of(data)).hexdigest()


def _read_exactly(file: BufferedReader, view: memoryview) -> None:
    done = 0
    while done < len(view):  # the system may read less than it is asked to
        count = file.readinto(view[done:])
        if not count:
            raise OSError(f"the file ended {len(view) - done} bytes early")
        done += count


def storage_error(what: str, path: Path, error: OSError) -> StorageError:
    """An OSError in the user's words, with the free space of the disk concerned."""
    try:
        free = f"; {format_bytes(shutil.disk_usage(path.parent).free)} are free there"
    except OSError:
        free = ""
    ending = "The last saved state is intact; make room or repair the folder, then go on with --resume"
    if not path.parent.is_dir():
        ending = f"{path.parent} was deleted or its disk is gone; put it back from a copy, or start a new run"
    return StorageError(f"{what}: {path}: {error.strerror or error}{free}. {ending}")
