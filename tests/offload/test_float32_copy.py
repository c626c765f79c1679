"""Float32 copies of blocks of bfloat16, which networks compute with."""

from contextlib import contextmanager

import pytest
import torch
from support.small_blocks import Small, store_in

from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.offload.block_buffer import BlockLayout
from edgeblocks.offload.float32_copy import Float32Copy, Float32Ema

WIDE, NARROW = (BlockLayout.of(Small(width), "adamw8bit", master="bf16") for width in (64, 32))


def filled(store, block, *, weights, ema):
    buffer = store.buffer()
    buffer.adopt_(store.layouts[block])
    buffer.touched().flat("weights").fill_(weights)
    buffer.flat("ema").fill_(ema)
    return buffer


def bound(copy, layout):
    with torch.device("meta"):
        network = Small(64 if layout is WIDE else 32)
    copy.bind_(network)
    return network


def test_a_copy_has_a_parts_values_under_its_names_and_shapes(tmp_path):
    """Float32, in the order of the file, for a smaller block than it was made for, too."""
    store = store_in(tmp_path, [WIDE, NARROW])
    copy = Float32Copy(store.layouts, torch.device("cpu"))
    for block, layout in enumerate(store.layouts):
        buffer = filled(store, block, weights=1, ema=2)
        generator = torch.Generator().manual_seed(block)
        for part in ("weights", "ema"):
            buffer.flat(part).copy_(torch.randn(layout.num_parameters, generator=generator))
            copy.hold_(buffer, part)
            for (name, value), (own, stored) in zip(copy.tensors(part), buffer.tensors(part), strict=True):
                assert name == own and value.dtype == torch.float32
                assert torch.equal(value, stored.float())
        assert {name for name, _ in bound(copy, layout).named_parameters()} == {name for name, _ in copy.tensors("ema")}


class Slots:
    """Two buffers, as a training has them between its visits."""

    def __init__(self, *buffers):
        self.buffers, self.asked = buffers, []

    @contextmanager
    def ema_weights(self, block):
        self.asked.append(block)
        yield self.buffers[block]


def test_an_ema_is_that_of_now_whenever_a_step_was_made_in_between(tmp_path):
    """Asked again for the same block it is not copied again, unless a network's weights took its place."""
    store = store_in(tmp_path, [WIDE, NARROW])
    slots = Slots(filled(store, 0, weights=1, ema=2), filled(store, 1, weights=3, ema=4))
    copy = Float32Copy(store.layouts, torch.device("cpu"))
    source = Float32Ema(slots, copy)

    def seen(block):
        with source.ema_weights(block) as weights:
            return set(weights.flat.tolist())

    assert [seen(0), seen(1), seen(1), seen(0)] == [{2}, {4}, {4}, {2}]
    copy.flat.fill_(9)
    assert seen(0) == {9}  # held: each layer of a stage asks for it
    assert set(copy.hold_(slots.buffers[0], "weights").flat.tolist()) == {1}  # a step's network takes the copy
    slots.buffers[0].flat("ema").fill_(5)
    assert seen(0) == {5}


@pytest.mark.parametrize("slots", [1, 2])
def test_a_loader_gives_float32_and_reads_into_one_buffer(tmp_path, slots):
    """As many copies as blocks are held; what passes is of 2 bytes a parameter, and is there once."""
    store = store_in(tmp_path, [WIDE, NARROW, WIDE])
    for block in range(3):
        store.write(block, filled(store, block, weights=9, ema=block + 1), step=1)
    loader, networks = EmaLoader(store, slots=slots), {}
    for block in range(slots):
        with loader.ema_weights(block) as weights:
            networks[block] = bound(weights, store.layouts[block])
    assert all(
        (parameter == block + 1).all() for block, network in networks.items() for parameter in network.parameters()
    )
    assert [buffer.num_bytes for buffer in loader._buffers] == [2 * WIDE.num_parameters]
    with loader.ema_weights(2) as weights:
        assert set(weights.flat.tolist()) == {3}
