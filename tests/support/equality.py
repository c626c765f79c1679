"""Runs that are compared bit for bit, and a listener that stops one."""

import os
import signal
from pathlib import Path

from safetensors import deserialize
from safetensors.numpy import load_file

SMALL = {"data": "digits", "depth": 6, "width": 64, "heads": 2, "batch": 16, "blocks": 3, "sample_grids": 0}


SMALL |= {"hold_out": 0.005}  # to evaluate takes longer than to train, and is not what is compared


class StopAfter:
    """A listener that sends SIGTERM to its own process after so many steps."""

    def __init__(self, steps):
        self._steps = steps

    def stage(self, text): ...
    def advance(self, done, total, text): ...
    def planned(self, plan_text, out): ...
    def note(self, text): ...
    def step(self, progress):
        if progress.steps_done == self._steps:
            os.kill(os.getpid(), signal.SIGTERM)


def block_tensors(run, blocks=3):
    """Every tensor of every block file: weights, EMA, optimizer codes and scales."""
    return {(path.name, name): tensor for path in _block_files(run, blocks) for name, tensor in load_file(path).items()}


def _block_files(run, blocks):
    folder = Path(run) / "blocks"
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("window_*/*.safetensors")])
    assert len(paths) == blocks
    return paths


def _stored_tensors(run, blocks):
    """As they are stored: numpy, which `block_tensors` gives, has no bfloat16."""
    files = {path.name: deserialize(path.read_bytes()) for path in _block_files(run, blocks)}
    return {(file, name): stored for file, tensors in files.items() for name, stored in tensors}


def assert_same_bits(first, second, blocks=3):
    one, two = _stored_tensors(first, blocks), _stored_tensors(second, blocks)
    assert one.keys() == two.keys()
    different = [name for name in one if one[name] != two[name]]
    assert not different, f"{len(different)} tensors differ, the first is {different[0]}"
