import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise
from edgeblocks.families.causal_layers import CausalAttention
from edgeblocks.families.layers import (
    AdaLnZeroLayer,
    LabelEmbedding,
    Mlp,
    RotaryAdaLnLayer,
    RotaryAttention,
    SelfAttention,
    TokenEmbedding,
    _Turned,
    _turned_without_complex_numbers,
    init_linear_,
    init_zero_,
    modulated_norm,
    noise_features,
    patchify,
    rotary_table,
    run_layers,
    sincos_positions,
    unpatchify,
)

WIDTH, HEADS = 16, 4


def random_(module, seed=0, std=0.3):
    """Every parameter drawn from a normal distribution, so that nothing is zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attention_is_softmax_of_scaled_products_head_by_head():
    """SelfAttention equals the textbook formula written with loops over heads."""
    attention = random_(SelfAttention(width=WIDTH, heads=HEADS)).double()
    x = normal(3, 5, WIDTH).double()
    queries, keys, values = (x @ attention.qkv.weight.T + attention.qkv.bias).split(WIDTH, dim=-1)
    size = WIDTH // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = queries[..., part] @ keys[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(scores.softmax(-1) @ values[..., part])
    expected = torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x), expected)


def test_attention_does_not_know_the_order_of_tokens():
    """Permuted tokens give the permuted output: positions come from the stem alone."""
    attention = random_(SelfAttention(width=WIDTH, heads=HEADS))
    x, order = normal(2, 6, WIDTH), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def rotary_attention(*, causal=False, table=None):
    kind = CausalAttention if causal else RotaryAttention
    attention = random_(kind(width=WIDTH, heads=HEADS)).double()
    attention.set_rotary_((rotary_table(12, WIDTH // HEADS) if table is None else table).double())
    return attention


def turned(heads, length):
    """Features (2 i, 2 i + 1) as a complex number, times exp(i position frequency)."""
    half = heads.shape[-1] // 2
    numbers = torch.complex(heads[..., 0::2], heads[..., 1::2])
    for position in range(length):
        for pair in range(half):
            angle = position / 10_000 ** (pair / half)
            numbers[:, position, pair] *= complex(math.cos(angle), math.sin(angle))
    return torch.stack([numbers.real, numbers.imag], dim=-1).flatten(-2)


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_attention_is_attention_of_turned_queries_and_keys(causal):
    """Oracle: complex numbers turned by the position, loops over heads; with `causal` later tokens are left out."""
    attention = rotary_attention(causal=causal)
    x = normal(3, 5, WIDTH).double()
    queries, keys, values = (x @ attention.qkv.weight.T + attention.qkv.bias).split(WIDTH, dim=-1)
    size = WIDTH // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = turned(queries[..., part], 5) @ turned(keys[..., part], 5).transpose(1, 2) / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ values[..., part])
    expected = torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("spread", [False, True])
def test_gradients_of_turned_queries_and_keys_are_autograds(spread):
    """Oracle: real products, differentiated by autograd; gradients that come in another layout give the same."""
    table, qkv = rotary_table(5, 8).double(), normal(2, 5, 3, HEADS, 8).double()
    gradients = [normal(2, HEADS, 5, 8, seed=seed).double() for seed in (1, 2, 3)]
    if spread:
        gradients = [gradient.mT.contiguous().mT for gradient in gradients]
    found = []
    for turn in (
        lambda x: _Turned.apply(x, torch.complex(*table)),
        lambda x: _turned_without_complex_numbers(x, table),
    ):
        x = qkv.clone().requires_grad_()
        parts = turn(x)
        torch.autograd.backward(parts, gradients)
        found.append((*(part.detach() for part in parts), x.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_rotary_attention_depends_on_relative_positions_only():
    """Positions 7 later give the same output; positions in another order do not (so positions count)."""
    x = normal(2, 5, WIDTH).double()
    table = rotary_table(12, WIDTH // HEADS)
    plain = rotary_attention(table=table[:, :5])(x)
    torch.testing.assert_close(rotary_attention(table=table[:, 7:])(x), plain, atol=1e-5, rtol=1e-5)
    assert (rotary_attention(table=table[:, [3, 0, 4, 1, 2]])(x) - plain).abs().max() > 0.01


def test_causal_attention_sees_nothing_that_comes_later():
    """A change of token 3 leaves tokens 0 to 2 as they are; attention that is not causal changes them all."""
    x = normal(1, 6, WIDTH).double()
    changed = x.clone()
    changed[:, 3] += 1
    for causal in (True, False):
        attention = rotary_attention(causal=causal)
        differs = (attention(x) != attention(changed)).any(-1)[0].tolist()
        assert differs == ([False] * 3 + [True] * 3 if causal else [True] * 6)


def test_a_rotary_layer_is_an_adaln_layer_and_stores_no_table():
    """Only its attention differs, and what is stored are the parameters of a plain layer."""
    layer, plain = RotaryAdaLnLayer(width=WIDTH, heads=HEADS), AdaLnZeroLayer(width=WIDTH, heads=HEADS)
    layer.attention.set_rotary_(rotary_table(5, WIDTH // HEADS))
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(random_(layer).state_dict())
    x, condition = normal(2, 5, WIDTH), normal(2, WIDTH, seed=1)
    assert not torch.allclose(layer(x, condition), plain(x, condition), atol=1e-3)
    layer.attention.set_rotary_(torch.stack([torch.ones(5, 2), torch.zeros(5, 2)]))  # nothing is turned
    torch.testing.assert_close(layer(x, condition), plain(x, condition))


def test_a_token_embedding_adds_to_the_gradients_that_are_there():
    """Oracle: torch's embedding. Gradients of looked-up rows are added in place, also of a token that occurs twice."""
    tokens = torch.tensor([[0, 3, 3], [6, 0, 3]])
    ours, plain = random_(TokenEmbedding(7, WIDTH)), nn.Embedding(7, WIDTH)
    plain.load_state_dict(ours.state_dict())
    ours.weight.grad = torch.ones_like(ours.weight)
    memory = ours.weight.grad.data_ptr()
    for embedding in (ours, plain):
        (embedding(tokens) * normal(2, 3, WIDTH, seed=2)).sum().backward()
    torch.testing.assert_close(ours.weight.grad - 1, plain.weight.grad)
    assert ours.weight.grad.data_ptr() == memory


