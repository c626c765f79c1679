"""Sections: what of a family's network lies in one block file.

Trained block-wise, a section is a network of its own: stem, some layers, readout. Trained end to end, sections are the
consecutive stages of one network: the first one has the stem, the last one the readout. What goes from stage to stage
are hidden values and the conditioning, which the stem makes once and every layer gets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeblocks.families.block import Block
from edgeblocks.families.family import Family
from edgeblocks.offload.block_buffer import bind_parameters_


@dataclass(frozen=True, kw_only=True)
class Section:
    """Some layers, with or without a stem and a readout."""

    num_layers: int
    stem: bool = True
    readout: bool = True
    first_layer: int = 0
    """Of the whole network, where this is a stage of it."""


def blocks_of(layers: Sequence[int]) -> tuple[Section, ...]:
    """Networks of their own, by the layers of each."""
    return tuple(Section(num_layers=count) for count in layers)


def stages_of(layers: Sequence[int]) -> tuple[Section, ...]:
    """Stages of one network, by the layers of each.

    >>> [(stage.stem, stage.readout) for stage in stages_of((2, 2, 1))]
    [(True, False), (False, False), (False, True)]
    """
    last = len(layers) - 1
    return tuple(
        Section(num_layers=count, stem=number == 0, readout=number == last, first_layer=sum(layers[:number]))
        for number, count in enumerate(layers)
    )


def network_of(family: Family, section: Section, *, checkpointing: bool = False) -> Block:
    """A section as a module on torch's default device, parameters not initialised."""
    network = family.block(num_layers=section.num_layers, checkpointing=checkpointing)
    network.begin_at(section.first_layer)
    for name in _left_out(network, section):
        setattr(network, name, None)
    return network


def init_section_(
    family: Family, section: Section, tensors: Iterable[tuple[str, Tensor]], generator: torch.Generator
) -> None:
    """Initialise a section's parameters, as those of a whole network of as many layers are initialised.

    Args:
        tensors: parameters by their names; the order is that of a section's own.
    """
    with torch.device("meta"):
        network = family.block(num_layers=section.num_layers, checkpointing=False)
    network.begin_at(section.first_layer)
    for name in _left_out(network, section):
        part = network.get_submodule(name)
        # Not `to_empty`: with meta tensors it would import 25 MB of symbolic libraries.
        bind_parameters_(part, [(own, torch.empty(parameter.shape)) for own, parameter in part.named_parameters()])
    bind_parameters_(network, tensors)
    network.init_(generator)


def _left_out(network: Block, section: Section) -> tuple[str, ...]:
    """Names of the parts that a section does not have."""
    stem = () if section.stem else network.stem_parts
    readout = () if section.readout else network.readout_parts
    parts = dict(network.named_children())
    return tuple(name for name in (*stem, *readout) if name in parts)


def whole_name(name: str, layers: Sequence[int], stage: int) -> str:
    """What a stage's parameter is called in the whole network.

    Args:
        layers: of each stage.

    >>> whole_name("layers.1.mlp.up.weight", (3, 3), 1), whole_name("readout.bias", (3, 3), 1)
    ('layers.4.mlp.up.weight', 'readout.bias')
    """
    part, _, rest = name.partition(".")
    if part != "layers":
        return name
    number, _, rest = rest.partition(".")
    return f"layers.{int(number) + sum(layers[:stage])}.{rest}"


def tensor_name(block: int, name: str, layers: Sequence[int], *, one_network: bool) -> str:
    """What a block's parameter is called in a file of the whole network's weights.

    Args:
        layers: of each block, or stage.
        one_network: whether these are stages of one network; else each is a network of its own.

    >>> tensor_name(1, "layers.0.mlp.up.weight", (3, 3), one_network=False)
    'block_1.layers.0.mlp.up.weight'
    """
    return whole_name(name, layers, block) if one_network else f"block_{block}.{name}"
