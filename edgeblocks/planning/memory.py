"""How much memory a way to train takes, part by part. Plain arithmetic on `LayerCosts`; no torch."""

from edgeblocks.planning.layer_costs import LayerCosts, at_samples, heap_bytes_at
from edgeblocks.planning.plans import Cut, Machine, PlanRequest, trained_stages

GAPS_SHARE = {"plain": 0.36, "checkpointed": 0.85, "staged": 0.7, "forward": 0.3}
"""Memory that the allocator keeps beyond live tensors, measured (tests/bench/budget_grid.py): as a share of those on
the heap; with checkpointing, which takes and frees in another order and peaks at another time, as a share of all; and
so between stages, which take and free tensors of different sizes in turn (two text families, a few shapes)."""
LARGEST_GAPS_BYTES = 75_000_000
LARGEST_GAPS_SHARE = 0.07
"""Gaps stop growing there, but for a share of all activations: more layers repeat the same pattern on the heap."""
SEGMENTS_SHARE = 0.08
"""What torch's caching allocator for a GPU keeps beyond live tensors, as a share of all activations: 0.005 to 0.06 with
segments that grow, measured on an H100 (docs/gpu.md)."""
GPU_CODE_BYTES = 70_000_000
"""Of the host's memory: code of kernels that are first launched when the network is looked at, measured 5 to 60 MB."""
BATCH_COPIES = 1.7
"""A batch, its pixels as bytes, and what flipping some of them copies."""
SAMPLE_COPIES = 5
"""A chain's samples, its noise, two slopes and the finished pictures, in batches' bytes (image and noise)."""
SLACK_BYTES = 28_000_000
"""Code pages and library scratch touched after the runtime was measured; and the cap's own margin, without which a run
at the smallest budget was refused memory some MB below it."""
HALF_SCRATCH_BYTES = 48_000_000
"""Of the library that multiplies matrices of half precision on a processor, which the trace does not see: copies in its
own layout, measured 4 to 15 MB at widths 64 and 384, 16,384 tokens, and the programs that it keeps
(`families.precision.PROGRAMS`). With 24 MB a vit at its smallest budget passed it by 15."""
SLACK_SHARE = 0.01
"""Of all that is not the runtime, for the same."""


def device_memory(cut: Cut) -> dict[str, int]:
    """Bytes of the device's memory by its parts; where the device is the host, of all memory."""
    costs, machine, request = cut.costs, cut.machine, cut.request
    weights_bytes, float32_bytes = cut.weights_bytes, 4 * cut.parameters
    workspace_bytes = costs.workspace_bytes if machine.host is None else costs.gpu_workspace_bytes
    activations, gaps = step_memory(costs, machine, cut.num_layers, cut.micro_batch, cut.checkpointing)
    if request.method.trained_together and cut.blocks > 1:
        gaps = max(gaps, int(GAPS_SHARE["staged"] * activations))
    drawn_bytes = batch_bytes(costs, request)
    slots = cut.slots - cut.frozen_slots  # those that hold a part with all that training needs
    breakdown = {
        "runtime": machine.runtime_bytes,
        # With the float32 copy that a network of bfloat16 blocks computes with.
        "weights": weights_bytes * slots + cut.is_rounded * float32_bytes,
        # Once: one part is trained at a time, in whichever slot it lies.
        "gradients": float32_bytes,
        "optimizer": cut.moment_bytes * slots + workspace_bytes["rounded" if cut.is_rounded else request.optimizer],
        "ema": cut.ema_bytes * slots,
        # With the float32 copy that one of them is expanded into; where weights are bfloat16 it is there anyway.
        "frozen": cut.frozen_bytes * cut.frozen_slots
        + 4 * cut.frozen_parameters * (request.frozen != "none" and not cut.is_rounded)
        if request.method.grows
        else request.resident_bytes,
        "activations": activations,
        "boundaries": _boundary_bytes(costs, request, cut.blocks, cut.micro_batch),
        "data": (request.data_bytes if machine.host is None else 0) + drawn_bytes,
        # Between visits a step's memory is free, so a preview only adds what it needs beyond that.
        "evaluation": max(
            0,
            preview_bytes(costs, machine, request, cut.num_layers, cut.micro_batch, gradient_bytes=float32_bytes)
            - activations
            - gaps
            - drawn_bytes,
        ),
        "slack": gaps
        + request.gap_bytes
        + SLACK_BYTES
        + (0 if request.precision == "fp32" or machine.host else HALF_SCRATCH_BYTES),
    }
    if not request.method.trained_together:
        del breakdown["boundaries"]
    if not breakdown["frozen"] and not request.method.grows:
        del breakdown["frozen"]
    # Of what the run adds: the runtime is measured, the rest is predicted.
    breakdown["slack"] += int(SLACK_SHARE * (sum(breakdown.values()) - machine.runtime_bytes))
    # Planning is over before training begins: it counts only where its own peak is above all the rest.
    breakdown["planning"] = max(0, machine.planning_bytes - sum(breakdown.values())) if machine.host is None else 0
    return breakdown


