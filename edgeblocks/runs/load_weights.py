"""Weights that a network starts from: a safetensors file, compared with the network before anything is created."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from edgeblocks.errors import ConfigError, RunError
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.family import Family
from edgeblocks.files.tensor_file import READABLE, TensorFile, Weights
from edgeblocks.files.untrusted import MalformedFileError, parse_json, shown
from edgeblocks.methods import METHODS
from edgeblocks.offload.sections import Section, blocks_of, network_of, stages_of, tensor_name
from edgeblocks.runs.save_weights import CLASS_NAMES
from edgeblocks.settings.fields import RunSettings

_NAMES_SHOWN = 8
_APART = "Its config.json and its .safetensors files do not belong together; download all of them again"


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """A file whose tensors are those of a network, all but some parts that start from the seed."""

    file: Weights
    sha256: str
    fresh: frozenset[str]
    """Names of the tensors that are not taken from the file."""
    name_of: Callable[[int, str], str]
    """The name in the file of what a block calls so."""
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of tensors whose rows lie in another order in the file: the number there of each row."""

    def cover(self, block: int, names: Iterable[str]) -> bool:
        """Whether the file gives all of these tensors of a block."""
        return not any(self.name_of(block, name) in self.fresh for name in names)

    def fill_(self, block: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Give a block's tensors their values from the file, but those that start from the seed.

        Raises:
            RunError: the file cannot be read any more.
        """
        for own, tensor in tensors:
            name = self.name_of(block, own)
            if name in self.fresh:
                continue
            try:
                self.file.read_(name, tensor)
                if name in self.rows:
                    tensor.copy_(tensor[list(self.rows[name])])
            except OSError as error:
                raise RunError(f"cannot read {self.file.path}: {error.strerror or error}; start again") from error


def initial_weights_of(
    run: RunSettings, family: Family, layers: Sequence[int], class_names: Sequence[str]
) -> InitialWeights | None:
    """What a run's settings have a network start from; None where that is the seed alone.

    Args:
        layers: of each block, or stage.
        class_names: of the data, in their order.

    Raises:
        ConfigError: with everything that is wrong with the file.
    """
    if run.init is None:
        if run.init_fresh is not None:
            raise ConfigError(
                f"init_fresh={run.init_fresh} names what is not taken from the file of --init; name the file, or leave "
                f"init_fresh out"
            )
        return None
    one_network = METHODS[run.method].one_network

    def name_of(block: int, name: str) -> str:
        return family.name_in_file(tensor_name(block, name, layers, one_network=one_network))

    told = [part.strip() for part in (run.init_fresh or "").split(",") if part.strip()]
    found = open_initial_weights(
        Path(run.init).expanduser(),
        family,
        (stages_of if one_network else blocks_of)(layers),
        name_of,
        fresh=[*told, *family.own_parts, *family.fresh_parts(class_names)],
        class_names=class_names,
    )
    return replace(found, rows=family.class_rows(class_names))


def open_initial_weights(
    path: Path,
    family: Family,
    sections: Sequence[Section],
    name_of: Callable[[int, str], str],
    *,
    fresh: Sequence[str] = (),
    class_names: Sequence[str] = (),
) -> InitialWeights:
    """A file whose tensors fit the network's, every value of them finite.

    Args:
        sections: the network's blocks, or stages.
        name_of: what a tensor of a block is called in the file.
        fresh: parts of the network, such as `readout`, that start from the seed whatever the file has.
        class_names: of the data, in their order; they are compared with those that a file of ours has.

    Raises:
        ConfigError: with everything that is wrong.
    """
    shapes = _shapes(family, sections, name_of)
    left_out = _starting_fresh(shapes, fresh)
    try:
        file = family.opened(path)
        wanted = {name: shape for name, shape in shapes.items() if name not in left_out}
        # Values last: looking at them reads the whole file, and a wrong shape is known from its table.
        problems = (
            _differences(file, shapes, wanted, unused=family.is_frozen)
            or _other_classes(
                _class_names(file),
                class_names,
                lambda: [
                    name
                    for name in _by_class(family, partial(_shapes, sections=sections, name_of=name_of))
                    if name in wanted
                ],
            )
            or _values_that_are_no_numbers(file, wanted)
        )
        digest = file.sha256()
    except OSError as error:
        raise ConfigError(f"--init {path}: it cannot be read ({error.strerror or error}); name another file") from error
    except MalformedFileError as error:
        raise ConfigError(f"--init {path}: {error}; write it with safetensors.torch.save_file") from error
    if problems:
        named = f"--init {path}" if isinstance(file, TensorFile) else path
        raise ConfigError(*(f"{named}: {problem}" for problem in problems))
    return InitialWeights(file=file, sha256=digest, fresh=left_out, name_of=name_of)


def _shapes(
    family: Family, sections: Sequence[Section], name_of: Callable[[int, str], str]
) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by their names in a file."""
    of_section = {}
    for section in set(sections):
        with torch.device("meta"):
            network = network_of(family, section)
        of_section[section] = [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]
    return {name_of(block, own): shape for block, section in enumerate(sections) for own, shape in of_section[section]}


def _starting_fresh(shapes: Iterable[str], parts: Sequence[str]) -> frozenset[str]:
    """Names of the tensors that lie in some parts of the network, or of every block.

    Raises:
        ConfigError: there is no such part.
    """
    inside = {
        part: {name for name in shapes if _is_in(part, name) or _is_in(part, _in_its_block(name))} for part in parts
    }
    if unknown := [part for part in parts if not inside[part]]:
        raise ConfigError(
            f"init_fresh={','.join(parts)}: the network has no part {', '.join(unknown)}; its parts are "
            f"{', '.join(_parts(shapes))}, and parts of these, such as layers.0"
        )
    return frozenset[str]().union(*inside.values())


def _is_in(part: str, name: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def _in_its_block(name: str) -> str:
    """A name without the number of its block, if it has one."""
    return re.sub(r"^block_\d+\.", "", name)


def _is_of_blocks(names: Iterable[str]) -> bool:
    return any(_in_its_block(name) != name for name in names)


def _parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_in_its_block(name).partition(".")[0] for name in names))


