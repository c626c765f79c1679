"""`eval`, `sample`, `export`, `weights` and `run`: what a trained network is for."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeblocks.cli.exit_codes import verb
from edgeblocks.cli.options import (
    IMAGE_OPTIONS,
    STEPS,
    TEXT_OPTIONS,
    Frozen,
    Json,
    MemBudget,
    Number,
    Overwrite,
    Provider,
    RunArgument,
    RunBudget,
    SampleSeed,
    SampleSteps,
    Threads,
    WritingBudget,
)
from edgeblocks.cli.outputs import Request, say_classes
from edgeblocks.cli.screen import json_text, say, say_lines
from edgeblocks.errors import ConfigError
from edgeblocks.tasks import TASKS, TEXT_TASKS
from edgeblocks.units import format_bytes

_EVALUATED = {task: usual.evaluation_samples for task, usual in TASKS.items()}


@verb()
def evaluate(
    run: RunArgument,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Images that are made for the Frechet distance, or classified (0 leaves the chain out); sequences of "
            "text.",
            show_default=f"{_EVALUATED['images']} made, {_EVALUATED['classes']} classified, {_EVALUATED['text']} "
            f"sequences; {_EVALUATED['continuation']} of ar and looped",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Noise levels of the chain; at least one a block.",
            show_default=f"{STEPS['images']} for images, {STEPS['classes']} for classes, {STEPS['continuation']} of ar "
            "and looped",
        ),
    ] = None,
    seed: SampleSeed = 0,
    data: Annotated[
        str | None, typer.Option(help="Where the run's data are now, if they were moved.", show_default=False)
    ] = None,
    mem_budget: MemBudget = None,
    frozen: Frozen = "none",
    as_json: Json = False,
) -> None:
    """Validation loss per noise level; and a Frechet distance of fresh samples, accuracy and calibration, or bits a
    character."""
    from edgeblocks import api
    from edgeblocks.cli.console import evaluation_report
    from edgeblocks.cli.console_progress import ConsoleListener

    with ConsoleListener() as listener:
        result = api.load(run, frozen=frozen).evaluate(
            samples=samples, steps=steps, seed=seed, data=data, mem_budget=mem_budget, listener=listener
        )
    say_lines(json_text(result) if as_json else evaluation_report(result))


@verb(of_images=IMAGE_OPTIONS, of_text=TEXT_OPTIONS)
def sample(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="grid.png; text is printed")
    ] = None,
    n: Number = None,
    steps: SampleSteps = None,
    *,
    of_images: dict[str, object],
    of_text: dict[str, object],
    seed: SampleSeed = 0,
    mem_budget: MemBudget = None,
    frozen: Frozen = "none",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Generate with a trained run: a grid of images, or texts."""
    request = Request(n=n, out=out, overwrite=overwrite, as_json=as_json, of_images=of_images, of_text=of_text)
    from edgeblocks import api
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.inference.sampling import usual_steps

    with ConsoleListener() as listener:
        loaded = api.load(run, frozen=frozen)
        if not (run / "summary.json").exists():
            listener.note("the run is not finished: its blocks are used as they were saved last")
        if loaded.directory.family().task in TEXT_TASKS:
            on_token = partial(listener.advance, text="writing")
            request.texts(partial(loaded.sample_text, steps=steps, seed=seed, mem_budget=mem_budget, on_step=on_token))
            return
        levels = usual_steps(loaded.directory) if steps is None else steps
        sampled = partial(listener.advance, total=levels, text="sampling")
        decoded = partial(listener.advance, text="decoding")
        told = partial(loaded.sample, on_level=sampled, on_picture=decoded)
        request.images(
            partial(told, steps=levels, seed=seed, mem_budget=mem_budget),
            num_classes=len(loaded.directory.class_names),
        )


@verb()
def export(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the exported network.", show_default=False)
    ] = None,
    web: Annotated[
        Path | None,
        typer.Option(
            help="In place of -o: directory of a page that runs the network in a browser, from any static server, and "
            "sends nothing.",
            show_default=False,
        ),
    ] = None,
    web_runtime: Annotated[
        Path | None,
        typer.Option(
            help="With --web: the npm package onnxruntime-web, its folder or its .tgz.",
            show_default="npm fetches it, once",
        ),
    ] = None,
    single_file: Annotated[
        bool,
        typer.Option(
            "--single-file",
            help="One graph for the whole chain, with its loop over the noise levels: it runs in any program that has "
            "onnxruntime, and holds the whole network in memory.",
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="As what matrices are written: int8, int4 or fp32. Rounded ones are measured on hold-out data.",
            show_default="fp32; of a fine-tuned model of text int8",
        ),
    ] = None,
    most_loss: Annotated[
        str | None,
        typer.Option(
            "--most-loss",
            help="By how much --weights may raise the loss on hold-out data, or lower the probability that a "
            "classifier gives the right class, such as 1%; what surely costs more is refused.",
            show_default="int8: 0.5%; int4: any",
        ),
    ] = None,
    mem_budget: WritingBudget = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a trained run as ONNX graphs, one a block or one for all, and verify them against torch.

    USE.md in the directory shows how other programs run them, with onnxruntime alone. A fine-tuned model becomes one
    graph: of pictures, which it normalises itself, or of text with a KV cache, in the layout of onnxruntime-genai,
    whose builder makes it (extra `genai`). With --web they become a page.
    """
    from edgeblocks import api
    from edgeblocks.cli.console import export_report, page_report
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.registry import build_exporter

    wanted = [path for path in (out, web) if path is not None]
    if len(wanted) != 1:
        raise ConfigError("give one directory: -o DIR for the network's graphs, --web DIR for a page that runs them")
    if web is None and web_runtime is not None:
        raise ConfigError("--web-runtime belongs to --web, which writes a page; leave it out")
    if web is not None and single_file:
        raise ConfigError("--single-file: a page has the form of graph that suits it; leave it out with --web")
    (destination,) = wanted
    told: dict[str, Any] = {"weights": weights, "most_loss": most_loss, "mem_budget": mem_budget}
    with ConsoleListener() as listener:
        loaded = api.load(run)
        if web is None:
            manifest = loaded.export(
                destination, single_file=single_file, overwrite=overwrite, listener=listener, **told
            )
        else:
            manifest = build_exporter("page")(
                loaded.directory, web, listener, runtime=web_runtime, overwrite=overwrite, **told
            )
    report = export_report if web is None else page_report
    say_lines(json_text(manifest) if as_json else report(manifest, destination))


@verb()
def weights(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="A file that ends in .safetensors.", show_default=False)],
    last: Annotated[bool, typer.Option("--last", help="As the last step left them, instead of their average.")] = False,
    mem_budget: WritingBudget = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a run's weights as one .safetensors file: for --init of another run, or for PyTorch."""
    from edgeblocks import api

    written = api.load(run).save_weights(out, last=last, overwrite=overwrite, mem_budget=mem_budget)
    line = f"wrote {written['tensors']} tensors, {format_bytes(written['bytes'])}, to {out}"
    say(json_text(written) if as_json else line)


