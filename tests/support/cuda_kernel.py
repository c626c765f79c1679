"""bitsandbytes' 8-bit AdamW kernel for CUDA, as its source says it computes, in torch on a processor.

Slow and obvious: it stands for a kernel that runs on GPUs only. The library's own operator for processors does three
things in other ways, each of which matters here: NaN gradients, the order of the weight decay, and small values.
"""

import pytest
import torch

from edgeblocks.optim import cuda_step


@pytest.fixture
def used_here(monkeypatch):
    """bitsandbytes makes the 8-bit step on this processor, by what its CUDA kernel computes."""
    cuda_step.library_operator()
    monkeypatch.setattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise", blockwise_adam)
    monkeypatch.setattr(cuda_step, "KINDS", ("cpu",))
    cuda_step._choice.cache_clear()
    yield
    cuda_step._choice.cache_clear()


def blockwise_adam(
    name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2,
    weight_decay, gnorm_scale, skip_zeros=False,
):  # fmt: skip
    """`bitsandbytes::optimizer_update_8bit_blockwise` of 0.50: csrc/cuda/optimizers.cu, the kernel of two states."""
    assert name == "adam" and g.numel() % 256 == 0 and state1.dtype == state2.dtype == torch.uint8
    sound = g.isfinite()
    gradients = g * gnorm_scale
    scale1, scale2 = (absmax.repeat_interleave(256) for absmax in (absmax1, absmax2))
    s1 = qmap1[state1.long()] * scale1 * beta1 + (1 - beta1) * gradients
    s2 = qmap2[state2.long()] * scale2 * beta2 + (1 - beta2) * gradients * gradients
    s1, s2 = s1.where(sound, torch.zeros(())), s2.where(sound, torch.zeros(()))
    for absmax, values in ((absmax1, s1), (absmax2, s2)):
        # fmaxf takes the number of a number and a NaN, and begins at the lowest float.
        lowest = torch.finfo(torch.float32).min
        absmax.copy_(values.abs().nan_to_num(nan=lowest, posinf=float("inf")).view(-1, 256).amax(1))
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    moved = p - lr * correction2 / correction1 * (s1 / (s2.sqrt() + correction2 * eps))
    p.copy_((moved * (1 - lr * weight_decay)).where(sound, p))
    index1 = _nearest(s1 / absmax1.repeat_interleave(256), qmap1, lowest=-1.0)
    index2 = _nearest(s2 / absmax2.repeat_interleave(256), qmap2, lowest=0.0)
    other_sign = torch.signbit(qmap1[index1]) != torch.signbit(s1)
    index1 += torch.where(other_sign, torch.where(s1 > 0, 1, -1), 0)
    state1.copy_(index1 % 256)  # an unsigned char
    state2.copy_(index2)


def _nearest(x, table, *, lowest):
    """The index that the kernel's search by halves ends at; every comparison with NaN is false."""
    pivot, below, above = (torch.full(x.shape, start) for start in (127, 0, 255))
    lower, upper = torch.full(x.shape, lowest), torch.ones(x.shape)
    for stride in (64, 32, 16, 8, 4, 2, 1):
        value, up = table[pivot], x > table[pivot]
        below, lower = below.where(~up, pivot), lower.where(~up, value)
        above, upper = above.where(up, pivot), upper.where(up, value)
        pivot = pivot + torch.where(up, stride, -stride)
    value = table[pivot]
    higher = torch.where(x > (upper + value) * 0.5, above, pivot)
    return torch.where(x > value, higher, torch.where(x < (lower + value) * 0.5, below, pivot))
