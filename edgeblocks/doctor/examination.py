"""What this machine can do, measured: `edgeblocks doctor`.

The process that asks stays small and imports neither torch nor onnxruntime; what could crash or hang runs in child
processes (`probes`). All together ends within `LIMIT_S`.
"""

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeblocks.doctor.findings import PATIENCE_S, Budgets, Disk, Gpu, Kernel, PresetFit, Report, TrainingUse
from edgeblocks.doctor.kernels import KERNELS, kernel_names
from edgeblocks.doctor.probes import Answer, ask
from edgeblocks.doctor.problems import find_problems
from edgeblocks.doctor.surroundings import (
    examine_disk,
    examine_memory,
    examine_processor,
    installed_versions,
    nvidia_gpus,
)
from edgeblocks.errors import ConfigError
from edgeblocks.files.cgroups import CGROUPS
from edgeblocks.planning.plans import Machine
from edgeblocks.progress import Listener, Silent
from edgeblocks.settings.presets import preset_names
from edgeblocks.units import ABOUT_THE_SAME, advised_budget, format_bytes, format_count, format_duration

LIMIT_S = 28.0
"""Probes that have not answered by then are left out, with that as their reason."""


def examine(
    folder: Path, listener: Listener | None = None, *, limit_s: float = LIMIT_S, cgroups: Path = CGROUPS
) -> Report:
    """Measure this machine with `folder` as the work directory. What is not done after `limit_s` is left out.

    Raises:
        ConfigError: `folder` is not a directory.
        StorageError: it cannot be written to.
    """
    started = time.monotonic()
    deadline = started + limit_s
    listener = listener or Silent()
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise ConfigError(f"--work-dir {folder} {what}; create it with: mkdir -p {folder}, or name another one")
    listener.stage("looking at processor and memory")
    processor = examine_processor(cgroups)
    memory = examine_memory(cgroups)
    listener.stage("measuring the disk")
    disk = examine_disk(folder)
    versions = installed_versions()
    half_bytes = memory.usable_bytes // 2 // 10**6 * 10**6

    listener.stage("measuring the processor and torch's kernels")
    names = ("machine", "presets", "gpus", "training", *kernel_names("torch"))
    answers = ask(names, {"folder": str(folder)}, limit_s=limit_s / 2, deadline=deadline)
    machine, gpus, training = (answers[name] for name in ("machine", "gpus", "training"))
    listener.stage("planning the presets")
    requests: dict[str, Any] = answers["presets"].value or {}
    common = {"machine": machine.value, "budget_bytes": half_bytes, "free_disk_bytes": disk.free_bytes}
    plans = {}
    if machine.value is not None and requests:
        plans = ask(smallest_first(requests), {"presets": requests, **common}, limit_s=limit_s / 2, deadline=deadline)
    else:
        unplanned = "the machine" if machine.value is None else "the presets"
        why = machine.reason if machine.value is None else answers["presets"].reason
        plans = {name: Answer(reason=f"{unplanned}: {why}") for name in smallest_first(requests) or preset_names()}
    for library in ("onnxruntime", "bitsandbytes", "torchao"):
        if versions[library] is not None:
            listener.stage(f"running {library}")
            answers |= ask(kernel_names(library), limit_s=limit_s / 3, deadline=deadline)

    kernels = tuple(_kernel(name, answers.get(name)) for name in KERNELS)
    fits = [_preset_fit(name, answer, half_bytes) for name, answer in plans.items()]
    presets = tuple(sorted(fits, key=lambda fit: math.inf if fit.parameters is None else fit.parameters))
    report = Report(
        system=f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        processor=processor,
        memory=memory,
        disk=disk,
        gpus=None if gpus.value is None else tuple(Gpu(**gpu) for gpu in gpus.value["gpus"]),
        gpu_note=None if gpus.value is None else gpus.value["note"],
        machine=None if machine.value is None else Machine.of(machine.value),
        versions=versions,
        training=None if training.value is None else tuple(TrainingUse(**use) for use in training.value),
        kernels=kernels,
        presets=presets,
        budgets=Budgets(
            smallest_bytes=min((fit.smallest_bytes for fit in presets if fit.smallest_bytes), default=None),
            half_bytes=half_bytes,
            largest_bytes=int(0.9 * min(memory.available_bytes, memory.usable_bytes)) // 10**6 * 10**6,
        ),
        problems=(),
        unknown={},
        seconds=0.0,
    )
    asked = ("gpus", "machine", "presets", "training")
    unknown = {name: answers[name].reason or "" for name in asked if answers[name].value is None}
    return replace(
        report,
        problems=tuple(find_problems(report, nvidia_gpus=nvidia_gpus())),
        unknown={**unknown, **_unknown_fields(report)},
        seconds=round(time.monotonic() - started, 2),
    )


