"""A run's figures: losses against steps, validation against noise levels, memory against time."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from edgeblocks.report import page
from edgeblocks.report.facts import RunFacts
from edgeblocks.report.figures import Reference, Series, line_figure
from edgeblocks.runs.summary import LevelScores
from edgeblocks.tasks import TASKS

SCORES = {"accuracy": "share of tokens guessed right", "top1": "share of images classified right (top 1)"}
"""Figures of a noise level that families report besides the loss."""


def loss_figure(facts: RunFacts) -> Markup:
    """Training loss against steps, a line for each block."""
    count = facts.directory.method.trained_apart(len(facts.directory.file_layers))
    series = []
    for block in range(count):
        records = facts.of_block(block)
        label = "the whole network" if facts.directory.method.trained_together else f"block {block}"
        x, y = [record.step for record in records], [record.loss for record in records]
        if records:
            series.append(Series(label=label, x=x, y=y, smooth=True))
    order = "Block 0 has the highest noise. " if count > 1 else ""
    return line_figure(
        series,
        title="Training loss",
        x_label="steps of the network" if facts.directory.method.trained_together else "steps of the block",
        y_label="loss of a step's batch",
        log_y=_spans_a_decade(series),
        caption=f"{order}Faint: single steps; strong: their moving mean. Losses at different noise are not comparable."
        if count > 1
        else "Faint: single steps; strong: their moving mean.",
    )


def _spans_a_decade(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis shows more: all values are above zero, and their middle halves lie far apart."""
    values = sorted(value for one in series for value in one.y if math.isfinite(value))
    if not values or values[0] <= 0:
        return False
    return values[-1 - len(values) // 50] > 8 * values[len(values) // 50]


def validation_figures(facts: RunFacts) -> list[Markup]:
    """Validation loss, and each score of the family, against the noise level; none where there is one level only."""
    if facts.summary is None:
        return []
    count = len(facts.directory.file_layers)
    levels = [level for level in facts.summary.metrics.validation.levels if level.block < count]
    if len({level.sigma for level in levels}) < 2:
        return []
    scores = sorted({name for level in levels for name in level.scores})
    of_loss = _level_figure(facts, levels, "loss", title="Validation loss per noise level", y_label="validation loss")
    return [
        of_loss,
        *(
            _level_figure(
                facts, levels, name, title=f"Validation {name} per noise level", y_label=SCORES.get(name, name)
            )
            for name in scores
        ),
    ]


def quality_figures(facts: RunFacts) -> list[Markup]:
    """Quality on the way, where it was measured more than once."""
    marks = facts.directory.quality()
    if len(marks) < 2:
        return []
    measure = TASKS[facts.directory.family().task].measure.name
    return [
        line_figure(
            [Series(label=measure, x=[mark.step for mark in marks], y=[mark.value for mark in marks], marks=True)],
            title="Quality on the way",
            x_label="steps of the network" if facts.directory.method.trained_together else "steps of each block",
            y_label=measure,
            caption=f"{marks[-1].examples} examples of the hold-out part, EMA weights." if marks[-1].examples else "",
        )
    ]


def growth_figures(facts: RunFacts) -> list[Markup]:
    """Of a network that grows, its loss with each number of layers."""
    looks = facts.directory.growth()
    if not looks:
        return []
    series = []
    for layers in dict.fromkeys(look.layers for look in looks):
        own = [look for look in looks if look.layers == layers]
        label = f"{layers} layer{'' if layers == 1 else 's'}"
        series.append(Series(label=label, x=[look.step for look in own], y=[look.loss for look in own], marks=True))
    return [
        line_figure(
            series,
            title="While it grew",
            x_label="steps of the network",
            y_label="loss on hold-out examples",
            log_y=_spans_a_decade(series),
            caption="Looked at before layers were added, and in between where that decides when they are; EMA weights. "
            "With all layers: see the validation.",
        )
    ]


def _level_figure(facts: RunFacts, levels: Sequence[LevelScores], name: str, *, title: str, y_label: str) -> Markup:
    found = facts.summary.metrics.validation if facts.summary is not None else None
    series = []
    for block in sorted({level.block for level in levels}):
        own = sorted((level for level in levels if level.block == block), key=lambda level: level.sigma)
        y = [level.loss if name == "loss" else level.scores.get(name, float("nan")) for level in own]
        label = "the whole network" if facts.directory.method.trained_together else f"block {block}"
        series.append(Series(label=label, x=[level.sigma for level in own], y=y, marks=True))
    masked = facts.directory.family().task == "text"
    examples = "" if found is None or found.images is None else f"{found.images} examples"
    part = "" if found is None or not found.part else f" of the {found.part} part"
    return line_figure(
        series,
        title=title,
        x_label="share of tokens that is masked" if masked else "noise level sigma",
        y_label=y_label,
        x_unit="share" if masked else "number",
        y_unit="share" if name in SCORES else "number",
        log_x=not masked,
        log_y=name == "loss" and _spans_a_decade(series),
        caption=f"{examples}{part}, EMA weights; noise falls from right to left." if examples else "EMA weights.",
    )


def memory_figure(facts: RunFacts) -> Markup:
    """Memory against time, below the budget."""
    run = facts.directory
    points = sorted(
        (record.seconds, record.used_bytes)
        for record in facts.records
        if record.seconds is not None and record.used_bytes is not None
    )
    title = "Memory against the budget over time"
    if not points:
        reason = (
            "There are no records yet."
            if not facts.records
            else "The records of this run have no time and no memory: it was trained by an earlier edgeblocks. Its "
            "losses are shown against steps, its peak in the table above."
        )
        return page.card(title, reason)
    references = [Reference(label="budget", value=run.plan.budget_bytes)]
    if run.plan.predicted_peak_bytes is not None:
        references.append(Reference(label="predicted peak", value=run.plan.predicted_peak_bytes))
    if facts.summary is not None:
        peak = "measured peak since it was resumed" if facts.is_resumed else "measured peak"
        references.append(Reference(label=peak, value=facts.summary.peak_bytes))
    where = "device" if run.plan.is_beside_a_host else "process's resident"
    return line_figure(
        [Series(label="in use before a step", x=[seconds for seconds, _ in points], y=[used for _, used in points])],
        title=title,
        x_label="time of training",
        y_label=f"{where} memory",
        x_unit="seconds",
        y_unit="bytes",
        from_zero=True,
        references=references,
        caption="Measured before each step, so what a step takes for a moment is in the measured peak alone."
        + (" Time is that of the whole run; the budget is the one since it was resumed." if facts.is_resumed else ""),
    )
