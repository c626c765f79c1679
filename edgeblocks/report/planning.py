"""What was planned against what was measured: memory and its parts, a step's time, the disk, the blocks."""

from collections.abc import Callable

from markupsafe import Markup

from edgeblocks.report import page
from edgeblocks.report.bars import Part, stacked_bar
from edgeblocks.report.facts import RunFacts
from edgeblocks.runs.summary import Summary
from edgeblocks.units import format_bytes, format_duration, parse_size

_MOST_OF_HALF_A_ROW = 4
"""Columns of numbers; more take the whole width."""
_NOTHING = "\N{EN DASH}"
_MOST_OF_HALF_A_ROW = 4
"""Columns of numbers; more take the whole width."""
_PARTS = {
    "runtime": "interpreter and libraries",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "ema": "moving average of weights",
    "activations": "activations",
    "boundaries": "activations between stages",
    "data": "data",
    "evaluation": "evaluation and samples",
    "slack": "allocator's gaps",
    "planning": "planning, before the start",
    "frozen": "frozen layers",
}
"""The items of plan.json's breakdown in words; one that is not here is shown by its own name."""


def plan_table(facts: RunFacts) -> Markup:
    """Predicted against measured; of a run that is not finished, what is known so far."""
    run, summary, plan = facts.directory, facts.summary, facts.directory.plan
    chosen = plan.chosen
    highest = max((record.used_bytes for record in facts.records if record.used_bytes is not None), default=None)
    peak = highest if summary is None else summary.peak_bytes
    memory = "peak memory" if summary is not None else "memory so far"
    rows = [_row(memory, plan.predicted_peak_bytes, peak, format_bytes, limit=plan.budget_bytes)]
    if plan.is_beside_a_host:
        host, limit = None if summary is None else summary.ram_peak_bytes, plan.ram_budget_bytes
        rows.append(_row("peak of the host", plan.predicted_host_peak_bytes, host, format_bytes, limit=limit))
    step = "step" if run.method.trained_together else "step of a block"
    rows.append(_row(step, plan.predicted_step_s, _step_s(facts), format_duration))
    planned, allowed = None if chosen is None else chosen.bytes_written, run.settings.run.max_disk_writes
    limit = None if allowed is None else parse_size(allowed)
    rows.append(_row("written to disk", planned, facts.bytes_written, format_bytes, limit=limit))
    if summary is not None:
        rows.append(_row("on disk", None if chosen is None else chosen.disk_bytes, summary.disk_bytes, format_bytes))
    return page.table(["", "predicted", "measured", "ratio", "budget"], rows, caption=_conditions(facts))


def _row(
    name: str,
    predicted: float | None,
    measured: float | None,
    write: Callable[[float], str],
    *,
    limit: float | None = None,
) -> list[str]:
    def written(value: float | None) -> str:
        return _NOTHING if value is None else write(value)

    ratio = f"{measured / predicted:.2f}" if predicted and measured is not None else _NOTHING
    return [name, written(predicted), written(measured), ratio, written(limit)]


