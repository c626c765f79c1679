"""Blocks that a scheduler moves, with a store that notes what it does and can be held back."""

import threading

import torch
from torch import nn

from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout
from edgeblocks.offload.block_files import BlockStore

PATIENCE_S = 30
"""How long a test waits for another thread before it fails; no test waits that long when it passes."""


class SpyStore(BlockStore):
    """A block store that notes each finished read and write, and can hold one back until it is told to go on."""

    def __init__(self, folder, layouts):
        super().__init__(folder, layouts, "run")
        self.log = []
        self.changed = threading.Condition()
        self.held = set()

    def hold(self, *event):
        self.held.add(event)

    def release(self, *event):
        with self.changed:
            self.held.discard(event)
            self.changed.notify_all()

    def wait_for(self, *event):
        with self.changed:
            assert self.changed.wait_for(lambda: event in self.log, PATIENCE_S), f"no {event} in {self.log}"

    def _pass(self, event):
        with self.changed:
            assert self.changed.wait_for(lambda: event not in self.held, PATIENCE_S)

    def _note(self, *event):
        with self.changed:
            self.log.append(event)
            self.changed.notify_all()

    def read(self, block, buffer, parts=None):
        self._pass(("read", block))
        step = super().read(block, buffer, parts)
        self._note("read", block)
        return step

    def write(self, block, buffer, step, loss_scale=None):
        self._pass(("write", block))
        super().write(block, buffer, step, loss_scale)
        self._note("write", block)


def layout(width):
    return BlockLayout.of(nn.Linear(width, 64), "adamw8bit")


def make_store(folder, widths=(64, 64, 96)):
    """Blocks of which the last is the largest, each filled with its own number, at step 0."""
    folder.mkdir(exist_ok=True)
    store = SpyStore(folder, [layout(width) for width in widths])
    for block, block_layout in enumerate(store.layouts):
        buffer = BlockBuffer(block_layout)
        for part in buffer.parts:
            buffer.part_bytes(part).zero_()
        buffer.flat("weights").fill_(block + 1)
        buffer.flat("ema").fill_(block + 1)
        store.write(block, buffer, step=0)
    store.log.clear()
    return store


def run_visits(scheduler, visits):
    for visit, then in zip(visits, [*visits[1:], None], strict=True):
        with scheduler.visit(visit, then=then) as resident:
            assert resident.block == visit
            assert resident.buffer.layout is scheduler.store.layouts[visit]
            train(resident, 2)
    scheduler.flush()


def contents(store):
    return [store.path(block).read_bytes() for block in range(len(store.layouts))]


VISITS = [
    [0, 1, 2, 0, 1, 2, 0, 1, 2],
    [0, 0, 0, 1, 1, 2],
    [2, 1, 0, 1, 2, 1, 0],
    [2],
    [0, 2, 0, 2, 0, 1],
]


def train(resident, steps):
    """Stands for training: what a step writes depends on everything before it."""
    weights, ema = resident.buffer.flat("weights"), resident.buffer.flat("ema")
    codes = dict(resident.buffer.tensors("optimizer"))["exp_avg_codes"]
    for _ in range(steps):
        weights.mul_(1.01).add_(torch.arange(len(weights)) % 7 * 0.1 * (resident.step + 1))
        ema.lerp_(weights, 0.1)
        codes.add_(resident.step + 3)
        resident.step += 1
