"""The Python interface: plan, train, load; and on a loaded run sample, evaluate, export.

Everything the command line does goes through here; `cli` only reads arguments and prints.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from edgeblocks.callbacks import Callback, Callbacks, Finished, Planned
from edgeblocks.cluster.connection import Cluster, joined
from edgeblocks.cluster.driver import Spread
from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.methods import METHODS, Frozen
from edgeblocks.planning.plan_text import banner
from edgeblocks.planning.plans import Machine
from edgeblocks.prepare import Prepared, prepare, prepare_elsewhere
from edgeblocks.pretrained.model_folder import CONFIG, model_folder
from edgeblocks.pretrained.writing import USUAL_LENGTH, TextWriter, writer_of_folder
from edgeblocks.profiling.budgets import RAM_BUDGET, device_budget_bytes, usual_budgets
from edgeblocks.profiling.measurement import with_precision
from edgeblocks.progress import Listener, Silent
from edgeblocks.registry import build_profile, build_target, family_type, profile_names, register_family, target_names
from edgeblocks.run import Run, within
from edgeblocks.runs.apart import as_text, check_trained_apart, checked_blocks, is_done_here, steps_left
from edgeblocks.runs.create import check_apart, check_free, create_blocks, create_run, seal_run
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.disk_room import check_disk, check_work_dir
from edgeblocks.runs.gathering import Gathered
from edgeblocks.runs.gathering import gather as gathered
from edgeblocks.runs.latents import check_vae
from edgeblocks.runs.locks import locked, locked_away
from edgeblocks.runs.open_data import check_vocab, stored_source
from edgeblocks.runs.opening import open_run
from edgeblocks.runs.schema import InitFields
from edgeblocks.runs.shared import as_far_as_it_is, is_split, shared_run, split
from edgeblocks.settings.fields import Settings
from edgeblocks.settings.reading import read_yaml, resolve_settings
from edgeblocks.terminal import command
from edgeblocks.training.resumption import is_finished, made_ready
from edgeblocks.training.session import at_steps, trained
from edgeblocks.tuning import tuning_settings

if TYPE_CHECKING:
    from edgeblocks.targets.profile import Profile

__all__ = [
    "Callback",
    "Prepared",
    "Run",
    "finetune",
    "gather",
    "load",
    "plan",
    "register_family",
    "resume",
    "train",
    "writer",
]


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
        settings: any of `RunSettings` or of the family's settings, such as mem_budget="6GB"; `target` may also
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
    check_vae(resolved.run)
    return resolved, profile


def train(
    *,
    out: Path | str,
    config: Path | str | None = None,
    listener: Listener | None = None,
    callbacks: Sequence[Callback] = (),
    blocks_here: Sequence[int] | None = None,
    cluster: str | None = None,
    workers: int | None = None,
    **settings: object,
) -> "Run":
    """Train a new run in the directory `out` and return it; see `plan` for settings and errors.

    Args:
        callbacks: hear what happens in the training. An error of theirs ends it, saved, and is raised.
        blocks_here: with method `diffusion`, the blocks that this call trains, the first being 0; None: all. The others
            are left to copies of the run on other machines (`gather`), and the run has no summary then. An empty one
            creates the run, with what all blocks begin as, and trains no block.
        cluster: a Ray cluster whose nodes train the blocks: auto, ray://HOST:PORT or HOST:PORT; None: this process.
        workers: how many blocks are trained there at a time; None: all.

    Raises:
        InterruptedRunError: stopped by a signal; everything is saved.
    """
    listener, told = listener or Silent(), Callbacks(callbacks)
    path = Path(out)
    # Looked at now, because planning takes half a minute, and again by `create_run`, which must not trust that look.
    check_free(path)
    settings = _with_stored_data(config, settings, listener)
    settled = settings_for_here(config=config, **settings).with_whole_paths()
    check_trained_apart(blocks_here, METHODS[settled.run.method], cluster=cluster)
    check_apart(path, settled.run.data)
    with joined(cluster, workers) as nodes:
        prepared = prepare(settled, path, listener)
        blocks_here = checked_blocks(blocks_here, prepared.plan.chosen.blocks)
        check_disk(prepared.plan, work_dir=prepared.settings.run.work_dir, out=path)
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
                init=_origin(prepared),
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
                return _train(
                    run,
                    prepared.data_set,
                    listener,
                    told,
                    resumed_from=None,
                    blocks_here=blocks_here,
                    nodes=nodes,
                    workers=workers,
                )


def finetune(
    model: Path | str,
    *,
    out: Path | str,
    config: Path | str | None = None,
    listener: Listener | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: object,
) -> "Run":
    """Fine-tune a pretrained model of Hugging Face's transformers in a new run in the directory `out`, and return it.

    All layers are trained with true gradients, some at a time in memory. Of a decoder the table of tokens, the head and
    the final norm stay as they are without `train_embeddings`; of an image classifier the head is trained, and what is
    before the first layer and the final norm stay as they are. `Run.merge` makes a folder of the result.

    Args:
        model: its folder, with config.json, .safetensors files, and a decoder's tokenizer.json.
        settings: as of `plan`, with `data` a text or conversations, or images with classes; `tuning_settings` has those
            that are usual here.

    Raises:
        ConfigError: the model cannot be trained, or its library is missing; and as of `train`.
    """
    told: dict[str, Any] = tuning_settings(model, settings)
    if model_folder(str(told["model"])).is_plan_only:
        raise ConfigError(f"{model} has no .safetensors files: a config is enough to plan (--dry-run), not to train")
    if listener is not None and told["family"] == "hf" and not told.get("train_embeddings"):
        listener.note(
            "note: all layers are trained; the table of tokens, the head and the last norm stay as they are without "
            "--train-embeddings"
        )
    return train(out=out, config=config, listener=listener, callbacks=callbacks, **told)


def _origin(prepared: Prepared) -> InitFields | None:
    """What a run remembers of the file that its weights began with, or of the model that they stand beside."""
    initial, model = prepared.initial, getattr(prepared.settings.family, "model", "")
    if initial is None and model:
        folder = model_folder(model)
        return InitFields(file=folder.path.name, bytes=folder.num_bytes, sha256=folder.sha256())
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
    vae: str | None = None,
    work_dir: str | None = None,
    max_disk_writes: str | None = None,
    precision: str | None = None,
    reinit_blocks: Sequence[int] = (),
    blocks_here: Sequence[int] | None = None,
    cluster: str | None = None,
    workers: int | None = None,
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
        vae: where the same autoencoder is now.
        work_dir: where the block files are now, and will be written.
        max_disk_writes: another limit from now on, counted from the run's beginning.
        precision: another one from now on, for example float32 on a processor that would have to emulate bfloat16.
        reinit_blocks: blocks to make and train again from their beginning, for example because a file is damaged.
        blocks_here: as of `train`; not kept: without it all that is left is trained.
        cluster, workers: as of `train`.
        callbacks: as of `train`; they hear nothing where the run is finished already.

    Raises:
        RunError: the run is damaged, in use by another process, or its data have changed.
        DoesNotFitError: the run's blocks do not fit the budget on this machine.
    """
    listener, told = listener or Silent(), Callbacks(callbacks)
    run = open_run(Path(path))
    run = replace(run, plan=run.trainable_plan)
    check_trained_apart(blocks_here, run.method, cluster=cluster)
    blocks_here = checked_blocks(blocks_here, len(run.file_layers))
    with joined(cluster, workers) as nodes, locked(run.path, listener.note):
        data = stored_source(data, run.settings, listener)
        given = {"mem_budget": mem_budget, "ram_budget": ram_budget, "target": target, "data": data}
        given |= {"vae": vae, "work_dir": work_dir, "max_disk_writes": max_disk_writes, "precision": precision}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        steps_before = run.settings.run.steps
        if steps is not None and steps != steps_before:
            changes["steps"] = steps
        if target is not None and target != run.settings.run.target:
            changes = {**usual_budgets(target), **changes}
        precision_before = run.precision
        run = run.changed(changes)
        here = build_target(run.settings.run.target)
        here.prepare()  # says at once that there is no such device
        half = here.half_precision()
        decided = with_precision(run.settings, run.data, device=here.torch_device, half=half)
        run = replace(run, settings=decided)
        if run.is_away:
            check_work_dir(run.settings.run.work_dir)
        if not reinit_blocks and not changes and is_finished(run):
            listener.note(f"{run.path} is finished: it has made its {run.settings.run.steps} steps")
            return Run(run)
        if not reinit_blocks and not changes and is_done_here(run, blocks_here) and is_split(run) and not run.is_away:
            return Run(run)
        with locked_away(run, listener.note):
            other_budget = mem_budget is not None or ram_budget is not None or run.precision != precision_before
            run, data_set, saved = made_ready(
                run, other_budget, reinit_blocks, listener, steps_before=steps_before, blocks_here=blocks_here
            )
            return _train(
                run, data_set, listener, told, resumed_from=saved, blocks_here=blocks_here, nodes=nodes, workers=workers
            )