def test_the_mlp_is_four_times_as_wide_inside():
    """Mlp has DiT's ratio, and its GELU is the tanh form."""
    mlp = random_(Mlp(width=WIDTH))
    assert mlp.up.out_features == 4 * WIDTH
    x = normal(2, 3, WIDTH)
    hidden = mlp.up(x)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(mlp(x), mlp.down(gelu))


def test_modulated_norm_shifts_and_scales_a_plain_layer_norm():
    """(x - mean) / std * (1 + scale) + shift, one shift and scale for all tokens of a sample."""
    x, shift, scale = normal(2, 5, WIDTH), normal(2, WIDTH, seed=1), normal(2, WIDTH, seed=2)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    expected = normed * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated_norm(x, shift, scale), expected, rtol=1e-4, atol=1e-5)


def test_an_adaln_zero_layer_starts_as_the_identity():
    """With its modulation at zero a layer returns x exactly, whatever its other weights; with it random it does not."""
    layer = random_(AdaLnZeroLayer(width=WIDTH, heads=HEADS))
    x, condition = normal(2, 5, WIDTH), normal(2, WIDTH, seed=1)
    assert not torch.allclose(layer(x, condition), x, atol=0.1)
    init_zero_(layer.modulation)
    assert torch.equal(layer(x, condition), x)


def test_an_adaln_zero_layer_is_the_papers():
    """x + gate (attention(norm(x))), then x + gate (mlp(norm(x))), with six vectors in DiT's order."""
    layer = random_(AdaLnZeroLayer(width=WIDTH, heads=HEADS)).double()
    x, condition = normal(2, 5, WIDTH).double(), normal(2, WIDTH, seed=1).double()
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
        condition @ layer.modulation.weight.T + layer.modulation.bias
    ).split(WIDTH, dim=-1)
    middle = x + gate_a[:, None] * layer.attention(modulated_norm(x, shift_a, scale_a))
    expected = middle + gate_m[:, None] * layer.mlp(modulated_norm(middle, shift_m, scale_m))
    torch.testing.assert_close(layer(x, condition), expected)