def _unknown_fields(report: Report) -> dict[str, str]:
    """Reasons of the fields that are None because they could not be found out, where no reason stands beside them."""
    found = {}
    if report.processor.load_1min is None:
        found["processor.load_1min"] = "this system keeps no load average"
    if report.processor.physical_cores is None:
        found["processor.physical_cores"] = "this system does not say"
    for name in ("write_bytes_per_s", "read_bytes_per_s", "sync_s"):
        if getattr(report.disk, name) is None:
            found[f"disk.{name}"] = report.disk.reason or ""
    if report.budgets.smallest_bytes is None:
        found["budgets.smallest_bytes"] = "no preset could be planned"
    return found


def report_text(report: Report) -> str:
    """The report for people: facts, kernels, presets, problems."""
    parts = [
        f"this machine, measured in {report.seconds:.0f} s",
        _aligned([["system", report.system], *_machine_rows(report)]),
        "libraries",
        _aligned([[name, version or "not installed"] for name, version in report.versions.items()]),
        "what a training here would use",
        _aligned(_training_rows(report)),
        "kernels, run here",
        _aligned([_kernel_row(kernel) for kernel in report.kernels]),
        f"presets at their own settings, in half of the memory ({format_bytes(report.budgets.half_bytes)})",
        _aligned(_preset_rows(report.presets)),
        "advice",
        _aligned([[line] for line in _advice(report)]),
    ]
    if report.unknown:
        parts += ["not found out", _aligned([[name, reason] for name, reason in report.unknown.items()])]
    if report.problems:
        parts += ["problems", "\n".join(f"  - {item.problem}\n      {item.cure}" for item in report.problems)]
    else:
        parts += ["problems", "  none found"]
    return "\n".join(parts)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns, indented; a row's last cell may be as long as it likes."""
    columns = range(max(map(len, rows), default=0))
    widths = [max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in columns]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _machine_rows(report: Report) -> list[list[str]]:
    processor, memory, disk, machine = report.processor, report.memory, report.disk, report.machine
    cores = f"{processor.cores} cores"
    if processor.physical_cores is not None:
        cores += f" ({processor.physical_cores} physical)"
    quota = "" if processor.quota_cores is None else f", a quota of {processor.quota_cores:g} cores"
    load = "?" if processor.load_1min is None else f"{processor.load_1min:.1f}"
    limit = (
        "" if memory.limit_bytes is None else f", of which a control group allows {format_bytes(memory.limit_bytes)}"
    )
    swap = (
        f"{format_bytes(memory.swap_used_bytes)} of {format_bytes(memory.swap_total_bytes)} used"
        if memory.swap_total_bytes
        else "none"
    )
    rows = [
        ["processor", f"{processor.name}, {cores}; this process may use {processor.allowed_cores}{quota}"],
        ["in use", f"{processor.others_share:.0%} by other programs, load average {load}"],
        ["memory", f"{format_bytes(memory.total_bytes)}{limit}; {format_bytes(memory.available_bytes)} available"],
        ["swap", swap],
        [
            "limits",
            ", ".join(
                f"ulimit -{letter} {'unlimited' if limit_bytes is None else format_bytes(limit_bytes)}"
                for letter, limit_bytes in (
                    ("d", memory.data_limit_bytes),
                    ("v", memory.address_limit_bytes),
                    ("f", disk.file_limit_bytes),
                )
            ),
        ],
        ["work directory", f"{disk.folder} ({disk.file_system} on {disk.mount_point})"],
        ["disk", f"{format_bytes(disk.free_bytes)} free of {format_bytes(disk.total_bytes)}; {_disk_speeds(disk)}"],
    ]
    if machine is not None:
        speeds = f"{machine.flops_per_s / 1e9:.0f} GFLOP/s fp32, {format_bytes(machine.memory_bytes_per_s)}/s"
        rows.insert(2, ["speed", f"{speeds} written by one pass, {format_duration(machine.operator_s)} a small kernel"])
    for gpu in report.gpus or ():
        link = " and ".join(
            f"{'?' if speed is None else format_bytes(speed) + '/s'} {way}"
            for speed, way in ((gpu.to_gpu_bytes_per_s, "to it"), (gpu.from_gpu_bytes_per_s, "from it"))
        )
        rows.append(
            ["gpu", f"{gpu.name}, {format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}; {link}"]
        )
    if not report.gpus:
        rows.append(["gpu", "not found out" if report.gpus is None else f"none ({report.gpu_note})"])
    else:
        rows.append(["", "edgeblocks train --target cuda uses it"])
    return rows


def _disk_speeds(disk: Disk) -> str:
    def speed(value: float | None) -> str:
        return "?" if value is None else f"{format_bytes(value)}/s"

    way = f" ({disk.read_way})" if disk.read_way else ""
    sync = "?" if disk.sync_s is None else format_duration(disk.sync_s)
    return (
        f"write {speed(disk.write_bytes_per_s)} with sync, read {speed(disk.read_bytes_per_s)}{way}, "
        f"{sync} a sync ({format_bytes(disk.probe_bytes)} tried)"
    )


_DEVICES = {"cpu": "processor", "cuda": "gpu"}


