"""What the verbs print: the banner of a plan, its table, what a training, an export or an evaluation came to."""

import math
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeblocks.methods import METHODS
from edgeblocks.runs.summary import Summary, TextScores
from edgeblocks.terminal import command, one_line, quoted
from edgeblocks.units import format_bytes, format_duration

if TYPE_CHECKING:
    from edgeblocks.inference.evaluate import Evaluated
    from edgeblocks.inference.metrics import Bits
    from edgeblocks.runs.gathering import Gathered


def training_report(summary: Summary, path: Path) -> str:
    """Planned against measured, and what to type next. A dash is what an earlier edgeblocks did not write down."""
    loss, method = summary.metrics, METHODS[summary.method]
    by_block = ", ".join("-" if value is None else f"{value:.3f}" for value in loss.validation_loss_by_block)
    by_block = f" (by block, high noise first: {by_block})" if by_block and not method.one_network else ""
    memories: list[tuple[str, int | None, int | None]] = [
        ("peak memory", summary.predicted_peak_bytes, summary.peak_bytes)
    ]
    if summary.predicted_ram_peak_bytes is not None:
        memories.append(("peak of the host", summary.predicted_ram_peak_bytes, summary.ram_peak_bytes))
    rows = [
        *(
            (name, _or_dash(planned, format_bytes), _or_dash(measured, format_bytes))
            for name, planned, measured in memories
        ),
        ("budget", "", _or_dash(summary.budget_bytes, format_bytes)),
        (
            "step" if method.trained_together else "step of a block",
            _or_dash(summary.predicted_step_s, format_duration),
            _or_dash(summary.step_s, format_duration),
        ),
    ]
    total = max(summary.seconds or 0.0, 1e-9)
    labels = {"stall": f"waiting for {method.part}s"}
    shares = ", ".join(f"{labels.get(name, name)} {share}" for name, share in _shares(summary.shares_of_time).items())
    lines = [f"{'':<18}{'planned':>12}{'measured':>12}"]
    lines += [f"{name:<18}{planned:>12}{measured:>12}" for name, planned, measured in rows]
    lines += [
        f"time: {format_duration(total)}{f'; {shares}' if shares else ''}; "
        f"{_or_dash(summary.disk_bytes_written, format_bytes)} written to disk",
        f"validation loss {loss.validation_loss:.4f}{by_block}",
    ]
    right = [level.scores.get("top1") for level in loss.validation.levels]
    top1 = right[0] if summary.makes == "model" and right else None
    if top1 is not None:
        lines.append(_accuracy_line(summary, top1))
    elif loss.validation_loss_before is not None:
        before, after = (math.exp(value) for value in (loss.validation_loss_before, loss.validation_loss))
        lines.append(
            f"perplexity on held-out text: {before:.2f} before, {after:.2f} after ({loss.validation_loss_before:.4f} "
            f"and {loss.validation_loss:.4f} nats a token)"
        )
    elif loss.text is not None:
        lines.append(_bits_line(loss.text))
    if len({span.machine for span in summary.trained_on}) > 1:
        spans = ", ".join(f"block {span.block} {span.words()}" for span in summary.trained_on)
        lines.append(f"trained {_or_dash(summary.trained_s, format_duration)} in all: {spans}")
    return "\n".join([*lines, "", *_next_commands("tuned classes" if top1 is not None else summary.makes, path)])


def _shares(seconds: Mapping[str, float]) -> dict[str, str]:
    """Per cent of a whole, to a tenth, which add up to 100; nothing where the whole is nothing.

    >>> _shares({"compute": 1.0, "data": 1.0, "other": 1.0})
    {'compute': '33.4%', 'data': '33.3%', 'other': '33.3%'}
    """
    whole = sum(seconds.values())
    if not whole:
        return {}
    exact = {name: 1000 * value / whole for name, value in seconds.items()}
    tenths = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: tenths[name] - exact[name])[: 1000 - sum(tenths.values())]:
        tenths[name] += 1
    return {name: f"{value / 10:.1f}%" for name, value in tenths.items()}


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def _accuracy_line(summary: Summary, right: float) -> str:
    """Of an image classifier, beside that of the model as it was, where it knew these classes."""
    validation, before = summary.metrics.validation, summary.metrics.top1_before
    beside = "" if before is None else f" ({before:.1%} before)"
    return f"top-1 accuracy {right:.1%}{beside} on {validation.images} images of the {validation.part} part"


def _bits_line(text: TextScores) -> str:
    """The bound of a text in bits."""
    per_token = "" if text.tokenizer == "chars" else f", {text.bits_per_token:.3f} a token"
    error = text.bits_per_character_error
    spread = "" if error is None else f" ± {error:.3f}"
    return (
        f"at most {text.bits_per_character:.3f}{spread} bits a character{per_token} "
        f"(bound on {text.sequences} sequences of {text.length} tokens)"
    )