def gather(run: Path | str, copies: Sequence[Path | str], *, listener: Listener | None = None) -> Gathered:
    """Take from copies of a run the blocks that other machines have trained further there; `resume` finishes it then.

    Copies may have other budgets, targets and places of their data. Every file's checksums are verified before one is
    replaced. What is as far in both is left as it is.

    Raises:
        ConfigError: a copy is the run itself, or the parts of the run are trained together.
        RunError: a copy is of another run or has other settings, a file of it is damaged, or a block was trained in two
            copies to other bits; nothing was taken.
        StorageError: the disk refused.
    """
    return gathered(open_run(Path(run)), [Path(copy) for copy in copies], (listener or Silent()).note)


def _train(
    run: RunDirectory,
    data_set: DataSet,
    listener: Listener,
    told: Callbacks,
    *,
    resumed_from: list[int] | None,
    blocks_here: Sequence[int] | None,
    nodes: Cluster | None,
    workers: int | None,
) -> "Run":
    """Train to the last step and evaluate; the callbacks are closed whatever happens."""
    with closing(told):
        settings = {**run.settings.run.model_dump(), **asdict(run.settings.family)}
        plan = run.trainable_plan.to_json()
        told.tell(Planned(run=run.path, settings=settings, plan=plan, resumed_from=resumed_from))
        only = () if blocks_here is None else ("--blocks-here", as_text(blocks_here))
        go_on_with = command("train", "--resume", run.resumed_at, *only)
        begins = resumed_from is None
        if not is_split(run):
            begins = True
            _begin_as_one(run, data_set, listener, told, go_on_with)
        if blocks_here is not None and begins:
            listener.note(f"from now on copies of {run.path} can train its other blocks elsewhere")
        if nodes is not None:
            blocks = [block for block in steps_left(run) if blocks_here is None or block in blocks_here]
            Spread(run, nodes, listener, workers=workers).train(blocks, go_on_with=go_on_with)
            resumed_from = run.saved_steps(run.store())
        finished = Run(
            trained(run, data_set, listener, told, resumed_from, go_on_with=go_on_with, blocks_here=blocks_here)
        )
        if finished.summary is not None:
            told.tell(Finished(run=run.path, summary=finished.summary))
    return finished


