"""Parts that families are built of: attention, MLP, AdaLN-zero layers, embeddings, and activation checkpointing.

Modules are built without values, on the meta device (no memory), bound to the block store's buffer, and only then
initialised there with an explicit generator. `Linear` and `Embedding` therefore do not initialise themselves; any
operator on a meta tensor would also import 80 MB of symbolic libraries.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from edgeblocks.families.precision import computing_in, lowered, precision_now

Hidden = Float[Tensor, "batch tokens width"]
"""Hidden values, between two layers."""
Condition = Float[Tensor, "batch width"]
"""The conditioning of all layers, such as by the noise level."""


class _AddingToGradients(torch.autograd.Function):
    """A linear map whose backward pass adds to the gradients in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = lowered(x)
        # The weight as it is stored: it is rounded again on the way back, which costs less than keeping a copy does.
        ctx.save_for_backward(x, weight, bias)
        return F.linear(x, lowered(weight), lowered(bias))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        # [rows, outputs], whatever the dimensions before the features are; x as [rows, features].
        rows = grad_outputs[0].flatten(0, -2)
        add_product_(weight.grad, rows.t(), x.flatten(0, -2))
        bias.grad.add_(rows.sum(0))
        return grad_outputs[0] @ weight.to(rows.dtype) if ctx.needs_input_grad[0] else None, None, None


def add_product_(gradient: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 gradient."""
    # In place, because autograd first makes a tensor as large as the weight and then adds it. In a block of width 1024
    # that took 25 MB at the peak, as much again in gaps of the heap, and two more passes over memory a step.
    if a.dtype == gradient.dtype:
        gradient.addmm_(a, b)
    else:
        gradient.add_(a @ b)  # no product of bfloat16 matrices adds to a float32 one; this takes half of that tensor


class Linear(nn.Linear):
    """torch's linear map, without values until its block is initialised; adds to gradients that exist already."""

    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""

    def forward(self, input: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows outputs"]:
        # Without a gradient to add to, as in ordinary training and in evaluation, it is torch's own operator.
        if self.weight.grad is None or not torch.is_grad_enabled():
            return F.linear(lowered(input), lowered(self.weight), lowered(self.bias))
        out: Tensor = _AddingToGradients.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


class Embedding(nn.Embedding):
    """torch's embedding, without values until its block is initialised."""

    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""


class _AddingRowsToGradients(torch.autograd.Function):
    """A look-up whose backward pass adds to the looked-up rows of the table's gradient in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        # In place, because autograd first makes a tensor as large as the table, with 50,000 tokens most of a block.
        # `index_put_` sums rows of the same token in a fixed order on every device.
        weight.grad.index_put_((tokens.flatten(),), grad_outputs[0].flatten(0, -2), accumulate=True)
        return None, None


class TokenEmbedding(Embedding):
    """An embedding for many tokens; adds to gradients that exist already."""

    def forward(self, input: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        if self.weight.grad is None or not torch.is_grad_enabled():
            return F.embedding(input, self.weight)
        out: Tensor = _AddingRowsToGradients.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Hidden) -> Hidden:
        # [B, T, 3 D] -> [B, T, 3, heads, d] -> three of [B, heads, T, d].
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.merged(F.scaled_dot_product_attention(queries, keys, values))

    def merged(self, attended: Float[Tensor, "batch heads tokens head_width"]) -> Hidden:
        """All heads' outputs side by side, through the last linear map."""
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))  # [B, heads, T, d] -> [B, T, D]
        return out


def rotary_table(length: int, head_width: int) -> Float[Tensor, "2 length half"]:
    """Cosines and sines of position * 10^4^(-i / half) for i < half = head_width / 2 (RoFormer, equation 15)."""
    half = head_width // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.stack([angles.cos(), angles.sin()])


