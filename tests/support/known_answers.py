"""What is the same for every run of a shape, found once: costs and exported graphs. And a machine of given speeds.

To trace a shape's costs in a process of its own takes 11 s, most of it to import torch; to trace the graph that is
exported takes 10 to 20 s; to measure this machine takes 0.3 s and writes 32 MiB, and to time a network's block takes
0.5 s, each time. Tests of these things ask for `traced_apart`, `exported_anew` and `measured_speeds`; every export is
verified against torch in any case.
"""

import hashlib
import json
import os
import pickle
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeblocks import prepare
from edgeblocks.children import python_module
from edgeblocks.planning.plans import Correction
from edgeblocks.profiling import trace
from edgeblocks.registry import build_family
from edgeblocks.targets import cpu
from edgeblocks.targets.disk import DiskSpeed
from edgeblocks.training import real_steps

TAKEN = {"peak_bytes": 300_000_000, "own_bytes": 0}
"""By a child process that traces costs, about; of it beside this one nothing, as there is none."""
TRACING_BYTES = trace.TRACING_BYTES
DEPTH = 12
KINDS = ("plain", "checkpointed", "forward")
_MEASURED = ("_measure_arithmetic", "measure_disk", "checksum_s_per_byte")
_REAL = [(cpu, name, getattr(cpu, name)) for name in _MEASURED]
_REAL += [(prepare, "with_timed_block", prepare.with_timed_block)]


def _arithmetic() -> tuple[float, float, float]:
    cpu.run_every_kernel()  # their code and scratch memory belong to what the process occupies
    return 6e10, 2e10, 6e-6


def _with_timed_block(settings, data, costs, machine, target, *, budget_bytes):
    """Steps are as the model says, and any time is as expected."""
    gain = None if settings.run.precision == "fp32" else 1.0
    return replace(machine, half_gain=gain, correction=Correction(least=0.0, most=1e6, origin="block"))


def _disk(folder, *, probe_bytes, limit_s, num_syncs=0) -> DiskSpeed:
    return DiskSpeed(
        probe_bytes=probe_bytes, write_bytes_per_s=4e8, read_bytes_per_s=1e9, read_way="direct", sync_s=None
    )


def _kept(request: dict[str, Any], samples: int) -> Path:
    """Where an answer lies for all processes of this session; one for all depths, which change the number alone."""
    shape = {**request, "settings": _as_deep(request["settings"]), "sample_counts": samples}
    name = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return Path(os.environ["EDGEBLOCKS_CACHE"]) / f"traced-{name}"


def _as_deep(settings: dict[str, Any]) -> dict[str, Any]:
    """A model's folder says itself how many layers it has."""
    return {**settings, "depth": DEPTH} if "depth" in settings else settings


def _costs(request: dict[str, Any]) -> dict[str, Any]:
    """Traced with so many layers that every family has them; each micro-batch of a shape is traced once.

    Only the smallest and the largest micro-batch are: what lies between is on a straight line, or a little below it.
    """
    wanted = sorted(set(request["sample_counts"]))
    counts = sorted({wanted[0], wanted[-1]})
    missing = [samples for samples in counts if not _kept(request, samples).exists()]
    if missing:
        settings = _as_deep(request["settings"])
        family = build_family(request["family"], settings, request["data"], request["method"])
        traced = asdict(trace.trace(family, missing, precision=request["precision"], device=request["device"]))
        for number, samples in enumerate(missing):
            one = {**traced, **{kind: traced[kind][number] for kind in KINDS}}
            _keep(_kept(request, samples), json.dumps(one).encode())
    low, high = (json.loads(_kept(request, samples).read_bytes()) for samples in (counts[0], counts[-1]))
    kinds = {kind: [_between(low[kind], high[kind], samples) for samples in wanted] for kind in KINDS}
    return {**low, **kinds, "num_layers": request["settings"].get("depth", low["num_layers"])}


def _between(low: dict[str, Any], high: dict[str, Any], samples: int) -> dict[str, Any]:
    """A step's costs at a micro-batch between two others."""
    share = (samples - low["samples"]) / max(1, high["samples"] - low["samples"])

    def value(name: str, layers: str) -> int:
        return round(low[name][layers] + share * (high[name][layers] - low[name][layers]))

    growths = {name: {layers: value(name, layers) for layers in low[name]} for name in low if name != "samples"}
    return {"samples": samples, **growths}


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def _answer(command, *, input, **_):
    """What `python -m edgeblocks.profiling.trace` answers, made here."""
    assert command == python_module("edgeblocks.profiling.trace")
    request = json.loads(input)
    try:
        build_family(request["family"], request["settings"], request["data"], request["method"])
        answer = json.dumps({**_costs(request), **TAKEN})
    except Exception:
        return SimpleNamespace(returncode=1, stdout="", stderr=traceback.format_exc())
    return SimpleNamespace(returncode=0, stdout=answer, stderr="")


def _make_template(family: Any, num_layers: int) -> Any:
    """A graph without its weights: kept where all processes of this session find it."""
    from edgeblocks.export import graph

    # A network is given numbers that were scaled before: the data's mean and scale are not in its graph.
    settings, data = asdict(family.settings) | {"depth": 0}, trace.shapes_of(family.data)
    shape = (type(family).__qualname__, settings, data, num_layers)
    path = Path(os.environ["EDGEBLOCKS_CACHE"]) / f"graph-{hashlib.sha256(repr(shape).encode()).hexdigest()}"
    if path.exists():
        return pickle.loads(path.read_bytes())
    made = graph.make_template(family, num_layers)
    _keep(path, pickle.dumps(made))
    return made


def _stand_ins(values) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for module, name, value in values:
            patched.setattr(module, name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def known_answers():
    """For all tests that do not ask for others."""
    from edgeblocks.export import export_run

    yield from _stand_ins(
        [
            (trace, "subprocess", SimpleNamespace(run=_answer)),
            (trace, "TRACING_BYTES", 0),
            (cpu, "_measure_arithmetic", _arithmetic),
            (cpu, "measure_disk", _disk),
            (cpu, "checksum_s_per_byte", lambda: 6e-10),
            (prepare, "with_timed_block", _with_timed_block),
            # No run of a test's is kept for the plans of the next one.
            (real_steps, "WARM_STEPS", 10**9),
            (export_run, "make_template", _make_template),
        ]
    )


@pytest.fixture(scope="module")
def measured_speeds(known_answers):
    """Speeds are those of this machine, measured each time."""
    yield from _stand_ins(_REAL)


@pytest.fixture(scope="module")
def traced_apart(known_answers, tmp_path_factory):
    """Costs are traced in a process of its own, and kept where no answer lies that was made in this one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EDGEBLOCKS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield from _stand_ins([(trace, "subprocess", subprocess), (trace, "TRACING_BYTES", TRACING_BYTES)])


@pytest.fixture
def exported_anew(known_answers):
    """Graphs are traced when they are exported."""
    from edgeblocks.export import export_run, graph

    yield from _stand_ins([(export_run, "make_template", graph.make_template)])