def step(checkpointing, num_layers=3, *, x_needs_gradient=True):
    """Output and all gradients of some layers with one more use of the condition at the end, as a readout has."""
    layers = random_(nn.ModuleList(AdaLnZeroLayer(width=WIDTH, heads=HEADS) for _ in range(num_layers)))
    x = normal(2, 7, WIDTH).requires_grad_(x_needs_gradient)
    condition = normal(2, WIDTH, seed=1).requires_grad_()
    out = run_layers(layers, x, condition, checkpointing=checkpointing)
    (out * condition.unsqueeze(1)).square().sum().backward()
    gradients = [parameter.grad for parameter in layers.parameters()]
    return [out.detach(), condition.grad, *([x.grad] if x_needs_gradient else []), *gradients]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_checkpointing_changes_no_bit(num_layers):
    """Output, the gradients of x and of the condition, and all parameters' gradients are bit-identical to plain."""
    plain, checkpointed = step(False, num_layers), step(True, num_layers)
    assert all(tensor is not None and tensor.abs().sum() > 0 for tensor in plain)
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)


def test_checkpointing_adds_to_gradients_that_are_there():
    """Two backward passes without zeroing give twice the gradient, in the same memory: accumulation works."""
    layer = random_(AdaLnZeroLayer(width=WIDTH, heads=HEADS))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    memory = [parameter.grad.data_ptr() for parameter in layer.parameters()]
    sums = []
    for _ in range(2):
        x = normal(2, 5, WIDTH).requires_grad_()
        run_layers([layer], x, normal(2, WIDTH, seed=1), checkpointing=True).square().sum().backward()
        sums.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert [parameter.grad.data_ptr() for parameter in layer.parameters()] == memory
    for once, twice in zip(*sums, strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_layers_get_gradients_even_where_x_needs_none():
    """Checkpointing asked for with an x that is no variable still trains every layer."""
    plain, checkpointed = step(False, x_needs_gradient=False), step(True, x_needs_gradient=False)
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)


