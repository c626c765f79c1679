"""`plan` and `train`."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeblocks.cli.exit_codes import verb
from edgeblocks.cli.options import SETTINGS, TUNING_SETTINGS, Json, PlanTarget, as_flags, given_settings
from edgeblocks.cli.screen import json_text, say, say_lines
from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.terminal import command, one_line, quoted

if TYPE_CHECKING:
    from edgeblocks.callbacks import Callback

RESUME_SETTINGS = frozenset(
    {"steps", "mem_budget", "ram_budget", "target", "data", "vae", "work_dir", "max_disk_writes", "precision"}
)
"""Settings that a run may change when it goes on: steps, precision, and what changes no number of the result."""


@verb(flags={**SETTINGS, "target": PlanTarget})
def plan(
    *,
    flags: dict[str, object],
    out: Annotated[Path, typer.Option("--out", help="Where the run would be written; its disk is measured.")] = Path(),
    resume: Annotated[
        Path | None,
        typer.Option(help="Of this run directory instead: how far each block is, who trained it, and what is left."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how a training run would fit the budget, and what it would cost. Trains nothing.

    Exits with 3 and the smallest budget that would work when nothing fits.

    --target NAME plans for another machine: for half of its memory, or for 90 % of its GPU's and half of its RAM.
    """
    given, config = given_settings(flags)
    if resume is not None:
        if given or config:
            raise ConfigError(f"plan --resume {quoted(resume)} tells of that run alone; leave everything else out")
        from edgeblocks.runs.opening import open_run
        from edgeblocks.runs.standing import standing_of

        standing = standing_of(open_run(resume))
        say_lines(json_text(standing.to_json()) if as_json else standing.text())
        return
    _print_plan(given, config, out, as_json=as_json)


