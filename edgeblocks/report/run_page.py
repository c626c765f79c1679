"""The page of one run: its sections in order."""

from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from edgeblocks.report import page
from edgeblocks.report.curves import growth_figures, loss_figure, memory_figure, quality_figures, validation_figures
from edgeblocks.report.facts import RunFacts
from edgeblocks.report.headline import headline
from edgeblocks.report.page import Section
from edgeblocks.report.planning import block_table, breakdown_bars, plan_table, time_bar
from edgeblocks.report.previews import previews_piece, read_previews
from edgeblocks.report.surroundings import environment_table, settings_table


def run_page(facts: RunFacts) -> str:
    """The HTML report of a run."""
    run = facts.directory
    name = Path(run.data_source).name or run.data_source
    return page.render(
        f"{run.settings.run.family} on {name}",
        _sections(facts),
        kind=f"edgeblocks: the run {run.path.resolve().name}",
        lead=headline(facts),
        footer=f"Made by edgeblocks {metadata.version('edgeblocks')} on {datetime.now(UTC):%d %B %Y, %H:%M} UTC from "
        f"the run {run.run_id[:12]}.",
    )


def _sections(facts: RunFacts) -> list[Section]:
    figures = [loss_figure(facts), *growth_figures(facts), *quality_figures(facts), *validation_figures(facts)]
    blocks = block_table(facts, wide=len(figures) % 2 == 0)
    return [
        Section(title="Plan against measured", pieces=[plan_table(facts), *breakdown_bars(facts)]),
        Section(title="Training", pieces=[*figures, *blocks]),
        Section(title="Memory and time", pieces=[memory_figure(facts), time_bar(facts)]),
        *([] if facts.directory.family().task == "classes" else [_samples(facts)]),
        Section(title="Settings", pieces=[settings_table(facts)], wide=True, folded=True),
        Section(title="Data and environment", pieces=[environment_table(facts)], wide=True, folded=True),
    ]


def _samples(facts: RunFacts) -> Section:
    """What the run made while it was trained, as far as it is to be seen."""
    previews, remarks = read_previews(facts.directory.path / "samples")
    pieces = [previews_piece(previews)] if previews else []
    if not previews and not remarks:
        remarks = ["The run has made no samples" + (" yet." if facts.summary is None else ".")]
    note = "The same noise each time, EMA weights; the newest first. " if previews else ""
    return Section(title="Samples over training", pieces=pieces, wide=True, note=note + " ".join(remarks))