def saved_bytes(checkpointing, num_layers):
    """Bytes that autograd keeps for the backward pass, parameters left out."""
    layers = random_(nn.ModuleList(AdaLnZeroLayer(width=WIDTH, heads=HEADS) for _ in range(num_layers)))
    own = {parameter.data_ptr() for parameter in layers.parameters()}
    kept = {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        x = normal(2, 64, WIDTH).requires_grad_()
        out = run_layers(layers, x, normal(2, WIDTH, seed=1), checkpointing=checkpointing)
    assert out.requires_grad
    return sum(kept.values())


def test_checkpointing_keeps_only_the_inputs_of_layers():
    """A further layer costs one x (and not the ten-odd tensors inside it)."""
    x_bytes = 2 * 64 * WIDTH * 4
    assert saved_bytes(True, 4) - saved_bytes(True, 3) == x_bytes
    assert saved_bytes(False, 4) - saved_bytes(False, 3) > 8 * x_bytes


def usual_features(c_noise, num_features):
    """DiT's sinusoids: periods up to 2 pi 10^4."""
    half = num_features // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    angles = c_noise.unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("num_blocks", [1, 3, 6, 12])
def test_noise_features_tell_levels_of_a_block_apart(num_blocks):
    """Trap 9: 8 levels evenly spaced in a block's range differ pairwise by 0.2 of the features' norm or more.

    The narrowest block of each partition counts. DiT's usual sinusoids stay below a fifth of our distance.
    """
    partition = partition_noise(NoiseDistribution(), num_blocks=num_blocks, kind="equal-probability", overlap=0.05)
    for block_range in partition.ranges:
        c_noise = torch.linspace(math.log(block_range.low) / 4, math.log(block_range.high) / 4, 8)
        ours, usual = (
            torch.nn.functional.pdist(features(c_noise, 256)).min() / math.sqrt(128)
            for features in (noise_features, usual_features)
        )
        assert ours > 0.2
        assert usual < ours / 5


def test_noise_features_of_close_levels_are_close():
    """The features are smooth: a thousandth of the range moves them by less than a fifth of their norm."""
    c_noise = torch.linspace(-1.6, 1.1, 1001)
    steps = (noise_features(c_noise, 256)[1:] - noise_features(c_noise, 256)[:-1]).norm(dim=1)
    assert steps.max() < 0.2 * math.sqrt(128)


def test_noise_features_are_cosines_and_sines():
    """At c_noise = 0 all cosines are 1 and all sines 0; the first frequency is 1, the last 100."""
    at_zero = noise_features(torch.zeros(1), 8)
    torch.testing.assert_close(at_zero, torch.tensor([[1.0] * 4 + [0.0] * 4]))
    features = noise_features(torch.tensor([0.3]), 8)[0]
    assert features[0] == pytest.approx(math.cos(0.3), abs=1e-6)
    assert features[3] == pytest.approx(math.cos(30.0), abs=1e-4)
    assert features[7] == pytest.approx(math.sin(30.0), abs=1e-4)


def test_positions_are_row_then_column_sinusoids():
    """Token (r, c) holds sin and cos of r in its first half and of c in the second, frequencies 10^(-4 i / (w/4))."""
    rows, columns, width = 3, 5, 16
    table = sincos_positions(rows, columns, width)
    assert table.shape == (rows * columns, width)
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (row, column):
                angles = [place / 10_000 ** (i / 4) for i in range(4)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            torch.testing.assert_close(table[row * columns + column], torch.tensor(expected))


def test_positions_are_all_different():
    """No two tokens of a grid share a position."""
    assert torch.pdist(sincos_positions(8, 8, 64)).min() > 0.5


@pytest.mark.parametrize(
    ("patch", "height", "width", "channels"), [(1, 3, 4, 1), (2, 4, 6, 3), (4, 8, 4, 2), (5, 5, 5, 1)]
)
def test_unpatchify_undoes_patchify(patch, height, width, channels):
    """Images survive the way to tokens and back exactly."""
    images = normal(2, channels, height, width)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, (height // patch) * (width // patch), channels * patch**2)
    assert torch.equal(unpatchify(tokens, patch=patch, height=height, width=width), images)


def test_patches_are_row_major_and_flattened_by_channel_row_column():
    """Token t of a grid of c columns is the patch at (t // c, t % c), read channel by channel and row by row."""
    images = torch.arange(2 * 4 * 6).float().view(1, 2, 4, 6)
    tokens = patchify(images, 2)
    for token in range(6):
        row, column = 2 * (token // 3), 2 * (token % 3)
        assert torch.equal(tokens[0, token], images[0, :, row : row + 2, column : column + 2].flatten())


def test_the_label_embedding_has_one_more_row_for_no_class():
    """num_classes itself is a valid label."""
    embedding = random_(LabelEmbedding(num_classes=3, width=8))
    out = embedding(torch.tensor([0, 3]))
    assert torch.equal(out, embedding.table.weight[[0, 3]])


def test_initialisation_comes_from_the_generator():
    """init_linear_ is Xavier-uniform with zero bias, the same for the same seed and another for another."""
    linears = [nn.Linear(64, 32) for _ in range(3)]
    for linear, seed in zip(linears, (0, 0, 1), strict=True):
        init_linear_(linear, torch.Generator().manual_seed(seed))
    bound = math.sqrt(6 / (64 + 32))
    assert torch.equal(linears[0].weight, linears[1].weight)
    assert not torch.equal(linears[0].weight, linears[2].weight)
    assert 0.95 * bound < linears[0].weight.abs().max() <= bound
    assert linears[0].weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not linears[0].bias.any()


def test_modules_have_no_values_until_they_are_initialised():
    """Building a layer draws no random number: the global generator is where it was."""
    before = torch.get_rng_state()
    AdaLnZeroLayer(width=WIDTH, heads=HEADS)
    LabelEmbedding(num_classes=3, width=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpointed_step_imports_no_symbolic_libraries():
    """torch's explicit-gradient backward imports sympy, 36 MB resident that no plan counts: a step must not take it."""
    program = """
import sys, torch
from edgeblocks.families.layers import AdaLnZeroLayer, run_layers
layer = AdaLnZeroLayer(width=8, heads=2)
x = torch.zeros(1, 2, 8, requires_grad=True)
run_layers([layer], x, torch.zeros(1, 8), checkpointing=True).sum().backward()
print(sorted({"sympy", "torch.fx.experimental.symbolic_shapes", "torch._dynamo"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
