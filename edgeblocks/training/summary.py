"""The figures of a finished training: the content of `summary.json`."""

import time

from edgeblocks.data.dataset import DataSet
from edgeblocks.families.base import TextInfo
from edgeblocks.inference import metrics
from edgeblocks.offload.device import Target
from edgeblocks.runs.directory import BEFORE_FILE, RunDirectory
from edgeblocks.runs.history import trained_on, trained_s
from edgeblocks.runs.schema import read_json
from edgeblocks.runs.summary import MemoryChange, Metrics, Summary, TextScores, Validation
from edgeblocks.tasks import TEXT_TASKS
from edgeblocks.training.loop import Trainer


def summary_of(
    run: RunDirectory,
    trainer: Trainer,
    evaluation: metrics.ValidationLoss,
    data_set: DataSet,
    target: Target,
    budget_bytes: int,
    resumed_from: list[int] | None,
    evaluation_s: float,
) -> Summary:
    """The summary of a run whose training has just ended, in this process.

    Args:
        evaluation: what `validation_loss` found at the end.
        resumed_from: the blocks' steps that this process began with; None where it began the run.
        evaluation_s: that the evaluation took.
    """
    progress, times = trainer.progress, trainer.times
    seconds = time.perf_counter() - progress.started
    done_here = progress.steps_done - progress.steps_before
    split = {
        "compute": progress.compute_s,
        "load": times.load_s,
        "store": times.store_s,
        "stall": times.stall_s,
        "data": progress.data_s,
    }
    split["other"] = max(0.0, seconds - split["compute"] - split["data"] - split["stall"])
    # Blocks that are trained alone are waited for between steps, stages within them.
    working_s = progress.compute_s + progress.data_s + (times.stall_s if run.method.trained_together else 0.0)
    per_example = run.data.length if isinstance(run.data, TextInfo) else 1
    before = _before(run)
    return Summary(
        family=run.settings.run.family,
        makes="model" if run.family().only_exact else run.family().task,
        method=run.settings.run.method,
        blocks=len(run.file_layers),
        layers_per_block=list(run.file_layers),
        trained_blocks=[block for block, trained in enumerate(run.trained) if trained],
        parameters=run.plan.parameters,
        steps=run.settings.run.steps,
        budget_bytes=budget_bytes,
        predicted_peak_bytes=run.plan.predicted_peak_bytes,
        peak_bytes=target.peak_bytes(),
        ram_peak_bytes=target.host_peak_bytes(),
        predicted_ram_peak_bytes=run.plan.predicted_host_peak_bytes,
        disk_bytes=sum(path.stat().st_size for path in run.blocks_folder.glob("*.safetensors")),
        disk_bytes_written=trainer.store.run_bytes_written,
        memory_changes=[MemoryChange(**change) for change in trainer.guard.changes],
        seconds=seconds,
        # Where this process only evaluated, it has measured no step.
        images_or_tokens_per_s=per_example * done_here * run.settings.run.batch / max(working_s, 1e-9)
        if done_here
        else None,
        step_s=working_s / done_here if done_here else None,
        predicted_step_s=run.plan.predicted_step_s,
        time_split={name: round(value, 3) for name, value in split.items()},
        sampling_s=round(progress.previews_s, 3),
        evaluation_s=round(evaluation_s, 3),
        metrics=Metrics(
            train_loss_by_block=[progress.losses.get(block) for block in range(len(run.file_layers))],
            validation_loss=evaluation["total"],
            validation_loss_before=before.total,
            top1_before=before.levels[0].scores.get("top1") if before.levels else None,
            validation_loss_by_block=metrics.mean_by_block(evaluation["levels"], run.partition),
            validation=Validation.model_validate(evaluation),
            **_text_metrics(run, evaluation, data_set),
        ),
        init=run.init,
        trained_s=trained_s(run),
        trained_on=trained_on(run),
        resumed_from=resumed_from,
    )


def _before(run: RunDirectory) -> Validation:
    """Of a pretrained network as it was; empty where it was not evaluated."""
    path = run.path / BEFORE_FILE
    return Validation.model_validate(read_json(path)) if path.exists() else Validation()


def _text_metrics(run: RunDirectory, evaluation: metrics.ValidationLoss, data_set: DataSet) -> dict[str, TextScores]:
    """The bound in bits, where the run makes text: of a chain for mdlm; for ar and looped of the top level alone."""
    task = run.family().task
    if task not in TEXT_TASKS or not run.family().writes_text:
        return {}
    if task == "text":
        nats, error = evaluation["total"], evaluation["standard_error"]
    else:
        nats, error = evaluation["levels"][0]["loss"], None
    return {"text": TextScores.model_validate(metrics.text_scores(nats, error, evaluation["images"], data_set))}
