"""What a block costs in bytes and arithmetic, as numbers: the planner's input, made by `profiling.trace`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, cast


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A quantity of a step for blocks of 1, 2 and 3 layers; from 2 layers on it grows linearly."""

    one: int
    two: int
    three: int

    def at(self, num_layers: int) -> int:
        """The quantity for a block of `num_layers` layers.

        >>> [Growth(one=5, two=7, three=10).at(n) for n in (1, 2, 3, 4)]
        [5, 7, 10, 13]
        """
        return self.one if num_layers == 1 else self.two + (num_layers - 2) * (self.three - self.two)


LARGEST_HEAP_BYTES = 32 * 2**20
"""Larger tensors get pages of their own from the allocator and give them back; smaller ones share the heap."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A step on `samples` samples.

    `peak_bytes` is the largest sum of live tensors beyond weights, gradients and the batch itself, `heap_bytes` the
    largest sum of those below `LARGEST_HEAP_BYTES` each, among which gaps arise; `touched_bytes` is the sum of all
    tensors written, which stands for memory traffic; `operators` counts kernels.
    """

    samples: int
    peak_bytes: Growth
    heap_bytes: Growth
    touched_bytes: Growth
    operators: Growth


Ends = Literal["whole", "first", "last", "middle"]
"""What a part of a network has beside its layers: stem and readout, as a network of its own; as stages have them, the
stem alone, the readout alone, or neither."""


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """A family with its settings, as the planner sees it.

    `hidden` are the values that go from layer to layer, `condition` the conditioning of all layers; 0 for a family that
    is not trained in stages. `end_*` are of what a part has beside its layers. `*_moments` are bytes of optimizer
    state by optimizer, and `workspace_bytes` what an optimizer step needs besides on a processor, `gpu_workspace_bytes`
    on a GPU; under `rounded` where weights are bfloat16, with any optimizer. Steps are traced at several sample counts,
    ascending: training with all activations kept, with activation checkpointing, and a forward pass alone. Under
    `always_checkpointed` there is nothing but activation checkpointing.
    """

    num_layers: int
    end_parameters: dict[Ends, int]
    layer_parameters: int
    end_moments: dict[Ends, dict[str, int]]
    layer_moments: dict[str, int]
    workspace_bytes: dict[str, int]
    gpu_workspace_bytes: dict[str, int]
    batch_bytes_per_sample: int
    stem_readout_flops_per_sample: int
    layer_flops_per_sample: int
    hidden_bytes_per_sample: int
    condition_bytes_per_sample: int
    plain: tuple[StepCost, ...]
    checkpointed: tuple[StepCost, ...]
    forward: tuple[StepCost, ...]
    always_checkpointed: bool = False

    @property
    def checkpointing_choices(self) -> tuple[bool, ...]:
        """What may be chosen."""
        return (True,) if self.always_checkpointed else (False, True)

    def parameters(self, num_layers: int, ends: Ends = "whole") -> int:
        return self.end_parameters[ends] + num_layers * self.layer_parameters

    def moment_bytes(self, num_layers: int, optimizer: str, ends: Ends = "whole") -> int:
        return self.end_moments[ends][optimizer] + num_layers * self.layer_moments[optimizer]

    def forward_flops_per_sample(self, num_layers: int) -> int:
        return self.stem_readout_flops_per_sample + num_layers * self.layer_flops_per_sample


def most_of(costs: Sequence[LayerCosts]) -> LayerCosts:
    """The largest of each number, among costs of the same steps."""
    return costs[0] if len(costs) == 1 else cast(LayerCosts, _most(costs))


def _most(values: Sequence[Any]) -> Any:
    """
    >>> _most([Growth(one=1, two=11, three=21), Growth(one=9, two=12, three=13)])
    Growth(one=9, two=12, three=22)
    """
    first = values[0]
    if isinstance(first, Growth):  # it goes on with the steepest
        two, slope = max(one.two for one in values), max(one.three - one.two for one in values)
        return Growth(one=max(one.one for one in values), two=two, three=two + slope)
    if isinstance(first, dict):
        return {name: _most([one[name] for one in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(map(_most, zip(*values, strict=True)))
    if is_dataclass(first):
        named = {one.name: _most([getattr(value, one.name) for value in values]) for one in fields(first)}
        return replace(first, **named)  # type: ignore[type-var]
    return max(values)


def heap_bytes_at(costs: Sequence[StepCost], samples: int, num_layers: int) -> int:
    """The step's `heap_bytes`; between traced sample counts its whole peak, because tensors leave the heap in jumps."""
    exact = next((cost for cost in costs if cost.samples == samples), None)
    if exact is not None:
        return exact.heap_bytes.at(num_layers)
    return at_samples(costs, samples, lambda cost: cost.peak_bytes.at(num_layers))


def at_samples(costs: Sequence[StepCost], samples: int, value: Callable[[StepCost], int]) -> int:
    """A step's quantity at a sample count between traced ones (`costs` ascending in samples), on a straight line.

    A peak is the largest of several sums that grow with the samples, so it is convex in them: the line between two
    traced counts never lies below it.
    """
    exact = next((cost for cost in costs if cost.samples == samples), None)
    if exact is not None:
        return value(exact)
    upper = next((cost for cost in costs if cost.samples > samples), costs[-1])
    lower = next((cost for cost in reversed(costs) if cost.samples < upper.samples), None)
    # Below the smallest count that was traced nothing is known but that no samples take nothing.
    if lower is None:
        return round(value(upper) * samples / upper.samples)
    slope = (value(upper) - value(lower)) / (upper.samples - lower.samples)
    return round(value(lower) + slope * (samples - lower.samples))