def _boundary_bytes(costs: LayerCosts, request: PlanRequest, stages: int, micro_batch: int) -> int:
    """Activations of a batch at the stage boundaries, and their gradient at one boundary.

    In the backward pass a micro-batch also has its own gradient and the product of it with a stage's output; see
    `training.streamed_backward`. These live on the heap, with gaps as the tensors of a step. Where the activations are
    kept on disk there are two gradients of a batch alone: a stage's output's and its input's.
    """
    if not request.method.trained_together or stages == 1:
        return 0
    if request.method.grows:
        # What enters the window, which the output of each frozen part takes the place of, row by row; and of a
        # micro-batch that, the part's output, and the gradient of the window's input.
        of_batch, of_micro_batch = 1.0, 3
        return _on_the_heap(costs, request, of_batch * request.batch + of_micro_batch * micro_batch)
    lowest = trained_stages(request.trained, stages).index(True)
    kept = stages - max(0, lowest - 1)  # activations below the lowest trained stage are not needed again
    # Tensors of the whole batch and of a micro-batch.
    of_batch, of_micro_batch = float(kept), 3
    if request.boundaries == "disk":
        of_batch, of_micro_batch = 2.0, 5
    elif request.boundary_dtype == "bfloat16":
        of_batch, of_micro_batch = (kept - 1) / 2 + 1.5, 4
    return _on_the_heap(costs, request, of_batch * request.batch + of_micro_batch * micro_batch)


def _on_the_heap(costs: LayerCosts, request: PlanRequest, samples: float) -> int:
    """Bytes of the hidden values of so many samples, and of the whole batch's conditioning, with gaps."""
    hidden = samples * costs.hidden_bytes_per_sample
    return int((1 + GAPS_SHARE["plain"]) * (hidden + 3 * request.batch * costs.condition_bytes_per_sample))


