"""A training in TensorBoard: losses, speed and memory as scalars, grids of samples as images, texts, figures."""

from pathlib import Path
from typing import TYPE_CHECKING

from edgeblocks.callbacks import Callback, Evaluated, Finished, Planned, Sampled, Step
from edgeblocks.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
"""In the run's directory, where no other is named."""
MOST_POINTS = 1000
"""Of each curve of a block, about."""


class TensorBoard(Callback):
    """Writes event files. Curves of blocks are over the block's own steps, the others over those of all blocks.

    Made before the training is planned: the library's memory, some 8 MB, is then counted in the budget.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        """
        Args:
            folder: where the files go; None: `tensorboard` in the run's directory.

        Raises:
            ConfigError: TensorBoard is not installed.
        """
        try:
            from torch.utils import tensorboard
        except ImportError as error:
            raise ConfigError(
                f"--track tensorboard needs its library ({error}): pip install 'edgeblocks[track]', or leave it out"
            ) from error
        self._make = tensorboard.SummaryWriter
        self._folder = None if folder is None else Path(folder)
        self._writer: SummaryWriter | None = None

    def planned(self, event: Planned) -> None:
        """Open the files.

        Raises:
            RunError: the folder in the run's directory is a link to somewhere else.
        """
        own = event.run / FOLDER
        if self._folder is None and own.is_symlink():
            raise RunError(f"{own} is a link to {own.resolve()}; remove it, or name a folder with --track-folder")
        self._writer = self._make(str(self._folder or own), flush_secs=10)
        self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in event.settings.items()))
        self._every = max(1, event.settings["steps"] // MOST_POINTS)

    def step(self, event: Step) -> None:
        if event.step % self._every and event.step != event.steps:
            return
        of_block = "" if event.block is None else f"/block_{event.block}"
        self._scalars(
            event.step,
            {
                f"loss{of_block}": event.loss,
                f"gradient_norm{of_block}": event.gradient_norm,
                f"learning_rate{of_block}": event.learning_rate,
            },
        )
        self._scalars(
            event.steps_done,
            {
                "examples_per_s": event.examples_per_s,
                "memory/used_MB": event.used_bytes / 1e6,
                "memory/budget_MB": event.budget_bytes / 1e6,
                "disk/written_MB": event.bytes_written / 1e6,
            },
        )

    def evaluated(self, event: Evaluated) -> None:
        self._scalars(event.step, {event.measure.replace(" ", "_"): event.value})

    def sampled(self, event: Sampled) -> None:
        assert self._writer is not None
        if event.grid is not None:
            self._writer.add_image("samples", event.grid, event.step, dataformats="HWC")
        for number, text in enumerate(event.texts):
            lines = "\n".join(f"    {line}" for line in text.splitlines())  # as it stands, not as Markdown
            self._writer.add_text(f"samples/{number}", lines, event.step)

    def finished(self, event: Finished) -> None:
        self._scalars(event.summary["steps"], {"memory/peak_MB": event.summary["peak_bytes"] / 1e6})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        assert self._writer is not None
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
