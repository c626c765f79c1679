"""Files of quantized blocks, beside those that they are made of."""

from collections.abc import Sequence

from edgeblocks.errors import RunError
from edgeblocks.files.own import make_folder
from edgeblocks.methods import Frozen
from edgeblocks.offload.block_buffer import BlockBuffer, largest_of
from edgeblocks.offload.block_files import BlockStore, storage_error
from edgeblocks.offload.quantized import quantize_, quantized_layouts
from edgeblocks.runs.directory import RunDirectory


def quantized_store(run: RunDirectory, count: int, kind: Frozen) -> BlockStore:
    """The files of a run's first `count` blocks, quantized; those that are missing are made now.

    They are in a folder of that name.

    Raises:
        RunError: a block is damaged.
        StorageError: the disk refused.
    """
    masters = run.store()
    folder = run.blocks_folder / kind
    try:
        make_folder(folder)
    except OSError as error:
        raise storage_error("cannot make a folder for quantized blocks", folder, error) from error
    store = BlockStore(folder, quantized_layouts(masters.layouts[:count], kind), run.run_id, trained_together=True)
    missing = [block for block in range(count) if not _is_up_to_date(store, masters, block)]
    if missing:
        _make(store, masters, missing)
    return store


def _is_up_to_date(store: BlockStore, masters: BlockStore, block: int) -> bool:
    """Whether a block has its quantized file, made of what its own file has now."""
    try:
        return store.header(block).made_of == _digest_of(masters, block)
    except RunError:  # none, or a damaged one: it is made again
        return False


def _make(store: BlockStore, masters: BlockStore, blocks: Sequence[int]) -> None:
    source = BlockBuffer(largest_of([masters.layouts[block] for block in blocks], ("ema",)), ("ema",))
    made = store.buffer()
    for block in blocks:
        step = masters.read(block, source)
        made.adopt_(store.layouts[block])
        quantize_(made, source.flat("ema"))
        store.write(block, made, step, made_of=_digest_of(masters, block))


def _digest_of(masters: BlockStore, block: int) -> str:
    """The checksum of what is quantized."""
    (part,) = masters.layouts[block].stored(["ema"])
    return masters.header(block).digests[part]
