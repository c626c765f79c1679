"""What could crash, hang or leave memory behind (libraries, kernels, a GPU's driver), run in child processes.

`python -m edgeblocks.doctor.probes --probe NAME ..` answers one line of JSON a probe. A child that dies is an answer
too: the probe it was at does not work here, for this reason, and another child goes on with the next one.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeblocks.children import python_module
from edgeblocks.doctor.findings import PATIENCE_S, PresetFit
from edgeblocks.doctor.kernels import KERNELS
from edgeblocks.doctor.training_here import training_uses
from edgeblocks.errors import DoesNotFitError
from edgeblocks.planning.planner import make_plan
from edgeblocks.planning.plans import Machine, PlanRequest, micro_batches
from edgeblocks.progress import Silent
from edgeblocks.registry import build_family, build_target, family_type

_LINK_PROBE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A probe's value, or None and the reason why there is none.

    failed: it raised or crashed. Without a value and not failed, it was not known when the time was up: on a busy
    machine a slow probe cannot be told from one that hangs.
    """

    value: Any = None
    reason: str | None = None
    failed: bool = False


def ask(
    names: Sequence[str], request: Mapping[str, object] | None = None, *, limit_s: float, deadline: float
) -> dict[str, Answer]:
    """Run probes one after the other in a child process; one that takes the child with it does not stop the others.

    Args:
        request: the probes' arguments, plain values.
        limit_s: time for all of them.
        deadline: `time.monotonic()` after which nothing runs any more.
    """
    end = min(time.monotonic() + limit_s, deadline)
    answers: dict[str, Answer] = {}
    while left := [name for name in names if name not in answers]:
        remaining_s = end - time.monotonic()
        if remaining_s < 1:
            answers |= {name: Answer(reason="not tried: the time was up") for name in left}
            break
        lines, ending = _run_child(left, request or {}, remaining_s)
        for line in lines:
            answer = json.loads(line)
            failed = answer["value"] is None
            answers[answer["name"]] = Answer(value=answer["value"], reason=answer["reason"], failed=failed)
        unanswered = next((name for name in left if name not in answers), None)
        if unanswered is not None:
            answers[unanswered] = ending
    return answers


def _run_child(names: Sequence[str], request: Mapping[str, object], limit_s: float) -> tuple[list[str], Answer]:
    """The finished lines of a child's answer, and the answer of the probe at which it ended, if it did not finish."""
    command = python_module("edgeblocks.doctor.probes", "--probe", *names)
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        return _whole_lines(error.stdout), Answer(reason=f"no answer within {limit_s:.0f} s")
    except OSError as error:
        return [], Answer(reason=f"no process could be started: {error.strerror}")
    last_words = done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
    reason = f"its process ended with {done.returncode}: {last_words}"
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            reason = f"it crashed ({signal.Signals(-done.returncode).name})"
    return _whole_lines(done.stdout), Answer(reason=reason, failed=True)


def _whole_lines(output: bytes | None) -> list[str]:
    return [line for line in (output or b"").decode().splitlines(keepends=True) if line.endswith("\n")]


