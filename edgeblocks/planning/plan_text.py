"""A plan in words: what is printed before training, and the table of candidates."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeblocks.planning.plans import DAY_S, shared_steps
from edgeblocks.planning.windows import last_steps, latest_steps
from edgeblocks.settings.fields import share_of
from edgeblocks.terminal import one_line
from edgeblocks.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from edgeblocks.planning.plans import Candidate, Correction, Plan
    from edgeblocks.prepare import Prepared

AGAIN_BYTES = 5_000_000
"""By which planning with the other method may pass the first one's peak."""
MUCH_WAITING = 0.2
"""The share of a measurement in which other programs had the processor from which on a plan says so."""


def banner(prepared: "Prepared") -> str:
    """What will be trained, and how it fits the budget."""
    run, data, plan = prepared.settings.run, prepared.data_set, prepared.plan
    chosen = plan.chosen
    method, unit = plan.method, plan.method.part
    lines = [
        f"edgeblocks: {_network(prepared)}, {format_count(plan.parameters)} parameters in "
        f"{method.parts(chosen.blocks)} "
        f"of {'/'.join(str(count) for count in sorted(set(plan.layers), reverse=True))} "
        f"layer{'' if set(plan.layers) == {1} else 's'}"
        f"{_how_trained(plan)}",
        f"data: {one_line(data.source)}, {one_line(data.describe())}",
        *([] if prepared.profile is None else [f"machine: {prepared.profile.name}, {prepared.profile.description}"]),
        f"plan: batch {run.batch}{_in_parts(chosen)}, "
        f"checkpointing {'on' if chosen.checkpointing else 'off'}, {run.optimizer}, {plan.precision}, "
        f"{'weights in bf16, ' if plan.master == 'bf16' else ''}"
        + (
            f"saved every {chosen.visit_steps} steps, {_where(chosen, unit)}"
            if method.trained_together
            else f"visits of {chosen.visit_steps} steps, {_where(chosen, unit)}"
        ),
        *_shared_lines(prepared),
        *_window_lines(prepared),
        prepared.reason,
        *_memory_lines(plan),
        *_planning_lines(plan),
        _time_line(prepared),
        _disk_line(plan),
    ]
    return "\n".join([*lines, *(f"note: {one_line(warning)}" for warning in plan.warnings)])


def _network(prepared: "Prepared") -> str:
    """What is trained: a preset, or the folder of a pretrained model."""
    run, family = prepared.settings.run, prepared.settings.family
    model, rank = getattr(family, "model", ""), getattr(family, "lora_rank", None)
    if not model:
        return f"{run.family} {run.preset}"
    beside = "" if rank is None else f"LoRA of rank {rank} beside "
    read = "" if rank is None else f", read {'as they are' if family.quantize == 'none' else f'as {family.quantize}'}"
    return f"{beside}the layers of {one_line(Path(model).name)}{read}"


def _shared_lines(prepared: "Prepared") -> list[str]:
    """How blocks that begin as one are trained."""
    run, blocks = prepared.settings.run, prepared.plan.chosen.blocks
    steps = shared_steps(share_of(run), steps=run.steps, blocks=blocks)
    if not steps:
        return []
    return [
        f"begun as one: one block's layers learn all noise levels for {blocks * steps} steps, then each of {blocks} "
        f"blocks begins as that and makes {run.steps - steps} steps of its own"
    ]


def _window_lines(prepared: "Prepared") -> list[str]:
    """How a network that grows is trained."""
    plan = prepared.plan
    if not plan.method.grows or len(plan.layers) == 1:
        return []
    up, window, count = plan.layers[0], plan.layers[-1], len(plan.layers)
    new = "the lowest of them is frozen and a new one comes" if up == 1 else f"{up} are frozen and {up} new ones come"
    when = f"after {last_steps(plan.steps, count)[0]} steps each time"
    if prepared.settings.run.grow == "auto":
        ends = latest_steps(plan.steps, count)
        when = f"when its loss has flattened, after step {ends[0]} at the latest,"
    return [
        f"greedy: {window} layer{'' if window == 1 else 's'} trained at a time, from the bottom up over frozen ones; "
        f"{when} {new} on top"
    ]


