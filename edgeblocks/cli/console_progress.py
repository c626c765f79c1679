"""The progress of a long call, on standard error: lines in a pipe, a live line or table in a terminal."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgeblocks.cli.block_table import bar, block_line, block_table
from edgeblocks.cli.screen import drop_output
from edgeblocks.progress import BlockProgress, Marked, Progress
from edgeblocks.terminal import one_line, visible
from edgeblocks.units import format_bytes, format_duration

PLAIN_LINE_EVERY_S = 10.0
LIVE_LINE_EVERY_S = 0.2


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process here, in the middle of a step."""
        raise BrokenPipeError


def make_console(stream: TextIO) -> Console:
    """A console that neither wraps nor colours in a pipe."""
    return _Console(file=stream, width=None if stream.isatty() else 140, highlight=False, soft_wrap=not stream.isatty())


class ConsoleListener:
    """Prints how a long call goes on, on standard error: standard output is for what the call gives.

    Used with `with`, so that an error begins on a line of its own.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._console = make_console(self._stream)
        self._live = self._stream.isatty()
        self._is_read = True
        self._every_s = LIVE_LINE_EVERY_S if self._live else PLAIN_LINE_EVERY_S
        self._last = 0.0
        self._open_line = False
        self._table: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def stage(self, text: str) -> None:
        self.close()
        self._last = 0.0
        if text != "training":
            self._print(f"{one_line(text)} ..", style="dim")

    def note(self, text: str) -> None:
        if self._table is None:  # else it stays below what is said
            self.close()
        console = self._console
        if isinstance(text, Marked) and console.is_terminal and console.color_system and not console.no_color:
            pieces = [(visible(piece), "green" if is_marked else "") for piece, is_marked in text.pieces]
            self._print(Text.assemble(f"{text.heading} ", ("green", "green"), ":\n", *pieces))
            return
        self._print(one_line(text))

    def advance(self, done: int, total: int, text: str) -> None:
        if done == total or time.monotonic() - self._last > self._every_s:
            self._line(f"{one_line(text)}: {done}/{total}", final=done == total)

    def planned(self, plan_text: str, out: Path) -> None:
        self._print(visible(plan_text))
        self._print(f"run directory: {one_line(out)}")

    def step(self, progress: Progress) -> None:
        finished = progress.steps_done == progress.steps_total
        now = time.monotonic()
        if not finished and now - self._last <= self._every_s:
            return
        left_s = progress.left_s
        remaining = "" if left_s is None else f"{format_duration(left_s)} left"
        where, loss = f"step {progress.step}", f"loss {progress.losses[progress.block or 0]:.3f}"
        other_losses = ""
        if progress.block is not None:
            losses = {block: f"{block}:{mean:.3f}" for block, mean in sorted(progress.losses.items())}
            where, loss = f"block {progress.block} step {progress.step}", f"loss {losses.pop(progress.block)}"
            other_losses = "  ".join(losses.values())
        elapsed = max(time.perf_counter() - progress.started, 1e-6)
        memory = f"{format_bytes(progress.used_bytes)}/{format_bytes(progress.budget_bytes)}"
        share = progress.steps_done / max(progress.steps_total, 1)
        pieces = {  # in the order in which they are shown; the numbers say in which they are left out
            bar(share): 3,
            f"{share:4.0%}": 10,
            where: 8,
            loss: 7,
            other_losses: 1,
            f"{progress.examples_per_s:.0f} {progress.example}/s": 5,
            memory: 6,
            f"stall {progress.stall_s / elapsed:.1%}": 2,
            f"{format_bytes(progress.bytes_written)} written": 4,
            remaining: 9,
        }
        self._line(_fitting(pieces, self._console.width - 1 if self._live else None), final=finished)

    def blocks(self, rows: Sequence[BlockProgress], left_s: float | None) -> None:
        finished = all(row.saved >= row.steps for row in rows)
        if not finished and time.monotonic() - self._last <= self._every_s:
            return
        if not self._live:
            self._line(block_line(rows, left_s), final=finished)
            return
        self._last = time.monotonic()
        self._tried(lambda: self._show(self._table_of(rows, left_s)))
        if finished:
            self.close()

    def _table_of(self, rows: Sequence[BlockProgress], left_s: float | None) -> Table:
        width, height = self._console.size
        return block_table(rows, left_s, width=width, height=max(1, height - 5))

    def _show(self, table: Table) -> None:
        if self._table is None:
            self._table = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._table.start()
        self._table.update(table, refresh=True)

    def close(self) -> None:
        """End a live line, or leave a live table as it is now."""
        if self._table is not None:
            table, self._table = self._table, None
            self._tried(table.stop)
        if self._open_line:
            self._write("\n")
            self._open_line = False

    def _print(self, text: str | Text, style: str | None = None) -> None:
        self._tried(lambda: self._console.print(text, markup=False, style=style))

    def _write(self, text: str) -> None:
        self._tried(lambda: print(text, end="", file=self._stream, flush=True))

    def _tried(self, work: Callable[[], None]) -> None:
        """A reader that left, or a terminal that is gone, does not end hours of training."""
        if not self._is_read:
            return
        try:
            work()
        except OSError:
            self._is_read = False
            drop_output(self._stream)

    def _line(self, text: str, *, final: bool) -> None:
        self._last = time.monotonic()
        if self._live:
            width = self._console.width - 1
            self._write(f"\r{text[:width]:<{width}}")
            self._open_line = True
            if final:
                self.close()
        else:
            self._write(f"{text}\n")


def _fitting(pieces: dict[str, int], width: int | None) -> str:
    """The pieces side by side; where they are wider than the terminal, without those of the lowest numbers."""
    shown = {piece: number for piece, number in pieces.items() if piece}
    while width is not None and len("  ".join(shown)) > width and len(shown) > 1:
        del shown[min(shown, key=shown.__getitem__)]
    return "  ".join(shown)
