"""How long a step takes: of one block alone, or of a network that is trained end to end, stage by stage."""

import math
import statistics
from dataclasses import dataclass

from edgeblocks.planning.layer_costs import LayerCosts, at_samples
from edgeblocks.planning.plans import Cut, Machine, PlanRequest, streaming_share, trained_stages
from edgeblocks.planning.stage_order import Traffic, traffic_of_a_step
from edgeblocks.planning.windows import frozen_below

_WEIGHT_BYTES = 20
"""Traffic of a parameter in a micro-batch: 4 bytes are read three times, and the gradient's 4 read and written."""
_CACHED = 3
"""How much faster than memory a processor is measured, whose cache holds the few megabytes that this is done with; 24
and 8 GB/s on a Xeon, where a micro-batch of 19M parameters took 0.12 s beyond its arithmetic."""

ROUNDED_UPDATE = 1.75
"""How many times as long an update takes where weights are rounded stochastically: 9 ns a parameter for 5, without
clipping, on one thread of an AMD EPYC (tests/bench/rounded_update.py)."""


def predicted_step_s(cut: Cut) -> float:
    """Seconds of one optimizer step of a block: arithmetic, memory traffic and kernel starts, corrected by what was
    measured.

    A backward pass costs twice a forward pass; activation checkpointing adds one more forward pass through the layers.
    A kernel reads about twice what it writes. Every micro-batch reads the weights in both passes and adds to the
    gradients; clipping, optimizer and EMA pass over the parameters once a step.
    """
    return cut.machine.correction.steps * (_passes_s(cut) + _update_s(cut))


def _passes_s(cut: Cut) -> float:
    """Of a step, all micro-batches forward and backward."""
    correction = cut.machine.correction
    with_samples_s, with_passes_s = modelled(
        cut.costs,
        cut.machine,
        num_layers=cut.num_layers,
        batch=cut.request.batch,
        micro_batch=cut.micro_batch,
        checkpointing=cut.checkpointing,
    )
    return correction.samples * with_samples_s + correction.passes * with_passes_s


def _update_s(cut: Cut) -> float:
    return cut.parameters * cut.machine.update_s_per_parameter * (ROUNDED_UPDATE if cut.is_rounded else 1)


def modelled(
    costs: LayerCosts, machine: Machine, *, num_layers: int, batch: int, micro_batch: int, checkpointing: bool
) -> tuple[float, float]:
    """Seconds of a batch forward and backward: of what grows with the samples, and of what each micro-batch takes."""
    traces = costs.checkpointed if checkpointing else costs.plain
    flops = 3 * costs.forward_flops_per_sample(num_layers)
    flops += num_layers * costs.layer_flops_per_sample if checkpointing else 0
    accumulation = math.ceil(batch / micro_batch)
    touched = accumulation * at_samples(traces, micro_batch, lambda cost: cost.touched_bytes.at(num_layers))
    operators = accumulation * at_samples(traces, micro_batch, lambda cost: cost.operators.at(num_layers))
    weights = accumulation * _WEIGHT_BYTES * costs.parameters(num_layers)
    weights *= _CACHED if machine.host is None else 1
    return (
        batch * flops / machine.flops_per_s + 3 * touched / machine.memory_bytes_per_s,
        operators * machine.operator_s + weights / machine.memory_bytes_per_s,
    )


@dataclass(frozen=True, kw_only=True)
class StagedStep:
    """A step of all stages: seconds of computing, seconds of waiting for the disk and the link to the host on top of
    them, bytes offloaded to disk."""

    step_s: float
    stall_s: float
    offloaded_bytes: int


