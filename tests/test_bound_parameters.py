"""Parameters as views of a buffer."""

import torch
from small_blocks import Small, filled_buffer, layout_of

from edgeblocks.store import (
    BlockBuffer,
    bind_parameters_,
)


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
