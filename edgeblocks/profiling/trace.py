"""What a block costs in bytes and arithmetic, found without allocating it.

Steps of blocks of one to three layers are traced on torch's meta device: operators run on shapes alone, while a
dispatch mode follows which storages are alive. A peak grows linearly with layers, so these few traces give every block
size. Meta operators import some 50 MB of symbolic libraries that a training process would never give back, hence the
trace runs in a process of its own (`trace_in_subprocess`). Its answer is kept in the cache folder: it is the same until
the network, this package's code or torch change, and planning or sampling again need not wait for it.
"""

import contextlib
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import psutil

from edgeblocks.children import python_module
from edgeblocks.errors import MAY_BE_REFUSALS, EdgeblocksError, is_refusal
from edgeblocks.methods import MethodName, Precision
from edgeblocks.planning.layer_costs import Ends, Growth, LayerCosts, StepCost, most_of
from edgeblocks.profiling.kept_answers import fingerprint, keep_answer, kept_answer
from edgeblocks.registry import build_family, build_target, import_own_family, own_family

if TYPE_CHECKING:
    import torch

    from edgeblocks.families.base import DataInfo
    from edgeblocks.families.family import Family

RUN_TO_RUN_BYTES = 3_000_000
"""The child's peak differs by this much from one run to the next."""
TRACING_BYTES = 220_000_000
"""What the child takes beside the libraries' code, measured 175 to 200 MB whatever the network; to import torch alone
takes most of it."""
_KINDS = ("plain", "checkpointed", "forward")
"""Of steps that are traced; see `LayerCosts`."""
_REFUSED = {"refused": True}
"""The child's answer where it was refused memory."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Costs, and what the process that traced them took.

    `peak_bytes` is its largest resident set; `own_bytes` that without the libraries' code, which it shares with the
    process that waits for it.
    """

    costs: LayerCosts
    peak_bytes: int
    own_bytes: int


class NoRoomToTraceError(Exception):
    """The process that traces has too little room: it was not started, or was refused memory."""


def shapes_of(data: "DataInfo") -> dict[str, object]:
    """What of a data set shapes a network's tensors: sets that differ in nothing else, as in their mean, share answers.

    Its fields, with 1 in the place of numbers that are not whole.
    """
    return {name: 1.0 if isinstance(value, float) else value for name, value in asdict(data).items()}


def trace_in_subprocess(
    family_name: str,
    settings: Mapping[str, object],
    data: Mapping[str, object],
    sample_counts: Sequence[int],
    *,
    method: MethodName = "diffusion",
    precision: Precision = "fp32",
    device: str = "cpu",
    architecture: str = "",
    cache: Path | None = None,
    room_bytes: int | None = None,
) -> Traced:
    """`LayerCosts` of a family, traced by a child process that leaves nothing behind in this one.

    Args:
        settings, data: fields of the family's settings and data description, as JSON values.
        sample_counts: micro-batches to trace.
        device: the kind of device that the network will be on.
        architecture: what of the network's shape is not in the settings, but in a file that they name.
        cache: a folder of former answers, one file a sample count, looked up and added to; None traces in any case.
        room_bytes: what the child may take beside the libraries' code; None does not bound it.

    Raises:
        NoRoomToTraceError: it takes more, or would.
        EdgeblocksError: the family cannot be traced.
    """
    request: dict[str, Any] = {"family": family_name, "settings": settings, "data": data, "method": method}
    request |= {"precision": precision, "device": device, "architecture": architecture}
    request["own_family"] = own_family(family_name)
    kept = {count: cache / f"costs-{fingerprint([request, count])}.json" for count in sample_counts} if cache else {}
    answers = {count: answer for count, path in kept.items() if (answer := _known(path)) is not None}
    missing = sorted(set(sample_counts) - answers.keys())
    if missing:
        if room_bytes is not None and room_bytes < TRACING_BYTES:
            raise NoRoomToTraceError  # the cap comes after the imports, which would pass it
        traced = _ask_child({**request, "sample_counts": missing, "room_bytes": room_bytes})
        for count in missing:
            answers[count] = {
                **traced,
                **{kind: [one for one in traced[kind] if one["samples"] == count] for kind in _KINDS},
            }
            if count in kept:
                keep_answer(kept[count], answers[count])
    parsed = [_parse_answer(answers[count]) for count in sorted(answers)]
    steps: dict[str, Any] = {
        kind: tuple(step for one in parsed for step in getattr(one.costs, kind)) for kind in _KINDS
    }
    return Traced(
        costs=replace(parsed[0].costs, **steps),
        peak_bytes=max(one.peak_bytes for one in parsed),
        own_bytes=max(one.own_bytes for one in parsed),
    )


