"""How far numbers are from each other, and where blocks are compared."""

import numpy as np

from edgeblocks.diffusion.noise import NoiseRange
from edgeblocks.diffusion.token_choice import Values
from edgeblocks.errors import RunError

NUM_OUTPUTS = 8
BATCH = 5


def levels_of(owned: NoiseRange) -> Values:
    """Five noise levels of a block from its lower end to its upper end, geometrically where that is not 0."""
    spaced = np.geomspace if owned.low > 0 else np.linspace
    levels: Values = spaced(owned.low, owned.high, BATCH).astype(np.float32)
    return levels


def largest_difference(found: Values, expected: Values) -> float:
    """The largest absolute difference; infinite when a shape or dtype differs or a value is not a number."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    difference = float(np.abs(found - expected).max())
    return difference if np.isfinite(difference) else float("inf")


def check_finite(expected: Values, what: str) -> None:
    if not np.isfinite(expected).all():
        raise RunError(
            f"{what} of the run gives values that are not finite numbers in torch itself, so there is nothing to "
            f"export: its training diverged; look at the loss in metrics.jsonl and train again with a lower "
            f"--set learning_rate"
        )
