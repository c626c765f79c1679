"""What stands above a run's page: the verdict, the few numbers that are looked for first, and remarks."""

from markupsafe import Markup

from edgeblocks.report import page
from edgeblocks.report.facts import RunFacts
from edgeblocks.runs.directory import SHARED_FOLDER
from edgeblocks.runs.summary import Summary
from edgeblocks.terminal import quoted
from edgeblocks.units import format_bytes, format_count, format_duration

_SCORES = {"accuracy": "tokens guessed right", "top1": "accuracy (top 1)"}


def headline(facts: RunFacts) -> Markup:
    """The verdict, the numbers that are looked for first, and remarks."""
    remarks = [*facts.doubts, *facts.directory.plan.warnings, *_begun_as_one(facts), *_machines(facts)]
    remarks += _memory_changes(facts)
    return Markup().join(
        [
            page.verdict(_verdict(facts), good=_is_good(facts)),
            page.tiles(_tiles(facts)),
            *([page.notes(remarks)] if remarks else []),
        ]
    )


def _begun_as_one(facts: RunFacts) -> list[str]:
    """Where the records of the first phase are."""
    run = facts.directory
    if run.shared_by is not None:
        return [f"This is the denoiser that the {run.shared_by.blocks} blocks of {run.path.parent} begin as."]
    if not run.shared_steps:
        return []
    return [
        f"The blocks began as one denoiser of {run.file_layers[0]} layers, which learned all noise levels instead of "
        f"each block's first {run.shared_steps:,} steps; its own report: edgeblocks report "
        f"{quoted(run.path / SHARED_FOLDER)}."
    ]


def _machines(facts: RunFacts) -> list[str]:
    """Who trained what, where that was not one machine."""
    spans = facts.summary.trained_on if facts.summary is not None else []
    if len({span.machine for span in spans}) < 2:
        return []
    return [f"Trained on several machines: {', '.join(f'block {span.block} {span.words()}' for span in spans)}."]


def _is_good(facts: RunFacts) -> bool:
    budget_bytes = facts.directory.plan.budget_bytes
    return facts.summary is not None and facts.summary.peak_bytes <= (facts.summary.budget_bytes or budget_bytes)


def _verdict(facts: RunFacts) -> str:
    """Finished inside its budget, or how far it is."""
    run, wanted = facts.directory, f"{facts.num_steps:,}"
    count = len(run.file_layers)
    what = "each block" if count > 1 else "the block"
    if run.method.trained_together:
        what = "the network, from the bottom up," if run.method.grows and count > 1 else "the network, end to end,"
    if facts.summary is not None:
        budget_bytes = facts.summary.budget_bytes or run.plan.budget_bytes
        peak, budget = format_bytes(facts.summary.peak_bytes), format_bytes(budget_bytes)
        peak += " since it was resumed" if facts.is_resumed else ""
        if facts.summary.peak_bytes <= budget_bytes:
            return f"Finished: {what} made {wanted} steps; peak memory {peak}, inside the budget of {budget}"
        return f"Finished, over its budget: {what} made {wanted} steps; peak memory {peak}, the budget was {budget}"
    if min(facts.steps) >= facts.num_steps:
        return f"Not finished: {what} made {wanted} steps, the evaluation at the end is missing"
    if run.method.trained_together or len(set(facts.steps)) == 1:
        return f"Not finished: saved at step {facts.steps[0]:,} of {wanted}"
    steps = ", ".join(f"{step:,}" for step in facts.steps)
    return f"Not finished: the blocks are saved at steps {steps} of {wanted}"


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    run, summary = facts.directory, facts.summary
    parameters = run.plan.parameters
    count, unit = len(run.file_layers), facts.unit
    network = (
        "network",
        f"{count} {unit}{'s' if count > 1 else ''}",
        f"{sum(run.file_layers)} layers" + ("" if parameters is None else f", {format_count(parameters)} parameters"),
    )
    if summary is None:
        trained_s = _trained_s(facts)
        time = [] if trained_s is None else [("trained so far", format_duration(trained_s), "")]
        return [network, _progress_tile(facts), *time]
    budget_bytes = summary.budget_bytes or run.plan.budget_bytes
    share = f"{summary.peak_bytes / budget_bytes:.0%} of {format_bytes(budget_bytes)}"
    return [
        network,
        ("peak memory", format_bytes(summary.peak_bytes), share),
        *_quality_tiles(summary),
        *_time_tiles(facts, summary),
    ]


def _progress_tile(facts: RunFacts) -> tuple[str, str, str]:
    """Of an unfinished run, counted over all blocks, which may be at different steps."""
    done, wanted, unit = sum(facts.steps), facts.num_steps * len(facts.steps), "block steps"
    if facts.directory.method.trained_together:
        done, wanted, unit = facts.steps[0], facts.num_steps, "steps"
    return ("saved so far", f"{done / wanted:.0%}", f"{done:,} of {wanted:,} {unit}")


def _quality_tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """The validation loss, and what says more of the family's task."""
    found = summary.metrics.validation
    error = "" if found.standard_error is None else f"± {found.standard_error:.2g}"
    tiles = [("validation loss", f"{summary.metrics.validation_loss:.4g}", error)]
    text = summary.metrics.text
    if text is not None:
        error = "" if text.bits_per_character_error is None else f"± {text.bits_per_character_error:.3f}, "
        tiles.append(("bits a character", f"{text.bits_per_character:.3f}", f"{error}at most"))
    names = {name for level in found.levels for name in level.scores}
    if len(found.levels) > 1:
        names.discard("top1")  # a block is shown the noised right class, so its mean is not how good the chain is
    for name in sorted(names):
        of_levels = [(level.share, level.scores.get(name)) for level in found.levels]
        whole = sum(share or 0.0 for share, _ in of_levels)
        if whole > 0:
            mean = sum((share or 0.0) * (score or 0.0) for share, score in of_levels) / whole
            where = "" if len(of_levels) == 1 else "mean over noise levels"
            tiles.append((_SCORES.get(name, name), f"{mean:.1%}", where))
    return tiles


def _time_tiles(facts: RunFacts, summary: Summary) -> list[tuple[str, str, str]]:
    """Of the whole run where the records tell it, else since it was resumed last."""
    per_s = summary.images_or_tokens_per_s
    unit = "images" if facts.directory.tokenizer is None else "tokens"
    speed = "" if per_s is None else f"{format_count(per_s)} {unit} a second"
    trained_s = _trained_s(facts)
    if facts.is_resumed and trained_s is not None:
        return [("time of training", format_duration(trained_s), speed and f"{speed} at the end")]
    if summary.seconds is None:
        return []
    name = "time since it was resumed" if facts.is_resumed else "time in all"
    return [(name, format_duration(summary.seconds), speed)]


def _trained_s(facts: RunFacts) -> float | None:
    """Of the last record that has it."""
    return max((record.seconds for record in facts.records if record.seconds is not None), default=None)


def _memory_changes(facts: RunFacts) -> list[str]:
    """What the run did to stay inside its budget."""
    changes = facts.summary.memory_changes if facts.summary is not None else []
    return [
        f"To stay inside the budget the micro-batch became {change.micro_batch}, with activation checkpointing "
        f"{'on' if change.checkpointing else 'off'}."
        for change in changes
    ]