def staged_step(cut: Cut, ram_blocks: int) -> StagedStep:
    """A step of end-to-end training.

    A trained stage takes as long as a block; a frozen one above the lowest trained one passes a gradient on, which is
    half of a backward pass, without an update; and all but the last one run forward once more. Gradients that wait for
    the norm of all are written and read while nothing is computed. Beside a host everything that moves passes the link,
    and the first `ram_blocks` stages come from no disk.
    """
    costs, machine, request, blocks, parameters = cut.costs, cut.machine, cut.request, cut.blocks, cut.parameters
    trained = trained_stages(request.trained, blocks)
    passed = sum(not is_trained for is_trained in trained[trained.index(True) :])
    forward_s = request.batch * costs.num_layers * costs.layer_flops_per_sample / machine.flops_per_s
    step_s = sum(trained) * (_passes_s(cut) + _update_s(cut)) + passed * 2 / 3 * _passes_s(cut)
    step_s += (blocks - 1) / blocks * forward_s * machine.correction.samples
    step_s *= machine.correction.steps
    late = request.clip_by == "network"
    weights_bytes, rest_bytes = cut.weights_bytes, cut.ema_bytes + cut.moment_bytes
    traffic = traffic_of_a_step(trained, cut.slots, late=late, in_ram=ram_blocks)
    loaded_bytes, offloaded_bytes = _moved_bytes(traffic, weights_bytes, rest_bytes)
    waiting_bytes = 4 * parameters * sum(trained) * late
    waiting_s = waiting_bytes / machine.disk_read_bytes_per_s + waiting_bytes / machine.disk_write_bytes_per_s
    boundary_bytes = boundary_disk_bytes(costs, request, blocks)
    waiting_s += 2 * boundary_bytes / machine.disk_read_bytes_per_s + boundary_bytes / machine.disk_write_bytes_per_s
    moving_s = loaded_bytes / machine.disk_read_bytes_per_s + offloaded_bytes / machine.disk_write_bytes_per_s
    if machine.host is not None:
        passing = traffic_of_a_step(trained, cut.slots, late=late)
        moving_s += sum(_moved_bytes(passing, weights_bytes, rest_bytes)) / machine.host.link_bytes_per_s
        waiting_s += (2 * waiting_bytes + 3 * boundary_bytes) / machine.host.link_bytes_per_s
    return StagedStep(
        step_s=step_s,
        # Moving hides behind computing, but for the processor's time that it takes or, where it is longer, for the
        # rest.
        stall_s=max(streaming_share(cut.slots) * moving_s, moving_s - step_s) + waiting_s,
        offloaded_bytes=offloaded_bytes + waiting_bytes + boundary_bytes,
    )


def window_step(cut: Cut, ram_blocks: int) -> tuple[float, float]:
    """A step of a network that grows, on average over its windows: seconds of computing, and of waiting for frozen
    parts on top of them.

    Frozen layers are run forward, once for the whole batch. Where not all frozen parts are in memory, each is loaded in
    every step.
    """
    costs, machine, request = cut.costs, cut.machine, cut.request
    layer_s = request.batch * costs.layer_flops_per_sample / machine.flops_per_s
    correction = machine.correction
    frozen_s = statistics.mean(frozen_below(cut.layers)) * layer_s * correction.samples * correction.steps
    moved_s = 0.0
    if cut.frozen_slots < cut.blocks - 1:
        # Below each window all take turns in the slots, but for the first windows, whose few parts fit.
        parts = [count if count > cut.frozen_slots else 0 for count in range(cut.blocks)]
        from_disk = [max(0, count - ram_blocks) if machine.host else count for count in parts]
        moved_s = statistics.mean(from_disk) * cut.frozen_bytes / machine.disk_read_bytes_per_s
        if machine.host is not None:
            moved_s += statistics.mean(parts) * cut.frozen_bytes / machine.host.link_bytes_per_s
    # What is loaded hides behind the frozen layers' computing, if there is a slot to load it into.
    hidden = frozen_s if cut.frozen_slots > 1 else 0.0
    stall_s = max(streaming_share(cut.frozen_slots) * moved_s, moved_s - hidden)
    return predicted_step_s(cut) + frozen_s, stall_s


def _moved_bytes(traffic: Traffic, weights_bytes: int, rest_bytes: int) -> tuple[int, int]:
    """Bytes that a step loads and offloads, given those of a stage's weights and of the rest of it."""
    loaded = weights_bytes * traffic.weights_loaded + rest_bytes * traffic.rest_loaded
    return loaded, (weights_bytes + rest_bytes) * traffic.offloaded


def boundary_disk_bytes(costs: LayerCosts, request: PlanRequest, stages: int) -> int:
    """Bytes of activations at the stage boundaries that a step writes; it reads them forward and again backward."""
    if request.boundaries != "disk" or not request.method.trained_together:
        return 0
    hidden_bytes = costs.hidden_bytes_per_sample // (2 if request.boundary_dtype == "bfloat16" else 1)
    return (stages - 1) * request.batch * hidden_bytes