def in_fp32(plan: "Plan", single: "Plan | None") -> str:
    """What half precision buys, beside the plan that the same request gives in float32; None where nothing fits."""
    gain = plan.machine.half_gain
    speed = "" if gain is None else f"; the smallest block takes {1 / gain:.2f} of its time in fp32, measured"
    if single is None:
        return f"in fp32 instead: nothing fits the budget{speed}"
    activations = format_bytes(single.chosen.breakdown["activations"])
    return (
        f"in fp32 instead: {single.method.parts(single.chosen.blocks)}, a batch{_in_parts(single.chosen)}, "
        f"activations {activations}{speed}"
    )


def _in_parts(chosen: "Candidate") -> str:
    """How a batch goes through a block."""
    if chosen.accumulation == 1:
        return " at once"
    return f" in {chosen.accumulation} micro-batches of {chosen.micro_batch}"


def _how_trained(plan: "Plan") -> str:
    """What follows the number of stages."""
    if not plan.method.trained_together or plan.method.grows:
        return ""
    if plan.trained is None or len(plan.trained) == plan.chosen.blocks:
        return ", trained end to end"
    return f", of which {', '.join(map(str, plan.trained))} (the first is 0) trained end to end, the others frozen"


def _where(chosen: "Candidate", unit: str) -> str:
    """Where blocks or stages are between their uses."""
    moving = " (one trained, one on its way)" if chosen.slots > 1 else ""
    tiers = chosen.tiers
    if "device" in tiers:
        if not tiers["ram"] and not tiers["disk"]:
            return f"all {unit}s stay on the device"
        places = f"{chosen.slots} of {chosen.blocks} {unit}s at a time on the device{moving}"
        names = {"ram": "in RAM", "disk": "on disk"}
        offloaded = [f"{_numbers(tiers[tier], unit)} {name}" for tier, name in names.items() if tiers[tier]]
        return f"{places}, between {'their uses' if unit == 'stage' else 'visits'} {' and '.join(offloaded)}"
    if not tiers["disk"]:
        return f"all {unit}s stay in memory"
    at_a_time = {
        "part": f"trained layers stay in memory, frozen ones on disk, {chosen.slots - 1} of their parts in memory",
        "stage": f"{chosen.slots} of {chosen.blocks} stages in memory at a time, the others on disk",
    }
    if unit in at_a_time:
        return at_a_time[unit]
    if not tiers["ram"]:
        return f"blocks on disk, {chosen.slots} in memory{moving}"
    in_memory, on_disk = (_numbers(tiers[tier], unit) for tier in ("ram", "disk"))
    return f"{in_memory} in memory, {on_disk} on disk, two of them in memory{moving}"


def _numbers(blocks: Sequence[int], unit: str) -> str:
    """Consecutive blocks in words.

    >>> _numbers([2], "block"), _numbers([0, 1, 2], "block")
    ('block 2', 'blocks 0-2')
    """
    return f"{unit} {blocks[0]}" if len(blocks) == 1 else f"{unit}s {blocks[0]}-{blocks[-1]}"


def _memory_lines(plan: "Plan") -> list[str]:
    """Predicted peak, budget and parts; the device's and the host's where these are two."""
    chosen = plan.chosen
    memories = [("memory", chosen.breakdown, plan.budget_bytes)]
    if plan.ram_budget_bytes is not None:
        memories = [
            ("device memory", chosen.breakdown, plan.budget_bytes),
            ("host memory", chosen.host_breakdown, plan.ram_budget_bytes),
        ]
    return [
        f"{name}: predicted peak {format_bytes(sum(breakdown.values()))} of {format_bytes(budget_bytes)} "
        f"({', '.join(f'{part} {format_bytes(size)}' for part, size in breakdown.items() if size)})"
        for name, breakdown, budget_bytes in memories
    ]


def _planning_lines(plan: "Plan") -> list[str]:
    """What planning takes in all its processes, where one of them traced the network's costs."""
    machine = plan.machine
    if not machine.planning_together_bytes:
        return []
    # A wide layer that is timed takes more in one process than tracing does in two; it is only timed inside the budget.
    most_bytes = max(machine.planning_together_bytes, machine.planning_bytes + AGAIN_BYTES)
    return [
        f"while planning: two processes, together up to {format_bytes(most_bytes)}; the second ends before training"
    ]


