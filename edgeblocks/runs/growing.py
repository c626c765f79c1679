"""A network that grows: the window of layers that was trained moves up by half of itself (`--method greedy`).

The lower half is frozen, and as many new layers come on top of the upper one. They begin as copies of the layers below
them, their branches' outputs times `COPIED_SHARE`, so that the network computes nearly what it did before, and the
readout goes on as it is. All values are the EMA's, those that the network is evaluated with; moments begin anew.

The files of each window are in a folder of their own. The manifest names the window, so that the run changes from one
set of files to the next in one instant.

Source: Belilovsky et al. 2019, arXiv 1812.11446 (greedy layer-wise training), with windows that overlap.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from edgeblocks.files.own import make_folder
from edgeblocks.offload.block_files import BlockStore, storage_error
from edgeblocks.offload.sections import init_section_, network_of
from edgeblocks.runs.create import seal_run
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.disk_room import check_writes
from edgeblocks.runs.schema import WindowFields
from edgeblocks.seeds import generator_at

COPIED_SHARE = 0.1


def grown(run: RunDirectory, note: Callable[[str], None]) -> RunDirectory:
    """The run with its window moved up, where the training of the present one has come to its end.

    A process that is killed meanwhile leaves the run as it was.

    Raises:
        RunError: a file is damaged.
        StorageError: the disk refused.
        WriteLimitError: more would be written to disk than the user allows; the run is as it was.
    """
    assert run.window is not None
    assert not run.is_grown
    former = run.store_with_meter()
    step = former.header(run.window.number).step
    taller = replace(run, window=WindowFields(number=run.window.number + 1, first_step=step))
    needed_bytes = sum(map(taller.store().file_bytes, range(len(taller.file_layers))))
    check_writes(run, needed_bytes, "adding layers", written=former.run_bytes_written)
    try:
        shutil.rmtree(taller.blocks_folder, ignore_errors=True)  # what a killed process left
        make_folder(taller.blocks_folder)
    except OSError as error:
        raise storage_error("cannot make a folder for the next window", taller.blocks_folder, error) from error
    _write_grown(former, taller, step)
    seal_run(taller)
    shutil.rmtree(run.blocks_folder, ignore_errors=True)
    frozen, there = sum(taller.file_layers[:-1]), sum(taller.file_layers)
    now_frozen = "layer 1 is" if frozen == 1 else f"layers 1 to {frozen} are"
    note(
        f"step {step}: {now_frozen} frozen, the network has {there} of its {sum(run.plan.layers_per_block)} layers now"
    )
    return taller


def _write_grown(former: BlockStore, taller: RunDirectory, step: int) -> None:
    """The files of all parts of the grown network."""
    assert taller.window is not None
    top = taller.window.number
    store = taller.store()
    store.continue_meter(former.header(part) for part in range(len(former.layouts)))
    buffer, loss_scale = store.buffer(), former.header(top - 1).loss_scale
    for part in range(top - 1):
        former.read(part, buffer)
        store.write(part, buffer, former.header(part).step)
    source = former.buffer(("ema",))
    former.read(top - 1, source)
    trained = dict(source.tensors("ema"))
    for part, up in ((top - 1, 0), (top, taller.file_layers[top - 1])):
        buffer.adopt_(store.layouts[part])
        for kind in buffer.parts:
            buffer.part_bytes(kind).zero_()  # moments begin anew
        _fill_(dict(buffer.tensors("weights")), trained, taller, part, up=up)
        buffer.flat("ema").copy_(buffer.flat("weights"))
        store.write(part, buffer, step, loss_scale if part == top else None)


def _fill_(tensors: dict[str, Tensor], trained: dict[str, Tensor], taller: RunDirectory, part: int, *, up: int) -> None:
    """Give a part of the grown network its weights from those of the window that was trained.

    Args:
        up: by how many layers the part begins above that window; so many new layers are its top.
    """
    family, section = taller.family(), taller.sections[part]
    with torch.device("meta"):
        outputs = network_of(family, section).branch_outputs
    copies = any(_owner(name) in outputs for name in tensors)
    if up and not copies:
        init_section_(family, section, tensors.items(), generator_at(taller.settings.run.seed, "grow", part))
    for name, tensor in tensors.items():
        number, inside = _in_layer(name)
        if number is None:
            tensor.copy_(trained[name])
        elif number < section.num_layers - up:
            tensor.copy_(trained[f"layers.{number + up}.{inside}"])
        elif copies:
            # The layer of that number in the window that was trained lies `up` layers below it now.
            tensor.copy_(trained[name])
            if _owner(name) in outputs:
                tensor.mul_(COPIED_SHARE)


def _in_layer(name: str) -> tuple[int | None, str]:
    """The number of a parameter's layer, and its name there; no number of one that is in none.

    >>> _in_layer("layers.2.mlp.down.bias"), _in_layer("readout.bias")
    ((2, 'mlp.down.bias'), (None, 'readout.bias'))
    """
    if not name.startswith("layers."):
        return None, name
    number, _, inside = name.removeprefix("layers.").partition(".")
    return int(number), inside


def _owner(name: str) -> str:
    """The module that has a parameter, by its name in a layer.

    >>> _owner("layers.2.mlp.down.bias")
    'mlp.down'
    """
    return _in_layer(name)[1].rpartition(".")[0]
