"""Why a plan is as it is: which limit decides, in words."""

from edgeblocks.planning.plans import Plan
from edgeblocks.units import format_bytes

MUCH_MOVING = 0.5
"""The share of the time that moving blocks takes from which on the disk, or the link, decides and not the computing."""


def reason(
    plan: Plan,
    *,
    asked_blocks: int | None,
    preferred_blocks: int,
    streamed_by_user: bool,
    step_by_user: bool = False,
) -> str:
    """Which limit decides, and how.

    Args:
        asked_blocks: the number that the user fixed; None where it was left to the planner.
        preferred_blocks: the family's own number.
        streamed_by_user: whether the user has the blocks wait on disk.
        step_by_user: whether the user fixed the micro-batch or checkpointing.
    """
    parts = [
        _number_of_blocks(plan, asked_blocks, preferred_blocks),
        _what_is_in_memory(plan, streamed_by_user),
        _time(plan),
    ]
    small_steps = plan.chosen.accumulation > 1 or plan.chosen.checkpointing
    if small_steps and not step_by_user:
        again = ", run again on the way back" if plan.chosen.checkpointing else ""
        parts.insert(2, f"micro-batches of {plan.chosen.micro_batch}{again}, the fastest that fit")
    limit = _limit(plan, asked_blocks, preferred_blocks, streamed_by_user)
    if limit is None and small_steps and not step_by_user:
        limit = "the budget"
    return f"why: {f'{limit} decides' if limit else 'no limit is felt'}: {'; '.join(parts)}"


def _limit(plan: Plan, asked_blocks: int | None, preferred_blocks: int, streamed_by_user: bool) -> str | None:
    chosen = plan.chosen
    if plan.stall_share > MUCH_MOVING:
        return "the link to the host" if plan.machine.host is not None else "the disk"
    if plan.method.grows and any(row.layers_per_block > chosen.layers_per_block for row in plan.candidates):
        return "the budget"
    too_many = (
        plan.method.cut_changes_result
        and not plan.method.grows
        and chosen.blocks > preferred_blocks
        and asked_blocks is None
    )
    if too_many or (chosen.slots < chosen.blocks and not streamed_by_user):
        return "the budget"
    return None if asked_blocks is None else "--blocks"


def _number_of_blocks(plan: Plan, asked_blocks: int | None, preferred_blocks: int) -> str:
    method, chosen = plan.method, plan.chosen
    number = method.parts(chosen.blocks)
    if method.grows:
        return _window(plan)
    if asked_blocks is not None:
        return f"{number}, as --blocks asks"
    if not method.cut_changes_result:
        return f"{number}, because the cut changes no result and this one is fast and writes little"
    fewer = [row for row in plan.candidates if row.blocks < chosen.blocks]
    if fewer:
        closest = max(fewer, key=lambda row: row.blocks)
        return (
            f"{number}, because {closest.blocks} would need {format_bytes(closest.predicted_peak_bytes)} of "
            f"{format_bytes(plan.budget_bytes)}"
        )
    if chosen.blocks == preferred_blocks:
        return f"{number}, the usual number of this family, and it fits"
    return f"{number}, the most that so few layers can be cut into"


def _window(plan: Plan) -> str:
    window = f"{plan.layers[-1]} layers are trained at a time"
    larger = [row for row in plan.candidates if row.layers_per_block > plan.layers[-1]]
    if larger:
        closest = min(larger, key=lambda row: row.layers_per_block)
        return (
            f"{window}, because {closest.layers_per_block} would need {format_bytes(closest.predicted_peak_bytes)} of "
            f"{format_bytes(plan.budget_bytes)}"
        )
    if len(plan.layers) == 1:
        return "all layers are trained at a time, end to end, because the budget holds them"
    return f"{window}, as window asks"


def _what_is_in_memory(plan: Plan, streamed_by_user: bool) -> str:
    chosen, part = plan.chosen, plan.method.part
    if chosen.slots >= chosen.blocks:
        return f"the budget holds {'it' if chosen.blocks == 1 else 'all of them'}"
    if streamed_by_user:
        return f"{part}s wait on disk, as tier=disk asks"
    waiting_bytes = chosen.breakdown["frozen"] // (chosen.slots - 1) if plan.method.grows else chosen.block_bytes
    whole = chosen.predicted_peak_bytes + (chosen.blocks - chosen.slots) * waiting_bytes
    return f"the budget holds {chosen.slots} of them at a time, all would need about {format_bytes(whole)}"


def _time(plan: Plan) -> str:
    if plan.chosen.slots >= plan.chosen.blocks:
        return "computing takes the time"
    what = f"moving {plan.method.part}s takes {plan.stall_share:.1%} of the time"
    return f"{what}, computing the rest" if plan.stall_share <= MUCH_MOVING else what
