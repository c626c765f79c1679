"""What the verbs print: the banner of a plan, its table, what a training, an export or an evaluation came to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeblocks.planning.plans import DAY_S
from edgeblocks.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from edgeblocks.planning.plans import Candidate, Plan
    from edgeblocks.prepare import Prepared


def banner(prepared: "Prepared") -> str:
    """What will be trained, and how it fits the budget."""
    run, data, plan = prepared.settings.run, prepared.data_set, prepared.plan
    chosen = plan.chosen
    unit = _unit(run.method)
    lines = [
        f"edgeblocks: {run.family} {run.preset}, {format_count(plan.parameters)} parameters in {chosen.blocks} "
        f"{unit}{'s' if chosen.blocks > 1 else ''} "
        f"of {'/'.join(str(count) for count in sorted(set(plan.layers), reverse=True))} layers"
        f"{_how_trained(plan)}",
        f"data: {data.source}, {data.describe()}",
        *([] if prepared.profile is None else [f"machine: {prepared.profile.name}, {prepared.profile.description}"]),
        f"plan: batch {run.batch}{_in_parts(chosen)}, "
        f"checkpointing {'on' if chosen.checkpointing else 'off'}, {run.optimizer}, "
        + (
            f"saved every {chosen.visit_steps} steps, {_where(chosen, unit)}"
            if run.method == "exact"
            else f"visits of {chosen.visit_steps} steps, {_where(chosen, unit)}"
        ),
        *_memory_lines(plan),
        _time_line(prepared),
        _disk_line(plan),
    ]
    return "\n".join([*lines, *(f"note: {warning}" for warning in plan.warnings)])


def _in_parts(chosen: "Candidate") -> str:
    """How a batch goes through a block."""
    if chosen.accumulation == 1:
        return " at once"
    return f" in {chosen.accumulation} micro-batches of {chosen.micro_batch}"


def _how_trained(plan: "Plan") -> str:
    """What is said of stages behind their number."""
    if plan.method == "diffusion":
        return ""
    if plan.trained is None or len(plan.trained) == plan.chosen.blocks:
        return ", trained end to end"
    return f", of which {', '.join(map(str, plan.trained))} (the first is 0) trained end to end, the others frozen"


def _unit(method: str) -> str:
    """What the layers are cut into."""
    return "stage" if method == "exact" else "block"


def _where(chosen: "Candidate", unit: str) -> str:
    """What lives where between its visits."""
    moving = " (one trained, one on its way)" if chosen.slots > 1 else ""
    tiers = chosen.tiers
    if "device" in tiers:
        if not tiers["ram"] and not tiers["disk"]:
            return f"all {unit}s stay on the device"
        places = f"{chosen.slots} of {chosen.blocks} {unit}s at a time on the device{moving}"
        names = {"ram": "in RAM", "disk": "on disk"}
        waiting = [f"{_numbers(tiers[tier], unit)} {name}" for tier, name in names.items() if tiers[tier]]
        return f"{places}, between {'their uses' if unit == 'stage' else 'visits'} {' and '.join(waiting)}"
    if not tiers["disk"]:
        return f"all {unit}s stay in memory"
    if unit == "stage":
        return f"{chosen.slots} of {chosen.blocks} stages in memory at a time, the others on disk"
    if not tiers["ram"]:
        return f"blocks on disk, {chosen.slots} in memory{moving}"
    in_memory, on_disk = (_numbers(tiers[tier], unit) for tier in ("ram", "disk"))
    return f"{in_memory} in memory, {on_disk} on disk, two of them in memory{moving}"


def _numbers(blocks: Sequence[int], unit: str) -> str:
    """Consecutive blocks in words.

    >>> _numbers([2], "block"), _numbers([0, 1, 2], "block")
    ('block 2', 'blocks 0-2')
    """
    return f"{unit} {blocks[0]}" if len(blocks) == 1 else f"{unit}s {blocks[0]}-{blocks[-1]}"


def _memory_lines(plan: "Plan") -> list[str]:
    """Predicted peak, budget and parts; the device's and the host's where these are two."""
    chosen = plan.chosen
    memories = [("memory", chosen.breakdown, plan.budget_bytes)]
    if plan.ram_budget_bytes is not None:
        memories = [
            ("device memory", chosen.breakdown, plan.budget_bytes),
            ("host memory", chosen.host_breakdown, plan.ram_budget_bytes),
        ]
    return [
        f"{name}: predicted peak {format_bytes(sum(breakdown.values()))} of {format_bytes(budget_bytes)} "
        f"({', '.join(f'{part} {format_bytes(size)}' for part, size in breakdown.items() if size)})"
        for name, breakdown, budget_bytes in memories
    ]


def _time_line(prepared: "Prepared") -> str:
    """An estimate from measured speeds, or a bound from those of a profile."""
    plan, steps = prepared.plan, prepared.settings.run.steps
    total, written = format_duration(plan.predicted_s), format_bytes(plan.chosen.bytes_written)
    which = f"{steps} steps" if plan.method == "exact" else f"{steps} steps of each block"
    streamed = plan.chosen.slots < plan.chosen.blocks
    moving = f"{plan.stall_share:.1%} of it moving {_unit(plan.method)}s, " if streamed else ""
    if prepared.profile is None:
        return f"time: about {total} for {which}, {moving}about {written} written to disk"
    step = format_duration(plan.chosen.step_s + plan.chosen.streaming_s)
    return (
        f"time: at most about {step} a step, {total} for {which} (a bound from the profile's "
        f"sustained speeds, not a measurement), {moving}about {written} written to disk"
    )


def _disk_line(plan: "Plan") -> str:
    """What lies on disk, and what wears it."""
    shorter = " (in all: the run takes less)" if plan.predicted_s < DAY_S else ""
    return (
        f"on disk: {format_bytes(plan.chosen.disk_bytes)} (every {_unit(plan.method)}, and {_spare(plan)}); about "
        f"{format_bytes(plan.written_a_day_bytes)} written a day{shorter}"
    )


def _spare(plan: "Plan") -> str:
    """What lies on disk for a moment beside the files of all blocks."""
    if plan.method == "diffusion":
        return "one being written"
    return "while they are saved every one again" + (", and while they wait" if plan.chosen.tier == "disk" else "")


def plan_table(prepared: "Prepared") -> str:
    """The candidates, one line each; the chosen one is marked. Memory is in MB."""
    parts = {"runtime": "runtime", "weights": "weights", "gradients": "grads", "optimizer": "optim", "ema": "ema"}
    parts |= {
        "activations": "activ",
        "boundaries": "bound",
        "data": "data",
        "evaluation": "eval",
        "slack": "slack",
        "planning": "planning",
    }
    rows_with = {part for row in prepared.plan.candidates for part, size in row.breakdown.items() if size}
    parts = {part: title for part, title in parts.items() if part in rows_with}
    with_host = prepared.machine.host is not None
    on_device = ["on device", "in RAM"] if with_host else ["in memory"]
    rows = [
        ["", "blocks", "layers", "micro-batch", "ckpt", *on_device, "visit", "fits", "peak MB", "=", *parts.values()]
    ]
    if prepared.plan.method == "exact":
        rows[0][1], rows[0][rows[0].index("visit")] = "stages", "saved"
    rows[0] += [*(["host MB"] if with_host else []), "step", "written"]
    for row in prepared.plan.candidates:
        rows.append(
            [
                "->" if row is prepared.plan.chosen else "",
                str(row.blocks),
                str(row.layers_per_block),
                f"{row.micro_batch} (x{row.accumulation})",
                "on" if row.checkpointing else "off",
                "all" if row.slots >= row.blocks else f"{row.slots} of {row.blocks}",
                *([str(row.ram_blocks)] if with_host else []),
                str(row.visit_steps),
                "yes" if row.fits else "no",
                f"{row.predicted_peak_bytes / 1e6:.0f}",
                "",
                *(f"{row.breakdown[part] / 1e6:.0f}" for part in parts),
                *([f"{row.predicted_host_peak_bytes / 1e6:.0f}"] if with_host else []),
                format_duration(row.step_s),
                format_bytes(row.bytes_written),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def training_report(summary: dict[str, Any], path: Any) -> str:
    """Planned beside measured, and what to type next."""
    loss = summary["metrics"]
    by_block = ", ".join("-" if value is None else f"{value:.3f}" for value in loss["validation_loss_by_block"])
    by_block = f" (by block, high noise first: {by_block})" if summary["method"] == "diffusion" else ""
    unit, split = _unit(summary["method"]), summary["time_split"]
    total = max(summary["seconds"], 1e-9)
    memories = [("peak memory", summary["predicted_peak_bytes"], summary["peak_bytes"])]
    if summary["predicted_ram_peak_bytes"] is not None:
        memories.append(("peak of the host", summary["predicted_ram_peak_bytes"], summary["ram_peak_bytes"]))
    rows = [
        *((name, format_bytes(planned), format_bytes(measured)) for name, planned, measured in memories),
        ("budget", "", format_bytes(summary["budget_bytes"])),
        (
            "step" if unit == "stage" else "step of a block",
            format_duration(summary["predicted_step_s"]),
            format_duration(summary["step_s"]),
        ),
    ]
    lines = [f"{'':<18}{'planned':>12}{'measured':>12}"]
    lines += [f"{name:<18}{planned:>12}{measured:>12}" for name, planned, measured in rows]
    lines += [
        f"time: {format_duration(total)}; compute {split['compute'] / total:.1%}, waiting for {unit}s "
        f"{split['stall'] / total:.1%}, data {split['data'] / total:.1%}; "
        f"{format_bytes(summary['disk_bytes_written'])} written to disk",
        f"validation loss {loss['validation_loss']:.4f}{by_block}",
        "",
        *_next_commands(summary["makes"], path),
    ]
    if "text" in loss:
        lines.insert(-len(_next_commands(summary["makes"], path)) - 1, _bits_line(loss["text"]))
    return "\n".join(lines)


def _bits_line(text: dict[str, Any]) -> str:
    """The bound of a text in bits."""
    per_token = "" if text["tokenizer"] == "chars" else f", {text['bits_per_token']:.3f} a token"
    error = text["bits_per_character_error"]
    spread = "" if error is None else f" ± {error:.3f}"
    return (
        f"at most {text['bits_per_character']:.3f}{spread} bits a character{per_token} "
        f"(bound on {text['sequences']} sequences of {text['length']} tokens)"
    )


def _next_commands(makes: str, path: Any) -> list[str]:
    """What to type after a training run."""
    export = f"      edgeblocks export {path} -o {path}-onnx && edgeblocks run {path}-onnx"
    if makes == "classes":
        return [f"next: edgeblocks eval {path}", f"{export} picture.png"]
    if makes == "text":
        return [f"next: edgeblocks sample {path} --n 2", f"{export} --fill 'the ____ sat'"]
    if makes == "continuation":
        return [f"next: edgeblocks sample {path} --prompt 'call me'", f"{export} --prompt 'call me'"]
    return [f"next: edgeblocks sample {path} -o grid.png", f"{export} -o grid.png"]


def export_report(manifest: dict[str, Any], path: Any) -> str:
    """How far an export is from torch, and what to type next."""
    verified = manifest["verified"]
    what, arguments = {
        "images": ("final images", "-o grid.png"),
        "classes": ("probabilities", "picture.png"),
        "text": ("probabilities along the chain", "--n 2"),
        "continuation": ("probabilities along the chain", "--prompt 'call me'"),
    }[manifest["task"]]
    return (
        f"exported {len(manifest['files'])} block(s) to {path}; verified against torch: blocks differ by at most "
        f"{verified['block_max_abs_error']:.1e}, {what} by {verified['output_max_abs_error']:.1e}\n"
        f"next: edgeblocks run {path} {arguments}"
    )


def evaluation_report(result: dict[str, Any]) -> str:
    """Losses per level and the Frechet distance beside its floor."""
    validation = result["validation"]
    error = validation["standard_error"]
    spread = f" ± {error:.4f}" if error is not None else ""
    examples = "sequences" if "text" in result else "images"
    lines = [
        f"validation loss {result['validation_loss']:.4f}{spread} "
        f"({validation['images']} {examples} of the {validation['part']} part, EMA weights)",
        *(_level_lines(validation["levels"]) if len(validation["levels"]) > 1 else ()),
    ]
    if "text" in result:
        lines.append(_bits_line(result["text"]))
    if "bounds" in result:
        lines += _continuation_lines(result)
    found = result.get("classification")
    end_to_end = result["method"] == "exact"
    if found is not None:
        by_block = ", ".join("-" if share is None else f"{share:.1%}" for share in result["top1_by_block"])
        lines += [
            f"{'' if end_to_end else 'chain on '}{found['images']} images: "
            f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}, "
            f"cross-entropy {found['cross_entropy']:.4f}, calibration error {found['calibration_error']:.3f}",
        ]
        if not end_to_end:
            lines.append(f"top-1 of one block alone, which is shown the right class under noise: {by_block}")
    frechet = result.get("frechet")
    if frechet is not None:
        floor = (
            "no hold-out part to compare"
            if frechet["floor"] is None
            else f"hold-out images score {frechet['floor']:.4g}"
        )
        lines += [
            f"Frechet distance of {frechet['samples']} samples to {frechet['train_images']} training images: "
            f"{frechet['to_train']:.4g} ({floor})",
            f"feature space: {frechet['feature_space']}",
        ]
    return "\n".join(lines)


def _continuation_lines(result: dict[str, Any]) -> list[str]:
    """What is told of text that is written token by token, beside its bound."""
    lines = []
    if result["method"] == "diffusion":
        lines += [
            f"with {row['noises']} noise{'' if row['noises'] == 1 else 's'} a token: {_with_error(row)}"
            for row in result["bounds"]
        ]
        lines.append(f"cross-entropy at the highest noise level: {result['cross_entropy_at_top']:.4f} nats a token")
    unit = "iterations" if result["method"] == "exact" else "levels"
    lines += [f"over {row['steps']:>2} {unit}: {_with_error(row)}" for row in result.get("curve", ())]
    for name, found in (("samples", result["variety"]["samples"]), ("hold-out", result["variety"]["held_out"])):
        distinct = ", ".join(_share(found[f"distinct_{count}"]) for count in (1, 2, 3))
        lines.append(
            f"{name + ':':<9} distinct words, pairs, triples {distinct}; groups of 4 words that are repeated "
            f"{_share(found['repeated_4'])} (of {found['words']} words)"
        )
    return lines


def _with_error(row: dict[str, Any]) -> str:
    error = row["bits_per_character_error"]
    spread = "" if error is None else f" ± {error:.3f}"
    return f"{row['bits_per_character']:.3f}{spread} bits a character"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _level_lines(levels: Sequence[dict[str, Any]]) -> list[str]:
    """One line a noise level, one column a score."""
    names = [name for name in levels[0] if name not in ("sigma", "block", "share")]
    rows = [f"{'level':>10} {'block':>6}" + "".join(f" {name:>9}" for name in names)]
    for level in levels:
        scores = "".join(f" {level[name]:>9.4f}" for name in names)
        rows.append(f"{level['sigma']:>10.4g} {level['block']:>6}{scores}")
    return rows


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
