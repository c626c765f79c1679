"""What a fine-tuning has changed of a model: its own tensors, or those that adapters stand beside."""

from collections.abc import Iterator

import torch
from torch import Tensor

from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.pretrained.decoder import Decoder
from edgeblocks.pretrained.lora import PEFT_PREFIX, AdapterSettings
from edgeblocks.pretrained.vision import Vision
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.save_weights import check_finite, part_of, read_weights

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def trained_names(run: RunDirectory) -> dict[str, tuple[int, ...]]:
    """The model's names of the tensors that training has changed, and shapes; those beside an adapter have it here."""
    family = _family(run)
    there = {
        family.name_in_file(run.tensor_name(stage, one.own_name)): tuple(one.shape)
        for stage, layout in enumerate(run.store().layouts)
        for one in layout.of_part("weights")
    }
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in there.items():
        if name.endswith(_DOWN):
            found[_matrix(name)] = (there[_up(name)][0], shape[1])
        elif not name.endswith(_UP):
            found[name] = shape
    return found


def trained_tensors(run: RunDirectory, *, last: bool) -> Iterator[tuple[str, Tensor]]:
    """Names in the model, and values: W + (alpha / r) B A where there is an adapter. One stage is in memory at a time.

    Args:
        last: the weights as the last step left them, without the average.

    Raises:
        RunError: a stage is damaged or holds values that are no numbers.
        OSError: the model's files cannot be read.
    """
    part = part_of(last)
    for stage, buffer in enumerate(read_weights(run, last=last)):
        check_finite(run, stage, buffer, part)
        yield from _of_stage(run, stage, buffer, last=last)


def _of_stage(run: RunDirectory, stage: int, buffer: BlockBuffer, *, last: bool) -> Iterator[tuple[str, Tensor]]:
    family = _family(run)
    stored = family.shell("meta").stored
    trained = {
        family.name_in_file(run.tensor_name(stage, own)): values for own, values in buffer.tensors(part_of(last))
    }
    for name, values in trained.items():
        if name.endswith(_DOWN):
            assert isinstance(family.settings, AdapterSettings)
            matrix = torch.empty(stored.tensors[_matrix(name)].shape)
            stored.read_(_matrix(name), matrix)
            yield _matrix(name), matrix.addmm_(trained[_up(name)].float(), values.float(), alpha=family.settings.scale)
        elif not name.endswith(_UP):
            yield name, values


def _family(run: RunDirectory) -> Decoder | Vision:
    family = run.family()
    assert isinstance(family, Decoder | Vision)
    return family


def _matrix(down: str) -> str:
    return f"{down.removeprefix(PEFT_PREFIX).removesuffix(_DOWN)}.weight"


def _up(down: str) -> str:
    return down.removesuffix(_DOWN) + _UP