def _training_rows(report: Report) -> list[list[str]]:
    rows = []
    for use in report.training or ():
        precision = use.precision or "depends on the network"
        gain = use.half_product_gain
        faster = "" if gain is None else f"; products are {gain:.1f}x as fast as in fp32"
        by = use.adamw8bit + (f" ({use.adamw8bit_reason})" if use.adamw8bit_reason else "")
        attention = use.attention
        if use.attention_with_mask != attention:
            attention += f", with a mask {use.attention_with_mask}"
        rows += [
            [_DEVICES[use.target], "--precision auto", f"{precision}: {use.reason}{faster}"],
            ["", "8-bit AdamW step", f"by {by}"],
            ["", "attention", attention],
        ]
    return rows or [["not found out"]]


def _kernel_row(kernel: Kernel) -> list[str]:
    if not kernel.works:
        return [kernel.what, f"does not work: {kernel.reason}" if kernel.works is False else kernel.reason or "?"]
    assert kernel.time_s is not None
    against = ""
    if kernel.fp32_time_s is not None:
        ratio = kernel.fp32_time_s / kernel.time_s
        against = f"{ratio:.1f}x as fast as fp32" if ratio >= 1 else f"{1 / ratio:.1f}x slower than fp32"
        if abs(ratio - 1) <= ABOUT_THE_SAME:
            against = "about as fast as fp32"
    return [kernel.what, "works", format_duration(kernel.time_s), against, f"error {kernel.error:.1g}"]


def smallest_first(requests: Mapping[str, Any]) -> tuple[str, ...]:
    """The presets by the size of their layers: where the time is up, the largest are left out.

    Args:
        requests: what is asked of each preset, see `probes`.
    """

    def size(name: str) -> int:
        settings = requests[name]["family"]["settings"]
        return int(settings["depth"] * settings["width"] ** 2)

    return tuple(sorted(requests, key=size))


def _preset_rows(presets: Sequence[PresetFit]) -> list[list[str]]:
    heads = [
        "preset",
        "example",
        "parameters",
        "about the least budget",
        "in half of the memory",
        "a step of a block",
        "all its steps",
    ]
    rows = [heads]
    for fit in presets:
        if fit.fits is None:
            rows.append([fit.preset, f"not found out: {fit.reason}"])
            continue
        assert fit.example is not None and fit.parameters is not None and fit.smallest_bytes is not None
        row = [fit.preset, fit.example, format_count(fit.parameters), advised_budget(fit.smallest_bytes)]
        if fit.fits:
            assert fit.step_s is not None and fit.total_s is not None
            where = "all in memory" if fit.tier == "ram" else "blocks on disk"
            row += [
                f"{fit.blocks} blocks, micro-batch {fit.micro_batch}, {where}",
                format_duration(fit.step_s),
                f"{fit.steps}: {_days(fit.total_s)}",
            ]
        else:
            row += ["does not fit"]
        rows.append(row)
    return rows


_FASTER_FORMS = {"torch_bf16_matmul": "bf16 in torch", "onnxruntime_int8": "int8 in onnxruntime"}


def _days(duration_s: float) -> str:
    return format_duration(duration_s) if duration_s < 48 * 3600 else f"{duration_s / 86400:.0f} days"


def _advice(report: Report) -> list[str]:
    budgets = report.budgets
    smallest = (
        "" if budgets.smallest_bytes is None else f"about {advised_budget(budgets.smallest_bytes)} is the least, "
    )
    lines = [
        f"--mem-budget: {smallest}{budgets.half_bytes // 10**6}MB is half of the memory (the default), more than "
        f"{budgets.largest_bytes // 10**6}MB is not free now"
    ]
    sensible = [fit.preset for fit in report.presets if fit.sensible]
    if sensible:
        lines.append(
            f"presets that fit and finish their own steps within {PATIENCE_S / 86400:.0f} days: {', '.join(sensible)}; "
            f"more about one: edgeblocks plan --preset {sensible[-1]} --data FOLDER"
        )
    elif any(fit.fits for fit in report.presets):
        lines.append(f"no preset finishes its own steps within {PATIENCE_S / 86400:.0f} days: give fewer --steps")
    if any(fit.fits is None for fit in report.presets):
        lines.append("some presets were not found out: edgeblocks doctor --time 60 measures longer, for a busy machine")
    for kernel in report.kernels:
        if kernel.name in _FASTER_FORMS and kernel.works and kernel.time_s is not None and kernel.fp32_time_s:
            ratio = kernel.fp32_time_s / kernel.time_s
            pays = "pays here" if ratio >= 1.1 else "does not pay here"
            lines.append(f"{_FASTER_FORMS[kernel.name]} {pays}: {ratio:.2g}x the speed of fp32")
    return lines


def _kernel(name: str, answer: Answer | None) -> Kernel:
    probe = KERNELS[name]
    if answer is None:
        return Kernel(name=name, what=probe.what, works=None, reason="not installed")
    if answer.value is None:
        return Kernel(name=name, what=probe.what, works=False if answer.failed else None, reason=answer.reason)
    return Kernel(name=name, what=probe.what, **answer.value)


def _preset_fit(name: str, answer: Answer, budget_bytes: int) -> PresetFit:
    if answer.value is None:
        return PresetFit(preset=name, budget_bytes=budget_bytes, reason=answer.reason)
    return PresetFit(**answer.value)
