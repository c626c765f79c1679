"""A warm-up step runs what a training step of the family runs, for every family and optimizer."""

from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import edgeblocks
from edgeblocks.errors import DoesNotFitError
from edgeblocks.families.base import ImageInfo, TextInfo
from edgeblocks.profiling.warmup_step import run_warmup_step
from edgeblocks.registry import build_family, build_target, family_type
from edgeblocks.settings.reading import resolve_settings

IMAGES = ImageInfo(channels=1, height=8, width=8, num_classes=10, mean=0.5, scale=2.0)
TEXT = TextInfo(vocabulary=27, length=16)


class Operators(TorchDispatchMode):
    """The names of the operators that were run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_weights_in_bfloat16_are_rounded_in_it_too():
    """Of a device the kernels that draw bits are loaded before anything is planned."""
    resolved = resolve_settings(
        {"width": 64, "heads": 2, "depth": 2}, family_settings=lambda name: family_type(name).settings_type
    )
    with Operators() as warmed_up:
        run_warmup_step(build_family("dit", asdict(resolved.family), asdict(IMAGES)), "adamw8bit", "cpu", master="bf16")
    assert {"aten::random_", "aten::_fused_adamw_", "aten::lerp_"} <= warmed_up.seen


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
@pytest.mark.parametrize("family", ["dit", "vit", "mdlm", "ar", "looped"])
def test_a_rehearsal_runs_the_operators_of_a_step(family, optimizer):
    """Forward and backward of two layers on real shapes of a batch of two need no operator that was not warmed_up."""
    kind = family_type(family)
    resolved = resolve_settings(
        {"family": family, "width": 64, "heads": 2, "depth": 2},
        family_settings=lambda name: family_type(name).settings_type,
    )
    built = build_family(family, asdict(resolved.family), asdict(TEXT if kind.reads == "text" else IMAGES))
    with Operators() as warmed_up:
        run_warmup_step(built, optimizer, "cpu")
    network = built.block(num_layers=2, checkpointing=False)
    network.reset_tables_()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in built.batch_spec(2).items()}
    with Operators() as trained:
        built.loss(network, batch).sum().backward()
    assert "aten::add_" in trained.seen
    assert trained.seen <= warmed_up.seen
    assert "aten::_fused_adamw_" in warmed_up.seen


@pytest.mark.usefixtures("gpu_like")
def test_a_network_too_large_for_the_device_is_refused_by_the_plan():
    """Not by its allocator, when the warm-up step asks it for a block."""
    target = build_target("cpu")
    with target.capped(target.used_bytes() + 200_000_000), pytest.raises(DoesNotFitError, match="--mem-budget"):
        edgeblocks.plan(target="cuda", mem_budget="300MB", width=1024, heads=16, depth=2, batch=1)