def _ask_child(request: Mapping[str, object]) -> dict[str, Any]:
    """The answer of a child process, as `main` gives it."""
    command = python_module("edgeblocks.profiling.trace")
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EdgeblocksError(
            f"the cost trace of '{request['family']}' failed (exit {done.returncode}):", *done.stderr.splitlines()
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer == _REFUSED:
        raise NoRoomToTraceError
    return answer


def _known(path: Path) -> dict[str, Any] | None:
    """A former answer; None where there is none, or a damaged one."""
    answer = kept_answer(path)
    # A damaged answer would be a plan that does not fit; asking again takes seconds.
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        if answer is not None:
            _parse_answer(answer)
            return answer
    return None


def _parse_answer(answer: Mapping[str, Any]) -> Traced:
    """The child's answer; anything else raises one of the errors that using JSON as something it is not can raise."""
    fields = dict(answer)
    taken = {name: int(fields.pop(name)) for name in ("peak_bytes", "own_bytes")}
    for kind in _KINDS:
        fields[kind] = tuple(_step_cost(step) for step in fields[kind])
    return Traced(costs=LayerCosts(**fields), **taken)


def _step_cost(fields: Mapping[str, Any]) -> StepCost:
    growths = {name: Growth(**fields[name]) for name in ("peak_bytes", "heap_bytes", "touched_bytes", "operators")}
    return StepCost(samples=int(fields["samples"]), **growths)


def trace(
    family: "Family", sample_counts: Sequence[int], *, precision: Precision = "fp32", device: str = "cpu"
) -> LayerCosts:
    """`LayerCosts` of a family, traced in this process on the meta device (`step_trace`).

    Of a network with layers of several kinds, the most that each number is with any of them: a plan may promise too
    much memory, not too little.
    """
    return most_of([_trace_layers(one, sample_counts, precision, device) for one in family.uniform()])


def _trace_layers(family: "Family", sample_counts: Sequence[int], precision: Precision, device: str) -> LayerCosts:
    """Of a family whose layers are alike, or repeat."""
    import torch

    from edgeblocks.offload.block_buffer import Optimizer, state_bytes
    from edgeblocks.optim.adamw import CHUNK_SIZE, GPU_CHUNK_SIZE

    period = family.layer_period
    # Every layer has as many parameters, so one layer more gives those of a layer, and what is left of one layer with
    # stem, or readout, or both or neither gives theirs.
    ones = {ends: _count_parameters(family, 1, ends) for ends in get_args(Ends)}
    two = _count_parameters(family, 2, "whole")
    optimizers = get_args(Optimizer)
    moments = {
        ends: {optimizer: state_bytes(*counts, optimizer)["optimizer"] for optimizer in optimizers}
        for ends, counts in ones.items()
    }
    layer_moments = {
        optimizer: state_bytes(*two, optimizer)["optimizer"] - moments["whole"][optimizer] for optimizer in optimizers
    }
    layer_parameters = two[0] - ones["whole"][0]
    flops = [_flops(family, num_layers) for num_layers in (period, 2 * period)]
    # By periods: layers inside one may differ, as of prelude, core and coda.
    layer_flops = (flops[1] - flops[0]) // period
    kinds = {
        kind: tuple(_trace_growth(family, samples, kind, precision, device) for samples in sorted(set(sample_counts)))
        for kind in _KINDS
    }
    hidden_bytes, condition_bytes = _carried_bytes(family, precision, device)
    return LayerCosts(
        num_layers=family.num_layers,
        end_parameters={ends: count - layer_parameters for ends, (count, _) in ones.items()},
        layer_parameters=layer_parameters,
        end_moments={
            ends: {optimizer: of_one[optimizer] - layer_moments[optimizer] for optimizer in optimizers}
            for ends, of_one in moments.items()
        },
        layer_moments=layer_moments,
        workspace_bytes=_workspace_bytes(torch.get_num_threads(), CHUNK_SIZE),
        # Of our own step: bitsandbytes', where it makes the step, takes less.
        gpu_workspace_bytes=_workspace_bytes(1, GPU_CHUNK_SIZE),
        batch_bytes_per_sample=sum(_num_bytes(shape, dtype) for shape, dtype in family.batch_spec(1).values()),
        stem_readout_flops_per_sample=flops[0] - period * layer_flops,
        layer_flops_per_sample=layer_flops,
        hidden_bytes_per_sample=hidden_bytes,
        condition_bytes_per_sample=condition_bytes,
        always_checkpointed=family.always_checkpointed,
        **kinds,
    )


def _workspace_bytes(num_threads: int, chunk_size: int) -> dict[str, int]:
    from edgeblocks.optim.adamw import workspace_bytes

    usual, rounded = (
        workspace_bytes(num_threads=num_threads, chunk_size=chunk_size, rounds=rounds) for rounds in (False, True)
    )
    return {"adamw8bit": usual, "adamw": 0, "rounded": rounded}


def _carried_bytes(family: "Family", precision: Precision, device: str) -> tuple[int, int]:
    """Of one sample's hidden values and condition, which go from stage to stage."""
    import torch

    from edgeblocks.families.family import EndToEnd
    from edgeblocks.families.precision import computing_in

    if not isinstance(family, EndToEnd):
        return 0, 0
    with torch.device("meta"), torch.no_grad():
        block = family.block(num_layers=1, checkpointing=False)
        block.reset_tables_()
        batch = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in family.batch_spec(1).items()}
        with computing_in(precision, "meta", traced_for=device):
            hidden, condition = family.enter(block, batch)
    return _num_bytes(hidden.shape, hidden.dtype), _num_bytes(condition.shape, condition.dtype)


