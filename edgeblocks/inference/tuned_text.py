"""Text of a fine-tuned model: the run's weights in the library's own forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.decoder import Decoder
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.pretrained.writing import TextWriter, cache_bytes, held, most_positions, tokenizer_of
from edgeblocks.registry import build_target
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.merging import check_same_tokenizer

if TYPE_CHECKING:
    from edgeblocks.inference.sampling import Runners

_GAPS = 0.1
"""Share of a budget that is not filled with weights that may as well be read again."""


@contextmanager
def tuned_writer(
    directory: RunDirectory, runners: "Runners", *, texts: int, length: int | None
) -> Iterator[TextWriter]:
    """A run's model, to write so many texts together of so many tokens; None: as many as it was trained on.

    Raises:
        ConfigError: the run is no fine-tuned model of text.
        DoesNotFitError: they do not fit the budget.
        RunError: the tokenizer in the model's folder is another one now.
    """
    family = directory.family()
    if not isinstance(family, Decoder):
        raise ConfigError(f"{directory.path} is of the family {family.name}, and no fine-tuned model of text")
    model = family.settings.model
    folder = model_folder(model)
    check_same_tokenizer(directory, folder)
    length = min(length or family.data.length, most_positions(folder) or family.data.length)
    kept_bytes = cache_bytes(
        folder, length, num_layers=len(family.shell("meta").layers), vocabulary=tokenizer_of(folder).vocabulary
    )
    with runners(samples=texts, kept_bytes=kept_bytes) as runner:
        table, readout = family.tables_of(runner.network(0))  # in memory before there is a look at what is left
        used_bytes = build_target(directory.settings.run.target).used_bytes()
        room_bytes = round((1 - _GAPS) * (runner.budget_bytes or 0)) - used_bytes - texts * kept_bytes
        with held(model, family.reads_layers_as, runner.device, room_bytes, with_head=readout is None):
            yield TextWriter(
                model,
                family.called_layers(partial(runner.network, 0), runner.device),
                table=table,
                readout=readout,
                device=runner.device,
                usual_length=family.data.length,
                precision=runner.precision,
            )
