"""What a result depends on: the settings, the data, the machine and the versions."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from markupsafe import Markup

from edgeblocks.report import page
from edgeblocks.report.facts import RunFacts

_MOST_CHARACTERS = 400
_MOST_ROWS = 200
_OF_DATA = {"images": ("image_size", "vae"), "text": ("tokenizer", "vocab", "length")}
"""Settings that only one kind of data has."""


def settings_table(facts: RunFacts) -> Markup:
    """Every setting that the run's kind of data has, with its value."""
    settings = facts.directory.settings
    values = {**settings.run.model_dump(), **asdict(settings.family)}
    others = {name for kind, names in _OF_DATA.items() if kind != facts.directory.family().reads for name in names}
    return page.table([], [[name, _readable(value)] for name, value in values.items() if name not in others])


def environment_table(facts: RunFacts) -> Markup:
    """The data, and what env.json and plan.json say of the machine."""
    run = facts.directory
    values = {
        "data": run.data_source,
        "fingerprint of the data": run.data_fingerprint,
        **{f"data: {name}": value for name, value in asdict(run.data).items() if value is not None},
        **({"classes": ", ".join(run.class_names)} if run.class_names else {}),
        **({"tokenizer": run.tokenizer.kind} if run.tokenizer is not None else {}),
        "run": run.run_id,
        **facts.environment,
        "machine": run.plan.machine,
    }
    leave_out = {"sha256", "run_id"}
    return values_table({name: value for name, value in values.items() if name not in leave_out})


def values_table(values: Mapping[str, object]) -> Markup:
    """Names and values; what lies in a value has its name behind."""
    rows = [[name, value] for name, value in _flat(values)]
    more = f"The first {_MOST_ROWS} of {len(rows)} values." if len(rows) > _MOST_ROWS else ""
    return page.table([], rows[:_MOST_ROWS], caption=more)


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}: ")
        elif value is not None:
            yield _readable(f"{prefix}{name}"), _readable(value)


def _readable(value: object) -> str:
    """A value as people read it, not longer than a paragraph."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} .."
