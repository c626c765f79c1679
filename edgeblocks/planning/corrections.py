"""What corrects the model of a step's time (`step_times`): a small block that was timed here, or steps of a run.

Of a narrow network the model alone says half to two thirds of a step's time: in training operators take longer than one
of them by itself. Where other programs use the processor it says a fifth or less, because it rests on the shortest of
many times. So a part of the very network is run while it is planned. Whole steps of a run before say most, and are
asked first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edgeblocks.methods import imported
from edgeblocks.planning.layer_costs import LayerCosts
from edgeblocks.planning.pace import Pace
from edgeblocks.planning.plans import Correction, Cut, Machine, PlanRequest, split_layers
from edgeblocks.planning.step_times import ROUNDED_UPDATE, modelled

BLOCK_ERROR = 1.35
"""By which a step's time differed at most from the one that its block's said, either way, with the processor for itself
(docs/figures.md, "How long a step takes")."""
RUN_ERROR = 1.15
"""The same of a run's steps; beside it stands by how much that run's own steps differed."""
_LEAST_PART = 0.1
"""Of the factor that both parts get alike: two times that leave less for what grows with the samples are noise, and
would say that large micro-batches cost next to nothing."""


@dataclass(frozen=True, kw_only=True)
class TimedBlock:
    """What a step of the network's smallest block took here: medians of rounds in which all of its parts had a turn."""

    num_layers: int
    checkpointing: bool
    passes_s: Mapping[int, float]
    """Of a micro-batch forward and backward, by its samples: two sizes, or one."""
    update_s_per_parameter: float
    is_rounded: bool = False
    """Whether its weights and EMA are bfloat16, whose update takes longer: `ROUNDED_UPDATE`."""
    waited: float
    """The share of that time in which other programs had the processor: 0 where nothing else runs."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """What steps of a run took here, without waiting for blocks, and how they were made.

    Half of the steps took up to `step_s`, one of ten less than `short_s`, one of ten more than `long_s`. `blocks` are
    parts of the network, whatever the method calls them.
    """

    step_s: float
    short_s: float
    long_s: float
    batch: int
    blocks: int
    micro_batch: int
    checkpointing: bool
    optimizer: Literal["adamw8bit", "adamw"]
    trained: tuple[int, ...] | None


def corrected_by_block(machine: Machine, costs: LayerCosts, timed: TimedBlock) -> Machine:
    """The machine, with the model's parts such that they make up a small block's times.

    Two sizes tell apart what grows with the samples and what does not. Where they contradict the model (a busy moment
    made the small one slower than the large one), or there is one size, both parts get the same factor.
    """

    def parts(samples: int) -> tuple[float, float]:
        return modelled(
            costs,
            machine,
            num_layers=timed.num_layers,
            batch=samples,
            micro_batch=samples,
            checkpointing=timed.checkpointing,
        )

    few, many = min(timed.passes_s), max(timed.passes_s)
    few_s, many_s = timed.passes_s[few], timed.passes_s[many]
    (few_samples_s, few_passes_s), (many_samples_s, many_passes_s) = parts(few), parts(many)
    samples = passes = many_s / (many_samples_s + many_passes_s)
    # few_s = samples * few_samples_s + passes * few_passes_s, and the same of many.
    determinant = few_samples_s * many_passes_s - many_samples_s * few_passes_s
    if few != many and determinant:
        found = (
            (few_s * many_passes_s - many_s * few_passes_s) / determinant,
            (few_samples_s * many_s - many_samples_s * few_s) / determinant,
        )
        if found[0] > _LEAST_PART * samples and found[1] >= 0:
            samples, passes = found
    return replace(
        machine,
        update_s_per_parameter=timed.update_s_per_parameter / (ROUNDED_UPDATE if timed.is_rounded else 1),
        correction=Correction(
            samples=samples,
            passes=passes,
            # Other programs may end, or take as much again.
            least=(1 - timed.waited) / BLOCK_ERROR,
            most=(1 + timed.waited) * BLOCK_ERROR,
            origin="block",
            waited=timed.waited,
        ),
    )


def corrected_by_run(machine: Machine, costs: LayerCosts, request: PlanRequest, run: MeasuredSteps) -> Machine:
    """The machine, with the model such that it gives what a run's steps took; other plans differ from that by it."""
    base = replace(machine, correction=replace(machine.correction, steps=1.0))
    asked = replace(request, batch=run.batch, optimizer=run.optimizer, trained=run.trained)
    cut = Cut(
        costs=costs,
        machine=base,
        request=asked,
        layers=split_layers(costs.num_layers, run.blocks),
        micro_batch=run.micro_batch,
        checkpointing=run.checkpointing,
        slots=1,
    )
    pace: Pace = imported(request.method.pace)(cut, 0)
    return replace(
        base,
        correction=replace(
            base.correction,
            steps=run.step_s / pace.step_s,
            least=run.short_s / run.step_s / RUN_ERROR,
            most=run.long_s / run.step_s * RUN_ERROR,
            origin="run",
            waited=0.0,
        ),
    )
