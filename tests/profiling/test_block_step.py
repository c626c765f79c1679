"""A block that is timed while a run is planned: what it takes of memory, and what comes of it."""

from dataclasses import asdict

import pytest
from support.given_settings import resolve
from support.made_up_plans import GPU, MACHINE
from support.separate_memory import SeparateMemory

from edgeblocks import prepare
from edgeblocks.families.base import ImageInfo, TextInfo
from edgeblocks.methods import METHODS
from edgeblocks.planning.candidates import cuts, options_of
from edgeblocks.planning.plans import PlanRequest
from edgeblocks.profiling import trace
from edgeblocks.profiling.block_step import bytes_to_time, samples_to_time
from edgeblocks.registry import build_family
from edgeblocks.targets.cpu import CpuTarget

IMAGES = ImageInfo(channels=3, height=16, width=16, num_classes=10, mean=0.5, scale=2.0)
TEXT = TextInfo(vocabulary=300, length=64)


def network(family, method, **settings):
    """Settings, data, the family, and its costs, traced in this process."""
    given = {"width": 64, "heads": 2, "depth": 4, "batch": 16}
    resolved = resolve({"family": family, "method": method, **given, **settings})
    data = IMAGES if family in ("dit", "vit") else TEXT
    built = build_family(family, asdict(resolved.family), asdict(data), method)
    return resolved, data, built, trace.trace(built, [1, 16])


@pytest.mark.parametrize(
    ("family", "method", "width"), [("dit", "diffusion", 512), ("ar", "diffusion", 64), ("looped", "exact", 64)]
)
def test_timing_a_block_takes_less_than_any_plan(family, method, width):
    """Smaller than the smallest prediction by what is not foreseen: it makes no budget larger."""
    cheap = {"iterations": 2, "truncation": 2} if family == "looped" else {}
    _, _, built, costs = network(family, method, width=width, **cheap)
    request = PlanRequest(
        budget_bytes=1, batch=16, steps=10, optimizer="adamw8bit", preferred_blocks=1, method=METHODS[method]
    )
    smallest = min(
        option.predicted_peak_bytes
        for cut in cuts(1 if built.one_stage else costs.num_layers, request)
        for option in options_of(costs, MACHINE, request, cut)
    )
    samples, checkpointing = samples_to_time(built, costs, 16)
    assert samples[0] == 1
    taken = bytes_to_time(built, costs, samples=samples, checkpointing=checkpointing, optimizer="adamw8bit")
    assert MACHINE.runtime_bytes + taken <= smallest - 10_000_000


@pytest.mark.parametrize(
    ("target", "machine"), [(CpuTarget(), MACHINE), (SeparateMemory(), GPU)], ids=["cpu", "device"]
)
def test_a_block_is_run_where_it_fits_the_budget_and_not_where_it_does_not(target, machine):
    """The model is corrected by positive factors; under a budget that no plan fits either it stays as it is.

    On a processor, and on one that stands for a GPU: the budget is of the device's memory.
    """
    resolved, data, _, costs = network("mdlm", "diffusion")
    what = resolved, data, costs, machine, target
    assert prepare.with_timed_block(*what, budget_bytes=target.used_bytes() + 1_000_000) == machine
    found = prepare.with_timed_block(*what, budget_bytes=target.used_bytes() + 500_000_000)
    correction = found.correction
    assert correction.origin == "block" and min(correction.samples, correction.passes) > 0
    assert correction.least < 1 < correction.most and found.update_s_per_parameter > 0
    assert found.update_s_per_parameter != machine.update_s_per_parameter
