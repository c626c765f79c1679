"""What the chains of families make: images, classes, text, continuations of text; and what is usual for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Reads = Literal["images", "text"]
"""What kind of data a family is trained on."""
PYTHON_DATA = "python:"
"""Begins the name of data that a program gave; the sha256 of their content follows, by which the cache has them."""
Task = Literal["images", "classes", "text", "continuation"]
"""What a family's chain makes: images, the probabilities of an image's classes, text, or text token by token."""
TEXT_TASKS: tuple[Task, ...] = ("text", "continuation")
"""Of networks that make text: by filling gaps, or from its beginning."""
FEWEST_FOR_ERROR = 10
"""Examples from which a standard error is told."""
GRID_TOKENS = 64
"""Of a sample made during training that is written token by token: where blocks are on disk each token loads all."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The figure of how good a network is: what it is called, and which of two is better."""

    name: str
    higher_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskDefaults:
    """What is usual where the user asks for nothing else."""

    steps: int
    """Of a chain: noise levels (of each token's chain), or steps of unmasking. At least one a block is made."""
    solver: Literal["euler", "heun"] = "heun"
    noises: int = 1
    """Chains whose mean is the answer."""
    evaluation_samples: int
    """Of `eval`: images made, images classified, or sequences of the bound."""
    loss_examples: int
    """Hold-out examples of the validation loss."""
    quality_examples: int
    """Hold-out examples of a figure along the training, and of a comparison."""
    measure: Measure
    grid_samples: int
    """Samples made together during training."""


TASKS: Mapping[Task, TaskDefaults] = {
    "images": TaskDefaults(
        steps=18,
        evaluation_samples=256,
        loss_examples=512,
        quality_examples=256,
        measure=Measure(name="denoising loss"),
        grid_samples=40,
    ),
    "classes": TaskDefaults(
        steps=4,
        solver="euler",
        noises=4,
        evaluation_samples=1024,
        loss_examples=512,
        quality_examples=1024,
        measure=Measure(name="top-1 accuracy", higher_is_better=True),
        grid_samples=0,
    ),
    "text": TaskDefaults(
        steps=64,
        evaluation_samples=256,
        loss_examples=64,
        quality_examples=64,
        measure=Measure(name="bits per character"),
        grid_samples=4,
    ),
    "continuation": TaskDefaults(
        steps=8,
        evaluation_samples=64,
        loss_examples=64,
        quality_examples=32,
        measure=Measure(name="bits per character"),
        grid_samples=4,
    ),
}
