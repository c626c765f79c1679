"""How long visits are, and what they cost: seconds of a step with its share of moving, bytes on disk and written."""

import math
from dataclasses import dataclass

from edgeblocks.planning.plans import Cut, PlanRequest, kept_blocks, streaming_share, trained_stages
from edgeblocks.planning.step_times import predicted_step_s, staged_step, window_step
from edgeblocks.planning.windows import look_steps

STREAMING_SHARE = 0.02
"""Loading and storing may take this share of a visit."""
USUAL_VISIT_S = 300.0
"""A visit is the most that a power cut can undo; shorter ones write more to the disk."""
FEWEST_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a candidate's steps and visits are, and what it asks of the disk; see `Candidate`."""

    visit_steps: int
    step_s: float
    streaming_s: float
    disk_bytes: int
    bytes_written: int


def pace_of_blocks(cut: Cut, ram_blocks: int) -> Pace:
    """Of blocks that are trained alone: every visit writes one, and brings one unless it is in memory anyway."""
    request, step_s = cut.request, predicted_step_s(cut)
    load_s, store_s = _moving_s(cut, ram_blocks)
    round_bytes = cut.blocks * cut.block_bytes
    visit_steps = request.visit_steps or _visit_steps(
        request, step_s, load_s + store_s, most_rounds=_most_rounds(request, round_bytes)
    )
    return Pace(
        visit_steps=visit_steps,
        step_s=step_s,
        streaming_s=streaming_share(cut.slots) * (load_s + store_s) / visit_steps,
        # A block's new file is complete before it replaces the former one.
        disk_bytes=round_bytes + cut.block_bytes * (2 if request.shared else 1),
        # One round more: the files that the run is created with.
        bytes_written=round_bytes * (math.ceil(request.steps / visit_steps) + 1),
    )


def pace_of_stages(cut: Cut, ram_blocks: int) -> Pace:
    """Of stages that are trained together: every step moves some, a checkpoint writes all that are trained.

    Beside a host, those that live in its memory are moved without the disk.

    Frozen stages have no optimizer state and are written once, when the run is created.
    """
    request, step = cut.request, staged_step(cut, ram_blocks)
    trained = sum(trained_stages(request.trained, cut.blocks))
    saved_bytes = trained * cut.block_bytes
    # Of a frozen stage weights and EMA.
    files_bytes = saved_bytes + (cut.blocks - trained) * (cut.weights_bytes + cut.ema_bytes)
    usual = min(
        math.ceil(USUAL_VISIT_S / (step.step_s + step.stall_s)), math.ceil(request.steps / max(request.previews, 1))
    )
    visit_steps = request.visit_steps or max(1, usual)
    _, store_s = _moving_s(cut, ram_blocks)
    return Pace(
        visit_steps=visit_steps,
        step_s=step.step_s,
        streaming_s=step.stall_s + streaming_share(cut.slots) * trained * store_s / visit_steps,
        # A checkpoint's new files lie beside the former ones until all are complete, and the swap file beside both.
        disk_bytes=files_bytes + saved_bytes + step.offloaded_bytes,
        bytes_written=files_bytes
        + saved_bytes * math.ceil(request.steps / visit_steps)
        + step.offloaded_bytes * request.steps,
    )


def pace_of_windows(cut: Cut, ram_blocks: int) -> Pace:
    """Of a network that grows, on average over its windows: a step trains one of them, over the frozen layers below it.

    After a visit the window's file is written; when it has moved up, the files of all parts so far.
    """
    request, frozen_bytes = cut.request, cut.frozen_file_bytes
    step_s, stall_s = window_step(cut, ram_blocks)
    _, store_s = _moving_s(cut, ram_blocks)
    below = range(cut.blocks)  # parts below each window
    windows_bytes = sum(count * frozen_bytes + cut.block_bytes for count in below)
    usual = min(math.ceil(USUAL_VISIT_S / (step_s + stall_s)), math.ceil(request.steps / max(request.previews, 1)))
    visit_steps = request.visit_steps or max(1, usual)
    whole_bytes = (cut.blocks - 1) * frozen_bytes + cut.block_bytes
    saves = math.ceil(request.steps / visit_steps)
    if request.grow == "auto" and cut.blocks > 1:  # before each look it is saved, too
        saves += request.steps // look_steps(request.steps, cut.blocks)
    return Pace(
        visit_steps=visit_steps,
        step_s=step_s,
        streaming_s=stall_s + streaming_share(2) * store_s / visit_steps,
        # The network before it grew is there until the files of the grown one are complete.
        disk_bytes=whole_bytes + cut.block_bytes + max(0, whole_bytes - frozen_bytes) * (cut.blocks > 1),
        bytes_written=windows_bytes + cut.block_bytes * saves,
    )


def _moving_s(cut: Cut, ram_blocks: int) -> tuple[float, float]:
    """Seconds of loading a block for a visit, on average over the blocks, and of storing it after the visit.

    Beside a host, a block passes the link, and comes from disk before unless it lives in RAM. Wherever it lives it is
    written to disk after every visit: what is only in memory would be lost with the power.
    """
    machine, blocks, block_bytes = cut.machine, cut.blocks, cut.block_bytes
    read_s = block_bytes * (1 / machine.disk_read_bytes_per_s + machine.checksum_s_per_byte)
    store_s = block_bytes * (1 / machine.disk_write_bytes_per_s + machine.checksum_s_per_byte)
    if machine.host is None:
        streamed = 1 - kept_blocks(blocks, cut.slots) / blocks
        return streamed * read_s, store_s
    link_s = block_bytes / machine.host.link_bytes_per_s
    if cut.slots >= blocks:
        return 0.0, link_s + store_s
    return link_s + (1 - ram_blocks / blocks) * read_s, link_s + store_s


def _most_rounds(request: PlanRequest, round_bytes: int) -> int:
    """Rounds over all blocks that the user's limit of disk writes allows, after the one that creates them."""
    if request.max_disk_writes is None:
        return request.steps
    return max(1, request.max_disk_writes // round_bytes - 1)


def _visit_steps(request: PlanRequest, step_s: float, streaming_s: float, *, most_rounds: int) -> int:
    """Long enough that streaming stays below its share; else some minutes, but several rounds over all blocks."""
    steps, rounds = request.steps, max(FEWEST_ROUNDS, request.previews)
    needed = max(math.ceil(streaming_s / (STREAMING_SHARE * step_s)), math.ceil(steps / most_rounds))
    pleasant = min(math.ceil(USUAL_VISIT_S / step_s), math.ceil(steps / rounds))
    return max(1, min(max(needed, pleasant), steps))
