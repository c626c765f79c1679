"""What a directory of this project holds, in a few lines. Reads headers and JSON only."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeblocks.errors import RunError
from edgeblocks.units import format_bytes, format_count

if TYPE_CHECKING:
    from edgeblocks.runs.directory import RunDirectory


def describe(path: Path) -> dict[str, object]:
    """Facts of a run directory or of an exported directory.

    Raises:
        RunError: neither of them, or damaged.
    """
    if (path / "config.yaml").exists():
        return _describe_run(path)
    if (path / "manifest.json").exists():
        return _describe_export(path)
    raise RunError(f"{path} is neither a run directory nor an exported directory (it has no manifest.json)")


def _begun_with(run: "RunDirectory") -> dict[str, object]:
    """The preset, or the folder of a pretrained model and what is trained beside it."""
    family = run.settings.family
    if not getattr(family, "model", ""):
        return {"preset": run.settings.run.preset}
    if not hasattr(family, "lora_rank"):
        return {"model": family.model}
    return {"model": family.model, "lora": f"rank {family.lora_rank}, beside layers read as {family.quantize}"}


def _describe_run(path: Path) -> dict[str, object]:
    from edgeblocks.runs.opening import open_run

    run = open_run(path)
    store = run.store()
    steps = run.saved_steps(store)
    unit = run.method.part
    described = {
        "kind": "run",
        "family": run.settings.run.family,
        **_begun_with(run),
        "method": run.settings.run.method,
        "parameters": _text_or_none(run.plan.parameters, format_count),
        f"{unit}s": len(run.file_layers),
        f"layers_per_{unit}": list(run.file_layers),
        "steps": steps,
        "steps_wanted": run.settings.run.steps,
        **({"prolonged_from": [one.steps_before for one in run.prolongations]} if run.prolongations else {}),
        "finished": min(steps) >= run.settings.run.steps,
        **_trained_on(run),
        **_begun_as_one(run),
        **({} if run.is_grown else {"grown": f"{sum(run.file_layers)} of {sum(run.plan.layers_per_block)} layers"}),
        **(
            {}
            if all(run.trained) or run.method.grows
            else {"trained_stages": list(run.settings.run.trained_blocks or ())}
        ),
        **({} if run.init is None else {"init": f"{run.init.file}, sha256 {run.init.sha256[:16]}.."}),
        "data": run.data_source,
        **_data_facts(run),
        "budget": format_bytes(run.plan.budget_bytes),
        "predicted_peak": _text_or_none(run.plan.predicted_peak_bytes, format_bytes),
        "disk": format_bytes(sum(store.path(block).stat().st_size for block in range(len(steps)))),
    }
    summary = run.summary
    if summary is not None:
        described["measured_peak"] = format_bytes(summary.peak_bytes)
        described["validation_loss"] = round(summary.metrics.validation_loss, 5)
    return described


def _trained_on(run: "RunDirectory") -> dict[str, object]:
    """Which machines trained it, where its records name them."""
    from edgeblocks.runs.history import trained_on

    part = "network" if run.method.trained_together else "block"
    spans: dict[str, list[str]] = {}
    for span in trained_on(run):
        name = part if part == "network" else f"{part} {span.block}"
        spans.setdefault(name, []).append(f"{span.first_step} to {span.last_step} on {span.machine}")
    return {"trained": {name: ", ".join(texts) for name, texts in spans.items()}} if spans else {}


def _begun_as_one(run: "RunDirectory") -> dict[str, object]:
    """How far the denoiser is that all blocks begin as, or whose that is."""
    from edgeblocks.runs.shared import as_far_as_it_is

    if run.shared_by is not None:
        return {"begins": f"the {run.shared_by.blocks} blocks of {run.path.parent}"}
    if not run.shared_steps:
        return {}
    steps, one = len(run.file_layers) * run.shared_steps, as_far_as_it_is(run)
    made = steps if one is run else one.saved_steps(one.store())[0]
    return {"begun_as_one": f"{made} of {steps} steps"}


def _data_facts(run: "RunDirectory") -> dict[str, object]:
    from edgeblocks.families.base import TextInfo

    data = run.data
    if isinstance(data, TextInfo):
        assert run.tokenizer is not None
        return {"tokenizer": run.tokenizer.kind, "vocabulary": data.vocabulary, "length": data.length}
    facts: dict[str, object] = {"image": "x".join(map(str, data.picture_shape)), "classes": data.num_classes}
    if data.autoencoder is not None:
        facts["latents"] = f"{data.height}x{data.width}x{data.channels}"
    return facts


def _text_or_none(value: float | None, text_of: Callable[[float], str]) -> str | None:
    return None if value is None else text_of(value)


def _describe_classifier(manifest: Any) -> dict[str, object]:
    """Of a fine-tuned one, a `VisionManifest`."""
    channels, height, width = manifest.image_shape
    return {
        "kind": "export",
        "family": manifest.model_type,
        "makes": manifest.task,
        "opset": manifest.opset,
        "weights": manifest.weights,
        "image": f"{height}x{width}x{channels}",
        "classes": len(manifest.class_names),
        "disk": format_bytes(manifest.graph.bytes),
        "verified": manifest.verified.model_dump(),
    }


def _describe_export(path: Path) -> dict[str, object]:
    from edgeblocks.registry import open_exported, open_language_model
    from edgeblocks.tasks import TEXT_TASKS

    model = open_language_model(path)
    if model is not None:
        return {
            "kind": "export",
            "family": model.manifest.model_type,
            "makes": "continuation",
            "weights": model.manifest.weights,
            "layers": model.manifest.layers,
            "vocabulary": model.manifest.vocabulary,
            "length": model.manifest.length,
            "positions": model.manifest.positions,
            "disk": format_bytes(sum(file.bytes for file in model.manifest.files)),
            "verified": model.manifest.verified.model_dump(),
        }
    manifest = open_exported(path).manifest
    if hasattr(manifest, "model_type"):
        return _describe_classifier(manifest)
    if manifest.task in TEXT_TASKS:
        facts = {"tokenizer": manifest.tokenizer, "vocabulary": manifest.vocabulary, "length": manifest.length}
    else:
        picture = manifest.picture
        facts = {"image": f"{picture.height}x{picture.width}x{picture.channels}", "classes": manifest.num_classes}
        if manifest.decoding is not None:
            facts["latents"] = f"{manifest.image.height}x{manifest.image.width}x{manifest.image.channels}"
    return {
        "kind": "export",
        "family": manifest.family,
        "makes": manifest.task,
        "blocks": manifest.num_blocks,
        "graphs": len(manifest.graphs),
        "opset": manifest.opset,
        "weights": "fp32" if manifest.rounding is None else manifest.rounding.weights,
        **facts,
        "disk": format_bytes(sum(file.bytes for file in manifest.graphs)),
        "verified": manifest.verified.model_dump(),
    }
