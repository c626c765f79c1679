"""What a run needs before it goes on: sound files, the same data, a plan that fits here, blocks made again."""

from collections.abc import Sequence

from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.device import Target
from edgeblocks.prepare import replan
from edgeblocks.pretrained.model_folder import model_folder
from edgeblocks.profiling.budgets import budget_of_this_process
from edgeblocks.progress import Listener
from edgeblocks.registry import build_target
from edgeblocks.runs.create import changed_environment, create_blocks
from edgeblocks.runs.directory import RunDirectory, remove_leftovers
from edgeblocks.runs.latents import autoencoder_of
from edgeblocks.runs.load_weights import InitialWeights, initial_weights_of
from edgeblocks.runs.merging import check_same_model, check_same_tokenizer
from edgeblocks.runs.open_data import open_run_data
from edgeblocks.runs.prolonging import check_prolonging, prolong
from edgeblocks.runs.written_plan import written_plan
from edgeblocks.training.session import at_steps
from edgeblocks.units import format_bytes, format_duration


def is_finished(run: RunDirectory) -> bool:
    """Whether there is nothing left to do: trained, evaluated, and its blocks at home."""
    if run.summary is None or not (run.path / "blocks").is_dir():
        return False
    return min(run.saved_steps(run.store())) >= run.settings.run.steps


def made_ready(
    run: RunDirectory,
    other_budget: bool,
    reinit_blocks: Sequence[int],
    listener: Listener,
    *,
    steps_before: int,
    blocks_here: Sequence[int] | None,
) -> tuple[RunDirectory, DataSet, list[int]]:
    """A locked run that can go on, its data, and its blocks' steps; its settings are written when all is sound.

    Args:
        other_budget: whether it has another budget than it was planned for.
        reinit_blocks: blocks that begin again.
        steps_before: that it was to make before its settings were changed.
        blocks_here: those that are trained here; None: all.

    Raises:
        RunError: the data have changed, or the file that its weights began with.
        DoesNotFitError: the run's blocks do not fit the budget on this machine.
    """
    remove_leftovers(run)
    # Before any step is read: a checkpoint that was cut short has files of two steps.
    if run.method.trained_together:
        NextBlocks(run.store()).recover()
    is_prolonged = run.settings.run.steps != steps_before
    if is_prolonged:  # else a damaged block may be among them, which is to be made again
        check_prolonging(run, steps_before=steps_before, saved=run.saved_steps(run.store()))
    target = build_target(run.settings.run.target)
    target.prepare()
    budget_bytes = budget_of_this_process(run.settings.run, target)
    # Compared with what the run was trained on before a file of the run is changed.
    autoencoder_of(run)
    if run.family().only_exact:
        check_same_tokenizer(run, model_folder(run.settings.family.model))
    data_set = open_run_data(run.data_settings, listener, budget_bytes=budget_bytes, target=target)
    if data_set.fingerprint != run.data_fingerprint:
        raise RunError(
            f"the data of {run.path} have changed: {data_set.source} is not what the run was trained on; put the "
            f"former data back, name their new place with --data, or start a new run with --out"
        )
    if run.family().only_exact:
        check_same_model(run, model_folder(run.settings.family.model))
    run = _replanned_if_needed(run, data_set, other_budget or is_prolonged, target, listener)
    _reinitialise(run, reinit_blocks, listener)
    saved = run.saved_steps(run.store())
    if is_prolonged:
        run = prolong(run, steps_before=steps_before, saved=saved, note=listener.note)
    run.save_settings()
    run.drop_metrics_after(saved)
    left = _left(run, saved, blocks_here)
    listener.note(f"resuming {run.path}: {at_steps(run, saved)} of {run.settings.run.steps}{left}")
    changed = changed_environment(run)
    if changed is not None:
        listener.note(
            f"note: this run began otherwise ({changed}): it goes on as well as before, but its sums are rounded in "
            f"another way, so its bits are not those that it would have had there"
        )
    return run, data_set, saved


def _left(run: RunDirectory, saved: Sequence[int], blocks_here: Sequence[int] | None) -> str:
    """How long the steps to come will take here, where the first ones were timed; moving blocks is not in it."""
    step_s = run.plan.measured_step_s
    if step_s is None:
        return ""
    if blocks_here is None:
        left = run.steps_of_all - (saved[0] if run.method.trained_together else sum(saved))
    else:
        left = sum(run.settings.run.steps - saved[block] for block in blocks_here)
    return f"; a step took {format_duration(step_s)}, and {left} are left: about {format_duration(left * step_s)}"


def _replanned_if_needed(
    run: RunDirectory, data_set: DataSet, other_budget: bool, target: Target, listener: Listener
) -> RunDirectory:
    """The run, planned again with the same blocks where its budget or target changed or its plan does not fit here."""
    former = run.trainable_plan
    runtime_bytes = former.breakdown.get("runtime", 0)
    # The plan's runtime is another process's: this one may hold more already, as from a notebook.
    here = former.predicted_peak_bytes - runtime_bytes + max(runtime_bytes, target.used_bytes())
    moved = former.is_beside_a_host != (target.host_bytes() is not None)
    if not (other_budget or moved) and here <= former.budget_bytes:
        return run
    plan = replan(run.settings, run.data, data_set, former, run.path, target, listener)
    run = run.planned_again(written_plan(plan, run.partition.ranges))
    chosen = plan.chosen
    listener.note(
        f"planned again for {format_bytes(plan.budget_bytes)}: predicted peak "
        f"{format_bytes(chosen.predicted_peak_bytes)}, batch {run.settings.run.batch} = {chosen.accumulation} x "
        f"{chosen.micro_batch}, checkpointing {'on' if chosen.checkpointing else 'off'}, {chosen.slots} of "
        f"{run.method.parts(chosen.blocks)} in memory"
    )
    return run


def _reinitialise(run: RunDirectory, blocks: Sequence[int], listener: Listener) -> None:
    if blocks and run.method.trained_together:
        raise ConfigError(
            f"--reinit-block {blocks[0]}: the stages of {run.path} were trained together, so one of them cannot be "
            f"trained again alone; put its file back from a copy, or start a new run"
        )
    wrong = [block for block in blocks if not 0 <= block < len(run.file_layers)]
    if wrong:
        raise ConfigError(f"--reinit-block {wrong[0]}: {run.path} has the blocks 0 to {len(run.file_layers) - 1}")
    if blocks:
        initial = _initial_again(run)
        run.forget_summary()
        create_blocks(run, only=sorted(set(blocks)), initial=initial)
        listener.note(f"made again from the beginning: {', '.join(f'block {block}' for block in sorted(set(blocks)))}")


def _initial_again(run: RunDirectory) -> InitialWeights | None:
    """The file that the run began with, for a block that is made again.

    Raises:
        RunError: it is not there any more, or is another one now.
    """
    if run.init is None:
        return None
    try:
        initial = initial_weights_of(run.settings.run, run.family(), run.file_layers, run.class_names)
    except ConfigError as error:
        raise RunError(f"a block of {run.path} begins with the file of --init, and {error}") from error
    if initial is None or initial.sha256 != run.init.sha256:
        raise RunError(
            f"a block of {run.path} begins with {run.init.file} as it was when the run was created (sha256 "
            f"{run.init.sha256[:16]}..), and {run.settings.run.init} is another file now; put it back from a copy"
        )
    return initial
