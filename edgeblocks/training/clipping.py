"""When a stage learns from its gradient, and by which norm this is clipped.

By the stage's own norm the update is made at once. The norm of the whole network's gradient is known only when the
first stage's is complete, and by then the others may have left the memory. So gradients wait in a scratch file, and a
stage is updated when it is used next: on the following way forward, the last stage before its backward pass, or at a
checkpoint. No stage is used between its gradient and its update, so the numbers are those of
`torch.nn.utils.clip_grad_norm_(network.parameters(), clip)` and a step of the optimizer, bit for bit: the norm is that
of the parameters' norms, in the network's order.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout
from edgeblocks.offload.scratch import Scratch
from edgeblocks.offload.slots import StreamTimes
from edgeblocks.optim.update import clip_

Update = Callable[[BlockBuffer, Tensor, int], None]
"""Updates a stage with its flat gradient in the step of that number, counted from 0."""


class Clipping(Protocol):
    """What the trainer tells of each stage's gradient."""

    step_bytes: int
    """Written to disk in every step."""

    def finish(self, stage: int, buffer: BlockBuffer) -> None:
        """Make the stage's update that still waits, if one does, before the stage is used or saved."""
        ...

    def complete(self, stage: int, network: nn.Module, buffer: BlockBuffer, step: int) -> None:
        """The stage's parameters have their gradients of a step, counted from 0.

        Raises:
            FloatingPointError: the gradient is no number; nothing has changed if it is the first one of the step.
        """
        ...

    def end_step(self, step: int) -> float:
        """The norm of the whole gradient, before it was clipped, when all stages' are complete.

        Raises:
            FloatingPointError: it is no number.
        """
        ...


class ClipByStage:
    """Each stage is clipped by its own norm and updated as soon as its gradient is complete."""

    step_bytes = 0

    def __init__(self, gradients: Tensor, update: Update, *, clip: float) -> None:
        """
        Args:
            gradients: float32, where the gradient of the stage in use lies flat.
        """
        self._gradients, self._update, self._clip = gradients, update, clip
        self._squares = 0.0

    def finish(self, stage: int, buffer: BlockBuffer) -> None:
        """No update waits."""

    def complete(self, stage: int, network: nn.Module, buffer: BlockBuffer, step: int) -> None:
        gradients = self._gradients[: buffer.layout.num_parameters]
        norm = _finite(clip_(gradients, self._clip))
        self._squares += norm**2
        self._update(buffer, gradients, step)

    def end_step(self, step: int) -> float:
        norm, self._squares = math.sqrt(self._squares), 0.0
        return norm


class ClipByNetwork:
    """All stages are clipped by the norm of the whole gradient, and each is updated when it is used next."""

    def __init__(
        self,
        gradients: Tensor,
        update: Update,
        *,
        clip: float,
        file: Scratch,
        layouts: Sequence[BlockLayout],
        trained: Sequence[bool],
        times: StreamTimes,
    ) -> None:
        """
        Args:
            gradients: as above; a gradient that waited comes back there.
            file: where gradients wait.
            layouts, trained: of all stages.
            times: what writing and reading takes is added to it, since nothing is computed meanwhile.
        """
        self._gradients, self._update, self._clip, self._times = gradients, update, clip, times
        self._file = file
        sizes = [4 * layout.num_parameters * one for layout, one in zip(layouts, trained, strict=True)]
        self._starts, self.step_bytes = [0, *accumulate(sizes)], sum(sizes)
        self._trained = {stage for stage, one in enumerate(trained) if one}
        self._norms: dict[int, list[Tensor]] = {}
        """By stage, of each parameter's gradient in the step that is being made."""
        self._waiting: set[int] = set()
        self._step, self._scale = -1, torch.ones(())
        """Of the updates that wait."""

    def finish(self, stage: int, buffer: BlockBuffer) -> None:
        if stage not in self._waiting:
            return
        gradients = self._gradients[: buffer.layout.num_parameters]
        started = time.perf_counter()
        self._file.read(self._starts[stage], gradients.view(torch.uint8))
        self._times.waited_for_loading(started)
        self._update(buffer, gradients.mul_(self._scale), self._step)
        self._waiting.remove(stage)

    def complete(self, stage: int, network: nn.Module, buffer: BlockBuffer, step: int) -> None:
        assert not self._waiting, "a way back begins when all stages have learned from the one before"
        self._norms[stage] = [
            torch.linalg.vector_norm(parameter.grad) for parameter in network.parameters() if parameter.grad is not None
        ]
        gradients, started = self._gradients[: buffer.layout.num_parameters], time.perf_counter()
        self._file.write(self._starts[stage], gradients.view(torch.uint8))
        self._times.waited_for_storing(started)

    def end_step(self, step: int) -> float:
        """Source: torch.nn.utils.clip_grad_norm_, of which it has the order of sums, and the 1e-6."""
        of_parameters = [one for stage in sorted(self._norms) for one in self._norms[stage]]
        self._norms.clear()
        norm = torch.linalg.vector_norm(torch.stack(of_parameters))
        before = _finite(norm.item())
        self._scale = torch.clamp(self._clip / (norm + 1e-6), max=1.0)
        self._step, self._waiting = step, set(self._trained)
        return before


def _finite(norm: float) -> float:
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    return norm