def _differences(
    file: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    unused: Callable[[str], bool],
) -> list[str]:
    """In what a file differs from what is wanted of it; `shapes` are those of the whole network."""
    there = file.tensors
    apart = "" if isinstance(file, TensorFile) else _APART
    if wanted and _is_of_blocks(there) != _is_of_blocks(wanted):
        is_whole = _is_of_blocks(wanted)
        what = "one network" if is_whole else "blocks that are trained alone"
        methods = " or ".join(f"--method {one.name}" for one in METHODS.values() if one.one_network == is_whole)
        return [f"it has the names of {what}; use {methods}, or write the tensors under other names"]
    missing = [name for name in wanted if name not in there]
    extra = [name for name in there if name not in shapes and not unused(name)]
    reshaped = [name for name, shape in wanted.items() if name in there and there[name].shape != shape]
    unreadable = [name for name in wanted if name in there and there[name].dtype not in READABLE]
    found = []
    if missing:
        cure = "Give the settings that the file's network had, or write the tensors under these names"
        found.append(
            f"it lacks {len(missing)} of the {len(shapes)} tensors of this network: {_listed(missing)}. {apart or cure}"
        )
    if extra:
        cure = "Leave them out of the file"
        found.append(f"{len(extra)} of its tensors are not of this network: {_listed(extra)}. {apart or cure}")
    if reshaped:
        pairs = [f"{name} is {_sizes(there[name].shape)}, here {_sizes(wanted[name])}" for name in reshaped]
        cure = "Give the settings that the file's network had, or let these parts start from the seed with --set "
        cure += f"init_fresh={','.join(_parts(reshaped))}"
        found.append(f"{len(reshaped)} of its tensors have other shapes: {_listed(pairs)}. {apart or cure}")
    if unreadable:
        pairs = [f"{name} is {shown(there[name].dtype)}" for name in unreadable]
        found.append(f"{len(unreadable)} of its tensors are of no type that is read: {_listed(pairs)}. Use float32")
    return found


def _other_classes(
    theirs: Sequence[str] | None, ours: Sequence[str], of_classes: Callable[[], Sequence[str]]
) -> list[str]:
    """In what the classes of a file differ from the data's: as many others, or the same ones in another order.

    Args:
        theirs: None where the file does not tell.
        of_classes: gives the names of the tensors that are taken from the file and have a part for each class.
    """
    if theirs is None or list(map(_plain, theirs)) == list(map(_plain, ours)) or not (tensors := of_classes()):
        return []
    if sorted(map(_plain, theirs)) == sorted(map(_plain, ours)):
        number = next(number for number, (a, b) in enumerate(zip(theirs, ours, strict=True)) if _plain(a) != _plain(b))
        differ = f"the data's classes in another order: class {number} is {shown(theirs[number])}, "
        differ += f"here {shown(ours[number])}"
    else:
        differ = f"other classes: {_listed(theirs)}; the data have {_listed(ours) or 'none'}"
    return [
        f"it is of {differ}. Name the classes so that they are the file's, or let what is of classes start from the "
        f"seed with --set init_fresh={','.join(_parts(tensors))}"
    ]


def _plain(name: str) -> str:
    """A name as it is compared: systems differ in how they write letters with accents."""
    return unicodedata.normalize("NFC", name)


def _class_names(file: Weights) -> list[str] | None:
    """The names of the file's classes; None where it does not tell, as those of others and of an earlier edgeblocks."""
    try:
        names = parse_json(file.metadata.get(CLASS_NAMES, "null"))
    except MalformedFileError:
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _by_class(family: Family, shapes: Callable[[Family], Mapping[str, tuple[int, ...]]]) -> list[str]:
    """Names of the tensors that have another shape where there is one more class."""
    if not isinstance(family.data, ImageInfo):
        return []
    make: Callable[[object, object], Family] = type(family)
    more = shapes(make(family.settings, replace(family.data, num_classes=family.data.num_classes + 1)))
    return [name for name, shape in shapes(family).items() if more.get(name) != shape]


def _values_that_are_no_numbers(file: Weights, wanted: Iterable[str]) -> list[str]:
    wrong = [name for name in wanted if not all(bool(piece.isfinite().all()) for _, piece in file.pieces(name))]
    if not wrong:
        return []
    return [
        f"{len(wrong)} of its tensors hold NaN or infinite values: {_listed(wrong)}. Its training had diverged: "
        f"take an earlier file"
    ]


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _NAMES_SHOWN} more" if len(items) > _NAMES_SHOWN else ""
    return f"{', '.join(shown(item).strip(chr(39)) for item in items[:_NAMES_SHOWN])}{more}"


def _sizes(shape: Sequence[int]) -> str:
    """
    >>> _sizes((10, 32)), _sizes(())
    ('10x32', 'one number')
    """
    return "x".join(map(str, shape)) or "one number"