@verb()
def merge(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.", show_default=False)],
    last: Annotated[bool, typer.Option("--last", help="As the last step left them, instead of their average.")] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of --tune lora: what was trained alone, as the library PEFT loads it.")
    ] = False,
    mem_budget: WritingBudget = None,
    as_json: Json = False,
) -> None:
    """Write a fine-tuned model into a folder like the one that it was made of, for transformers and others.

    Files and tensors that were not trained are the same byte for byte, and trained ones have the type that they had.
    """
    from edgeblocks import api

    merged = api.load(run).merge(out, last=last, adapter=adapter, mem_budget=mem_budget)
    left_out = f"; not copied: {', '.join(merged['left_out'])}" if merged["left_out"] else ""
    line = (
        f"wrote {out}: {merged['trained']} trained tensors, {merged['untouched']} as they were, and "
        f"{len(merged['files'])} files beside them{left_out}"
    )
    say(json_text(merged) if as_json else line)


@verb(of_images=IMAGE_OPTIONS, of_text=TEXT_OPTIONS)
def run(
    directory: Annotated[Path, typer.Argument(help="An exported directory.", show_default=False)],
    images: Annotated[
        list[Path] | None, typer.Argument(help="For an exported classifier: images to classify, or folders of them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write.", show_default="grid.png where images are made")
    ] = None,
    n: Number = None,
    steps: Annotated[
        int | None, typer.Option(help="Noise levels of the chain; at least one a block.", show_default="as exported")
    ] = None,
    *,
    of_images: dict[str, object],
    of_text: dict[str, object],
    seed: SampleSeed = 0,
    mem_budget: RunBudget = None,
    threads: Threads = None,
    provider: Provider = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run an exported network: onnxruntime only, one block in memory at a time, no torch.

    An image model writes a grid of images. A classifier prints the likeliest classes of each image file, or writes them
    to a .json file; a folder stands for all images in it and below. A text model prints its text, or writes it to a
    file. A network from elsewhere gets no more than --mem-budget, and Ctrl-C ends it.
    """
    request = Request(n=n, out=out, overwrite=overwrite, as_json=as_json, of_images=of_images, of_text=of_text)
    from edgeblocks.cli.console_progress import ConsoleListener
    from edgeblocks.onnx_runtime import Hardware
    from edgeblocks.registry import open_exported, open_language_model

    hardware = Hardware(threads=threads, provider=provider)
    model = open_language_model(directory, hardware)
    if model is not None:
        if images:
            raise ConfigError(f"{directory} takes no images; leave out {images[0]}")
        with ConsoleListener() as listener, model.within(mem_budget, n=request.num_texts):
            on_token = partial(listener.advance, text="writing")
            request.texts(partial(model.write, steps=steps, seed=seed, on_token=on_token))
        return
    exported = open_exported(directory, hardware)
    manifest = exported.manifest
    if images and manifest.task != "classes":
        raise ConfigError(f"{directory} takes no images; leave out {images[0]}")
    if manifest.task == "classes":
        from edgeblocks.data.picture_files import files_in

        request.nothing("classifies images")
        files = files_in(images or [])
        with ConsoleListener() as listener, exported.within(mem_budget, n=len(files)):
            on_image = partial(listener.advance, text="classifying")
            say_classes(exported, files, out, steps, seed, overwrite=overwrite, as_json=as_json, on_image=on_image)
        return
    levels = manifest.sampler.steps if steps is None else steps
    if manifest.task in TEXT_TASKS:
        with (
            ConsoleListener() as listener,
            exported.within(mem_budget, n=request.num_texts, on_note=listener.note),
        ):
            on_token = partial(listener.advance, text="writing")
            request.texts(partial(exported.write, steps=levels, seed=seed, on_token=on_token))
    else:
        with ConsoleListener() as listener, exported.within(mem_budget, n=request.num_images):
            sampled = partial(listener.advance, total=levels, text="sampling")
            decoded = partial(listener.advance, text="decoding")
            told = partial(exported.sample, on_level=sampled, on_picture=decoded)
            request.images(partial(told, steps=levels, seed=seed), num_classes=manifest.num_classes)
