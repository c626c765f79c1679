"""Blocks that begin as one: a denoiser of a block's depth learns all noise levels, and is then copied into every block.

It is a run of its own in the folder `shared` of the run: of one block, with the same settings, inside the same plan. A
step of each of B blocks is B of its steps, and one learning-rate schedule goes over both phases: at step n of B S it
has the rate of a block's step n / B of S. Its weights, their average and its moments become those of every block, whose
own steps go on from there. The shared run stays: it is a network of its own, as good as one of that size can be.

Source: experts of a range of noise levels that begin as one model: Balaji et al. 2022, eDiff-I, arXiv 2211.01324,
section 4.1.
"""

from dataclasses import asdict, replace

from edgeblocks.diffusion.noise import partition_noise
from edgeblocks.errors import ConfigError
from edgeblocks.planning.plans import tiers
from edgeblocks.runs.create import create_blocks, create_run, seal_run
from edgeblocks.runs.directory import SHARED_FOLDER, RunDirectory, remove_leftovers
from edgeblocks.runs.opening import open_run
from edgeblocks.runs.schema import SharedBy
from edgeblocks.runs.written_plan import TrainablePlan
from edgeblocks.settings.fields import Settings


def is_split(run: RunDirectory) -> bool:
    """Whether the blocks have their own weights: those of a run whose blocks never begin as one always have."""
    store = run.store()
    return not run.shared_steps or all(store.header(block).step > 0 for block in range(len(run.file_layers)))


def as_far_as_it_is(run: RunDirectory) -> RunDirectory:
    """The run, or that of the denoiser which its blocks will begin as, while there are no blocks yet."""
    if is_split(run) or not (run.path / SHARED_FOLDER / "manifest.json").exists():
        return run
    return open_run(run.path / SHARED_FOLDER)


def shared_run(run: RunDirectory) -> RunDirectory:
    """The run of the denoiser that all blocks of a run begin as, created where it is not there yet; ready to go on.

    Its settings and its plan are those that `run` has now: the budget, the data's place, the machine.

    Raises:
        StorageError: the disk refused.
    """
    path = run.path / SHARED_FOLDER
    settings, plan = _shared_settings(run), _shared_plan(run)
    if (path / "manifest.json").exists():
        one = replace(open_run(path), settings=settings, plan=plan)
        remove_leftovers(one)
        one.save_settings()
        one.write_json("plan.json", plan.to_json())
        one.drop_metrics_after(one.saved_steps(one.store()))
        return one
    one = create_run(
        path,
        settings,
        plan,
        run.data,
        data_source=run.data_source,
        data_fingerprint=run.data_fingerprint,
        class_names=run.class_names,
        tokenizer=run.tokenizer,
        shared_by=SharedBy(blocks=len(run.file_layers), steps=run.first_steps),
    )
    create_blocks(one, former=run.store_with_meter())
    seal_run(one)
    return one


def split(run: RunDirectory, one: RunDirectory) -> list[int]:
    """Begin the blocks that have none yet with the shared denoiser's weights, average and moments; gives their steps.

    Raises:
        RunError: a file is damaged.
        StorageError: the disk refused.
    """
    source = one.store_with_meter()
    store = run.store_with_meter(source)
    buffer = store.buffer()
    for block in range(len(run.file_layers)):
        # One that is there was split off before this process was, or another, was killed.
        if store.header(block).step == 0:
            source.read(0, buffer)
            store.write(block, buffer, run.shared_steps, source.header(0).loss_scale)
    return run.saved_steps(store)


def _shared_settings(run: RunDirectory) -> Settings:
    settings, family = run.settings.run, run.settings.family
    if not hasattr(family, "depth"):
        raise ConfigError(f"shared={settings.shared}: the family '{settings.family}' has no setting `depth`")
    share = run.shared_steps / run.first_steps
    changes = {
        "blocks": 1,
        "shared": 0.0,
        "steps": len(run.file_layers) * run.shared_steps,
        # So many of the run's as belong to this part of it.
        "sample_grids": int(share * settings.sample_grids),
        "evaluations": int(share * settings.evaluations),
    }
    return replace(
        run.settings,
        run=settings.model_copy(update=changes),
        family=replace(family, depth=run.file_layers[0]),
    )


def _shared_plan(run: RunDirectory) -> TrainablePlan:
    """The run's own for one block: a step is made in the same way, and takes as much memory."""
    plan, settings = run.trainable_plan, run.settings.run
    whole = partition_noise(run.family().noise, num_blocks=1, kind=settings.partition, overlap=settings.overlap)
    changes = {
        "blocks": 1,
        "layers_per_block": [run.file_layers[0]],
        "noise_ranges": [asdict(one) for one in whole.ranges],
        "slots": 1,
        "tiers": tiers(1, 1, ram_blocks=0 if plan.is_beside_a_host else None),
        "candidates": [],
    }
    if plan.is_beside_a_host:
        changes["ram_blocks"] = 0
    return plan.model_copy(update=changes)
