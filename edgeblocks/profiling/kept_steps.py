"""What a run's steps took, for the next plan of the same network on this machine: a small file in the cache folder.

It is looked for by the network's shape, method and precision, by the machine, and by all that `kept_answers` names a
file by. Plans that cut the network otherwise use it, too: the model of a step's time says by how much they differ.
"""

import contextlib
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from edgeblocks.data.cache import cache_folder
from edgeblocks.errors import StorageError
from edgeblocks.families.base import DataInfo
from edgeblocks.limits import MOST_LAYERS
from edgeblocks.planning.corrections import MeasuredSteps
from edgeblocks.profiling.kept_answers import fingerprint, keep_answer, kept_answer
from edgeblocks.profiling.trace import shapes_of
from edgeblocks.settings.fields import Settings, precision_of

NAME = "steps"
"""Of the files, before their fingerprint."""


class KeptSteps:
    """What is known of a network's steps on this machine."""

    def __init__(self, settings: Settings, data: DataInfo, *, device: str) -> None:
        """
        Args:
            device: as torch names it.
        """
        run = settings.run
        network = [run.family, asdict(settings.family), shapes_of(data), run.method, precision_of(run), run.master]
        where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
        machine = [where, platform.node(), torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
        self._path: Path | None = None
        with contextlib.suppress(StorageError):  # nowhere to keep anything
            self._path = cache_folder() / f"{NAME}-{fingerprint([network, machine])}.json"

    def read(self) -> MeasuredSteps | None:
        """What steps took; None where nothing was kept, or nothing that can be."""
        answer = None if self._path is None else kept_answer(self._path)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if answer is not None:
                return _checked(answer)
        return None

    def keep(self, measured: MeasuredSteps) -> None:
        """Write down what steps took, in the place of what was known."""
        if self._path is not None:
            keep_answer(self._path, asdict(measured))


def _checked(answer: Mapping[str, Any]) -> MeasuredSteps:
    """What `keep` wrote.

    Raises:
        KeyError, TypeError, ValueError: it did not write that.
    """
    trained = answer["trained"]
    found = MeasuredSteps(**{**answer, "trained": None if trained is None else tuple(map(int, trained))})
    times = (found.short_s, found.step_s, found.long_s)
    if not (0 < times[0] <= times[1] <= times[2] and all(map(math.isfinite, times))):
        raise ValueError(f"{times} are not times")
    if not (1 <= found.blocks <= MOST_LAYERS and 1 <= found.micro_batch <= found.batch):
        raise ValueError(f"{found.blocks} blocks and a micro-batch of {found.micro_batch} of {found.batch}")
    return found