@verb(flags=SETTINGS)
def train(
    *,
    flags: dict[str, object],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory.", show_default="runs/...")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with this run directory. It keeps its settings; --steps may be more than before (the learning "
            "rate rises again and falls along a new cosine), and --mem-budget, --ram-budget, --target, --data "
            "and --vae (their new places), --work-dir, --max-disk-writes and --precision may be others."
        ),
    ] = None,
    reinit_block: Annotated[
        list[int] | None,
        typer.Option(help="With --resume: train this block alone again, from its beginning. Repeatable."),
    ] = None,
    blocks_here: Annotated[
        str | None,
        typer.Option(
            help="Train only these blocks, such as 0 or 0,2 (the first one is 0), and leave the others to copies of "
            "the run on other machines, which gather brings together. none: begin the run, and train no block.",
            show_default="all",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Have the blocks trained by the nodes of a Ray cluster: auto, ray://HOST:PORT or HOST:PORT.",
            show_default="none",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="With --cluster: so many blocks at a time.", show_default="all")
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(help="tensorboard: also write losses, samples and memory for it, into RUN/tensorboard."),
    ] = None,
    track_folder: Annotated[
        Path | None, typer.Option("--track-folder", help="With --track: another folder.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network inside the memory budget, block by block, or with --method exact end to end.

    With no arguments: a small dit on the built-in digits. Ctrl-C saves and stops; --resume goes on.
    """
    given, config = given_settings(flags)
    others = sorted(set(given) - RESUME_SETTINGS)
    if resume is not None and (others or config or out):
        raise ConfigError(
            f"--resume {quoted(resume)} goes on with the settings of that run; only {as_flags(RESUME_SETTINGS)} may be "
            f"others; leave out {_left_out(others, given) or '--out/--config'}, or start a new run with --out"
        )
    if reinit_block and resume is None:
        raise ConfigError("--reinit-block belongs to --resume RUN: it trains one block of that run again")
    if track_folder is not None and track is None:
        raise ConfigError("--track-folder belongs to --track tensorboard: it says where its files go")
    if track not in (None, "tensorboard"):
        raise ConfigError(f"--track {track}: there is tensorboard; others are ten lines of Python (docs/tracking.md)")
    if dry_run:
        if resume is not None:
            raise ConfigError(
                f"--dry-run shows a new run's plan; what is left of a run tells {command('plan', '--resume', resume)}"
            )
        from edgeblocks import api

        api.settings_for_here(config=config, **given)
        _print_plan(given, config, out or Path(), as_json=as_json)
        return
    from edgeblocks import api
    from edgeblocks.cli.console import training_report
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.runs.apart import blocks_from_text
    from edgeblocks.runs.standing import standing_of

    callbacks = _tracker(track_folder) if track else []
    here = None if blocks_here is None else blocks_from_text(blocks_here)
    with ConsoleListener() as listener:
        hearing: dict[str, Any] = {"listener": listener, "callbacks": callbacks, "blocks_here": here}
        hearing |= {"cluster": cluster, "workers": workers}
        if resume is not None:
            run = api.resume(resume, reinit_blocks=reinit_block or (), **hearing, **given)
        else:
            run = api.train(out=out or _free_run_path(given), config=config, **hearing, **given)
    summary = run.directory.summary
    if summary is None:  # blocks are left to other machines
        standing = standing_of(run.directory)
        say_lines(json_text(standing.to_json()) if as_json else standing.text())
        return
    say_lines(json_text(summary.to_json()) if as_json else training_report(summary, run.path))


@verb()
def gather(
    run: Annotated[Path, typer.Argument(help="The run directory that takes them.", show_default=False)],
    copies: Annotated[
        list[Path], typer.Argument(help="Copies of it, which other machines have trained.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Take the blocks that copies of a run have trained further (--blocks-here) into the run.

    Checksums are verified before anything is replaced. train --resume then trains what is left and finishes the run.
    """
    from edgeblocks import api
    from edgeblocks.cli.console import gathered_report
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.runs.opening import open_run
    from edgeblocks.runs.standing import standing_of

    with ConsoleListener() as listener:
        gathered = api.gather(run, copies, listener=listener)
    if as_json:
        say(json_text(gathered))
        return
    say_lines(gathered_report(gathered, copies))
    say_lines(standing_of(open_run(run)).text())


@verb(flags=TUNING_SETTINGS)
def finetune(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a pretrained decoder or image classifier: config.json, .safetensors files, and a decoder's "
            "tokenizer.json.",
            show_default=False,
        ),
    ],
    *,
    flags: dict[str, object],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory.", show_default="runs/...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a pretrained model on your text, conversations or images inside the memory budget, with true gradients.

    Needs transformers, which the extra `hf` brings along. Ctrl-C saves and stops, and train --resume goes on. merge
    makes a folder of the result.
    """
    from edgeblocks import api
    from edgeblocks.tuning import tuning_settings

    given, config = given_settings(flags)
    settings = tuning_settings(model, given)
    folder = out or _free_run_path({"family": model.resolve().name, "data": settings.get("data")})
    if dry_run:
        _print_plan(settings, config, folder, as_json=as_json)
        return
    from edgeblocks.cli.console import training_report
    from edgeblocks.cli.console_progress import ConsoleListener

    with ConsoleListener() as listener:
        run = api.finetune(model, out=folder, config=config, listener=listener, **given)
    summary = run.directory.summary
    assert summary is not None
    say_lines(json_text(summary.to_json()) if as_json else training_report(summary, run.path))


def _tracker(folder: Path | None) -> "list[Callback]":
    """Made before the memory is measured, so that its library is counted in the plan."""
    from edgeblocks.track.tensorboard import TensorBoard

    return [TensorBoard(folder)]


def _left_out(names: list[str], given: Mapping[str, object]) -> str:
    """Settings as the user typed them; a family has no flag, and others are given with --set."""
    family = [f"'{given['family']}'"] if "family" in names else []
    flags = as_flags([name for name in names if name in SETTINGS and name != "family"])
    others = [f"--set {one_line(f'{name}={given[name]}')}" for name in names if name not in SETTINGS]
    return ", ".join([*family, *([flags] if flags else []), *others])


def _print_plan(given: Mapping[str, Any], config: Path | None, out: Path, *, as_json: bool) -> None:
    from edgeblocks import api
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.methods import METHODS, MethodName
    from edgeblocks.planning.plan_text import banner, in_fp32, plan_table
    from edgeblocks.planning.recommendation import Option, measured, option, recommendation
    from edgeblocks.registry import family_type

    with ConsoleListener() as listener:
        prepared = api.plan(config=config, out=out, listener=listener, **given)
        run = prepared.settings.run
        options: dict[MethodName, Option] = {run.method: option(lambda: prepared)}
        found = measured(run.family, sliding_window=getattr(prepared.settings.family, "sliding_window", 0))
        for other in METHODS.keys() - {run.method}:
            if family_type(run.family).only_exact:
                break
            if found is not None and found.of(other) is None:  # nothing could be said of it
                continue
            listener.stage(f"planning with --method {other} as well")
            only_here = METHODS[run.method].own_settings - METHODS[other].own_settings
            asked = {name: value for name, value in given.items() if name not in only_here}
            asked |= {"method": other, "precision": prepared.plan.precision}
            options[other] = option(partial(api.plan_beside, prepared, config=config, out=out, **asked))
        advice = None if family_type(run.family).only_exact else recommendation(found, options)
        single = None
        if prepared.plan.precision != "fp32":
            listener.stage("planning in fp32 as well")
            with contextlib.suppress(DoesNotFitError):
                single = api.plan(config=config, out=out, **{**given, "precision": "fp32"}).plan
    if as_json:
        say(json_text({**prepared.to_json(), "recommendation": None if advice is None else asdict(advice)}))
        return
    say_lines(banner(prepared))
    if prepared.plan.precision != "fp32":
        say(in_fp32(prepared.plan, single))
    say_lines(plan_table(prepared))
    if advice is not None:
        say(advice.line())


def _free_run_path(given: Mapping[str, object]) -> Path:
    """runs/FAMILY-DATA, numbered when it is taken."""
    name = f"{given.get('family', 'dit')}-{Path(str(given.get('data', 'digits'))).stem or 'images'}"
    path, number = Path("runs") / name, 2
    while path.exists():
        path, number = Path("runs") / f"{name}-{number}", number + 1
    return path