class _Turned(torch.autograd.Function):
    """Queries and keys of a joint projection, rotated by their positions, and its values.

    A pair of features is a complex number, and rotating it is a product. An attention on one thread, forward and
    backward, 32 windows of 128 tokens, 4 heads of width 32: 24 ms; 29 with autograd's backward pass, 40 with real
    products of the pairs' halves; 21 without positions.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turns)
        # Queries and keys together, [B, T, 2, heads, d/2] complex, times e^(i position frequency), [T, 1, 1, d/2]; in
        # float32, as torch knows no complex numbers of half precision on a processor.
        turned = torch.view_as_real(_pairs(qkv[:, :, :2].float()) * turns[:, None, None]).flatten(-2).to(qkv.dtype)
        queries, keys = turned.permute(2, 0, 3, 1, 4).unbind(0)
        return queries, keys, qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (turns,) = ctx.saved_tensors
        back = turns.conj().resolve_conj()[:, None]  # rotation by the opposite angle
        grad_queries, grad_keys, grad_values = (grad.transpose(1, 2) for grad in grad_outputs)
        batch, tokens, heads, head_width = grad_values.shape
        # Each part's gradient is written into its place in the projection's; autograd would fill three tensors of that
        # size with zeros and add them.
        grad = grad_values.new_empty(batch, tokens, 3, heads, head_width)
        for part, grad_turned in enumerate((grad_queries, grad_keys)):
            if grad.dtype == torch.float32:
                torch.mul(_pairs(grad_turned.contiguous()), back, out=_pairs(grad[:, :, part]))
            else:
                turned_back = _pairs(grad_turned.contiguous().float()) * back
                grad[:, :, part] = torch.view_as_real(turned_back).flatten(-2)
        grad[:, :, 2] = grad_values
        return grad, None


def _pairs(x: Float[Tensor, "*dims features"]) -> Complex[Tensor, "*dims half"]:
    """Features (2 i, 2 i + 1) as one complex number; a view."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


class RotaryAttention(SelfAttention):
    """Self-attention in which a query and a key see how far apart they are, and nothing else of their positions.

    Pairs (2 i, 2 i + 1) of a head's features are rotated by an angle that grows with the position, so that a product of
    a query and a key depends on the difference. `rotary`, from `rotary_table`, is a fixed table that all layers share:
    `set_rotary_` is called before use, and it is never stored.

    Source: Su et al. 2021, arXiv 2104.09864 (RoFormer), equation 34.
    """

    rotary: Tensor

    def set_rotary_(self, table: Float[Tensor, "2 length half"]) -> None:
        """Use this table."""
        self.register_buffer("rotary", table, persistent=False)  # recomputed, so block files do not hold it

    def forward(self, x: Hidden) -> Hidden:
        queries, keys, values = self.projected(x, self.rotary[:, : x.shape[1]])
        return self.merged(F.scaled_dot_product_attention(queries, keys, values))

    def projected(
        self, x: Hidden, positions: Float[Tensor, "2 tokens half"]
    ) -> tuple[Float[Tensor, "batch heads tokens head_width"], ...]:
        """Queries and keys rotated by `positions`, which are rows of the table, and values."""
        # [B, T, 3 D] -> [B, T, 3, heads, d]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if torch.compiler.is_exporting():  # onnxruntime has no complex numbers
            return _turned_without_complex_numbers(qkv, positions)
        turned: tuple[Tensor, ...] = _Turned.apply(qkv, torch.complex(*positions.unbind(0)))  # type: ignore[no-untyped-call]
        return turned