def _next_commands(makes: str | None, path: Path) -> list[str]:
    """What to type after a training run."""
    onnx = f"{path}-onnx"
    if makes == "model":
        return [f"next: {command('merge', path, '-o', f'{path}-model')}"]
    export = f"      {command('export', path, '-o', onnx)} && {command('run', onnx)}"
    if makes == "tuned classes":
        return [f"next: {command('merge', path, '-o', f'{path}-model')}", f"{export} picture.png"]
    if makes == "classes":
        return [f"next: {command('eval', path)}", f"{export} picture.png"]
    if makes == "text":
        return [f"next: {command('sample', path)} --n 2", f"{export} --fill 'the ____ sat'"]
    if makes == "continuation":
        return [f"next: {command('sample', path)} --prompt 'call me'", f"{export} --prompt 'call me'"]
    return [f"next: {command('sample', path)} -o grid.png", f"{export} -o grid.png"]


def gathered_report(gathered: "Gathered", copies: Sequence[Path]) -> str:
    """What was taken from which copy."""
    lines = []
    for taken in gathered["taken"]:
        what = "what all blocks begin as" if taken["block"] is None else f"block {taken['block']}"
        lines.append(f"{what}: step {taken['step_before']} -> {taken['step']}, from {one_line(taken['copy'])}")
    useless = {str(copy) for copy in copies} - {taken["copy"] for taken in gathered["taken"]}
    lines += [f"nothing from {one_line(copy)}: no block of it is further" for copy in sorted(useless)]
    return "\n".join(lines)


def export_report(manifest: Mapping[str, Any], path: Path) -> str:
    """How far an export is from torch, and what to type next."""
    verified = manifest["verified"]
    if "greedy_tokens" in verified:
        return _language_model_report(manifest, path)
    if "logits_limit" in verified:
        return _vision_report(manifest, path)
    what, arguments = {
        "images": ("final images", "-o grid.png"),
        "classes": ("probabilities", "picture.png"),
        "text": ("probabilities along the chain", "--n 2"),
        "continuation": ("probabilities along the chain", "--prompt 'call me'"),
    }[manifest["task"]]
    made = f"{len(manifest['files'])} block(s)" if "chain" not in manifest else "the chain in one file"
    return (
        f"exported {made} to {one_line(path)}; verified against torch: blocks differ "
        f"by at most {verified['block_max_abs_error']:.1e}, {what} by {verified['output_max_abs_error']:.1e}\n"
        f"{_rounding_line(manifest)}"
        f"next: {command('run', path)} {arguments}"
    )


def page_report(manifest: Mapping[str, Any], path: Path) -> str:
    """The same of a page, which holds an export."""
    served = f"python -m http.server -d {quoted(path)}"
    return f"{export_report(manifest, path / 'network')}\nor: {served}   # and open http://localhost:8000/"


def _rounding_line(manifest: Mapping[str, Any]) -> str:
    """What rounding of the weights saved and cost; nothing where there was none."""
    found = manifest.get("rounding")
    if found is None:
        return ""
    sizes = [found["bytes_fp32"], sum(file["bytes"] for file in _graphs_of(manifest))]
    whole = max(found["loss_fp32"], 1e-30)
    rise = found["loss"] / whole - 1
    error = "" if found["loss_error"] is None else f" ± {2 * found['loss_error'] / whole:.3%}"
    right = "" if found["accuracy"] is None else f", {found['accuracy_fp32']:.2%} -> {found['accuracy']:.2%} right"
    if found["accuracy_error"] is not None:
        right += f" (± {2 * found['accuracy_error']:.2%})"
    return (
        f"then weights in {found['weights']}: {format_bytes(sizes[0])} -> {format_bytes(sizes[1])}; on "
        f"{found['examples']} examples of the {found['part']} part loss {found['loss_fp32']:.5g} -> "
        f"{found['loss']:.5g} ({rise:+.3%}{error}){right}; outputs differ by "
        f"{found['relative_difference']:.2%} on average\n"
    )


