"""Attention of every family is computed by fused kernels, which never hold all scores: on a processor and on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from edgeblocks.families.precision import computing_in
from edgeblocks.profiling.block_step import example_batch
from edgeblocks.registry import build_family
from edgeblocks.seeds import generator_at

IMAGE = {"channels": 1, "height": 8, "width": 8, "num_classes": 10, "mean": 0.5, "scale": 2.0}
TEXT = {"vocabulary": 70, "length": 16}
FAMILIES = {"dit": IMAGE, "vit": IMAGE, "mdlm": TEXT, "ar": TEXT, "looped": TEXT}
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
every = pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in FAMILIES for method in ("diffusion", "exact")]
)
halves = pytest.mark.parametrize("precision", ["fp32", "bf16"])


class Calls(TorchFunctionMode):
    """Keeps what attention is called with, keys and values by name."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.kept.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def step(name, method, precision, device="cpu", *, checkpointing=False):
    """Forward and backward of a family's smallest block; what attention was called with in the forward pass."""
    family = build_family(name, {"width": 64, "heads": 2, "depth": 4}, FAMILIES[name], method)
    block = family.block(num_layers=family.layer_period, checkpointing=checkpointing)
    block.reset_tables_()
    block.init_(generator_at(0))
    block.to(device)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with computing_in(precision, device), Calls() as calls:
        loss = family.loss(block, example_batch(family, 2, device)).sum()
    loss.backward()
    return calls.kept


@every
@halves
def test_no_family_needs_the_form_that_holds_all_scores(name, method, precision):
    """A step is made, layers that are run again included, where torch may not take that form."""
    with sdpa_kernel(FUSED):
        assert step(name, method, precision, checkpointing=True)


@every
@halves
def test_what_the_kernels_of_a_gpu_ask_for_is_given(name, method, precision):
    """Four dimensions, the last one dense, one type for all, masks without gradient: else CUDA holds all scores.

    Source: can_use_flash_attention and can_use_mem_efficient_attention of torch, aten/.../cuda/sdp_utils.cpp.
    """
    for given, named in step(name, method, precision):
        assert not named.get("is_causal") or given[0].shape[2] == given[1].shape[2]
        mask = named.get("attn_mask")
        assert mask is None or (mask.dim() == 2 and not mask.requires_grad)
        for tensor in (*given, *([] if mask is None else [mask])):
            assert tensor.stride(-1) == 1 and tensor.dtype == given[0].dtype
        assert all(tensor.dim() == 4 and tensor.storage_offset() % 8 == 0 for tensor in given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every
@pytest.mark.parametrize("precision", ["fp32", "half"])
def test_a_gpu_takes_fused_kernels(name, method, precision):
    """The same there, in fp32 and in the half precision that the GPU has."""
    half = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    with sdpa_kernel(FUSED):
        assert step(name, method, half if precision == "half" else precision, "cuda", checkpointing=True)
