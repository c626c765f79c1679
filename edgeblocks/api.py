"""The Python interface: plan, train, load; and on a loaded run sample, evaluate, export.

Everything the command line does goes through here; `cli` only reads arguments and prints.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeblocks.callbacks import Callback, Callbacks, Finished, Planned, Step
from edgeblocks.config import Settings, read_yaml, resolve_settings
from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import ConfigError, InterruptedRunError, RunError
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.device import Target
from edgeblocks.planning.plan_text import banner
from edgeblocks.planning.plans import Machine
from edgeblocks.prepare import Prepared, check_disk, check_work_dir, prepare, prepare_elsewhere, replan
from edgeblocks.profiling.budgets import budget_of_this_process, usual_budgets
from edgeblocks.progress import Listener, Progress, Silent
from edgeblocks.registry import build_profile, build_target, family_type, profile_names, register_family, target_names
from edgeblocks.run import Run
from edgeblocks.runs.create import changed_environment, check_free, create_blocks, create_run, seal_run
from edgeblocks.runs.directory import RunDirectory, bring_blocks_home, open_run, remove_leftovers
from edgeblocks.runs.load_weights import InitialWeights, initial_weights_of
from edgeblocks.runs.locks import locked, locked_away
from edgeblocks.runs.open_data import check_vocab, open_run_data, stored_source
from edgeblocks.runs.prolonging import check_prolonging, prolong
from edgeblocks.runs.schema import InitFields
from edgeblocks.runs.summary import Summary
from edgeblocks.runs.written_plan import written_plan
from edgeblocks.terminal import command
from edgeblocks.training.guard import Guard, refusals_explained
from edgeblocks.training.interruption import Interrupted, Interruption
from edgeblocks.training.loop import trainer_type
from edgeblocks.training.previews import Previews
from edgeblocks.training.summary import summary_of
from edgeblocks.units import format_bytes

if TYPE_CHECKING:
    from edgeblocks.targets.profile import Profile

__all__ = ["Callback", "Prepared", "Run", "load", "plan", "register_family", "resume", "train"]


def plan(
    *,
    config: Path | str | None = None,
    out: Path | str = ".",
    listener: Listener | None = None,
    **settings: object,
) -> Prepared:
    """What `train` would do with these settings, without doing it; here, or on a machine named as `target`.

    Args:
        config: a YAML file of settings; keyword settings go over it.
        out: where a run would be written; its disk is measured.
        settings: any of `config.RunSettings` or of the family's settings, such as mem_budget="6GB"; `target` may also
            be a machine's name, such as "rtx3060-12gb", and `data` the data themselves (docs/python.md).

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
        DoesNotFitError: nothing fits the budget; carries the smallest that would.
    """
    return _planned(config, out, listener or Silent(), settings)


def plan_beside(
    former: Prepared,
    *,
    config: Path | str | None = None,
    out: Path | str = ".",
    listener: Listener | None = None,
    **settings: object,
) -> Prepared:
    """The same as `plan`, at the speeds that were measured for a former plan, so that the two can be compared."""
    return _planned(config, out, listener or Silent(), settings, speeds=former.machine)


def _planned(
    config: Path | str | None,
    out: Path | str,
    listener: Listener,
    settings: Mapping[str, object],
    speeds: Machine | None = None,
) -> Prepared:
    resolved, profile = _resolved(config, _with_stored_data(config, settings, listener))
    if profile is not None:
        return prepare_elsewhere(resolved, profile, listener)
    return prepare(resolved, Path(out), listener, speeds=speeds)


def settings_for_here(*, config: Path | str | None = None, **settings: object) -> Settings:
    """The settings of a run on this machine.

    Raises:
        ConfigError: they cannot be used, or `target` names a machine that is not here.
    """
    resolved, profile = _resolved(config, settings)
    if profile is not None:
        raise ConfigError(
            f"--target {profile.name} is a machine to plan for, and training runs on this one; show its plan with "
            f"edgeblocks plan --target {profile.name}, or train with --target auto"
        )
    return resolved


def _with_stored_data(
    config: Path | str | None, settings: Mapping[str, object], listener: Listener
) -> dict[str, object]:
    """The settings, with data that the program gave in the cache, and their name there in their place."""
    data = settings.get("data")
    if data is None or isinstance(data, str):
        return dict(settings)
    resolved, _ = _resolved(config, {name: value for name, value in settings.items() if name != "data"})
    return {**settings, "data": stored_source(data, resolved, listener)}


def _resolved(config: Path | str | None, settings: Mapping[str, object]) -> tuple[Settings, "Profile | None"]:
    """The settings, and the profile of the machine that `target` names; None where it names this one."""
    from_file = read_yaml(Path(config)) if config is not None else {}
    problems, profile = [], None
    target = from_file.get("target") if settings.get("target") is None else settings["target"]
    if isinstance(target, str) and target not in ("auto", *target_names()):
        if target in profile_names():
            profile = build_profile(target)
        else:
            problems.append(
                f"there is no target '{target}'; there are: auto, {', '.join(target_names())}; and machines that only "
                f"plan knows: {', '.join(profile_names())}"
            )
        settings = {**settings, "target": "auto"}
    try:
        resolved = resolve_settings(
            settings, family_settings=lambda name: family_type(name).settings_type, config=from_file
        )
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    if problems:
        raise ConfigError(*problems)
    check_vocab(resolved.run, settings, from_file)
    return resolved, profile


def train(
    *,
    out: Path | str,
    config: Path | str | None = None,
    listener: Listener | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: object,
) -> "Run":
    """Train a new run in the directory `out` and return it; see `plan` for settings and errors.

    Args:
        callbacks: hear what happens in the training. An error of theirs ends it, saved, and is raised.

    Raises:
        InterruptedRunError: stopped by a signal; everything is saved.
    """
    listener, told = listener or Silent(), Callbacks(callbacks)
    path = Path(out)
    # Looked at now, because planning takes half a minute, and again by `create_run`, which must not trust that look.
    check_free(path)
    settings = _with_stored_data(config, settings, listener)
    prepared = prepare(settings_for_here(config=config, **settings).with_whole_paths(), path, listener)
    check_disk(prepared, path)
    with locked(path, listener.note):
        run = create_run(
            path,
            prepared.settings,
            prepared.written_plan,
            prepared.data,
            data_source=prepared.data_set.source,
            data_fingerprint=prepared.data_set.fingerprint,
            class_names=prepared.data_set.class_names,
            tokenizer=prepared.data_set.tokenizer,
            init=_origin(prepared.initial),
        )
        with locked_away(run, listener.note):
            listener.planned(banner(prepared), run.path)
            listener.stage("creating blocks")
            create_blocks(
                run,
                initial=prepared.initial,
                on_block=lambda done: listener.advance(done, len(run.file_layers), "creating blocks"),
            )
            seal_run(run)
            return _train(run, prepared.data_set, listener, told, resumed_from=None)


def _origin(initial: InitialWeights | None) -> InitFields | None:
    """What a run remembers of the file that its weights began with."""
    if initial is None:
        return None
    file = initial.file
    return InitFields(file=file.path.name, bytes=file.num_bytes, sha256=initial.sha256)


def resume(
    path: Path | str,
    *,
    steps: int | None = None,
    mem_budget: str | None = None,
    ram_budget: str | None = None,
    target: str | None = None,
    data: object = None,
    work_dir: str | None = None,
    max_disk_writes: str | None = None,
    reinit_blocks: Sequence[int] = (),
    listener: Listener | None = None,
    callbacks: Sequence[Callback] = (),
) -> "Run":
    """Go on with a run from each block's last saved step, and return it when it is finished.

    The numbers depend on the run's settings alone, so a run may go on anywhere: with another budget (the blocks stay,
    the rest is planned again), on another machine, with its data or its work directory in another place.

    Args:
        steps: more than the run was to make. The learning rate rises again from where it is, over the warm-up, and
            falls to zero along a new cosine.
        mem_budget: another budget from now on.
        ram_budget: another bound of the host's memory, when a GPU trains.
        target: another kind of machine; it has its usual budgets unless these are given too.
        data: where the same data are now, or the data themselves where they came from Python; they are compared by
            their fingerprint.
        work_dir: where the block files are now, and will be written.
        max_disk_writes: another limit from now on, counted from the run's beginning.
        reinit_blocks: blocks to make and train again from their beginning, for example because a file is damaged.
        callbacks: as of `train`; they hear nothing where the run is finished already.

    Raises:
        RunError: the run is damaged, in use by another process, or its data have changed.
        DoesNotFitError: the run's blocks do not fit the budget on this machine.
    """
    listener, told = listener or Silent(), Callbacks(callbacks)
    run = open_run(Path(path))
    run = replace(run, plan=run.trainable_plan)
    with locked(run.path, listener.note):
        data = stored_source(data, run.settings, listener)
        given = {"mem_budget": mem_budget, "ram_budget": ram_budget, "target": target, "data": data}
        given |= {"work_dir": work_dir, "max_disk_writes": max_disk_writes}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        steps_before = run.settings.run.steps
        if steps is not None and steps != steps_before:
            changes["steps"] = steps
        if target is not None and target != run.settings.run.target:
            changes = {**usual_budgets(target), **changes}
        run = run.changed(changes)
        if run.blocks_folder == run.away_folder:
            check_work_dir(run.settings.run.work_dir)
        if not reinit_blocks and not changes and _is_finished(run):
            listener.note(f"{run.path} is finished: it has made its {run.settings.run.steps} steps")
            return Run(run)
        with locked_away(run, listener.note):
            other_budget = mem_budget is not None or ram_budget is not None
            return _resume(run, other_budget, reinit_blocks, listener, told, steps_before=steps_before)


def _is_finished(run: RunDirectory) -> bool:
    """Whether there is nothing left to do: trained, evaluated, and its blocks at home."""
    if run.summary is None or not (run.path / "blocks").is_dir():
        return False
    return min(run.saved_steps(run.store())) >= run.settings.run.steps


def _resume(
    run: RunDirectory,
    other_budget: bool,
    reinit_blocks: Sequence[int],
    listener: Listener,
    told: Callbacks,
    *,
    steps_before: int,
) -> "Run":
    """Go on with a locked run; its settings are written down when everything has proved sound."""
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
    data_set = open_run_data(run.data_settings, listener, budget_bytes=budget_bytes, target=target)
    if data_set.fingerprint != run.data_fingerprint:
        raise RunError(
            f"the data of {run.path} have changed: {data_set.source} is not what the run was trained on; put the "
            f"former data back, name their new place with --data, or start a new run with --out"
        )
    run = _replanned_if_needed(run, data_set, other_budget or is_prolonged, target, listener)
    _reinitialise(run, reinit_blocks, listener)
    saved = run.saved_steps(run.store())
    if is_prolonged:
        run = prolong(run, steps_before=steps_before, saved=saved, note=listener.note)
    run.save_settings()
    run.drop_metrics_after(saved)
    listener.note(f"resuming {run.path}: {_at_steps(run, saved)} of {run.settings.run.steps}")
    changed = changed_environment(run)
    if changed is not None:
        listener.note(
            f"note: this run began otherwise ({changed}): it goes on as well as before, but its sums are rounded in "
            f"another way, so its bits are not those that it would have had there"
        )
    return _train(run, data_set, listener, told, resumed_from=saved)


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


def _at_steps(run: RunDirectory, steps: Sequence[int]) -> str:
    """How far the blocks are, or the stages that are trained together."""
    return f"step {steps[0]}" if run.method.trained_together else f"steps {', '.join(map(str, steps))}"


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


def _train(
    run: RunDirectory, data_set: DataSet, listener: Listener, told: Callbacks, *, resumed_from: list[int] | None
) -> "Run":
    """Train to the last step and evaluate; the callbacks are closed whatever happens."""
    with closing(told):
        settings = {**run.settings.run.model_dump(), **asdict(run.settings.family)}
        plan = run.trainable_plan.to_json()
        told.tell(Planned(run=run.path, settings=settings, plan=plan, resumed_from=resumed_from))
        summary = _trained(run, data_set, listener, told, resumed_from)
        run.write_json("summary.json", summary.to_json())
        finished = Run(run)
        told.tell(Finished(run=run.path, summary=finished.summary or {}))
    return finished


def _trained(
    run: RunDirectory, data_set: DataSet, listener: Listener, told: Callbacks, resumed_from: list[int] | None
) -> Summary:
    """The summary of a run that is trained now."""
    target = build_target(run.settings.run.target)
    target.warm_up()
    if not target.has_cap:
        listener.note(
            "note: this system does not bound the memory of a process: the plan and a look before each step keep the "
            "budget, and nothing refuses what passes it in between"
        )
    plan = run.trainable_plan
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
        store = run.store()
        # Of the newest file, as each header has what the run had written when that file was complete.
        store.continue_meter(store.header(block) for block in range(len(run.file_layers)))
        store.hold_folder()
        trainer = trainer_type(run.method).open(run, data_set, store, guard, target.device)
        try:
            with target.capped(budget_bytes), Interruption(listener.note).listening() as interruption:
                previews = Previews(run, data_set, trainer, interruption, told.tell)
                listener.stage("training")
                # Those that a crash prevented are due now; of a new run none is.
                previews.after_visit(run.saved_steps(store))
                steps = trainer.train(
                    interruption,
                    on_step=partial(_on_step, listener, told, previews),
                    between_visits=previews.after_visit,
                )
                if interruption.signal_name is None:
                    listener.stage("evaluating")
                    evaluation = previews.evaluation(listener)
        except Interrupted:
            steps = run.saved_steps(store)
        finally:
            trainer.close()
    if interruption.signal_name is not None:
        raise InterruptedRunError(
            f"stopped by {interruption.signal_name}; saved at {_at_steps(run, steps)} of "
            f"{run.settings.run.steps}. Go on with: {command('train', '--resume', run.path)}"
        )
    # Before the summary, which says that the run is finished: a crash in between is made good by --resume.
    bring_blocks_home(run)
    return summary_of(
        run, trainer, evaluation, data_set, target, budget_bytes, resumed_from, evaluation_s=previews.evaluation_s
    )


def _on_step(listener: Listener, told: Callbacks, previews: Previews, progress: Progress) -> None:
    """What hears of each step."""
    progress.looks_left_s = previews.left_s()
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


def load(path: Path | str) -> Run:
    """A run that exists on disk.

    Raises:
        RunError: not a run, damaged, or of another version.
    """
    return Run(open_run(Path(path)))