def _time_line(prepared: "Prepared") -> str:
    """What to expect by what was measured here, or a bound from the speeds of a profile."""
    plan, steps = prepared.plan, prepared.settings.run.steps
    least, most = map(format_duration, prepared.whole_range_s)
    written = format_bytes(plan.chosen.bytes_written)
    looking_s = prepared.whole_s - plan.predicted_s
    looking = f"{format_duration(looking_s)} of it for samples and evaluation, " if looking_s >= 1 else ""
    which = f"{steps} steps" if plan.method.trained_together else f"{steps} steps of each block"
    streamed = plan.chosen.slots < plan.chosen.blocks
    moving = f"{plan.stall_share:.1%} of it moving {plan.method.part}s, " if streamed else ""
    if prepared.profile is None:
        why = _why_that_long(plan.machine.correction)
        return f"time: about {least} to {most} here for {which}{why}, {looking}{moving}about {written} written to disk"
    total = format_duration(prepared.whole_s)
    step = format_duration(plan.chosen.step_s + plan.chosen.streaming_s)
    return (
        f"time: at most about {step} a step, {total} for {which} (a bound from the profile's "
        f"sustained speeds, not a measurement), {looking}{moving}about {written} written to disk"
    )


def _why_that_long(correction: "Correction") -> str:
    """What a time rests on, where that is no usual measurement."""
    if correction.origin == "run":
        return " (as steps took in a run on this machine)"
    if correction.waited >= MUCH_WAITING:
        return (
            f" (so uncertain because other programs had the processor for {correction.waited:.0%} of the measurement)"
        )
    return ""


def _disk_line(plan: "Plan") -> str:
    """Bytes on disk, and bytes written a day, which wear it."""
    # Besides the files of all blocks: those being written, and scratch files.
    spare = "the one they begin as, and one being written" if plan.begins_as_one else "and one being written"
    if plan.method.trained_together:
        spare = "and a second copy while they are saved" + (", and scratch files" if plan.chosen.tier == "disk" else "")
    shorter = " (in all: the run takes less)" if plan.predicted_s < DAY_S else ""
    return (
        f"on disk: {format_bytes(plan.chosen.disk_bytes)} (every {plan.method.part}, {spare}); about "
        f"{format_bytes(plan.written_a_day_bytes)} written a day{shorter}"
    )


def plan_table(prepared: "Prepared") -> str:
    """The candidates, one line each; the chosen one is marked. Memory is in MB."""
    parts = {"runtime": "runtime", "weights": "weights", "gradients": "grads", "optimizer": "optim", "ema": "ema"}
    parts |= {
        "frozen": "frozen",
        "activations": "activ",
        "boundaries": "bound",
        "data": "data",
        "evaluation": "eval",
        "slack": "slack",
        "planning": "planning",
    }
    rows_with = {part for row in prepared.plan.candidates for part, size in row.breakdown.items() if size}
    parts = {part: title for part, title in parts.items() if part in rows_with}
    with_host = prepared.machine.host is not None
    on_device = ["on device", "in RAM"] if with_host else ["in memory"]
    rows = [
        ["", "blocks", "layers", "micro-batch", "ckpt", *on_device, "visit", "fits", "peak MB", "=", *parts.values()]
    ]
    method = prepared.plan.method
    rows[0][1] = f"{method.part}s"
    if method.trained_together:
        rows[0][rows[0].index("visit")] = "saved"
    rows[0] += [*(["host MB"] if with_host else []), "step", "written"]
    for row in prepared.plan.candidates:
        rows.append(
            [
                "->" if row is prepared.plan.chosen else "",
                str(row.blocks),
                str(row.layers_per_block),
                f"{row.micro_batch} (x{row.accumulation})",
                "on" if row.checkpointing else "off",
                "all" if row.slots >= row.blocks else f"{row.slots} of {row.blocks}",
                *([str(row.ram_blocks)] if with_host else []),
                str(row.visit_steps),
                "yes" if row.fits else "no",
                f"{row.predicted_peak_bytes / 1e6:.0f}",
                "",
                *(f"{row.breakdown[part] / 1e6:.0f}" for part in parts),
                *([f"{row.predicted_host_peak_bytes / 1e6:.0f}"] if with_host else []),
                format_duration(row.step_s),
                format_bytes(row.bytes_written),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)