def host_memory(cut: Cut) -> tuple[dict[str, int], int]:
    """The host's memory by its parts, and how many blocks live in it: as many as the rest of its budget holds.

    `staging` is the page-locked memory of one block, through which blocks move between disk and device. Gradients that
    are offloaded until the norm of all is known pass through page-locked memory of their own; activations at the stage
    boundaries that are kept on disk pass through the heap.
    """
    costs, machine, request, blocks = cut.costs, cut.machine, cut.request, cut.blocks
    if machine.host is None:
        return {}, 0
    needed = {
        "runtime": machine.host.runtime_bytes,
        "data": request.data_bytes + 2 * batch_bytes(costs, request),  # one is drawn while the device has the other
        "evaluation": _grid_bytes(costs, request, cut.micro_batch),
        # One block on its way between disk and device; a block that lives in RAM is copied from where it lies.
        "staging": cut.block_bytes,
        "slack": SLACK_BYTES + GPU_CODE_BYTES,
    }
    if request.clip_by == "network":
        needed["gradients"] = 4 * cut.parameters
    if request.boundaries == "disk" and blocks > 1:
        needed["boundaries"] = int((1 + GAPS_SHARE["plain"]) * cut.micro_batch * costs.hidden_bytes_per_sample)
    # Both are over before training begins: planning, and creating blocks, where weights that are to be rounded are
    # made in float32 beside a whole block.
    creating_bytes = machine.host.runtime_bytes + request.data_bytes + cut.block_bytes + SLACK_BYTES
    creating_bytes += cut.is_rounded * 4 * cut.parameters
    needed["planning"] = max(0, max(machine.planning_bytes, creating_bytes) - sum(needed.values()))
    room = host_budget_bytes(machine, request) - sum(needed.values())
    # Of a network that grows the window never waits, and frozen parts are their weights alone.
    waiting, bytes_of_one = (blocks - 1, cut.frozen_bytes) if request.method.grows else (blocks, cut.block_bytes)
    if cut.slots >= blocks or request.tier == "disk":
        ram_blocks = 0
    else:
        ram_blocks = waiting if request.tier == "ram" else min(waiting, max(0, room) // bytes_of_one)
    return {**needed, "blocks": ram_blocks * bytes_of_one}, ram_blocks


def batch_bytes(costs: LayerCosts, request: PlanRequest) -> int:
    """Of a whole batch while it is drawn."""
    return int(BATCH_COPIES * request.batch * costs.batch_bytes_per_sample)


def host_budget_bytes(machine: Machine, request: PlanRequest) -> int:
    """The bound of the host's memory; without a host there is nothing to bound."""
    if machine.host is None:
        return 0
    return machine.host.memory_bytes if request.ram_budget_bytes is None else request.ram_budget_bytes


def step_memory(
    costs: LayerCosts, machine: Machine, num_layers: int, micro_batch: int, checkpointing: bool
) -> tuple[int, int]:
    """Bytes of a step's live tensors, and of the gaps that the allocator leaves between them."""
    traces = costs.checkpointed if checkpointing else costs.plain
    activations = at_samples(traces, micro_batch, lambda cost: cost.peak_bytes.at(num_layers))
    if machine.host is not None:
        return activations, int(SEGMENTS_SHARE * activations)
    if checkpointing:
        return activations, int(GAPS_SHARE["checkpointed"] * activations)
    heap_bytes = heap_bytes_at(traces, micro_batch, num_layers)
    return activations, int(
        min(GAPS_SHARE["plain"] * heap_bytes, LARGEST_GAPS_BYTES + LARGEST_GAPS_SHARE * activations)
    )


def preview_bytes(
    costs: LayerCosts,
    machine: Machine,
    request: PlanRequest,
    num_layers: int,
    micro_batch: int,
    *,
    gradient_bytes: int,
) -> int:
    """Bytes of evaluating and sampling between visits: a forward pass, and the samples at the solver's levels.

    Beside a host the samples are there, and a micro-batch of them on the device.

    Args:
        gradient_bytes: of the gradients' memory, which is free between steps.
    """
    forward = forward_bytes(costs, machine, num_layers, micro_batch)
    forward += _copied_end_bytes(costs, request, gradient_bytes)
    forward = max(forward, request.decoding_bytes)  # pictures are made of samples when the network has made these
    if machine.host is not None:
        return forward + micro_batch * (costs.batch_bytes_per_sample + request.sample_bytes)
    return forward + _grid_bytes(costs, request, micro_batch)


def _copied_end_bytes(costs: LayerCosts, request: PlanRequest, gradient_bytes: int) -> int:
    """Bytes of the copies of stem and readout that a preview holds while the stages between them are loaded in turn.

    See `inference.staged_weights`: what fits lies in the memory of the gradients, one tensor after the other.
    """
    if not request.method.one_network:
        return 0
    all_bytes = 4 * costs.parameters(0) - request.tied_bytes
    if request.method.grows:
        return all_bytes
    if all_bytes <= gradient_bytes:
        return 0
    # The stem comes first, and the gradients of its stage are longer than it is, where that is trained.
    return all_bytes - (4 * costs.parameters(0, "first") if request.trained is None else 0)


def _grid_bytes(costs: LayerCosts, request: PlanRequest, micro_batch: int) -> int:
    """Bytes of the samples that are made between visits, or of measuring the quality; texts that are written token by
    token, a micro-batch of them at a time, keep their keys and values."""
    written_bytes = min(request.grid_samples, micro_batch) * request.sample_bytes
    samples_bytes = SAMPLE_COPIES * request.grid_samples * costs.batch_bytes_per_sample + written_bytes
    return max(samples_bytes, request.quality_bytes)


def forward_bytes(costs: LayerCosts, machine: Machine, num_layers: int, micro_batch: int) -> int:
    """Bytes of a forward pass without gradients, with the gaps that the allocator leaves."""
    live = at_samples(costs.forward, micro_batch, lambda cost: cost.peak_bytes.at(num_layers))
    if machine.host is not None:
        return live + int(SEGMENTS_SHARE * live)
    return live + int(GAPS_SHARE["forward"] * heap_bytes_at(costs.forward, micro_batch, num_layers))
