"""The batches of consecutive steps; where a device trains, the next one is drawn while it computes.

A step's batch depends on nothing but the step, so it is the same whenever it is drawn.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.noise import NoiseRange
from edgeblocks.families.base import Batch
from edgeblocks.families.family import Family
from edgeblocks.seeds import generator_at


def drawing(
    family: Family, data: DataSet, noise: NoiseRange, *, batch: int, seed: int, block: int
) -> Callable[[int], Batch]:
    """Draws the batch of each step of a block: examples in the block's order, the rest from (seed, block, step).

    Args:
        noise: the block's range of noise levels, as `family.draw` takes it.
    """
    order = data.order(batch=batch, seed=seed, block=block)

    def draw(step: int) -> Batch:
        examples, labels = data.gather(order.indices(step))
        # A generator for this step alone: its draws do not depend on how many steps the process has made.
        return family.draw(examples, labels, noise, generator_at(seed, "train", block, step))

    return draw


def draws_ahead(device: torch.device) -> bool:
    """Whether a thread draws for a device; a processor that trains has no time to spare."""
    return device.type != "cpu"


class BatchThread:
    """The thread that draws for a device, if one does. Its owner closes it."""

    def __init__(self, device: torch.device) -> None:
        self._pool: ThreadPoolExecutor | None = None
        if draws_ahead(device):
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edgeblocks-data")

    def batches(self, draw: Callable[[int], Batch], *, last: int) -> "Batches":
        """What `draw` gives for each step before `last`."""
        return Batches(draw, last=last, helper=self._pool)

    def close(self) -> None:
        """End the thread, after what it is drawing."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Batches:
    """What `draw` gives for each step, for one caller."""

    def __init__(self, draw: Callable[[int], Batch], *, last: int, helper: ThreadPoolExecutor | None) -> None:
        """
        Args:
            last: no step from this one on is drawn.
            helper: one thread that draws the batch of the step to come; None where the caller's processor computes.
        """
        self._draw, self._last, self._helper = draw, last, helper
        self._drawn: dict[int, Future[Batch]] = {}

    def of(self, step: int) -> Batch:
        """A step's batch; raises what `draw` raises."""
        if self._helper is None:
            return self._draw(step)
        # One step ahead, no more: each batch that is drawn ahead takes memory.
        wanted = [number for number in (step, step + 1) if number < self._last]
        self._drawn = {number: self._drawn.get(number) or self._helper.submit(self._draw, number) for number in wanted}
        return self._drawn[step].result()

    def close(self) -> None:
        """Wait for what is being drawn, which nobody will ask for."""
        for drawn in self._drawn.values():
            if not drawn.cancel():
                drawn.exception()  # waits, and takes the failure of a batch that no step needs
        self._drawn.clear()