def _turned_without_complex_numbers(
    qkv: Float[Tensor, "batch tokens 3 heads head_width"], positions: Float[Tensor, "2 tokens half"]
) -> tuple[Float[Tensor, "batch heads tokens head_width"], ...]:
    """The same as `_Turned` up to rounding, without a backward pass of its own."""
    cosines, sines = positions[:, :, None, None].unbind(0)
    pairs = qkv[:, :, :2]
    real, imaginary = pairs.reshape(*pairs.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([real * cosines - imaginary * sines, imaginary * cosines + real * sines], dim=-1).flatten(-2)
    queries, keys = turned.permute(2, 0, 3, 1, 4).unbind(0)
    return queries, keys, qkv[:, :, 2].transpose(1, 2)


class Mlp(nn.Module):
    """Two linear maps with a tanh-approximated GELU between them, four times as wide inside."""

    def __init__(self, *, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.up = Linear(width, ratio * width)
        self.down = Linear(ratio * width, width)

    def forward(self, x: Hidden) -> Hidden:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


def modulated_norm(x: Hidden, shift: Float[Tensor, "batch width"], scale: Float[Tensor, "batch width"]) -> Hidden:
    """LayerNorm without affine parameters, then x * (1 + scale) + shift (AdaLN)."""
    # 1 + scale: a modulation of zero, as it starts, leaves the norm as it is.
    # eps as DiT has it; torch's own is 1e-5.
    normed = lowered(F.layer_norm(x, x.shape[-1:], eps=1e-6))
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))


class AdaLnZeroLayer(nn.Module):
    """A transformer layer whose norms and gates come from the condition, starting as the identity.

    Source: Peebles and Xie 2023, arXiv 2212.09748, section 3.2 (adaLN-Zero). `condition` has passed SiLU already, once
    for all layers.
    """

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width=width, heads=heads)
        self.mlp = Mlp(width=width)
        self.modulation = Linear(width, 6 * width)

    def forward(self, x: Hidden, condition: Condition) -> Hidden:
        # Six of [B, D], the same for all tokens of a sample: x + gate * f(norm(x) (1 + scale) + shift), f attention,
        # then MLP.
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attention(modulated_norm(x, shift_a, scale_a)))
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulated_norm(x, shift_m, scale_m)))


class RotaryAdaLnLayer(AdaLnZeroLayer):
    """An AdaLN layer for text: positions come from its rotary attention."""

    attention: RotaryAttention

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__(width=width, heads=heads)
        self.attention = RotaryAttention(width=width, heads=heads)


class PreNormLayer(nn.Module):
    """A transformer layer of a network without conditioning; `condition` is ignored.

    Source: Xiong et al. 2020, arXiv 2002.04745 (pre-LN).
    """

    def __init__(self, *, width: int, attention: SelfAttention) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width=width)

    def forward(self, x: Hidden, condition: Tensor) -> Hidden:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


def noise_features(c_noise: Float[Tensor, " batch"], num_features: int) -> Float[Tensor, "batch features"]:
    """Sines and cosines of c_noise = ln(sigma)/4, which spans about [-1.6, 1.1]."""
    half = num_features // 2
    # Frequencies run from 1 to 100: a block sees a span of 0.2 to 1.6, over which the usual sinusoids with a longest
    # period of 10^4 would hardly change.
    frequencies = torch.exp(torch.arange(half, device=c_noise.device) * (math.log(100.0) / max(half - 1, 1)))
    angles = c_noise.unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sincos_positions(rows: int, columns: int, width: int) -> Float[Tensor, "tokens width"]:
    """Fixed 2-D sine-cosine positions, row-major: half of the width for the row, half for the column (DiT, ViT/MAE).

    `width` must be divisible by 4.
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4) / (width // 4))
    row_angles = torch.arange(rows).unsqueeze(1) * frequencies
    column_angles = torch.arange(columns).unsqueeze(1) * frequencies
    # [rows, width/2] and [columns, width/2], side by side for each place of the grid.
    by_row = torch.cat([row_angles.sin(), row_angles.cos()], dim=1)
    by_column = torch.cat([column_angles.sin(), column_angles.cos()], dim=1)
    grid = [by_row.unsqueeze(1).expand(-1, columns, -1), by_column.unsqueeze(0).expand(rows, -1, -1)]
    return torch.cat(grid, dim=2).flatten(0, 1)


class WithPositions(nn.Module):
    """A network on patches with `positions`, a fixed table and no parameter: it is never stored.

    A subclass has `patch`, the image's `height` and `width`, and layers of width `hidden`.
    """

    positions: Tensor
    patch: int
    height: int
    width: int
    hidden: int

    def reset_tables_(self) -> None:
        """Make the fixed tables on torch's default device; needed before use."""
        rows, columns = self.height // self.patch, self.width // self.patch
        table = sincos_positions(rows, columns, self.hidden)
        self.register_buffer("positions", table, persistent=False)


