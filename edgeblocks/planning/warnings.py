"""What a plan says of itself: what it costs, and which setting would change that."""

from collections.abc import Sequence
from dataclasses import replace

from edgeblocks.planning.candidates import candidate
from edgeblocks.planning.layer_costs import LayerCosts
from edgeblocks.planning.plans import FEWEST_GOOD_LAYERS, Candidate, Cut, Machine, PlanRequest, cut_like
from edgeblocks.units import format_bytes

MUCH_FASTER = 0.75
"""The share of the time of the preferred blocks from which on the plan names a cut into more of them."""
FEWEST_IN_A_WINDOW = 2
"""Layers; with one the windows do not overlap, and a network of four layers copied 68 % of what it should, with two 95
(docs/greedy.md)."""
NOTED_STALL = 0.25
"""Waiting for stages, as a share of the computation, from which on the plan says what hides it."""


def plan_warnings(
    costs: LayerCosts,
    machine: Machine,
    request: PlanRequest,
    chosen: Candidate,
    others: Sequence[Candidate],
    *,
    cut_by_budget: bool,
) -> tuple[str, ...]:
    """What to say of the chosen plan, a sentence each.

    Args:
        others: for each number of blocks the best that fits.
        cut_by_budget: the user left the number of blocks to the planner.
    """
    found, num_layers, method = [], costs.num_layers, request.method
    holds_stages = "--mem-budget" if machine.host is None or chosen.tier == "ram" else "--mem-budget or --ram-budget"
    blocks_alone = method.cut_changes_result and not method.grows
    if method.grows and chosen.layers_per_block < min(FEWEST_IN_A_WINDOW, num_layers):
        found.append(
            "1 layer is trained at a time: with none above it that is trained as well, a layer learns only what the "
            "readout needs at once. A larger --mem-budget or a smaller width trains more at a time"
        )
    if blocks_alone and chosen.layers_per_block < min(request.good_layers, num_layers):
        layers = "1 layer" if chosen.layers_per_block == 1 else f"{chosen.layers_per_block} layers"
        found.append(
            f"{layers} a block: fewer than {request.good_layers} cost quality, because a "
            f"block denoises alone with the layers it has (ImageNet FID in the paper: 3 blocks 11.1, 6 blocks 14.4). "
            + (
                "A larger --mem-budget or a smaller width gives deeper blocks"
                if request.blocks is None and chosen.blocks > request.preferred_blocks
                else "More layers (--set depth=..) or fewer --blocks give deeper ones"
            )
        )
    if blocks_alone and request.blocks is None and chosen.blocks > request.preferred_blocks:
        found.append(f"{chosen.blocks} blocks instead of the preferred {request.preferred_blocks}: fewer do not fit")
    faster = _much_faster_cut(chosen, others) if blocks_alone else None
    if faster is not None:
        blocks, share = faster
        found.append(
            f"{blocks} blocks (--blocks {blocks}) would take {1 - share:.0%} less time: smaller "
            f"blocks leave more memory for a batch. Fewer are preferred all the same, for quality"
        )
    if request.clip_by == "network":
        found.append(
            "clip_by=network: every step writes the gradients of all trained stages to disk and reads them back, 4 "
            "bytes a parameter, because their common norm is known only when the last one is complete; clip_by=stage "
            "does not"
        )
    if request.boundaries == "disk" and chosen.blocks > 1:
        found.append(
            "activations at the stage boundaries are kept on disk: every step writes them once and reads them twice; "
            "a larger --mem-budget keeps them in memory, --set boundary_dtype=bfloat16 halves them"
        )
    if method.trained_together and not method.grows and chosen.slots < chosen.blocks and _stall(chosen) > NOTED_STALL:
        hiding = _hiding_batch(costs, machine, request, chosen)
        waited_for = "the disk" if chosen.tier == "disk" else "the link to the host"
        found.append(
            f"waiting for {waited_for} takes {_stall(chosen):.0%} of the time of computing with {request.batch} "
            f"samples a step; "
            + (f"--batch {hiding} hides most of it behind the computation, and " if hiding else "")
            + f"a larger {holds_stages} holds more stages and shortens it"
        )
    if request.trained is not None and cut_by_budget:
        found.append(
            f"--train-blocks counts the {chosen.blocks} stages that the budget chose, and another budget may cut the "
            f"network elsewhere; --blocks {chosen.blocks} fixes the cut"
        )
    if request.max_disk_writes is not None and chosen.bytes_written > request.max_disk_writes:
        swaps = method.trained_together and chosen.tier == "disk"
        larger = f"{holds_stages} that holds more stages" if swaps else "visit_steps"
        found.append(
            f"the run would write {format_bytes(chosen.bytes_written)} to disk and will end, saved, before it has "
            f"written {format_bytes(request.max_disk_writes)}, as --max-disk-writes asks; fewer --steps, or a larger "
            f"{larger}, write less"
        )
    return tuple(found)


def _much_faster_cut(chosen: Candidate, others: Sequence[Candidate]) -> tuple[int, float] | None:
    """The fewest blocks that are deep enough and save much time, and the share of it that they take; None: none do."""
    whole_s = chosen.blocks * (chosen.step_s + chosen.streaming_s)
    for other in others:
        share = other.blocks * (other.step_s + other.streaming_s) / whole_s
        deep = other.layers_per_block >= FEWEST_GOOD_LAYERS and other.blocks <= 2 * chosen.blocks
        if deep and share <= MUCH_FASTER:
            return other.blocks, share
    return None


def _stall(option: Candidate) -> float:
    """Seconds of waiting for each second of computing."""
    return option.streaming_s / option.step_s


def _hiding_batch(costs: LayerCosts, machine: Machine, request: PlanRequest, chosen: Candidate) -> int | None:
    """The batch, some doublings larger, that fits and hides most of the waiting; None: there is none."""
    for doublings in range(1, 10):
        batch = request.batch << doublings
        cut = Cut(
            costs=costs,
            machine=machine,
            request=replace(request, batch=batch),
            layers=cut_like(chosen, costs.num_layers, request.method),
            micro_batch=chosen.micro_batch,
            checkpointing=chosen.checkpointing,
            slots=chosen.slots,
        )
        option = candidate(cut)
        if option.fits and _stall(option) <= NOTED_STALL / 2:
            return batch
    return None
