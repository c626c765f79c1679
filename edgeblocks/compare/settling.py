"""What a comparison needs torch for, each in a process that ends with its answer: see `trainings.apart`.

Before the first training the settings and the data are looked at; after each its figures are read.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from edgeblocks import api
from edgeblocks.checked_method import check_method
from edgeblocks.compare.arms import Arm
from edgeblocks.compare.plain_training import PlainSummary
from edgeblocks.compare.wanted import Asked, Measured, Settled
from edgeblocks.data.dataset import DataSet
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.profiling.budgets import budget_of_this_process
from edgeblocks.profiling.measurement import check_precision, with_precision
from edgeblocks.progress import Silent
from edgeblocks.registry import build_target, family_type
from edgeblocks.runs.create import environment
from edgeblocks.runs.open_data import open_run_data
from edgeblocks.runs.opening import open_run
from edgeblocks.settings.fields import RunSettings, Settings
from edgeblocks.settings.reading import read_yaml


def settled(asked: Asked) -> Settled:
    """What is compared, where every arm can train this family on these data.

    Raises:
        ConfigError, DataError, DoesNotFitError: with the reasons.
    """
    if asked.seeds < 1:
        raise ConfigError(f"--seeds {asked.seeds}: at least one is needed")
    if asked.minutes is not None and asked.config is not None and "steps" in read_yaml(asked.config):
        raise ConfigError(
            f"--minutes and the steps of {asked.config}: an arm trains for a time or for a number of steps"
        )
    settings = api.settings_for_here(config=asked.config, **asked.settings).with_whole_paths()
    data_set = _checked_data(asked.arms, asked.minutes, settings)
    # One precision for every arm.
    data = family_type(settings.run.family).data_info(data_set)
    target = build_target(settings.run.target)
    settings = with_precision(settings, data, device=target.torch_device, half=target.half_precision())
    run = settings.run
    return Settled(
        arms=asked.arms,
        seeds=tuple(range(run.seed, run.seed + asked.seeds)),
        minutes=asked.minutes,
        run=run,
        settings={**run.model_dump(), **vars(settings.family)},
        depth=settings.family.depth,
        task=family_type(run.family).task,
        unrolled=family_type(run.family, "exact").unrolled,
        environment=environment(run),
    )


def _checked_data(arms: Sequence[Arm], minutes: float | None, settings: Settings) -> DataSet:
    run, problems = settings.run, []
    if minutes is not None and not 0 < minutes < math.inf:
        problems.append(f"--minutes {minutes}: a number above 0 is needed")
    if run.method != RunSettings.model_fields["method"].default:
        problems.append(f"method={run.method}: compare trains with several methods; name them with --arms")
    begun = [name for name in ("init", "init_fresh", "train_blocks") if getattr(run, name) is not None]
    if begun and any(arm.is_plain for arm in arms):
        problems.append(
            f"{', '.join(begun)}: ordinary training begins with random weights and trains all of them, which would "
            f"compare different things; use --arms diffusion,exact"
        )
    if any(arm.is_boosting for arm in arms) and family_type(run.family).task != "classes":
        problems.append(
            f"--arms boostresnet: it trains classifiers, and {run.family} is none; leave it out, or use vit"
        )
    if problems:
        raise ConfigError(*problems)
    target = build_target(run.target)
    target.prepare()  # says at once that there is no such device
    check_precision(settings, target.half_precision())
    if run.precision == "fp16" and any(arm.is_plain for arm in arms):
        raise ConfigError("--precision fp16: ordinary training has no loss scaling here; use --arms diffusion,exact")
    if run.master == "bf16" and any(arm.is_plain for arm in arms):
        raise ConfigError("master=bf16: ordinary training keeps float32 weights here; use --arms diffusion,exact")
    for arm in arms:
        family_type(run.family, arm.network)
        if not arm.is_plain:
            check_method(run.model_copy(update={"method": arm.network}))
    return open_run_data(settings, Silent(), budget_bytes=budget_of_this_process(run, target), target=target)


def measured(trainings: Sequence[tuple[Path, bool]]) -> list[Measured]:
    """The figures of trainings that ended.

    Args:
        trainings: the folder of each, and whether it is an ordinary one.

    Raises:
        RunError: one is damaged.
    """
    return [_measured_plain(path) if is_plain else _measured(path) for path, is_plain in trainings]


def _measured_plain(path: Path) -> Measured:
    plain = PlainSummary(**json.loads((path / "summary.json").read_text()))
    return Measured(
        steps=plain.steps, peak_bytes=plain.peak_bytes, runtime_bytes=plain.runtime_bytes, step_s=plain.step_s
    )


def _measured(path: Path) -> Measured:
    run = open_run(path)
    summary, breakdown = run.summary, run.trainable_plan.breakdown
    if summary is None or summary.step_s is None:
        raise RunError(f"{path} has no figures of time; remove it and compare again")
    blocks = len(run.file_layers)
    return Measured(
        steps=run.settings.run.steps,
        blocks=blocks,
        peak_bytes=summary.peak_bytes,
        budget_bytes=summary.budget_bytes,
        runtime_bytes=breakdown["runtime"],
        step_s=summary.step_s * run.method.trained_apart(blocks),
        time_split=summary.time_split,
    )
