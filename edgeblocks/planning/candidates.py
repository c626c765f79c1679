"""The ways in which a network could be trained: numbers of blocks, micro-batches, checkpointing, places in memory."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from edgeblocks.methods import imported
from edgeblocks.planning.layer_costs import LayerCosts
from edgeblocks.planning.memory import device_memory, host_budget_bytes, host_memory
from edgeblocks.planning.pace import Pace
from edgeblocks.planning.plans import Candidate, Cut, Machine, PlanRequest, micro_batches, split_layers
from edgeblocks.planning.windows import layers_in_windows


def cuts(num_layers: int, request: PlanRequest) -> list[tuple[int, ...]]:
    """Ways to cut a network that are worth comparing, by the layers of each part: fewer parts, of more layers, first.

    The one that is asked for; else for each size of the largest part the one with the fewest.
    """
    if request.method.grows:
        sizes = range(num_layers, 0, -1) if request.window is None else (request.window,)
        found = [layers_in_windows(num_layers, size) for size in sizes]
        return [layers for layers in found if len(layers) <= request.steps] or found[:1]
    return [split_layers(num_layers, blocks) for blocks in _block_counts(num_layers, request)]


def _block_counts(num_layers: int, request: PlanRequest) -> list[int]:
    if request.blocks is not None:
        return [request.blocks]
    start = min(request.preferred_blocks, num_layers) if request.method.cut_changes_result else 1
    counts: dict[int, int] = {}
    for blocks in range(start, num_layers + 1):
        if request.shared and num_layers % blocks:
            continue
        # Memory goes by the largest block: of counts with the same one, the first, smallest, has the most layers a
        # block.
        counts.setdefault(math.ceil(num_layers / blocks), blocks)
    return list(counts.values())


def options_of(costs: LayerCosts, machine: Machine, request: PlanRequest, layers: tuple[int, ...]) -> list[Candidate]:
    """Every way to train a network that is cut so, whether it fits or not."""
    sizes = micro_batches(request.batch) if request.micro_batch is None else (min(request.micro_batch, request.batch),)
    checkpointing = costs.checkpointing_choices if request.checkpointing is None else (request.checkpointing,)
    return [
        candidate(
            Cut(
                costs=costs,
                machine=machine,
                request=request,
                layers=layers,
                micro_batch=micro_batch,
                checkpointing=keep,
                slots=slots,
            )
        )
        for micro_batch in sizes
        for keep in checkpointing
        for slots in _slot_counts(machine, request, len(layers))
    ]


def _slot_counts(machine: Machine, request: PlanRequest, blocks: int) -> Sequence[int]:
    """Numbers of blocks on the device at once that are worth trying, largest first.

    Beside a host, blocks are kept in its memory rather than some of them on the device: all, two or one are tried.
    """
    if request.method.grows:
        return _slots_of_a_window(request, blocks)
    if machine.host is not None:
        few = range(min(2, blocks), 0, -1)
        return few if request.tier == "disk" or blocks <= 2 else (blocks, *few)
    most, fewest = {"ram": (blocks, blocks), "disk": (min(2, blocks), 1), None: (blocks, 1)}[request.tier]
    return range(most, fewest - 1, -1)


def _slots_of_a_window(request: PlanRequest, parts: int) -> Sequence[int]:
    """The window stays; of the frozen parts all are in memory, or two or one take turns."""
    turns = sorted({min(slots, parts) for slots in (2, 3)}, reverse=True)
    return {"ram": [parts], "disk": turns, None: sorted({parts, *turns}, reverse=True)}[request.tier]


def candidate(cut: Cut) -> Candidate:
    """One way: what it takes of memory, how long a step and moving blocks take, and what is written."""
    breakdown = device_memory(cut)
    host_breakdown, ram_blocks = host_memory(cut)
    pace: Pace = imported(cut.request.method.pace)(cut, ram_blocks)
    return Candidate(
        blocks=cut.blocks,
        layers_per_block=cut.num_layers,
        micro_batch=cut.micro_batch,
        accumulation=math.ceil(cut.request.batch / cut.micro_batch),
        checkpointing=cut.checkpointing,
        slots=cut.slots,
        breakdown=breakdown,
        block_bytes=cut.block_bytes,
        **asdict(pace),
        fits=sum(breakdown.values()) <= cut.request.budget_bytes
        and sum(host_breakdown.values()) <= host_budget_bytes(cut.machine, cut.request),
        host_breakdown=host_breakdown,
        ram_blocks=ram_blocks,
    )