def patchify(
    images: Float[Tensor, "batch channels height width"], patch: int
) -> Float[Tensor, "batch tokens features"]:
    """Square patches in row-major order, each flattened as (channel, row, column)."""
    batch, channels, height, width = images.shape
    # [B, C, H/p, p, W/p, p] -> [B, H/p, W/p, C, p, p] -> [B, T, C p^2]
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // patch) * (width // patch), channels * patch * patch)


def unpatchify(
    tokens: Float[Tensor, "batch tokens features"], *, patch: int, height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of `patchify`."""
    batch, _, features = tokens.shape
    channels = features // (patch * patch)
    # [B, T, C p^2] -> [B, H/p, W/p, C, p, p] -> [B, C, H/p, p, W/p, p] -> [B, C, H, W]
    x = tokens.reshape(batch, height // patch, width // patch, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


class LabelEmbedding(nn.Module):
    """A learned vector for each class, and a last one for "no class" (used by guidance)."""

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = Embedding(num_classes + 1, width)

    def forward(self, labels: Int[Tensor, " batch"]) -> Condition:
        out: Tensor = self.table(labels)
        return out


def init_linear_(linear: nn.Linear, generator: torch.Generator) -> None:
    """Xavier-uniform weights and zero bias (DiT)."""
    nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)


def init_plain_(network: nn.Module, generator: torch.Generator) -> None:
    """Linear maps as `init_linear_` has them, embeddings small, norms as the identity."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            init_linear_(module, generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def init_zero_(linear: nn.Linear) -> None:
    """Weights and bias zero, so that a gated or final map starts as nothing (adaLN-Zero)."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to `out` is `grad_output`."""

    # torch.autograd.backward(out, grad_output) would do the same, but imports sympy on the way: 36 MB resident.
    @staticmethod
    def forward(ctx: FunctionCtx, out: Tensor, grad_output: Tensor) -> Tensor:
        ctx.save_for_backward(grad_output)
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The scalar's own gradient is 1 and is not multiplied in.
        return ctx.saved_tensors[0], None


class _Checkpointed(torch.autograd.Function):
    """Runs a layer without keeping its activations and runs it again in the backward pass.

    The layer must not be random, and its parameters' gradients are accumulated in place.
    """

    # Our own 20 lines because the first call of torch.utils.checkpoint imports dynamo: 73 MB resident.
    @staticmethod
    def forward(ctx: Any, layer: nn.Module, *inputs: Tensor) -> Tensor:
        ctx.layer, ctx.precision = layer, precision_now(inputs[0].device)
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            out: Tensor = layer(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Detached, so that this pass ends at the layer's inputs; autograd continues from their gradients.
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            # As the forward pass did, wherever this is called.
            with computing_in(ctx.precision, inputs[0].device):
                out = ctx.layer(*inputs)
            loss = _WithGradient.apply(out, grad_outputs[0])  # type: ignore[no-untyped-call]
        # This adds to the gradients of the layer's parameters in place, so only those of its inputs are returned.
        loss.backward()
        return (None, *(tensor.grad for tensor in inputs))


def run_layers(
    layers: Iterable[nn.Module], x: Float[Tensor, "batch ..."], condition: Tensor, *, checkpointing: bool
) -> Float[Tensor, "answered ..."]:
    """x through all layers; with checkpointing only the layers' inputs are kept for the backward pass.

    The last layer may return fewer rows than it gets (`TwoStreamLayer` drops the clean tokens). The numbers are the
    same with and without checkpointing, bit for bit on a CPU.
    """
    for layer in layers:
        # Without a gradient to come nothing is kept anyway, and there is nothing to run again.
        if checkpointing and x.requires_grad:
            x = _Checkpointed.apply(layer, x, condition)  # type: ignore[no-untyped-call]
        else:
            x = layer(x, condition)
    return x
