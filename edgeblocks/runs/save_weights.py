"""A run's weights in one safetensors file, under the names that they have in the whole network."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeblocks.errors import ConfigError, RunError, StorageError
from edgeblocks.files.durable import write_atomically
from edgeblocks.files.own import check_new
from edgeblocks.files.tensor_file import encode_header, table_of
from edgeblocks.offload.block_buffer import BlockBuffer, NetworkPart, largest_of
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.profiling.budgets import check_needed
from edgeblocks.registry import build_target
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.opening import check_whole
from edgeblocks.terminal import command
from edgeblocks.units import format_bytes

CLASS_NAMES = "edgeblocks.class_names"
"""What a file's metadata has the names of the classes under, in JSON: the order in which a network knows them."""

_MOST_NAMES_BYTES = 2**20
"""Beyond which the names are left out: a header may not have any length."""
_PIECE_VALUES = 2**19
"""That are looked at together: of a whole tensor the look would take as much memory again."""
BESIDE_A_BLOCK_BYTES = 8_000_000
"""What writing takes beside one block: code that is used for the first time, a piece's look, tables; measured 3 MB."""


class WrittenWeights(TypedDict):
    """What was written."""

    path: str
    tensors: int
    bytes: int
    part: NetworkPart


def write_weights(
    run: RunDirectory, out: Path, *, last: bool, overwrite: bool, mem_budget: str | None = None
) -> WrittenWeights:
    """Write the weights of all blocks, one block after the other; returns the file's path and size.

    Blocks that were trained alone are networks of their own: their names begin with `block_0.`, `block_1.` and so on.

    Args:
        last: the weights as the last step left them, without the average.
        overwrite: replace a file that is there.
        mem_budget: what the process may take of memory; None does not bound it.

    Raises:
        ConfigError: the file's name does not end in .safetensors, the file is there already, or `mem_budget` is no
            size.
        DoesNotFitError: it takes more than `mem_budget`.
        RunError: a block is damaged or holds values that are not finite, or the run is trained while it is read.
        StorageError: the disk refused.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"-o {out}: weights are written as safetensors; give a name that ends in .safetensors")
    check_new(out, overwrite=overwrite)
    part = part_of(last)
    check_memory(run, part, mem_budget)
    blocks = read_weights(run, last=last)  # looks at the steps before anything is written
    entries = [(block, entry) for block, layout in enumerate(run.store().layouts) for entry in layout.of_part(part)]
    named = [(run.tensor_name(block, entry.own_name), entry) for block, entry in entries]
    table = table_of((name, torch.float32, entry.shape) for name, entry in named)
    names = json.dumps(run.class_names)
    told = {CLASS_NAMES: names} if run.class_names and len(names) <= _MOST_NAMES_BYTES else {}
    header = encode_header(table, {"format": "pt", **told})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, _pieces(run, header, blocks, part))
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}; choose another place with -o") from error
    num_bytes = len(header) + 4 * sum(math.prod(entry.shape) for _, entry in entries)
    return {"path": str(out), "tensors": len(entries), "bytes": num_bytes, "part": part}


def part_of(last: bool) -> NetworkPart:
    """Of a block: its weights as the last step left them, or their average."""
    return "weights" if last else "ema"


def check_memory(run: RunDirectory, part: NetworkPart, mem_budget: str | None) -> None:
    """Refuse to begin where one block beside what the process holds is more than it may take."""
    block_bytes = largest_of(run.store().layouts, (part,)).part_span(part)[1]
    needed_bytes = build_target("cpu").used_bytes() + block_bytes + BESIDE_A_BLOCK_BYTES
    why = f"the largest {run.method.part} has {format_bytes(block_bytes)} of weights, and one is in memory at a time"
    check_needed(mem_budget, needed_bytes, f"writing the weights of {run.path}", why)


def check_finite(run: RunDirectory, block: int, buffer: BlockBuffer, part: NetworkPart) -> None:
    """Raises RunError where a block holds values that are no numbers."""
    broken = [(name, _num_broken(tensor), tensor.numel()) for name, tensor in buffer.tensors(part)]
    count, total = sum(count for _, count, _ in broken), sum(size for _, _, size in broken)
    if not count:
        return
    first = next(name for name, count, _ in broken if count)
    alone = "" if run.method.trained_together else f"train it again: {command('train', '--resume', run.path)} "
    alone += "" if run.method.trained_together else f"--reinit-block {block}, or "
    raise RunError(
        f"{run.method.part} {block} of {run.path} holds {count} values of {total} that are not finite numbers (NaN or "
        f"infinite), the first in {first}: its training diverged, so nothing was written; {alone}train anew with a "
        f"smaller --set learning_rate=.."
    )


def _num_broken(tensor: Tensor) -> int:
    """Values that are not finite."""
    # numpy's, which starts no threads: torch's and their memory took 15 MB.
    return sum(len(piece) - int(np.count_nonzero(np.isfinite(piece))) for piece in _float32_pieces(tensor.view(-1)))


def _float32_pieces(values: Tensor) -> Iterator[NDArray[np.float32]]:
    """Values of float32 or bfloat16 in a row, some at a time; of float32 they are views."""
    for start in range(0, len(values), _PIECE_VALUES):
        piece = values[start : start + _PIECE_VALUES]
        if values.dtype == torch.float32:
            yield piece.numpy()
        else:  # numpy has no bfloat16: it is the upper half of a float32
            yield (piece.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32)


def _pieces(
    run: RunDirectory, header: bytes, blocks: Iterator[BlockBuffer], part: NetworkPart
) -> Iterator[bytes | memoryview]:
    yield header
    for block, buffer in enumerate(blocks):
        check_finite(run, block, buffer, part)
        for piece in _float32_pieces(buffer.flat(part)):
            yield memoryview(piece).cast("B")  # type: ignore[arg-type]  # numpy's stubs: see `bytes_of`


def read_weights(run: RunDirectory, *, last: bool) -> Iterator[BlockBuffer]:
    """The weights of one block after the other, all in the same memory: a block's are there until the next is taken.

    Args:
        last: the weights as the last step left them; else their average (EMA), which is the only part that is read.

    Raises:
        RunError: a block is damaged, or the run is trained while it is read.
    """
    store = run.store()
    if run.method.trained_together:
        check_whole(run, store)
    return _blocks(run, store, store.buffer((part_of(last),)))


def _blocks(run: RunDirectory, store: BlockStore, buffer: BlockBuffer) -> Iterator[BlockBuffer]:
    steps = set()
    for block, trained in enumerate(run.trained):
        step = store.read(block, buffer)
        if trained:
            steps.add(step)
        yield buffer
    # Looked at again at the end: a training process may have put a checkpoint in place between two of the reads.
    if run.method.trained_together and len(steps) > 1:
        raise RunError(f"{run.path} was saved while its weights were read, and they do not belong together; try again")
