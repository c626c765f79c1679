"""A checkpoint of all blocks at once: new files that replace the former ones together or not at all."""

from pathlib import Path

from edgeblocks.files.durable import sync, write_atomically
from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.offload.block_files import BlockStore, storage_error
from edgeblocks.optim.loss_scale import LossScale


class NextBlocks:
    """New files for all blocks of a run, which replace the former ones together or not at all, even after a crash.

    The new files are written next to the former ones under other names. When all are complete, an empty marker file is
    written: from then on the new files are the run's. After a crash `recover` finishes renaming them.
    """

    _COMPLETE = ".next_blocks_are_complete"

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._new = _NextStore(store.folder, store.layouts, store.run_id)

    def write(self, block: int, buffer: BlockBuffer, step: int, loss_scale: LossScale | None = None) -> None:
        """Write a block's new file; see `BlockStore.write`."""
        self._store.check_folder()  # `_new` holds no folder open that it could compare with
        self._new.count_from(self._store.run_bytes_written)
        self._new.write(block, buffer, step, loss_scale)
        self._store.bytes_written += self._new.bytes_written

    def commit(self) -> None:
        """Put the new files in the place of the former ones."""
        marker = self._store.folder / self._COMPLETE
        try:
            # The instant of the change. Each new file was synced when it was written, so no marker can be there without
            # them.
            write_atomically(marker, [b""])
        except OSError as error:
            raise storage_error("cannot complete a checkpoint", marker, error) from error
        self.recover()

    def recover(self) -> None:
        """Finish a replacement that was interrupted, or remove what there is of an incomplete one.

        Raises:
            StorageError: the folder cannot be written.
        """
        marker = self._store.folder / self._COMPLETE
        try:
            # A marker that outlives its files, after a crash between the two lines at the end, finds nothing left to
            # rename.
            complete = marker.exists()
            # Renaming can be cut short after any of the files: those that are left still have their new names.
            for block in range(len(self._store.layouts)):
                if complete and self._new.path(block).exists():
                    self._new.path(block).replace(self._store.path(block))
                self._new.path(block).unlink(missing_ok=True)
            sync(self._store.folder)  # all renames are on the disk before the marker goes
            marker.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("cannot replace the blocks", marker, error) from error


class _NextStore(BlockStore):
    def path(self, block: int) -> Path:
        return self.folder / f".block_{block:03d}.next"

    def count_from(self, bytes_written: int) -> None:
        """Set the bytes the run had written before, which the next file's header counts on from."""
        self._former_bytes_written, self.bytes_written = bytes_written, 0
