"""A small block's step, part by part: what warms a device up, and what the plan's times are corrected by.

The block is in memory as training has it: weights, moments and EMA in one buffer, gradients in one row.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeblocks.families.base import Batch
from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.methods import Master, Precision
from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, BlockLayout, Optimizer, Part, bind_parameters_
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.optim.adamw import Workspace
from edgeblocks.optim.update import clip_, update_
from edgeblocks.planning.corrections import TimedBlock
from edgeblocks.planning.layer_costs import LayerCosts, at_samples
from edgeblocks.planning.memory import GAPS_SHARE, SLACK_BYTES
from edgeblocks.planning.plans import micro_batches

ROOM_BYTES = SLACK_BYTES - 16_000_000
"""For the activations of a block that is timed, beyond those of one checkpointed sample: every plan has this much for
what is not foreseen, of which code of kernels took 10 MB here."""
LEAST_UPDATED = 320_000
"""Parameters of the update that is timed, where the network has them: of fewer, starting it is most of its time."""
_ROUNDS, _PASSES_S, _UPDATES_S = 12, 0.35, 0.1


class BlockStep:
    """A block of a family on a device, with random weights, and the parts of its training step."""

    def __init__(
        self,
        family: Family,
        device: str,
        *,
        num_layers: int,
        checkpointing: bool = False,
        optimizer: Optimizer | None,
        master: Master = "fp32",
    ) -> None:
        """
        Args:
            optimizer: that of the update; None where there is none, which takes less memory.
        """
        self._family, self._device, self._made = family, device, 0
        with torch.device("meta"):
            self.network = family.block(num_layers=num_layers, checkpointing=checkpointing)
        with torch.device(device):
            self.network.reset_tables_()
        layout = BlockLayout.of(self.network, optimizer or "adamw", frozen=optimizer is None, master=master)
        parts: tuple[Part, ...] = ("weights",) if optimizer is None else PARTS
        self._buffer = BlockBuffer(layout, parts, allocate=partial(_memory, device)).touched()
        self._gradients = torch.empty(layout.num_parameters, device=device).zero_()
        self._buffer.flat("weights").normal_(std=0.02)
        rounds, weights = layout.is_rounded, self._buffer
        self._workspace = Workspace.for_device(device, rounds=rounds) if layout.num_quantized or rounds else None
        computed = Float32Copy([layout], weights.device).hold_(weights, "weights") if rounds else weights
        bind_parameters_(self.network, computed.tensors("weights"), self._gradients)

    @property
    def num_parameters(self) -> int:
        return self._buffer.layout.num_parameters

    def forward_and_backward(self, batch: Batch, precision: Precision) -> None:
        """Adds to the gradients."""
        with computing_in(precision, self._device):
            loss = self._family.loss(self.network, batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # a device is waited for here

    def update_(self) -> None:
        """Clipping, AdamW, EMA."""
        self._gradients.nan_to_num_()  # those of made-up examples; the update is to run on numbers
        clip_(self._gradients, 1.0)
        update_(
            self._buffer,
            self._gradients,
            step=self._made,
            learning_rate=1e-3,
            weight_decay=0.1,
            exponent=6.94,
            workspace=self._workspace,
            position=(0, "warm-up"),
        )
        self._gradients.zero_()
        self._gradients[0].item()  # a device is waited for here
        self._made += 1


def _memory(device: str, num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def example_batch(family: Family, count: int, device: str) -> Batch:
    """A batch of so many made-up examples: numbers of one half, every other truth value true, integers of zero."""
    # All zeros would be the wrong batch to time: no token would be masked, and a noise level of 0 has no logarithm.
    batch = {}
    for name, (shape, dtype) in family.batch_spec(count).items():
        if dtype == torch.bool:
            batch[name] = (torch.arange(math.prod(shape), device=device) % 2 == 0).view(shape)
        else:
            batch[name] = torch.full(shape, 0.5 if dtype.is_floating_point else 0, dtype=dtype, device=device)
    return batch


def samples_to_time(family: Family, costs: LayerCosts, batch: int) -> tuple[tuple[int, ...], bool]:
    """Micro-batches with which a block is timed, and whether it is checkpointed.

    One sample, and as many as are sure to stay below what any plan needs; where not even one is, it is checkpointed, as
    it is in the smallest plan.
    """
    room_bytes = ROOM_BYTES + at_samples(costs.checkpointed, 1, lambda cost: cost.peak_bytes.at(family.layer_period))
    for size in micro_batches(batch):
        if _activations_bytes(family, costs, size, checkpointing=False) <= room_bytes:
            return tuple(sorted({1, size})), False
    return (1,), True


def bytes_to_time(
    family: Family,
    costs: LayerCosts,
    *,
    samples: Sequence[int],
    checkpointing: bool,
    optimizer: Optimizer,
    master: Master = "fp32",
) -> int:
    """What `time_block` takes of memory: weights, gradients, EMA and moments, and a micro-batch."""
    layers = family.layer_period
    # Weights and EMA of two bytes have a copy of four beside them.
    state_bytes = 12 * costs.parameters(layers) + costs.moment_bytes(layers, optimizer)
    micro_batch_bytes = _activations_bytes(family, costs, max(samples), checkpointing=checkpointing)
    return state_bytes + costs.workspace_bytes[optimizer if master == "fp32" else "rounded"] + micro_batch_bytes


def _activations_bytes(family: Family, costs: LayerCosts, samples: int, *, checkpointing: bool) -> int:
    """With the gaps that the allocator leaves."""
    traces, kind = (costs.checkpointed, "checkpointed") if checkpointing else (costs.plain, "plain")
    live_bytes = at_samples(traces, samples, lambda cost: cost.peak_bytes.at(family.layer_period))
    return int((1 + GAPS_SHARE[kind]) * live_bytes)


def time_block(
    family: Family,
    device: str,
    *,
    precision: Precision,
    samples: Sequence[int],
    checkpointing: bool,
    optimizer: Optimizer,
    master: Master = "fp32",
) -> TimedBlock:
    """What the steps of a family's smallest block take here and now, in about half a second.

    Args:
        samples: of micro-batches, one or two sizes.
    """
    period = family.layer_period
    what: dict[str, Any] = {"checkpointing": checkpointing, "optimizer": optimizer, "master": master}
    step = BlockStep(family, device, num_layers=period, **what)
    batches = [example_batch(family, count, device) for count in samples]
    # In turn, so that a busy moment falls on all of them.
    calls = [partial(step.forward_and_backward, batch, precision) for batch in batches]
    before = _processor_times()
    rounds = rounds_s(calls, most_s=_PASSES_S)
    ran, waited = (now - then for now, then in zip(_processor_times(), before, strict=True))
    # Enough layers for the update, which small blocks begin more often than they work on it.
    layers = min(family.num_layers, period * math.ceil(LEAST_UPDATED / step.num_parameters))
    if layers > period:
        step = BlockStep(family, device, num_layers=layers, **what)
    updates = rounds_s([step.update_], most_s=_UPDATES_S)
    return TimedBlock(
        num_layers=period,
        checkpointing=checkpointing,
        passes_s={count: statistics.median(one[i] for one in rounds) for i, count in enumerate(samples)},
        update_s_per_parameter=statistics.median(one[0] for one in updates) / step.num_parameters,
        is_rounded=master == "bf16",
        waited=waited / max(ran + waited, 1),
    )


def _processor_times() -> tuple[int, int]:
    """Nanoseconds in which this thread had a processor, and in which it was ready and another program had it (Linux;
    elsewhere nothing is known of that)."""
    with contextlib.suppress(OSError, ValueError):
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
        return int(ran), int(waited)
    return 0, 0


def rounds_s(calls: Sequence[Callable[[], None]], *, most_s: float) -> list[list[float]]:
    """Seconds of each call, in rounds of all calls in turn, for about `most_s` seconds; two rounds at least.

    A first round, in which programs are loaded and memory is touched, is left out.
    """
    rounds: list[list[float]] = []
    until = time.perf_counter() + most_s
    while len(rounds) < 3 or (len(rounds) <= _ROUNDS and time.perf_counter() < until):
        rounds.append([_seconds(call) for call in calls])
    return rounds[1:]


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
