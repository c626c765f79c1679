"""What the user sees: banner, progress, tables. A live bar on a terminal, plain lines in a pipe."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from edgeblocks.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from edgeblocks.checkpoint import RunDirectory
    from edgeblocks.preparation import Prepared
    from edgeblocks.trainer import Progress

PLAIN_LINE_EVERY_S = 10.0
LIVE_LINE_EVERY_S = 0.2


def make_console(stream: TextIO) -> Console:
    """A console that neither wraps nor colours in a pipe."""
    return Console(file=stream, width=None if stream.isatty() else 140, highlight=False, soft_wrap=not stream.isatty())


class ConsoleListener:
    """Prints how a long call goes on, on `stream` (standard error when the answer itself goes to standard output)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._console = make_console(self._stream)
        self._live = self._stream.isatty()
        self._every_s = LIVE_LINE_EVERY_S if self._live else PLAIN_LINE_EVERY_S
        self._last = 0.0
        self._open_line = False
        self._budget_bytes = 0
        self._started_at: tuple[float, int] | None = None

    def stage(self, text: str) -> None:
        self.close()
        self._last = 0.0
        if text != "training":
            self._console.print(f"[dim]{text} ..[/dim]")

    def note(self, text: str) -> None:
        self.close()
        self._console.print(text, markup=False)

    def advance(self, done: int, total: int, text: str) -> None:
        if done == total or time.monotonic() - self._last > self._every_s:
            self._line(f"{text}: {done}/{total}", final=done == total)

    def planned(self, prepared: "Prepared", run: "RunDirectory") -> None:
        self._budget_bytes = prepared.budget_bytes
        self._console.print(banner(prepared), markup=False)
        self._console.print(f"run directory: {run.path}", markup=False)

    def step(self, progress: "Progress", stall_s: float, used_bytes: int) -> None:
        finished = progress.steps_done == progress.steps_total
        now = time.monotonic()
        if self._started_at is None:
            self._started_at = (now, progress.steps_done)
        if not finished and now - self._last <= self._every_s:
            return
        start_time, start_steps = self._started_at
        done = progress.steps_done - start_steps
        to_do = progress.steps_total - progress.steps_done
        remaining = f"  {format_duration((now - start_time) / done * to_do)} left" if done else ""
        losses = "  ".join(f"{block}:{loss:.3f}" for block, loss in sorted(progress.losses.items()))
        elapsed = max(time.perf_counter() - progress.started, 1e-6)
        memory = format_bytes(used_bytes)
        if self._budget_bytes:
            memory += f"/{format_bytes(self._budget_bytes)}"
        share = progress.steps_done / max(progress.steps_total, 1)
        self._line(
            f"{_bar(share)} {share:4.0%}  block {progress.block} step {progress.step}  loss {losses}  "
            f"{progress.images_per_s:.0f} img/s  {memory}  stall {stall_s / elapsed:.1%}{remaining}",
            final=finished,
        )

    def close(self) -> None:
        """End a live line."""
        if self._open_line:
            print(file=self._stream, flush=True)
            self._open_line = False

    def _line(self, text: str, *, final: bool) -> None:
        self._last = time.monotonic()
        if self._live:
            width = self._console.width - 1
            print(f"\r{text[:width]:<{width}}", end="", file=self._stream, flush=True)
            self._open_line = True
            if final:
                self.close()
        else:
            print(text, file=self._stream, flush=True)


def _bar(share: float, width: int = 16) -> str:
    filled = round(share * width)
    return "━" * filled + "─" * (width - filled)


def banner(prepared: "Prepared") -> str:
    """What will be trained, and how it fits the budget."""
    run, images, plan = prepared.settings.run, prepared.images, prepared.plan
    chosen = plan.chosen
    data = prepared.data
    classes = f"{data.num_classes} classes" if data.num_classes else "no classes"
    breakdown = ", ".join(f"{name} {format_bytes(size)}" for name, size in chosen.breakdown.items())
    where = (
        "all blocks stay in memory"
        if chosen.tier == "ram"
        else (
            f"blocks on disk, {chosen.slots} in memory" + (" (one trained, one on its way)" if chosen.slots > 1 else "")
        )
    )
    lines = [
        f"edgeblocks: {run.family} {run.preset}, {format_count(plan.parameters)} parameters in {chosen.blocks} blocks "
        f"of {'/'.join(str(count) for count in sorted(set(plan.layers), reverse=True))} layers",
        f"data: {images.source}, {len(images.train)} training and {len(images.held_out)} hold-out images of "
        f"{data.height}x{data.width}x{data.channels}, {classes}",
        f"plan: batch {run.batch} = {chosen.accumulation} x {chosen.micro_batch}, "
        f"checkpointing {'on' if chosen.checkpointing else 'off'}, {run.optimizer}, visits of {chosen.visit_steps} "
        f"steps, {where}",
        f"memory: predicted peak {format_bytes(chosen.predicted_peak_bytes)} of {format_bytes(prepared.budget_bytes)} "
        f"({breakdown})",
        f"time: about {format_duration(chosen.blocks * run.steps * (chosen.step_s + chosen.streaming_s))} for "
        f"{run.steps} steps of each block, about {format_bytes(chosen.bytes_written)} written to disk",
    ]
    return "\n".join([*lines, *(f"note: {warning}" for warning in plan.warnings)])


