"""What trainers have in common that train one part of a network at a time, which stays in memory for a whole visit."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from edgeblocks.data.dataset import DataSet
from edgeblocks.offload.block_slots import BlockSlots
from edgeblocks.offload.slots import Slot
from edgeblocks.optim.loss_scale import unscale_
from edgeblocks.optim.update import clip_
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.training.guard import Guard
from edgeblocks.training.loop import Trainer, Visit


class ResidentTrainer(Trainer):
    """Has the part of a visit in a slot, and writes its file when the visit ends."""

    def __init__(self, run: RunDirectory, data: DataSet, slots: BlockSlots, guard: Guard) -> None:
        super().__init__(run, data, slots, guard)
        self.slots = slots
        self._resident: Slot | None = None
        """The part of the visit that goes on."""

    def part_of(self, visit: Visit) -> int:
        """The number of the part that is trained in a visit."""
        return visit.block

    @property
    def resident(self) -> Slot:
        """The slot of the part that is trained now."""
        assert self._resident is not None, "only during a visit"
        return self._resident

    @contextmanager
    def visit(self, visit: Visit, then: Visit | None) -> Iterator[None]:
        # A visit always ends with the part's file written, so the limit is looked at before the part is loaded. The
        # bytes count from now on: the I/O thread may write them only after the next visit has asked for its share.
        part = self.part_of(visit)
        file_bytes = self.store.file_bytes(part)
        self.check_write_limit(file_bytes, "the next visit")
        self.progress.bytes_written += file_bytes
        with self.slots.visit(part, then=self.part_of(then) if then else None) as resident:
            assert resident.step == visit.first, f"part {part} is at step {resident.step}, not {visit.first}"
            self.gradients.zero_()  # those of another part, or of a step that failed
            resident.loss_scale = self.saved_loss_scale(part)
            self._resident = resident
            try:
                yield
            finally:
                self._resident = None

    def update_resident_(self, visit: Visit, step: int) -> float:
        """Clip the resident part's gradient by its own norm, make the update, and count the step as made.

        Returns:
            The norm before clipping; no number where float16 could not hold the gradient, and nothing was updated.

        Raises:
            EdgeblocksError: the gradient is no number.
        """
        resident, scale = self.resident, self.resident.loss_scale
        gradients = self.gradients[: resident.buffer.layout.num_parameters]
        unscale_(gradients, scale)
        gradient_norm = clip_(gradients, self.settings.clip)
        finite = math.isfinite(gradient_norm)
        if scale is None and not finite:
            # Before the update: a NaN would go into the weights, their average and both moments.
            raise self.diverged(f"the gradient's norm is {gradient_norm}", step, saved=visit.first)
        if finite:
            self.update_(resident.buffer, gradients, step, visit.block)
        if scale is not None:
            with self.divergence(step, saved=visit.first):
                resident.loss_scale = scale.after(finite=finite)
        gradients.zero_()  # the next step's backward pass adds to them
        resident.step = step + 1  # written into the file's header, where a resumed run begins
        return gradient_norm
