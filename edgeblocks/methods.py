"""What the methods of training are. Everything that depends on the method is asked here, of one `Method`.

Another method needs an entry in `METHODS` and the files that the entry names: a trainer, and a time model for plans. No
torch: planning asks it too.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

MethodName = Literal["diffusion", "exact", "greedy"]

Clipping = Literal["stage", "network"]
"""By which norm a gradient is clipped: each block's or stage's by its own, or all stages' by the whole network's."""

BoundaryTier = Literal["ram", "disk"]
"""Where the activations at the stage boundaries wait for the backward pass."""

Precision = Literal["fp32", "bf16", "fp16"]
"""In which numbers networks compute; see `families.precision`."""
BoundaryDtype = Literal["float32", "bfloat16"]
"""What they are kept as."""
Master = Literal["fp32", "bf16"]
"""In which numbers weights and their EMA are kept; see `optim.rounded_update`."""
Frozen = Literal["none", "int8", "nf4"]
"""As what weights that are not trained are in memory; see `offload.quantized`."""
USUAL_SHARE = 0.8
"""Of the steps of blocks that begin as one, those before they are parted: the best that was tried (docs/shared.md)."""
FEWEST_SHARED_STEPS = 100
"""Of each block, below which blocks do not begin as one unless that is asked for: so few are a trial of a command."""
FROZEN_BYTES: dict[Frozen, float] = {"int8": 1 + 4 / 64, "nf4": 1 / 2 + 4 / 64}
"""Of a parameter that is quantized: its code, and its share of the scale of 64."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train a network whose parts (blocks, or stages) are in memory one at a time."""

    name: MethodName
    summary: str
    """What it does, in a line for people."""
    part: str
    """What a part of the network is called."""
    one_network: bool
    """Whether the parts are stages of one network; else each is a network of its own, with its own stem and readout,
    that denoises its own range of noise levels."""
    trained_together: bool
    """Whether there is one count of steps, those of the whole network; else each part makes its own."""
    grows: bool
    """Whether the network begins as its lowest layers: a window of layers is trained, its lower half frozen, and as
    many new layers put on top, again and again (`planning.windows`). Else all parts are there from the beginning."""
    cut_changes_result: bool
    """Whether another number of parts is another training; else a cut is free, and only memory and time decide."""
    ran_on_a_gpu: bool
    """Whether figures of it on a GPU were measured (docs/gpu.md)."""
    own_settings: frozenset[str]
    """Settings that mean nothing with other methods."""
    trainer: str
    """The path of its `training.loop.Trainer`."""
    pace: str
    """The path of its time model; see `planning.pace`."""

    @property
    def form(self) -> MethodName:
        """Of the methods that train the same kind of network the first: what is known of that holds for this one."""
        return next(one.name for one in METHODS.values() if one.one_network == self.one_network)

    def denoisers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Layers of each denoiser, given the layers of each part: a part is one, or all together are.

        >>> METHODS["diffusion"].denoisers((4, 4)), METHODS["exact"].denoisers((4, 4))
        ((4, 4), (8,))
        """
        return (sum(layers),) if self.one_network else tuple(layers)

    def trained_apart(self, parts: int) -> int:
        """How many of `parts` parts make steps of their own.

        >>> METHODS["diffusion"].trained_apart(3), METHODS["exact"].trained_apart(3)
        (3, 1)
        """
        return 1 if self.trained_together else parts

    def parts(self, count: int) -> str:
        """So many parts, in words.

        >>> METHODS["diffusion"].parts(1), METHODS["exact"].parts(4)
        ('1 block', '4 stages')
        """
        return f"{count} {self.part}{'' if count == 1 else 's'}"


METHODS: dict[MethodName, Method] = {
    "diffusion": Method(
        name="diffusion",
        summary="each block alone, as a denoiser of its noise levels, inside the budget",
        part="block",
        one_network=False,
        trained_together=False,
        grows=False,
        cut_changes_result=True,
        ran_on_a_gpu=True,
        own_settings=frozenset({"shared"}),
        trainer="edgeblocks.training.diffusion:DiffusionTrainer",
        pace="edgeblocks.planning.pace:pace_of_blocks",
    ),
    "exact": Method(
        name="exact",
        summary="end to end, some stages in memory at a time, inside the budget",
        part="stage",
        one_network=True,
        trained_together=True,
        grows=False,
        cut_changes_result=False,
        ran_on_a_gpu=False,
        own_settings=frozenset({"clip_by", "boundaries", "boundary_dtype", "train_blocks"}),
        trainer="edgeblocks.training.exact:ExactTrainer",
        pace="edgeblocks.planning.pace:pace_of_stages",
    ),
    "greedy": Method(
        name="greedy",
        summary="from the bottom up: a window of layers is trained over frozen ones, inside the budget",
        part="part",
        one_network=True,
        trained_together=True,
        grows=True,
        cut_changes_result=True,
        ran_on_a_gpu=False,
        own_settings=frozenset({"window", "grow", "frozen"}),
        trainer="edgeblocks.training.greedy:GreedyTrainer",
        pace="edgeblocks.planning.pace:pace_of_windows",
    ),
}
DIFFUSION, EXACT, GREEDY = METHODS["diffusion"], METHODS["exact"], METHODS["greedy"]


def imported(path: str) -> Any:
    """What `module:name` names; imported when it is asked for, since a trainer brings torch along."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