def _count_parameters(family: "Family", num_layers: int, ends: Ends) -> tuple[int, int]:
    """Parameters of some layers with what is beside them, and those of them whose optimizer state may be 8-bit."""
    import torch

    from edgeblocks.offload.block_buffer import is_quantizable
    from edgeblocks.offload.sections import Section, network_of

    section = Section(num_layers=num_layers, stem=ends in ("whole", "first"), readout=ends in ("whole", "last"))
    with torch.device("meta"):
        parameters = list(network_of(family, section).parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if is_quantizable(p.shape))


def _trace_growth(family: "Family", samples: int, kind: str, precision: Precision, device: str) -> StepCost:
    """From blocks of one, two and three layers, or as many periods of a structure that repeats after some layers."""
    from edgeblocks.profiling.step_trace import traced_step

    period = family.layer_period
    traces = [
        traced_step(family, period * count, samples, kind, precision=precision, device=device) for count in (1, 2, 3)
    ]
    growths = {
        name: _growth(*(getattr(found, name) for found in traces), period=period)
        for name in ("peak_bytes", "heap_bytes", "touched_bytes", "operators")
    }
    return StepCost(samples=samples, **growths)


def _growth(one: int, two: int, three: int, *, period: int) -> Growth:
    """Of a quantity at one, two and three periods; the line through the last two, where a period is several layers."""
    if period == 1:
        return Growth(one=one, two=two, three=three)
    # Rounded up: a plan may promise too much memory, not too little.
    a_layer = math.ceil((three - two) / period)
    start = three - 3 * period * a_layer
    return Growth(one=start + a_layer, two=start + 2 * a_layer, three=start + 3 * a_layer)


def _num_bytes(shape: Sequence[int], dtype: "torch.dtype") -> int:
    count = 1
    for size in shape:
        count *= size
    return count * int(dtype.itemsize)


def _flops(family: "Family", num_layers: int) -> int:
    """Floating-point operations of a forward pass of one sample, counted by torch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        block = family.block(num_layers=num_layers, checkpointing=False)
        block.reset_tables_()
        batch = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in family.batch_spec(1).items()}
        family.loss(block, batch)
    return int(counter.get_total_flops())


class _NoCompiler(ModuleType):
    """Stands for `torch._dynamo` while nothing is compiled; whatever but `disable` is asked of it brings the real one.

    At the first operator that a dispatch mode sees, torch imports its compiler only to tell it to leave that alone:
    1.3 s, and 39 MB, which would be the largest share of the smallest budget.
    """

    def disable(self, function: object, recursive: bool = True, wrapping: bool = True) -> object:
        return function

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        sys.modules.pop(self.__name__, None)
        return getattr(importlib.import_module(self.__name__), name)


def trace_without_compiler(
    family: "Family", sample_counts: Sequence[int], *, precision: Precision = "fp32", device: str = "cpu"
) -> LayerCosts:
    """`trace` in a process that does nothing else: torch's compiler is imported only for a network that uses it."""
    name = "torch._dynamo"
    sys.modules[name] = _NoCompiler(name)
    try:
        return trace(family, sample_counts, precision=precision, device=device)
    except ImportError:  # the network imports a part of it
        sys.modules.pop(name, None)
        return trace(family, sample_counts, precision=precision, device=device)


def main() -> None:
    """Answer one request on standard input (see `trace_in_subprocess`) with `LayerCosts` as JSON."""
    request = json.load(sys.stdin)
    if request["own_family"] is not None:
        import_own_family(request["own_family"])
    family = build_family(request["family"], request["settings"], request["data"], request["method"])
    target, room_bytes = build_target("cpu"), request["room_bytes"]
    bound = contextlib.nullcontext() if room_bytes is None else target.capped(room_bytes + _shared_bytes())
    try:
        with bound:
            where = {"precision": request["precision"], "device": request["device"]}
            costs = asdict(trace_without_compiler(family, request["sample_counts"], **where))
    except MAY_BE_REFUSALS as error:
        if not is_refusal(error):
            raise
        print(json.dumps(_REFUSED))
        return
    peak_bytes = target.peak_bytes() + RUN_TO_RUN_BYTES
    print(json.dumps({**costs, "peak_bytes": peak_bytes, "own_bytes": peak_bytes - _shared_bytes()}))


def _shared_bytes() -> int:
    """Of the resident set, what other processes have too: code of the interpreter and of libraries."""
    memory = psutil.Process().memory_full_info()
    return int(memory.rss - memory.uss)


if __name__ == "__main__":
    main()
