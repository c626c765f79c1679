"""A block's bytes in memory: where each tensor lies, and parameters as views of the buffer."""

import itertools
import math

import pytest
import torch
from support.small_blocks import Small, filled_buffer, layout_of

from edgeblocks.offload.block_buffer import (
    PARTS,
    BlockBuffer,
    BlockLayout,
    bind_parameters_,
    is_quantizable,
    state_bytes,
)
from edgeblocks.optim.moments import GROUP_SIZE


def test_the_layout_puts_quantized_matrices_first_and_vectors_last():
    """Weights are ordered: large matrices, other matrices, vectors; ema has the same order, so one slice fits both."""
    layout = layout_of()
    names = [entry.name for entry in layout.entries if entry.part == "weights"]
    assert names == [
        "weights.first.weight",
        "weights.inner.1.weight",
        "weights.inner.0.weight",
        "weights.scale",
        "weights.first.bias",
        "weights.inner.0.bias",
        "weights.inner.1.bias",
    ]
    ema_names = [entry.name for entry in layout.entries if entry.part == "ema"]
    assert ema_names == [name.replace("weights.", "ema.") for name in names]
    assert layout.num_quantized == 2 * 128 * 64
    assert layout.num_decayed == layout.num_quantized + 21
    assert layout.num_parameters == layout.num_decayed + 5 + 128 + 3 + 64


def test_without_8_bit_state_nothing_is_quantized():
    """With adamw the quantized stretch is empty, and all moments are fp32."""
    layout = layout_of("adamw")
    assert layout.num_quantized == 0
    assert layout.num_decayed == 2 * 128 * 64 + 21
    assert layout.part_span("optimizer")[1] == 8 * layout.num_parameters


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_tensors_fill_the_file_without_gaps(optimizer):
    """Each entry begins where the former ends, aligned to its type; parts are contiguous."""
    layout, end = layout_of(optimizer), 0
    for entry in layout.entries:
        assert entry.start == end
        assert entry.start % entry.dtype.itemsize == 0
        end += entry.num_bytes
    assert end == layout.num_bytes
    starts = [layout.part_span(part) for part in PARTS]
    assert starts[0][0] == 0
    for (start, size), (following, _) in itertools.pairwise(starts):
        assert start + size == following
    assert sum(size for _, size in starts) == layout.num_bytes


def test_state_bytes_are_those_of_the_layout():
    """state_bytes, which plans use, foretells each part; 8-bit state takes 2.03 bytes a parameter, fp32 8."""
    for optimizer, master in itertools.product(("adamw8bit", "adamw"), ("fp32", "bf16")):
        layout = BlockLayout.of(Small(), optimizer, master=master)
        quantizable = sum(p.numel() for p in Small().parameters() if is_quantizable(p.shape))
        foretold = state_bytes(layout.num_parameters, quantizable, optimizer, master=master)
        assert foretold == {part: layout.part_span(part)[1] for part in PARTS}
    large = state_bytes(10**6 * GROUP_SIZE, 10**6 * GROUP_SIZE, "adamw8bit")
    assert large["optimizer"] / (10**6 * GROUP_SIZE) == pytest.approx(2.03, abs=0.005)
    assert large["weights"] == large["ema"] == 4 * 10**6 * GROUP_SIZE


@pytest.mark.parametrize(
    ("shape", "quantizable"),
    [((64, 64), True), ((16, 16, 16), True), ((4096,), False), ((32, 64), False), ((65, 64), False), ((68, 64), True)],
)
def test_only_large_matrices_of_whole_groups_are_quantized(shape, quantizable):
    """Two dimensions or more, 4,096 values or more, and a multiple of the group size."""
    assert is_quantizable(shape) == quantizable
    assert not quantizable or (math.prod(shape) % GROUP_SIZE == 0 and math.prod(shape) >= 4096)


def test_bound_parameters_are_views_of_the_buffer():
    """A step on the flat weights is seen by the module at once, and the other way round."""
    layout, block = layout_of(), Small()
    buffer = filled_buffer(layout)
    bind_parameters_(block, buffer.tensors("weights"), torch.zeros(layout.num_parameters))
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        name: tuple(p.shape) for name, p in Small().named_parameters()
    }
    for name, view in buffer.tensors("weights"):
        assert torch.equal(block.get_parameter(name), view), name
    buffer.flat("weights").fill_(2.5)
    assert all((parameter == 2.5).all() for parameter in block.parameters())
    with torch.no_grad():
        block.scale.fill_(-1)
    assert (buffer.flat("weights") == -1).sum() == 5


def test_gradients_accumulate_in_the_flat_vector():
    """Two backward passes add up in the one vector, at the place of each parameter; zeroing the vector zeroes them."""
    layout, block, plain = layout_of(), Small(), Small()
    buffer, gradients = filled_buffer(layout), torch.zeros(layout.num_parameters)
    bind_parameters_(block, buffer.tensors("weights"), gradients)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(block.get_parameter(name))

    def loss(network, seed):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
        small = network.inner[0](x[:, :7]).square().sum()
        return network.inner[1](network.first(x)).square().sum() + small + network.scale.square().sum()

    for seed in (0, 1):
        loss(block, seed).backward()
        loss(plain, seed).backward()
    expected = torch.cat([plain.get_parameter(name).grad.flatten() for name, _ in buffer.tensors("weights")])
    assert expected.all()
    torch.testing.assert_close(gradients, expected)
    gradients.zero_()
    assert not any(parameter.grad.any() for parameter in block.parameters())
    loss(block, 1).backward()
    assert gradients.any()


def test_without_gradients_parameters_need_none():
    """Bound for inference, no parameter requires a gradient."""
    layout, block = layout_of(), Small()
    bind_parameters_(block, BlockBuffer(layout, ["ema"]).tensors("ema"))
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_binding_takes_a_block_from_the_meta_device():
    """A block built without memory gets all of it from the buffer."""
    with torch.device("meta"):
        block = Small()
    buffer = filled_buffer(layout_of())
    bind_parameters_(block, buffer.tensors("weights"))
    assert not any(parameter.is_meta for parameter in block.parameters())
