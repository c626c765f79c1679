"""The training of a run in this process: from its files to its summary, or to the signal that stops it."""

from collections.abc import Sequence
from functools import partial

from edgeblocks.callbacks import Callbacks, Step
from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import InterruptedRunError
from edgeblocks.profiling.precisions import untouched_bytes, warm_up
from edgeblocks.profiling.warmup_step import run_warmup_step
from edgeblocks.progress import Listener, Progress
from edgeblocks.registry import build_target
from edgeblocks.runs.apart import is_done_here
from edgeblocks.runs.directory import RunDirectory, bring_blocks_home
from edgeblocks.runs.growing import grown
from edgeblocks.runs.summary import Summary
from edgeblocks.training.guard import Guard, refusals_explained
from edgeblocks.training.interruption import Interrupted, Interruption
from edgeblocks.training.loop import SoFar, trainer_type
from edgeblocks.training.previews import Previews
from edgeblocks.training.real_steps import RealSteps
from edgeblocks.training.summary import summary_of


def trained(
    run: RunDirectory,
    data_set: DataSet,
    listener: Listener,
    told: Callbacks,
    resumed_from: list[int] | None,
    *,
    go_on_with: str,
    blocks_here: Sequence[int] | None = None,
) -> RunDirectory:
    """Train a run to its end, and write its summary; gives the run, whose network may have grown on the way.

    Args:
        resumed_from: the blocks' steps that this process begins with; None where it begins the run.
        go_on_with: the command that goes on with it, for whoever stops it.
        blocks_here: those that are trained here; None: all. Where others are left then, the run has no summary.

    Raises:
        InterruptedRunError: stopped by a signal; everything is saved.
    """
    summary = None
    if not is_done_here(run, blocks_here):
        beside = data_set, listener, told, resumed_from, go_on_with, blocks_here
        so_far, summary = _trained_as_it_is(run, *beside)
        while summary is None and not run.is_grown:
            run = grown(run, listener.note)
            so_far, summary = _trained_as_it_is(run, *beside, so_far)
    # Before the summary, which says that the run is finished: a crash in between is made good by --resume. And where
    # blocks are left, so that the directory can be copied whole.
    bring_blocks_home(run)
    if summary is not None:
        run.write_json("summary.json", summary.to_json())
    return run


def _trained_as_it_is(
    run: RunDirectory,
    data_set: DataSet,
    listener: Listener,
    told: Callbacks,
    resumed_from: list[int] | None,
    go_on_with: str,
    blocks_here: Sequence[int] | None,
    so_far: SoFar | None = None,
) -> tuple[SoFar, Summary | None]:
    """Train the parts that are there; what was counted, and the summary, or None where the network is to grow now, or
    where blocks are left to other machines.

    Args:
        so_far: what was counted in this process before the network had all of these parts.

    Raises:
        InterruptedRunError: stopped by a signal; everything is saved.
    """
    target = build_target(run.settings.run.target)
    warm_up(target, run.precision)
    plan = run.trainable_plan
    if run.precision != "fp32":
        sizes = sorted({plan.look_micro_batch or plan.micro_batch, plan.micro_batch})
        what = run.family(), run.settings.run.optimizer, target.torch_device
        run_warmup_step(*what, samples=sizes, precision=run.precision, master=run.master)
        target.give_back()
    target.keep_heap(largest_bytes=run.family().largest_heap_bytes)
    target.give_back()  # what planning and creating blocks have left behind
    if not target.has_cap:
        listener.note(
            "note: this system does not bound the memory of a process: the plan and a look before each step keep the "
            "budget, and nothing refuses what passes it in between"
        )
    budget_bytes, breakdown = plan.budget_bytes, plan.breakdown
    guard = Guard(
        target,
        budget_bytes=budget_bytes,
        shapes=plan.step_shapes,
        breakdown=breakdown,
        note=listener.note,
        ram_budget_bytes=plan.ram_budget_bytes,
    )
    with refusals_explained(target, budget_bytes, breakdown):
        store = run.store_with_meter()
        store.hold_folder()
        real_steps = RealSteps(run, guard, listener.note, device=target.torch_device)
        evaluation = None
        trainer = trainer_type(run.method).open(run, data_set, store, guard, target.device)
        if so_far is not None:
            trainer.go_on_from(so_far)
        try:
            cap = target.capped(budget_bytes, untouched_bytes=untouched_bytes(run.precision))
            with cap, Interruption(listener.note).listening() as interruption:
                previews = Previews(run, data_set, trainer, interruption, told.tell)
                previews.before_training(listener)
                target.give_back()
                listener.stage("training")
                # Those that a crash prevented are due now; of a new run none is.
                steps = trainer.saved_steps()
                elsewhere = () if blocks_here is None else {*range(len(steps))} - {*blocks_here}
                leaves_some = any(steps[block] < run.last_step for block in elsewhere)
                looks = None if leaves_some else previews
                if not _looked_at(looks, steps):
                    steps = trainer.train(
                        interruption,
                        on_step=partial(_on_step, listener, told, looks, real_steps),
                        between_visits=partial(_looked_at, looks),
                        blocks_here=blocks_here,
                    )
                if interruption.signal_name is None and not leaves_some:
                    listener.stage("evaluating")
                    if run.is_grown:
                        evaluation = previews.evaluation(listener)
                    else:
                        previews.before_growing(steps)
        except Interrupted:
            steps = run.saved_steps(store)
        finally:
            trainer.close()
    if interruption.signal_name is not None:
        raise InterruptedRunError(
            f"stopped by {interruption.signal_name}; saved at {at_steps(run, steps)} of "
            f"{run.settings.run.steps}. Go on with: {go_on_with}"
        )
    if evaluation is None:
        return trainer.so_far, None
    return trainer.so_far, summary_of(
        run, trainer, evaluation, data_set, target, budget_bytes, resumed_from, evaluation_s=previews.evaluation_s
    )


def _looked_at(previews: Previews | None, steps: Sequence[int]) -> bool:
    """Make the previews that are due; says whether the network is to grow now.

    None are made where blocks are left to other machines: each would make them anew, with blocks that are behind.
    """
    if previews is None:
        return False
    previews.after_visit(steps)
    return previews.is_to_grow(steps)


def _on_step(
    listener: Listener, told: Callbacks, previews: Previews | None, real_steps: RealSteps, progress: Progress
) -> None:
    """What hears of each step; no previews are to come where blocks are left to other machines."""
    progress.looks_left_s = 0.0 if previews is None else previews.left_s()
    real_steps.see(progress)
    listener.step(progress)
    if told:
        told.tell(
            Step(
                block=progress.block,
                step=progress.step,
                steps=progress.steps,
                steps_done=progress.steps_done,
                steps_total=progress.steps_total,
                loss=progress.loss,
                gradient_norm=progress.gradient_norm,
                learning_rate=progress.learning_rate,
                examples_per_s=progress.examples_per_s,
                seconds=progress.seconds,
                used_bytes=progress.used_bytes,
                budget_bytes=progress.budget_bytes,
                bytes_written=progress.bytes_written,
            )
        )


def at_steps(run: RunDirectory, steps: Sequence[int]) -> str:
    """How far the blocks are, or the stages that are trained together."""
    if run.shared_by is not None:
        return f"step {steps[0]} of the denoiser that all blocks begin as,"
    return f"step {steps[0]}" if run.method.trained_together else f"steps {', '.join(map(str, steps))}"