def plan_table(prepared: "Prepared") -> str:
    """The candidates, one line each; the chosen one is marked. Memory is in MB."""
    parts = {"runtime": "runtime", "weights": "weights", "gradients": "grads", "optimizer": "optim", "ema": "ema"}
    parts |= {"activations": "activ", "data": "data", "slack": "slack"}
    rows = [
        ["", "blocks", "layers", "micro-batch", "ckpt", "in memory", "visit", "fits", "peak MB", "=", *parts.values()]
    ]
    rows[0] += ["step", "written"]
    for row in prepared.plan.candidates:
        rows.append(
            [
                "->" if row is prepared.plan.chosen else "",
                str(row.blocks),
                str(row.layers_per_block),
                f"{row.micro_batch} (x{row.accumulation})",
                "on" if row.checkpointing else "off",
                "all" if row.tier == "ram" else f"{row.slots} of {row.blocks}",
                str(row.visit_steps),
                "yes" if row.fits else "no",
                f"{row.predicted_peak_bytes / 1e6:.0f}",
                "",
                *(f"{row.breakdown[part] / 1e6:.0f}" for part in parts),
                format_duration(row.step_s),
                format_bytes(row.bytes_written),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def training_report(summary: dict[str, Any], path: Any) -> str:
    """Planned beside measured, and what to type next."""
    loss = summary["metrics"]
    by_block = ", ".join("-" if value is None else f"{value:.3f}" for value in loss["validation_loss_by_block"])
    split = summary["time_split"]
    total = max(summary["seconds"], 1e-9)
    rows = [
        ("peak memory", format_bytes(summary["predicted_peak_bytes"]), format_bytes(summary["peak_bytes"])),
        ("budget", "", format_bytes(summary["budget_bytes"])),
        ("step of a block", format_duration(summary["predicted_step_s"]), format_duration(summary["step_s"])),
    ]
    lines = [f"{'':<18}{'planned':>12}{'measured':>12}"]
    lines += [f"{name:<18}{planned:>12}{measured:>12}" for name, planned, measured in rows]
    lines += [
        f"time: {format_duration(total)}; compute {split['compute'] / total:.1%}, waiting for blocks "
        f"{split['stall'] / total:.1%}, data {split['data'] / total:.1%}; "
        f"{format_bytes(summary['disk_bytes_written'])} written to disk",
        f"validation denoising loss {loss['validation_loss']:.4f} (by block, high noise first: {by_block})",
        "",
        f"next: edgeblocks sample {path} -o grid.png",
        f"      edgeblocks export {path} -o {path}-onnx && edgeblocks run {path}-onnx -o grid.png",
    ]
    return "\n".join(lines)


def evaluation_report(result: dict[str, Any]) -> str:
    """Losses per level and the Frechet distance beside its floor."""
    validation = result["validation"]
    error = validation["standard_error"]
    spread = f" ± {error:.4f}" if error is not None else ""
    lines = [
        f"validation denoising loss {result['validation_loss']:.4f}{spread} "
        f"({validation['images']} images of the {validation['part']} part, EMA weights)",
        f"{'sigma':>10} {'block':>6} {'loss':>9}",
    ]
    lines += [f"{level['sigma']:>10.4g} {level['block']:>6} {level['loss']:>9.4f}" for level in validation["levels"]]
    frechet = result.get("frechet")
    if frechet is not None:
        floor = (
            "no hold-out part to compare"
            if frechet["floor"] is None
            else f"hold-out images score {frechet['floor']:.4g}"
        )
        lines += [
            f"Frechet distance of {frechet['samples']} samples to {frechet['train_images']} training images: "
            f"{frechet['to_train']:.4g} ({floor})",
            f"feature space: {frechet['feature_space']}",
        ]
    return "\n".join(lines)


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
