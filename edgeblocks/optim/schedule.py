"""The learning rate: a linear rise, then a cosine to zero; of a run that was prolonged, once more for each time."""

import math
from collections.abc import Sequence


def learning_rate_at(
    step: int, *, steps: int, warmup: int, peak: float, first: int = 0, from_rate: float = 0.0, floor: float = 0.0
) -> float:
    """Linear warm-up, then a cosine to zero. `step` counts from 0; the last step still learns.

    Args:
        first: the step in which it begins, with a rise from `from_rate`.
        floor: the share of `peak` to which the cosine falls.

    >>> [round(learning_rate_at(s, steps=10, warmup=2, peak=1.0), 3) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup = min(warmup, (steps - first) // 2)
    done = step - first
    if done < warmup:
        return from_rate + (peak - from_rate) * (done + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(steps - first - warmup, 1)))
    return peak * (cosine if not floor else floor + (1 - floor) * cosine)


def learning_rate_over(
    stretches: Sequence[tuple[int, int]], step: int, *, warmup: int, peak: float, floor: float = 0.0
) -> float:
    """Of a run that was prolonged: each stretch rises from where the rate is, and falls to zero along its own cosine.

    Args:
        stretches: the first step of each, and the steps that the run was to make from then on.
        floor: the share of `peak` to which the cosine falls.

    >>> rates = [learning_rate_over([(0, 4), (4, 8)], step, warmup=2, peak=1.0) for step in range(8)]
    >>> [round(rate, 2) for rate in rates]
    [0.5, 1.0, 1.0, 0.5, 0.75, 1.0, 1.0, 0.5]
    """
    rate = 0.0
    for number, (first, steps) in enumerate(stretches):
        is_last = number + 1 == len(stretches) or step < stretches[number + 1][0]
        until = step if is_last else stretches[number + 1][0] - 1
        if until >= first:
            rate = learning_rate_at(
                until, steps=steps, warmup=warmup, peak=peak, first=first, from_rate=rate, floor=floor
            )
        if is_last:
            break
    return rate
