"""Gradient clipping in end-to-end training: by each stage's own norm, or by that of the whole network.

By the stage's own norm the update is made at once. The norm of the whole network's gradient is known only when the
first stage's gradient is complete, and by then the others may have left the memory. So gradients are offloaded to a
scratch file, and a stage is updated when it is used next: in the following forward pass, the last stage before its
backward pass, or at a checkpoint. No stage is used between its gradient and its update, so the numbers are those of
`torch.nn.utils.clip_grad_norm_(network.parameters(), clip)` and a step of the optimizer, bit for bit: the norm is that
of the parameters' norms, in the network's order.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout
from edgeblocks.offload.scratch import AnyScratchFile
from edgeblocks.offload.slots import StreamTimes
from edgeblocks.optim.update import clip_

_PIECE_BYTES = 2**22
Update = Callable[[BlockBuffer, Tensor, int, int], None]
"""Updates a stage with its flat gradient, given the numbers of the step and of the stage, both counted from 0."""


class ClipByStage:
    """Each stage is clipped by its own norm and updated as soon as its gradient is complete."""

    step_bytes = 0
    """Written to disk in every step."""

    def __init__(self, gradients: Tensor, update: Update, *, clip: float) -> None:
        """
        Args:
            gradients: float32, where the gradient of the stage in use lies flat.
        """
        self._gradients, self._update, self._clip = gradients, update, clip
        self._squares = 0.0

    def finish(self, stage: int, buffer: BlockBuffer) -> None:
        """Make the stage's pending update, if it has one, before the stage is used or saved. Here none waits."""

    def complete(self, stage: int, network: nn.Module, buffer: BlockBuffer, step: int) -> None:
        """The stage's parameters have their gradients of a step, counted from 0.

        Raises:
            FloatingPointError: the gradient is no number; nothing has changed if it is the first one of the step.
        """
        gradients = self._gradients[: buffer.layout.num_parameters]
        # Looked at before the update: a NaN would go into the weights, their average and both moments.
        norm = _finite(clip_(gradients, self._clip))
        self._squares += norm**2  # the whole network's norm is reported, though nothing is clipped by it
        self._update(buffer, gradients, step, stage)

    def end_step(self, step: int) -> float:
        """The norm of the whole gradient before clipping, when all stages' gradients are complete.

        Raises:
            FloatingPointError: it is no number.
        """
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
        file: AnyScratchFile,
        layouts: Sequence[BlockLayout],
        trained: Sequence[bool],
        times: StreamTimes,
        tied: tuple[str, str] | None = None,
    ) -> None:
        """
        Args:
            gradients: as above; an offloaded gradient is loaded into it again.
            file: where gradients are offloaded to.
            layouts, trained: of all stages.
            times: counts the time of writing and reading as a stall, since nothing is computed meanwhile.
            tied: a parameter of the first stage and one of the last that are copies of each other: each gets the
                gradient of both.
        """
        self._gradients, self._update, self._clip, self._times = gradients, update, clip, times
        self._file = file
        sizes = [4 * layout.num_parameters * is_trained for layout, is_trained in zip(layouts, trained, strict=True)]
        self._starts, self.step_bytes = [0, *accumulate(sizes)], sum(sizes)
        self._trained = {stage for stage, is_trained in enumerate(trained) if is_trained}
        self._norms: dict[int, dict[str, Tensor]] = {}
        """By stage, of each parameter's gradient in the current step."""
        self._tied = tied
        self._copies: list[tuple[int, int]] = []
        """Where the gradients of the two begin in the file, and their bytes."""
        for stage, name in () if tied is None else zip((0, len(layouts) - 1), tied, strict=True):
            entry = next(entry for entry in layouts[stage].of_part("weights") if entry.name == f"weights.{name}")
            place, size = (4 * number // entry.dtype.itemsize for number in (entry.start, entry.num_bytes))
            self._copies.append((self._starts[stage] + place, size))
            self.step_bytes += size
        self._pending: set[int] = set()
        """Stages whose gradient is in the file and whose update is still to be made."""
        self._step, self._scale = -1, torch.ones(())
        """Of the pending updates."""

    def finish(self, stage: int, buffer: BlockBuffer) -> None:
        if stage not in self._pending:
            return
        gradients = self._gradients[: buffer.layout.num_parameters]
        started = time.perf_counter()
        # `gradients` is free: the former stage's was written away, and this stage's backward pass has not begun.
        self._file.read(self._starts[stage], gradients.view(torch.uint8))
        self._times.waited_for_loading(started)
        self._update(buffer, gradients.mul_(self._scale), self._step, stage)
        self._pending.remove(stage)

    def complete(self, stage: int, network: nn.Module, buffer: BlockBuffer, step: int) -> None:
        assert not self._pending, "a backward pass begins when the updates of the step before are made"
        # A norm a parameter, in the network's order, not one of the flat gradient: the norm of these norms is then the
        # one of `clip_grad_norm_`, bit for bit.
        self._norms[stage] = {
            name: torch.linalg.vector_norm(parameter.grad)
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }
        gradients, started = self._gradients[: buffer.layout.num_parameters], time.perf_counter()
        # Before the next stage's backward pass writes its gradient to the same memory.
        self._file.write(self._starts[stage], gradients.view(torch.uint8))
        self._times.waited_for_storing(started)

    def end_step(self, step: int) -> float:
        """Source: torch.nn.utils.clip_grad_norm_."""
        # Stages complete from the last to the first; `clip_grad_norm_` sums from the first parameter on.
        if self._tied is not None:
            first, last = self._tied
            del self._norms[max(self._norms)][last]
            self._norms[0][first] = self._sum_of_copies()
        of_parameters = [norm for stage in sorted(self._norms) for norm in self._norms[stage].values()]
        self._norms.clear()
        norm = torch.linalg.vector_norm(torch.stack(of_parameters))
        before = _finite(norm.item())
        self._scale = torch.clamp(self._clip / (norm + 1e-6), max=1.0)  # 1e-6 as there
        self._step, self._pending = step, set(self._trained)
        return before

    def _sum_of_copies(self) -> Tensor:
        """Put the sum of both copies' gradients in the place of each; its norm."""
        (first, size), (other, _) = self._copies
        one, two = (torch.empty(min(size, _PIECE_BYTES) // 4, device=self._gradients.device) for _ in range(2))
        norms, started = [], time.perf_counter()
        for start in range(0, size, _PIECE_BYTES):
            count = min(size - start, _PIECE_BYTES) // 4
            pieces = [piece[:count].view(torch.uint8) for piece in (one, two)]
            for place, piece in zip((first, other), pieces, strict=True):
                self._file.read(place + start, piece)
            one[:count] += two[:count]
            norms.append(torch.linalg.vector_norm(one[:count]))
            for place in (first, other):
                self._file.write(place + start, pieces[0])
        self._times.waited_for_storing(started)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm


StageClipping = ClipByStage | ClipByNetwork
"""Gets each stage's gradient from the trainer, and makes the updates."""


def _finite(norm: float) -> float:
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    return norm
