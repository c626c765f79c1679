"""In which order a step of end-to-end training uses the stages of a network, and what it moves where some are on disk.

Forward through all stages but the last, then backward from the last one to the lowest that is trained. Stages below
that one are frozen and run forward only; frozen ones above it pass the gradient on and do not change.
"""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a stage: on the way forward or back, and whether it changes the stage."""

    stage: int
    backward: bool
    changes: bool


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Stages that a step moves: offloaded whole, weights loaded, and the rest (EMA, optimizer state) loaded."""

    offloaded: int
    weights_loaded: int
    rest_loaded: int


def uses_of_a_step(trained: tuple[bool, ...], *, late: bool = False) -> list[Use]:
    """The uses of a step, in order.

    Args:
        trained: of each stage whether it is; one at least.
        late: whether a stage is updated when it is used next, not when its gradient is complete (`training.clipping`).

    >>> [(use.stage, use.changes) for use in uses_of_a_step((True, True, True))]
    [(0, False), (1, False), (2, True), (1, True), (0, True)]
    >>> [(use.stage, use.backward, use.changes) for use in uses_of_a_step((False, True, False))]
    [(0, False, False), (1, False, False), (2, True, False), (1, True, True)]
    >>> [(use.stage, use.backward, use.changes) for use in uses_of_a_step((True, True), late=True)]
    [(0, False, True), (1, True, True), (0, True, False)]
    """
    last, lowest = len(trained) - 1, trained.index(True)
    forward = [Use(stage=stage, backward=False, changes=late and trained[stage]) for stage in range(last)]
    return forward + [
        Use(stage=stage, backward=True, changes=trained[stage] and (stage == last or not late))
        for stage in range(last, lowest - 1, -1)
    ]


@functools.cache
def traffic_of_a_step(trained: tuple[bool, ...], slots: int, *, late: bool = False, in_ram: int = 0) -> Traffic:
    """What a step moves with `slots` stages in memory, once the first steps are over.

    The stage that was used longest ago gives way. If all are trained there is a formula: a stage that stays in memory
    from its update to its next one is among the first and among the last `slots`. Else the uses are simulated.

    Args:
        in_ram: how many stages, from the first one on, are not counted: they are offloaded to RAM.

    >>> [traffic_of_a_step((True,) * 6, slots).offloaded for slots in (1, 2, 3, 4, 5, 6)]
    [6, 6, 6, 4, 2, 0]
    >>> [traffic_of_a_step((False, False, True, True), slots).offloaded for slots in (1, 2, 3, 4)]
    [2, 2, 1, 0]
    >>> [traffic_of_a_step((True,) * 6, 2, in_ram=in_ram).weights_loaded for in_ram in (0, 1, 2, 5, 6)]
    [8, 7, 6, 1, 0]
    """
    stages = len(trained)
    if slots >= stages:
        return Traffic(offloaded=0, weights_loaded=0, rest_loaded=0)
    if all(trained) and not late and not in_ram:
        swapped = min(stages, 2 * (stages - slots))
        return Traffic(offloaded=swapped, weights_loaded=2 * (stages - slots), rest_loaded=swapped)
    held: OrderedDict[int, tuple[bool, bool]] = OrderedDict()
    """Of each stage in memory, the one that was used longest ago first: whether it changed, and whether it is whole."""
    uses = uses_of_a_step(trained, late=late)
    for _ in range(3):  # until what is in memory at a step's beginning is the same every time
        _simulated_step(uses, slots, held, in_ram)
    return _simulated_step(uses, slots, held, in_ram)


def _simulated_step(uses: Sequence[Use], slots: int, held: OrderedDict[int, tuple[bool, bool]], in_ram: int) -> Traffic:
    """What one step moves; `held` is as the step before it left it, and is changed."""
    offloaded = weights_loaded = rest_loaded = 0
    for use in uses:
        if use.stage not in held:
            if len(held) == slots:
                leaves, (changed, _) = held.popitem(last=False)
                offloaded += changed and leaves >= in_ram
            weights_loaded += use.stage >= in_ram
            held[use.stage] = (False, False)
        changed, whole = held[use.stage]
        rest_loaded += use.changes and not whole and use.stage >= in_ram
        # What a use changes has all its parts in memory; a forward pass has brought the weights alone.
        held[use.stage] = (changed or use.changes, whole or use.changes)
        held.move_to_end(use.stage)
    return Traffic(offloaded=offloaded, weights_loaded=weights_loaded, rest_loaded=rest_loaded)
