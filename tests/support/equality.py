"""Runs that are compared bit for bit, and a listener that stops one."""

import os
import signal
from pathlib import Path

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
    paths = sorted((Path(run) / "blocks").glob("*.safetensors"))
    assert len(paths) == blocks
    return {(path.name, name): tensor for path in paths for name, tensor in load_file(path).items()}


def assert_same_bits(first, second, blocks=3):
    one, two = block_tensors(first, blocks), block_tensors(second, blocks)
    assert one.keys() == two.keys()
    different = [name for name in one if one[name].tobytes() != two[name].tobytes()]
    assert not different, f"{len(different)} tensors differ, the first is {different[0]}"