def _step_s(facts: RunFacts) -> float | None:
    """The mean of all steps, or the median of those that there are records of."""
    if facts.summary is not None:
        return facts.summary.step_s
    speeds = sorted(record.examples_per_s for record in facts.records if record.examples_per_s)
    return facts.directory.settings.run.batch / speeds[len(speeds) // 2] if speeds else None


def _conditions(facts: RunFacts) -> str:
    run = facts.directory
    plan, batch, count = run.plan, run.settings.run.batch, len(run.file_layers)
    parts = [
        f"Batch {batch} in micro-batches of {plan.micro_batch}",
        f"{run.settings.run.optimizer}",
        *([] if plan.checkpointing is None else [f"checkpointing {'on' if plan.checkpointing else 'off'}"]),
        f"all {facts.unit}s in memory" if plan.slots >= count else f"{plan.slots} of {count} {facts.unit}s in memory",
    ]
    more = ""
    if facts.summary is None:
        more = " Not finished: memory is the largest amount before a step, a step's time the median of those recorded."
    elif facts.is_resumed:
        more = " Resumed: memory and times are measured since then, what was written is of the whole run."
    if plan.chosen is not None and plan.chosen.disk_bytes is not None and facts.summary is not None:
        more += " The prediction for the disk holds what is there for a moment while files are written."
    return f"{', '.join(parts)}.{more}"


def breakdown_bars(facts: RunFacts) -> list[Markup]:
    """The predicted peak in parts, up to the budget; the host's, too, where a device has its own memory."""
    plan, bars = facts.directory.plan, []
    if plan.breakdown:
        bars.append(_breakdown_bar("Predicted peak, in parts", plan.breakdown, plan.budget_bytes))
    if plan.host_breakdown and plan.ram_budget_bytes:
        title = "Predicted peak of the host, in parts"
        bars.append(_breakdown_bar(title, plan.host_breakdown, plan.ram_budget_bytes))
    return bars


def _breakdown_bar(title: str, breakdown: dict[str, int], budget_bytes: int) -> Markup:
    parts = [
        Part(label=_PARTS.get(name, name), value=size, quiet=name == "runtime") for name, size in breakdown.items()
    ]
    left = budget_bytes - sum(breakdown.values())
    return stacked_bar(
        [*parts, Part(label="left of the budget", value=left, free=True)],
        title=title,
        write=format_bytes,
        caption=f"As the plan itemises it; the whole bar is the budget, {format_bytes(budget_bytes)}.",
    )


def time_bar(facts: RunFacts) -> Markup:
    """How the time was spent. Reading and writing go on during the computing, so they are words and no parts."""
    title, summary = "Time", facts.summary
    if summary is None or not summary.time_split:
        return page.card(title, "How the time was spent is known when the run is finished.")
    labels = {"stall": f"stall: waiting for {facts.unit}s", "other": "other: starting, saving"}
    parts = [Part(label=labels.get(name, name), value=value) for name, value in summary.shares_of_time.items()]
    split = summary.time_split
    moving = (
        f"Reading {facts.unit}s (load) took {format_duration(split.get('load', 0.0))} and writing them (store) "
        f"{format_duration(split.get('store', 0.0))}, at the same time as the computing, apart from the stall."
    )
    of = " Measured since the run was resumed." if facts.is_resumed else ""
    return stacked_bar(parts, title=title, write=format_duration, caption=moving + of)


def block_table(facts: RunFacts, *, wide: bool) -> list[Markup]:
    """A line for each block: where it works, how far it is, and how good; of stages, which are one network, the scores.

    Args:
        wide: whether it stands alone in its row.
    """
    run, summary = facts.directory, facts.summary
    if run.method.one_network:
        return [] if summary is None else [_score_table(summary, wide=wide)]
    rows = []
    for block, (layers, noise) in enumerate(zip(run.file_layers, run.partition.ranges, strict=True)):
        row = [str(block), f"{noise.low:.3g} to {noise.high:.3g}", str(layers), f"{facts.steps[block]:,}"]
        if summary is not None:
            row.append(_loss_at(summary.metrics.train_loss_by_block, block))
            row.append(_loss_at(summary.metrics.validation_loss_by_block, block))
        rows.append(row)
    head = ["block", "share masked" if run.family().task == "text" else "sigma", "layers", "steps"]
    caption = "Not finished: no validation yet."
    if summary is not None:
        head += ["training loss", "validation loss"]
        caption = (
            "Training loss: running mean at the end. Validation loss: EMA weights, mean over a block's noise levels."
        )
    return [page.table(head, rows, caption=caption, wide=wide or len(head) > _MOST_OF_HALF_A_ROW)]


def _score_table(summary: Summary, *, wide: bool) -> Markup:
    found, text = summary.metrics.validation, summary.metrics.text
    rows = [["validation loss", _with_error(summary.metrics.validation_loss, found.standard_error)]]
    if len(found.levels) == 1:
        rows += [[f"validation {name}", f"{value:.1%}"] for name, value in found.levels[0].scores.items()]
    if text is not None:
        rows.append(["bits a character", _with_error(text.bits_per_character, text.bits_per_character_error)])
        rows.append(["bits a token", f"{text.bits_per_token:.4g}"])
    examples = "" if found.images is None else f"{found.images} examples of the {found.part} part, "
    return page.table(
        ["", "after training"], rows, caption=f"{examples}EMA weights; ± is the standard error.", wide=wide
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _loss_at(values: list[float | None], block: int) -> str:
    value = values[block] if block < len(values) else None
    return _NOTHING if value is None else f"{value:.4g}"