def _begin_as_one(run: RunDirectory, data_set: DataSet, listener: Listener, told: Callbacks, go_on_with: str) -> None:
    """Train the denoiser that all blocks begin as, as far as that is to be done, and copy it into them."""
    listener.stage("beginning with one denoiser for all blocks")
    one = shared_run(run)
    with locked(one.path, listener.note), locked_away(one, listener.note):
        if not is_finished(one):
            saved = one.saved_steps(one.store())
            if saved[0]:
                listener.note(f"at {at_steps(one, saved)} of {one.settings.run.steps}")
            trained(one, data_set, listener, told, saved if saved[0] else None, go_on_with=go_on_with)
        split(run, one)


@contextmanager
def writer(path: Path | str, *, mem_budget: str | None = None, length: int | None = None) -> Iterator[TextWriter]:
    """What continues texts and answers messages, of a run that fine-tuned a model, or of a model's folder.

        with edgeblocks.writer("runs/tuned") as model:
            print(model.answer([{"role": "user", "content": "Where is the capital?"}]))

    Args:
        mem_budget: of the process; None: that of the run, and of a folder half of the memory.
        length: tokens of the longest text or conversation, for which memory is kept; None: as many as were trained on.

    Raises:
        ConfigError: it is neither, or the model cannot be run.
        DoesNotFitError, OutOfBudgetError: the budget is too small.
    """
    if not (Path(path) / CONFIG).is_file():
        if not any((Path(path) / name).exists() for name in ("manifest.json", "metrics.jsonl")):
            what = "has neither manifest.json nor config.json" if Path(path).is_dir() else "is no folder"
            raise RunError(f"{path} {what}; name a run of finetune, or the folder of a model with its config.json")
        with load(path).writer(mem_budget=mem_budget, length=length) as found:
            yield found
        return
    target = build_target("auto")
    target.prepare()
    budget_bytes = device_budget_bytes(mem_budget or RAM_BUDGET, target)
    opened = writer_of_folder(
        str(Path(path).expanduser()),
        torch.device(target.torch_device),
        length=length or USUAL_LENGTH,
        budget_bytes=budget_bytes,
        used_bytes=target.used_bytes,
    )
    with opened as found, within(target, budget_bytes):
        yield found


def load(path: Path | str, *, frozen: str = "none") -> Run:
    """A run that exists on disk; while its blocks are still one, the run of that denoiser.

    Args:
        frozen: as what blocks that wait are in memory when it samples, classifies or is evaluated: none as they are,
            int8 in a quarter of it, rounded by 0.6 %, nf4 in a seventh, rounded by 9 %. Their files are made beside
            those of the run when they are first used.

    Raises:
        ConfigError: `frozen` is none of these.
        RunError: not a run, damaged, or of another version.
    """
    known: dict[str, Frozen] = {kind: kind for kind in get_args(Frozen)}
    if frozen not in known:
        raise ConfigError(f"--frozen {frozen}: blocks that wait are kept as {', '.join(known)}; use one of these")
    return Run(as_far_as_it_is(open_run(Path(path))), frozen=known[frozen])
