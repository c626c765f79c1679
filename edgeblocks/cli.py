"""The command line: arguments, printing, exit codes. Torch is imported by the verbs that need it, when they run.

Exit codes: 0 done; 1 the run failed; 2 wrong use; 3 does not fit the budget; 130 interrupted and saved.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeblocks.errors import ConfigError, EdgeblocksError, StorageError

RESUME_SETTINGS = frozenset({"mem_budget", "ram_budget", "target", "data", "work_dir", "max_disk_writes"})
"""Settings that a run may change when it goes on: they change no number of the result."""

SETTING_FLAGS = frozenset(
    {
        "family",
        "preset",
        "data",
        "tokenizer",
        "vocab",
        "mem_budget",
        "ram_budget",
        "steps",
        "batch",
        "blocks",
        "partition",
        "target",
        "work_dir",
        "max_disk_writes",
        "seed",
    }
)
"""Flags of plan and train that are settings, by their names."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Family = Annotated[
    str | None,
    typer.Argument(
        help="Kind of model: dit (makes images), vit (classifies them), mdlm (fills gaps in text), ar or looped "
        "(write on).",
        show_default="dit",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A named size: dit-tiny, -s, -b, -l, -xl, vit-tiny, -s, -b, mdlm-tiny, -s, -b, ar-tiny, -s, -b, "
        "looped-tiny, -s."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Images: digits (built in), a folder, or an .npz file. Text: moby-dick (built in), a file or folder of "
        "text, a .jsonl or .parquet file."
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Of text: chars (a-z and space), bytes, bpe, or a tokenizer.json.", show_default="chars"),
]
Vocab = Annotated[int | None, typer.Option(help="Tokens of a bpe that is trained on the text.", show_default="4096")]
MemBudget = Annotated[
    str | None,
    typer.Option(
        help="Largest resident memory of the process, such as 700MB, 6GB or 50% (the default); with --target cuda, of "
        "the GPU's memory (90% is the default)."
    ),
]
WorkDir = Annotated[str | None, typer.Option(help="Folder on a fast disk for the blocks while they are trained.")]
MaxDiskWrites = Annotated[
    str | None, typer.Option(help="End, saved, before the run has written more than this to disk, such as 200GB.")
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of each block.")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Images or sequences a step.")]
Blocks = Annotated[str | None, typer.Option(help="Number of blocks; auto lets the budget decide.")]
Partition = Annotated[
    str | None, typer.Option(help="Noise ranges: equal-probability or uniform (in log sigma, or in time).")
]
Target = Annotated[
    str | None, typer.Option(help="Kind of machine: cpu, cuda (not yet run on a GPU), or auto, which is cpu for now.")
]
PlanTarget = Annotated[
    str | None,
    typer.Option(
        help="Kind of machine: auto, cpu or cuda; or the profile of one that is not here, such as laptop-8gb or "
        "rtx3060-12gb (any other word lists them)."
    ),
]
RamBudget = Annotated[
    str | None,
    typer.Option(help="Largest resident memory of the process beside a GPU, such as 8GB or 50% (the default)."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags go over it.")]
SetValues = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as key=value, for example --set patch=1. Repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Decides all randomness.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]
RunArgument = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]
Number = Annotated[int | None, typer.Option("--n", help="How many images or texts.", show_default="64 images, 4 texts")]
Temperature = Annotated[
    float | None, typer.Option(help="Of text: 1 draws as trained, 0 takes the likeliest.", show_default="1")
]
Fill = Annotated[
    str | None,
    typer.Option(help="For mdlm: a text with gaps to fill in, each missing token written _ or [MASK]."),
]
Prompt = Annotated[str | None, typer.Option(help="For ar and looped: how each text begins.")]
TopP = Annotated[
    float | None,
    typer.Option(
        help="For ar and looped: draw from the smallest set of the likeliest tokens that has this probability.",
        show_default="1",
    ),
]
SampleSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", help="Noise levels of the chain; at least one a block.", show_default="18; mdlm 64; ar and looped 8"
    ),
]
Solver = Annotated[str | None, typer.Option(help="heun (two evaluations a level) or euler (one).", show_default="heun")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance; 1 is off, which runs the network once.", show_default="1"),
]
ClassChoice = Annotated[str | None, typer.Option("--class", help="A class by name or number; all in turn by default.")]
SampleSeed = Annotated[int, typer.Option("--seed", help="Decides the noise; sample and run agree on it.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"edgeblocks {metadata.version('edgeblocks')}")
        raise typer.Exit


@app.callback()
def edgeblocks(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train a deep network block by block under a memory budget; deploy it with onnxruntime."""


@app.command()
def plan(
    family: Family = None,
    preset: Preset = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    vocab: Vocab = None,
    mem_budget: MemBudget = None,
    ram_budget: RamBudget = None,
    steps: Steps = None,
    batch: BatchSize = None,
    blocks: Blocks = None,
    partition: Partition = None,
    target: PlanTarget = None,
    work_dir: WorkDir = None,
    max_disk_writes: MaxDiskWrites = None,
    config: ConfigFile = None,
    set_values: SetValues = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option("--out", help="Where the run would be written; its disk is measured.")] = Path(),
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show how a training run would fit the budget, and what it would cost. Trains nothing.

    Exits with 3 and the smallest budget that would work when nothing fits.

    --target NAME plans for another machine: for half of its memory, or for 90 % of its GPU's and half of its RAM.
    """

    typed = {name: value for name, value in locals().items() if name in SETTING_FLAGS}

    def work() -> None:
        given = _given(set_values, typed)
        _print_plan(given, config, out, as_json=as_json)

    _guarded(work, verbose=verbose)


@app.command()
def train(
    family: Family = None,
    preset: Preset = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    vocab: Vocab = None,
    mem_budget: MemBudget = None,
    ram_budget: RamBudget = None,
    steps: Steps = None,
    batch: BatchSize = None,
    blocks: Blocks = None,
    partition: Partition = None,
    target: Target = None,
    work_dir: WorkDir = None,
    max_disk_writes: MaxDiskWrites = None,
    config: ConfigFile = None,
    set_values: SetValues = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory.", show_default="runs/...")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with this run directory. It keeps its settings; --mem-budget, --ram-budget, --target, --data "
            "(its new place), --work-dir and --max-disk-writes may be others."
        ),
    ] = None,
    reinit_block: Annotated[
        list[int] | None,
        typer.Option(help="With --resume: train this block alone again, from its beginning. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a network block by block inside the memory budget.

    With no arguments: a small dit on the built-in digits. Ctrl-C saves and stops; --resume goes on.
    """

    typed = {name: value for name, value in locals().items() if name in SETTING_FLAGS}

    def work() -> None:
        given = _given(set_values, typed)
        others = sorted(set(given) - RESUME_SETTINGS)
        if resume is not None and (others or config or out):
            raise ConfigError(
                f"--resume {resume} goes on with the settings of that run; only {_flags(RESUME_SETTINGS)} may be "
                f"others; leave out {_flags(others) or '--out/--config'}, or start a new run with --out"
            )
        if reinit_block and resume is None:
            raise ConfigError("--reinit-block belongs to --resume RUN: it trains one block of that run again")
        if dry_run:
            if resume is not None:
                raise ConfigError("--dry-run shows a new run's plan; the plan of a run is in its plan.json")
            from edgeblocks import api

            api.settings_for_here(config=config, **given)
            _print_plan(given, config, out or Path(), as_json=as_json)
            return
        from edgeblocks import api
        from edgeblocks.console import ConsoleListener, training_report

        listener = ConsoleListener(sys.stderr if as_json else sys.stdout)
        try:
            if resume is not None:
                run = api.resume(resume, reinit_blocks=reinit_block or (), listener=listener, **given)
            else:
                run = api.train(out=out or _free_run_path(given), config=config, listener=listener, **given)
        finally:
            listener.close()
        summary = run.summary
        assert summary is not None
        print(json.dumps(summary) if as_json else training_report(summary, run.path))

    _guarded(work, verbose=verbose)


@app.command("eval")
def evaluate(
    run: RunArgument,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Images that are made for the Frechet distance, or classified (0 leaves the chain out); sequences of "
            "text.",
            show_default="256 made, 1024 classified, 256 sequences; 64 of ar and looped",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Noise levels of the chain; at least one a block.",
            show_default="18 for images, 4 for classes, 8 of ar and looped",
        ),
    ] = None,
    seed: SampleSeed = 0,
    mem_budget: MemBudget = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Validation loss per noise level; and a Frechet distance of fresh samples, accuracy and calibration, or bits a
    character."""

    def work() -> None:
        from edgeblocks import api
        from edgeblocks.console import ConsoleListener, evaluation_report

        listener = ConsoleListener(sys.stderr)
        result = api.load(run).evaluate(
            samples=samples, steps=steps, seed=seed, mem_budget=mem_budget, listener=listener
        )
        print(json.dumps(result) if as_json else evaluation_report(result))

    _guarded(work, verbose=verbose)


@app.command()
def sample(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="grid.png; text is printed")
    ] = None,
    n: Number = None,
    steps: SampleSteps = None,
    solver: Solver = None,
    guidance: Guidance = None,
    label: ClassChoice = None,
    temperature: Temperature = None,
    fill: Fill = None,
    prompt: Prompt = None,
    top_p: TopP = None,
    seed: SampleSeed = 0,
    mem_budget: MemBudget = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Generate with a trained run: a grid of images, or texts."""
    of_images = {"solver": solver, "guidance": guidance, "label": label}
    of_text = {"temperature": temperature, "fill": fill, "prompt": prompt, "top_p": top_p}

    def work() -> None:
        from edgeblocks import api
        from edgeblocks.console import ConsoleListener

        listener = ConsoleListener(sys.stderr)
        loaded = api.load(run)
        common: dict[str, Any] = {"seed": seed, "mem_budget": mem_budget}
        if loaded.directory.family().task in ("text", "continuation"):
            texts = loaded.sample_text(
                n=4 if n is None else n,
                steps=steps,
                on_step=lambda done, total: listener.advance(done, total, "writing"),
                **common,
                **_only(of_text, of_images, "writes text"),
            )
            _say_texts(texts, out, as_json=as_json)
            return
        asked = _only(of_images, of_text, "makes no text")
        made, levels = 64 if n is None else n, 18 if steps is None else steps
        _check_picture(out or Path("grid.png"), asked.get("solver", "heun"))
        images = loaded.sample(
            n=made, steps=levels, on_level=lambda done: listener.advance(done, levels, "sampling"), **common, **asked
        )
        _save_grid(images, out, loaded.directory.data.num_classes, label, as_json=as_json)

    _guarded(work, verbose=verbose)


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the exported network.", show_default=False)],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a trained run as ONNX graphs, one a block, and verify them against torch."""

    def work() -> None:
        from edgeblocks import api
        from edgeblocks.console import ConsoleListener, export_report

        manifest = api.load(run).export(out, listener=ConsoleListener(sys.stderr))
        if as_json:
            print(json.dumps(manifest))
        else:
            print(export_report(manifest, out))

    _guarded(work, verbose=verbose)


@app.command()
def run(
    directory: Annotated[Path, typer.Argument(help="An exported directory.", show_default=False)],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files to classify, for a network that tells classes.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="grid.png where images are made")
    ] = None,
    n: Number = None,
    steps: Annotated[
        int | None, typer.Option(help="Noise levels of the chain; at least one a block.", show_default="as exported")
    ] = None,
    solver: Solver = None,
    guidance: Guidance = None,
    label: ClassChoice = None,
    temperature: Temperature = None,
    fill: Fill = None,
    prompt: Prompt = None,
    top_p: TopP = None,
    seed: SampleSeed = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run an exported network: onnxruntime only, one block in memory at a time, no torch.

    One that makes images writes a grid of them. One that tells classes prints the likeliest ones of each image file,
    or writes them to a .json file. One that writes text prints it, or writes it to a file.
    """
    of_images = {"solver": solver, "guidance": guidance, "label": label}
    of_text = {"temperature": temperature, "fill": fill, "prompt": prompt, "top_p": top_p}

    def work() -> None:
        from edgeblocks.registry import open_exported

        exported = open_exported(directory)
        task = exported.manifest.task
        if images and task != "classes":
            raise ConfigError(f"{directory} takes no images; leave out {images[0]}")
        if task == "classes":
            _only({}, {**of_images, **of_text}, "tells classes")
            _classify(exported, images or [], out, steps, seed, as_json=as_json)
            return
        if task in ("text", "continuation"):
            asked = _only(of_text, of_images, "writes text")
            _say_texts(exported.write(4 if n is None else n, steps=steps, seed=seed, **asked), out, as_json=as_json)
            return
        asked = _only(of_images, of_text, "makes no text")
        _check_picture(out or Path("grid.png"), asked.get("solver", "heun"))
        steps_taken = exported.manifest.sampler.steps if steps is None else steps
        made = exported.sample(64 if n is None else n, steps=steps_taken, seed=seed, **asked)
        _save_grid(made, out, exported.manifest.num_classes, label, as_json=as_json)

    _guarded(work, verbose=verbose)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A run directory or an exported directory.", show_default=False)],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What a run directory or an exported directory holds."""

    def work() -> None:
        from edgeblocks.console import facts
        from edgeblocks.info import describe

        description = describe(path)
        print(json.dumps(description) if as_json else facts([(key, str(value)) for key, value in description.items()]))

    _guarded(work, verbose=verbose)


@app.command()
def doctor(
    work_dir: Annotated[
        Path, typer.Option("--work-dir", help="Folder whose disk is measured: where runs will be written.")
    ] = Path(),
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure this machine in half a minute: which budgets and presets are sensible, what is wrong, what mends it."""

    def work() -> None:
        from edgeblocks.console import ConsoleListener
        from edgeblocks.doctor.examination import examine, report_text

        report = examine(work_dir, ConsoleListener(sys.stderr))
        print(json.dumps(report.to_json()) if as_json else report_text(report))

    _guarded(work, verbose=verbose)


def _given(set_values: list[str] | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings that the user typed, flags over `--set`."""
    from edgeblocks.config import parse_assignments

    typed = {name: value for name, value in flags.items() if value is not None}
    if str(typed.get("blocks", "")).isdigit():
        typed["blocks"] = int(typed["blocks"])
    return {**parse_assignments(set_values or []), **typed}


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def _print_plan(given: dict[str, Any], config: Path | None, out: Path, *, as_json: bool) -> None:
    from edgeblocks import api
    from edgeblocks.console import ConsoleListener, banner, plan_table

    prepared = api.plan(config=config, out=out, listener=ConsoleListener(sys.stderr), **given)
    if as_json:
        print(json.dumps(prepared.to_json()))
        return
    print(banner(prepared))
    print(plan_table(prepared))


def _free_run_path(given: dict[str, Any]) -> Path:
    """runs/FAMILY-DATA, numbered when it is taken."""
    name = f"{given.get('family', 'dit')}-{Path(str(given.get('data', 'digits'))).stem or 'images'}"
    path, number = Path("runs") / name, 2
    while path.exists():
        path, number = Path("runs") / f"{name}-{number}", number + 1
    return path


def _classify(
    classifier: Any, images: list[Path], out: Path | None, steps: int | None, seed: int, *, as_json: bool
) -> None:
    if not images:
        raise ConfigError(f"{classifier.directory} tells the classes of images: name some image files after it")
    if out is not None and out.suffix.lower() != ".json":
        raise ConfigError(f"-o {out}: classes are written as JSON; give a name that ends in .json")
    found = classifier.classify_files(images, steps=steps, seed=seed)
    if out is not None:
        _write(out, json.dumps(found, indent=1) + "\n")
        print(json.dumps({"path": str(out), "n": len(found)}) if as_json else f"saved {len(found)} answers to {out}")
        return
    if as_json:
        print(json.dumps(found))
        return
    for answer in found:
        classes = ", ".join(f"{one['name']} {one['probability']:.1%}" for one in answer["classes"])
        print(f"{answer['path']}: {classes}")


def _check_picture(out: Path, solver: str) -> None:
    problems = []
    if out.suffix.lower() != ".png":
        problems.append(f"-o {out}: the grid is a PNG picture; give a name that ends in .png")
    if solver not in ("heun", "euler"):
        problems.append(f"--solver {solver}: there are heun and euler")
    if problems:
        raise ConfigError(*problems)


def _columns(num_classes: int, label: str | None) -> int | None:
    """A column for each class where the classes take turns and are few; else the picture chooses."""
    return num_classes if label is None and 1 < num_classes <= 16 else None


def _only(own: dict[str, Any], others: dict[str, Any], what: str) -> dict[str, Any]:
    """What the user typed of a network's own options, after a look that nothing else was typed."""
    wrong = ["class" if name == "label" else name for name, value in others.items() if value is not None]
    if wrong:
        raise ConfigError(f"this network {what}, so {_flags(wrong)} means nothing to it; leave it out")
    return {name: value for name, value in own.items() if value is not None}


def _save_grid(images: Any, out: Path | None, num_classes: int, label: str | None, *, as_json: bool) -> None:
    from edgeblocks import pictures

    path = out or Path("grid.png")
    pictures.save_png(path, pictures.image_grid(images, columns=_columns(num_classes, label)))
    print(json.dumps({"path": str(path), "n": len(images)}) if as_json else f"saved {len(images)} images to {path}")


def _say_texts(texts: list[str], out: Path | None, *, as_json: bool) -> None:
    """Print texts, or save them: as a JSON list where the file's name ends in .json."""
    from edgeblocks.unmasking import texts_as_file

    if out is None:
        print(json.dumps(texts) if as_json else texts_as_file(texts), end="\n" if as_json else "")
        return
    content = json.dumps(texts, indent=1, ensure_ascii=False) + "\n" if out.suffix == ".json" else texts_as_file(texts)
    _write(out, content)
    print(json.dumps({"path": str(out), "n": len(texts)}) if as_json else f"saved {len(texts)} texts to {out}")


def _write(out: Path, content: str) -> None:
    try:
        out.write_text(content, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}; choose another place with -o") from error


def _guarded(work: Callable[[], None], *, verbose: bool) -> None:
    """Run a verb; turn errors into their message and exit code."""
    try:
        work()
    except EdgeblocksError as error:
        if verbose:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}" if error.exit_code != 130 else line, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        raise typer.Exit(1) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if verbose:
            raise
        print(f"error: {type(error).__name__}: {error}. --verbose shows where", file=sys.stderr)
        raise typer.Exit(1) from error


def main() -> None:
    """The `edgeblocks` command."""
    # Torch's threads wait for each other actively for some milliseconds. Where another program holds a core this made a
    # step 3 times slower; 5,000 turns cost nothing on a quiet machine and a sixth less on a busy one.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    app()


if __name__ == "__main__":
    main()