def _graphs_of(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What it says of each of its graphs."""
    for name in ("chain", "graph"):
        if name in manifest:
            return [manifest[name]]
    decoder = (manifest.get("decoding") or {}).get("graph")
    return [*manifest["files"], *([decoder] if decoder else [])]


def _vision_report(manifest: Mapping[str, Any], path: Path) -> str:
    verified, (graph,) = manifest["verified"], _graphs_of(manifest)
    shown = "hold-out" if verified["real_pictures"] else "random"
    return (
        f"exported a {manifest['model_type']} of {len(manifest['class_names'])} classes, "
        f"{format_bytes(graph['bytes'])}, to {one_line(path)}; verified against torch: logits differ by at most "
        f"{verified['logits_max_abs_error']:.1e} (limit {verified['logits_limit']:.1e}), {verified['top1_equal']} of "
        f"{verified['pictures']} {shown} pictures have the same class\n"
        f"{_rounding_line(manifest)}"
        f"next: {command('run', path)} picture.png"
    )


def _language_model_report(manifest: Mapping[str, Any], path: Path) -> str:
    verified = manifest["verified"]
    size = format_bytes(sum(file["bytes"] for file in manifest["files"]))
    lines = [
        f"exported a {manifest['model_type']} with weights in {manifest['weights']}, {size}, to {one_line(path)}",
        f"greedy text: {verified['greedy_equal']} of {verified['greedy_tokens']} tokens as torch writes them",
    ]
    if verified["loss_torch"] is not None:
        by_torch, by_graph = verified["loss_torch"], verified["loss_graph"]
        lines.append(
            f"loss on {verified['windows']} windows of the data: {by_torch:.4f} nats a token by torch, {by_graph:.4f} "
            f"by the graph ({by_graph / by_torch - 1:+.2%})"
        )
    return "\n".join([*lines, f"next: {command('run', path)} --prompt 'Once upon a time'"])


def evaluation_report(result: "Evaluated") -> str:
    """Losses per level and the Frechet distance beside its floor."""
    validation = result["validation"]
    error = validation["standard_error"]
    spread = f" ± {error:.4f}" if error is not None else ""
    examples = "sequences" if "text" in result or "perplexity" in result else "images"
    lines = [
        f"validation loss {result['validation_loss']:.4f}{spread} "
        f"({validation['images']} {examples} of the {validation['part']} part, EMA weights)",
        *(_level_lines(validation["levels"]) if len(validation["levels"]) > 1 else ()),
    ]
    if "in_both" in result:
        both = result["in_both"]
        lines.append(
            f"computed in {both['precision']}: {both['half']:.5f} on {both['examples']} of them, "
            f"{both['fp32']:.5f} in fp32 ({abs(both['half'] / both['fp32'] - 1):.2%} apart)"
        )
    if "perplexity" in result:
        lines.append(f"perplexity {result['perplexity']:.3f}")
    if "text" in result:
        lines.append(_bits_line(TextScores.model_validate(result["text"])))
    if "bounds" in result:
        lines += _continuation_lines(result)
    found = result.get("classification")
    end_to_end = METHODS[result["method"]].trained_together
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


def _continuation_lines(result: "Evaluated") -> list[str]:
    """The figures of text that is written token by token, besides its bound."""
    lines = []
    if not METHODS[result["method"]].trained_together:
        lines += [
            f"with {row['noises']} noise{'' if row['noises'] == 1 else 's'} a token: {_with_error(row)}"
            for row in result["bounds"]
        ]
        lines.append(f"cross-entropy at the highest noise level: {result['cross_entropy_at_top']:.4f} nats a token")
    unit = "iterations" if METHODS[result["method"]].trained_together else "levels"
    lines += [f"over {row['steps']:>2} {unit}: {_with_error(row)}" for row in result.get("curve", ())]
    for name, found in (("samples", result["variety"]["samples"]), ("hold-out", result["variety"]["held_out"])):
        distinct = ", ".join(_share(found[f"distinct_{count}"]) for count in (1, 2, 3))
        lines.append(
            f"{name + ':':<9} distinct words, pairs, triples {distinct}; groups of 4 words that are repeated "
            f"{_share(found['repeated_4'])} (of {found['words']} words)"
        )
    return lines


def _with_error(row: "Bits") -> str:
    error = row["bits_per_character_error"]
    spread = "" if error is None else f" ± {error:.3f}"
    return f"{row['bits_per_character']:.3f}{spread} bits a character"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _level_lines(levels: Sequence[Mapping[str, float]]) -> list[str]:
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
    return "\n".join(f"{name:<{width}}  {one_line(value)}" for name, value in rows)


def wrapped_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of four cells, no wider than the terminal: what does not fit goes on in the next line of its column."""
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    longest = [max(len(row[column]) for row in rows) for column in range(4)]
    widths = [longest[0], min(longest[1], max(12, width // 5)), min(longest[2], max(14, width // 5))]
    widths.append(max(20, width - sum(widths) - 6))
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, size) or [""] for cell, size in zip(row, widths, strict=True)]
        for pieces in zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(f"{piece:<{size}}" for piece, size in zip(pieces, widths, strict=True)).rstrip())
    return "\n".join(lines)