def _probe_gpus() -> dict[str, object]:
    """The GPUs that torch can use, and why there are none."""
    import warnings

    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return {"gpus": [], "note": f"torch {torch.__version__} is built without CUDA"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reason = " ".join(str(caught[-1].message).split()) if caught else "torch.cuda.is_available() is False"
        return {"gpus": [], "note": reason}
    return {"gpus": [_probe_gpu(index) for index in range(torch.cuda.device_count())], "note": None}


def _probe_gpu(index: int) -> dict[str, object]:
    """Memory and link speed of a GPU. The link is measured as for a plan, which was done on a GPU (docs/gpu.md)."""
    import torch

    device = torch.device("cuda", index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    to_gpu = from_gpu = None
    probe_bytes = max(2**20, min(_LINK_PROBE_BYTES, free_bytes // 4))
    # A target keeps a stream of the GPU that it copies to, hence one for each. torch's out-of-memory errors, of the GPU
    # and of the host, mean that its memory is full.
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        gpu = build_target("cuda").device
        assert gpu is not None
        to_gpu, from_gpu = gpu.link_bytes_per_s(probe_bytes)
    return {
        "name": torch.cuda.get_device_name(device),
        "total_bytes": total_bytes,
        "free_bytes": free_bytes,
        "to_gpu_bytes_per_s": to_gpu,
        "from_gpu_bytes_per_s": from_gpu,
    }


def _probe_machine(folder: Path) -> Machine:
    """The planner's view of this machine, with the libraries loaded that a training process has."""
    from PIL import Image

    from edgeblocks.profiling.measurement import measured_machine

    for name in ("api", "cli.main", "cli.console_progress"):
        importlib.import_module(f"edgeblocks.{name}")
    Image.init()
    target = build_target("cpu")
    target.prepare()
    return measured_machine(target, folder)


def _probe_presets() -> dict[str, dict[str, object]]:
    """The arguments of `_plan_preset` for each preset: the default ones on the built-in data, others on 32x32x3 images
    or 4,096 byte pairs.

    A process of its own, because the settings' libraries would weigh on the peak of the one that traces.
    """
    from edgeblocks.families.base import ImageInfo, TextInfo
    from edgeblocks.profiling.looks import grid_sample_bytes
    from edgeblocks.runs.open_data import open_run_data
    from edgeblocks.settings.presets import DEFAULT_PRESETS, preset_names
    from edgeblocks.settings.reading import resolve_settings
    from edgeblocks.tasks import TASKS

    requests: dict[str, dict[str, object]] = {}
    for name in preset_names():
        settings = resolve_settings({"preset": name}, family_settings=lambda family: family_type(family).settings_type)
        run, kind = settings.run, family_type(settings.run.family)
        if name in DEFAULT_PRESETS.values():
            here = build_target("cpu")
            data_set = open_run_data(settings, Silent(), budget_bytes=here.total_bytes(), target=here)
            data, data_bytes = kind.data_info(data_set), data_set.batch_resident_bytes(run.batch)
        elif kind.reads == "text":
            data = TextInfo(vocabulary=4096, length=run.length)
            data_bytes = run.batch * data.example_bytes
        else:
            data = ImageInfo(channels=3, height=32, width=32, num_classes=10, mean=0.5, scale=2.0)
            data_bytes = run.batch * (data.height * data.width * data.channels + 8)
        request = PlanRequest(
            budget_bytes=1,
            batch=run.batch,
            steps=run.steps,
            optimizer=run.optimizer,
            preferred_blocks=kind.preferred_blocks,
            data_bytes=data_bytes,
            grid_samples=TASKS[kind.task].grid_samples,
            sample_bytes=grid_sample_bytes(build_family(run.family, asdict(settings.family), asdict(data))),
        )
        family = {"name": run.family, "settings": asdict(settings.family), "data": asdict(data)}
        fields = asdict(request)
        del fields["method"]  # the usual one, and no JSON
        requests[name] = {"family": family, "request": fields}
    return requests


def _example(data: Mapping[str, object]) -> str:
    """One example of the data, in short."""
    if "length" in data:
        return f"{data['length']} tokens"
    return f"{data['height']}x{data['width']}x{data['channels']}"


def _plan_preset(name: str, asked: Mapping[str, Any]) -> dict[str, object]:
    """The fields of a `PresetFit`, as `edgeblocks plan` plans: in a process that traces costs and does nothing else."""
    from edgeblocks.profiling import trace

    preset = asked["presets"][name]
    data, request = preset["family"]["data"], PlanRequest(**preset["request"])
    sizes = micro_batches(request.batch)
    costs = trace.trace_without_compiler(
        build_family(**preset["family"]), sorted({sizes[0], sizes[len(sizes) // 2], 1})
    )
    machine = Machine.of(asked["machine"])
    own_peak_bytes = build_target("cpu").peak_bytes() + trace.RUN_TO_RUN_BYTES
    machine = replace(machine, planning_bytes=max(machine.planning_bytes, own_peak_bytes))
    budget_bytes = int(asked["budget_bytes"])
    fit = PresetFit(
        preset=name,
        example=_example(data),
        parameters=costs.parameters(costs.num_layers),
        budget_bytes=budget_bytes,
        steps=request.steps,
    )
    try:
        make_plan(costs, machine, request)
    except DoesNotFitError as error:
        fit = replace(fit, smallest_bytes=error.smallest_bytes)
    try:
        plan = make_plan(costs, machine, replace(request, budget_bytes=budget_bytes))
    except DoesNotFitError:
        return asdict(replace(fit, fits=False, sensible=False))
    chosen = plan.chosen
    step_s = chosen.step_s + chosen.streaming_s
    return asdict(
        replace(
            fit,
            parameters=plan.parameters,
            fits=True,
            sensible=plan.predicted_s <= PATIENCE_S and chosen.disk_bytes <= asked["free_disk_bytes"],
            blocks=chosen.blocks,
            layers_per_block=chosen.layers_per_block,
            micro_batch=chosen.micro_batch,
            checkpointing=chosen.checkpointing,
            tier=chosen.tier,
            predicted_peak_bytes=chosen.predicted_peak_bytes,
            disk_bytes=chosen.disk_bytes,
            step_s=step_s,
            total_s=plan.predicted_s,
        )
    )


def _run_probe(name: str, request: Mapping[str, Any]) -> object:
    if name in KERNELS:
        return KERNELS[name].run()
    if name == "gpus":
        return _probe_gpus()
    if name == "training":
        return [asdict(use) for use in training_uses()]
    if name == "machine":
        return asdict(_probe_machine(Path(request["folder"])))
    if name == "presets":
        return _probe_presets()
    return _plan_preset(name, request)


def main() -> None:
    """Run the probes named after `--probe` with the request on standard input; print a line of JSON for each."""
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is not an answer
        for name in sys.argv[2:]:
            answer: dict[str, Any] = {"name": name, "value": None, "reason": None}
            try:
                answer["value"] = _run_probe(name, request)
            except Exception as error:
                # Whatever a library raises is a finding.
                answer["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
