"""How far blocks are that a cluster trains: a table in a terminal, a line in a pipe."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from edgeblocks.progress import BlockProgress
from edgeblocks.terminal import one_line
from edgeblocks.units import format_bytes, format_duration

_ALL, _NARROW = 79, ("block", "where", "step", "loss")
"""Characters that all columns take; those of a narrower terminal."""


def block_table(rows: Sequence[BlockProgress], left_s: float | None, *, width: int, height: int) -> Table:
    """One row a block; of more than are shown in that height, those that are being trained."""
    shown = [row for row in rows if row.is_training or len(rows) <= height][:height]
    hidden = [row for row in rows if row not in shown]
    more = f"{len(hidden)} others, {sum(row.saved >= row.steps for row in hidden)} of them done\n" if hidden else ""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.caption, table.caption_justify, table.caption_style = more + _together(rows, left_s), "left", ""
    cells = [_cells(row) for row in shown]
    for name in _cells(rows[0]) if width >= _ALL else _NARROW:
        is_text = name in ("where", "")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True, max_width=16, overflow="ellipsis")
    for cell in cells:
        table.add_row(*(Text(text) for name, text in cell.items() if width >= _ALL or name in _NARROW))
    return table


def _cells(row: BlockProgress) -> dict[str, str]:
    """By the name of the column."""
    return {
        "block": str(row.block),
        "where": one_line(row.where),
        "": bar(row.step / row.steps, 8),
        "step": f"{row.step}/{row.steps}",
        "at home": str(row.saved),
        "loss": "" if row.loss is None else f"{row.loss:.3f}",
        "per s": "" if row.examples_per_s is None else f"{row.examples_per_s:.0f}",
        "memory": "" if row.used_bytes is None else format_bytes(row.used_bytes),
    }


def block_line(rows: Sequence[BlockProgress], left_s: float | None) -> str:
    """The same in a line."""
    steps = "  ".join(f"{row.block}:{row.step}{f' {one_line(row.where)}' * row.is_training}" for row in rows)
    losses = " ".join(f"{row.block}:{row.loss:.3f}" for row in rows if row.loss is not None)
    return f"{_together(rows, left_s)}  steps {steps}{f'  loss {losses}' if losses else ''}"


def bar(share: float, width: int = 16) -> str:
    filled = round(share * width)
    return "━" * filled + "─" * (width - filled)


def _together(rows: Sequence[BlockProgress], left_s: float | None) -> str:
    share = sum(row.step for row in rows) / max(1, sum(row.steps for row in rows))
    remaining = "" if left_s is None else f"  {format_duration(left_s)} left"
    return f"{bar(share)} {share:4.0%}{remaining}"
