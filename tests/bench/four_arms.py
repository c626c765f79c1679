"""What block-wise training costs in quality: arms of a family at equal layer evaluations.

    python tests/bench/fashion_mnist.py fashion.npz
    python tests/bench/four_arms.py fashion.npz --task vit
    python tests/bench/four_arms.py moby-dick --task ar --seeds 0 1
    python tests/bench/four_arms.py addresses.jsonl --task mdlm        # see state_of_the_union.py
    python tests/bench/four_arms.py moby-dick --task ar --steps 1200 --seeds 0 --arms "plain, short" greedy
    python tests/bench/four_arms.py moby-dick --task ar-sliding --rates 1e-3 2e-3 4e-3

With L layers, the family's preferred number of blocks B, and K steps of each block:
  blocks        B blocks of L/B layers, K steps each
  begun as one  the same blocks, which for four fifths of the steps are one denoiser (shared=0.8)
  one block     the same method with B = 1: one block of L layers, K steps
  plain         end-to-end training of L layers, K steps; for dit and mdlm that is one block
  plain, short  end-to-end training of L/B layers, B K steps: shows whether depth is used at all
  greedy        L/B layers at a time, from the bottom up (--method greedy), as many steps as make as many layer
                evaluations, those of the frozen layers counted, where each window is trained as long as it may be
                (grow=auto); and with equal steps for each window (grow=equal)
  BoostResNet   of vit: one layer at a time, by boosting (`compare.boosting`), as many layer evaluations
and for looped, whose B is 1:
  unrolled      end-to-end training of its own form, K steps: the core several times a step, which takes more layer
                evaluations
`ar-sliding` is ar where a layer sees two tokens (sliding_window=2), so that a text is seen only as far back as there
are layers: there depth pays. With several learning rates each arm has its best one, that of the first seed.
Text that is written token by token is told by the bound with 8 noises, or by the cross-entropy of a network that was
trained end to end. Batch, learning rate, schedule, clipping, EMA and the hold-out part are the same.

Trainings are kept in docs/four_arms.jsonl: what is there is not trained again. Two tables follow from them:
docs/four_arms.md, and with docs/methods.md (and edgeblocks/measured.json) the one behind `edgeblocks plan`'s
recommendation, where the plain arm (of looped the unrolled one) stands for --method exact.
"""

import argparse
import itertools
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import edgeblocks
from edgeblocks.api import settings_for_here
from edgeblocks.compare import boosting
from edgeblocks.diffusion.classification import classification_scores
from edgeblocks.planning.windows import frozen_below, last_steps, latest_steps, layers_in_windows
from edgeblocks.registry import build_family, family_type
from edgeblocks.runs.open_data import data_of

HERE = Path(__file__).parents[2]
TRAININGS = HERE / "docs/four_arms.jsonl"
PAGE = HERE / "docs/four_arms.md"
METHODS = HERE / "docs/methods.md"
CURVES = HERE / "docs/methods.png"
PACKAGED = HERE / "edgeblocks/measured.json"

LEARNING = {"learning_rate": 1e-3, "warmup": 50, "weight_decay": 0.01, "clip": 1.0, "ema_length": 0.1}
IMAGE = {"width": 96, "depth": 6, "heads": 4, "patch": 4, "batch": 64}
TEXT = {"width": 64, "depth": 12, "heads": 4, "length": 128, "batch": 16, "overlap": 0.1}
SLIDING = {**TEXT, "depth": 4, "sliding_window": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    **{"dit": IMAGE, "vit": IMAGE, "mdlm": TEXT, "ar": TEXT, "looped": TEXT},
    "ar-sliding": SLIDING,
}
"""By the task: a family, with what else is asked of it."""
STEPS = {"dit": 1000, "vit": 800, "mdlm": 500, "ar": 300, "looped": 300, "ar-sliding": 800}
LENGTHS = (1, 4, 12)
"""Times as many steps."""
BLOCKS = {"dit": 3, "vit": 2, "mdlm": 3, "ar": 4, "looped": 1, "ar-sliding": 2}
EXAMPLES = {"dit": 0, "vit": 1024, "mdlm": 64, "ar": 64, "looped": 64, "ar-sliding": 64}
"""Of the hold-out part: classified, or sequences of the bound; the loss of images is that of 512."""
DATA = {
    **{"dit": "fashion", "vit": "fashion", "mdlm": "addresses", "ar": "moby-dick", "looped": "moby-dick"},
    "ar-sliding": "moby-dick",
}
CURVED = ("begun as one", "greedy", "plain", "one block", "plain, short")
"""Arms that are trained for longer, too."""
LATER = ("begun as one", "greedy", "greedy, equal", "BoostResNet")
"""Arms that a family's section does without until they are measured."""
MEASURES = {
    "dit": ("loss",),
    "vit": ("top1", "cross_entropy", "calibration_error"),
    "mdlm": ("bits_per_character",),
    "ar": ("bits_per_character",),
    "looped": ("bits_per_character",),
    "ar-sliding": ("bits_per_character",),
}
SHOWN = {"loss": "denoising loss", "top1": "top-1 accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--task", choices=sorted(BLOCKS), required=True, help="a family, or more closely what it does")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="+", default=[LEARNING["learning_rate"]])
    parser.add_argument("--arms", nargs="+", help="of those above; all where none is named")
    wanted = parser.parse_args()
    if Path(wanted.data).stem != DATA[wanted.task]:
        parser.error(f"{wanted.task} is measured on {DATA[wanted.task]}")
    for seed, rate in itertools.product(wanted.seeds, wanted.rates):
        for arm, one in arms(wanted.task, wanted.steps or STEPS[wanted.task]).items():
            training = {**one, "learning_rate": rate}
            if (wanted.arms is None or arm in wanted.arms) and not found(training, seed):
                row = {**training, "seed": seed, **trained(training, wanted.task, wanted.data, seed)}
                with TRAININGS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    for path, content in tables().items():
        path.write_text(content)
    draw(CURVES)


def arms(task: str, steps: int) -> dict[str, dict[str, Any]]:
    """What is trained for each arm. An ordinary network of looped's layers is that of ar."""
    family, blocks, depth = task.partition("-")[0], BLOCKS[task], SETTINGS[task]["depth"]
    how = {"method": "diffusion", "blocks": 1, "steps": steps, "data": DATA[task], "shared": 0.0}
    whole = {"family": family, "sliding_window": 0, **SETTINGS[task], **how}
    plain = whole
    if family in ("vit", "ar", "looped"):
        plain = {**whole, "family": "ar" if family == "looped" else family, "method": "exact"}
    if family == "looped":
        return {"one block": whole, "unrolled": {**whole, "method": "exact"}, "plain": plain}
    ways = {"blocks": {**whole, "blocks": blocks}, "begun as one": {**whole, "blocks": blocks, "shared": 0.8}}
    ways["one block"] = whole
    if plain != whole:
        ways["plain"] = plain
    ways["plain, short"] = {**plain, "depth": depth // blocks, "steps": steps * blocks}
    for arm, grow in (("greedy", "auto"), ("greedy, equal", "equal")):
        grown = {"method": "greedy", "window": depth // blocks, "grow": grow}
        ways[arm] = {**whole, **grown, "steps": greedy_steps(depth, depth // blocks, steps, grow)}
    if family == "vit":
        ways["BoostResNet"] = {**plain, "method": "boostresnet"}
    return ways


def greedy_steps(depth: int, window: int, steps: int, grow: str) -> int:
    """Steps of all windows together that make as many layer evaluations as `steps` of the whole network.

    A layer forward is one and its backward pass two; frozen layers are run forward alone.

    >>> greedy_steps(4, 2, 800, "equal"), greedy_steps(4, 2, 800, "auto")
    (1371, 1536)
    """
    below, many = frozen_below(layers_in_windows(depth, window)), 1_000_000
    ends = (latest_steps if grow == "auto" else last_steps)(many, len(below))
    lengths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    cost = sum(length * (3 * window + frozen) for length, frozen in zip(lengths, below, strict=True)) / many
    return round(steps * 3 * depth / cost)


def trainings() -> list[dict[str, Any]]:
    """All that there are."""
    return [json.loads(line) for line in TRAININGS.read_text().splitlines()] if TRAININGS.exists() else []


UNSAID = {"shared": 0.0, "sliding_window": 0, "learning_rate": LEARNING["learning_rate"]}
"""Of rows that were written before there was a choice."""


def found(training: dict[str, Any], seed: int | None = None) -> list[dict[str, Any]]:
    """Trainings of this kind, of each seed in turn, or of one; of several learning rates those of the best."""
    rows = [row for row in trainings() if all({**UNSAID, **row}.get(key) == value for key, value in training.items())]
    rows = sorted((row for row in rows if seed in (None, row["seed"])), key=lambda row: int(row["seed"]))
    if not rows:
        return []
    # By the first seed, as the others are trained with that rate alone.
    best = max((row for row in rows if row["seed"] == rows[0]["seed"]), key=_quality)
    return [row for row in rows if rate_of(row) == rate_of(best)]


def rate_of(row: dict[str, Any]) -> float:
    return float({**UNSAID, **row}["learning_rate"])


def _quality(row: dict[str, Any]) -> float:
    return float(row["top1"] if "top1" in row else -row.get("bits_per_character", row.get("loss")))


def trained(training: dict[str, Any], task: str, data: str, seed: int) -> dict[str, Any]:
    """Train and evaluate."""
    started = time.perf_counter()
    alone, sliding = training["method"] == "diffusion", training["sliding_window"]
    given = {**LEARNING, **training, "data": data, "blocks": training["blocks"] if alone else None}
    given = without_none({**given, "sliding_window": sliding or None})  # not every family has one
    looks, curve = [], None
    if training["method"] == "boostresnet":
        measured, levels = boosted(given, seed)
        error = 0.0
    else:
        folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
        try:
            run = edgeblocks.train(out=folder / "run", mem_budget="4GB", seed=seed, sample_grids=0, **given)
            result = run.evaluate(samples=EXAMPLES[task])
            looks = [look.step for look in run.directory.growth()]
        finally:
            shutil.rmtree(folder)
        measured = {"loss": result["validation_loss"], **result.get("classification", {}), **result.get("text", {})}
        levels, curve = [level["loss"] for level in result["validation"]["levels"]], result.get("curve")
        error = measured.get("bits_per_character_error", result["validation"]["standard_error"])
    if "top1" in measured:
        error = math.sqrt(measured["top1"] * (1 - measured["top1"]) / EXAMPLES[task])
    return {
        **{name: measured[name] for name in MEASURES[task]},
        "error": error,
        **({"looks": looks} if training["method"] == "greedy" else {}),
        "levels": [round(level, 4) for level in levels],
        "curve": curve,
        "environment": f"{platform.system()} {platform.machine()}, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - started),
    }


def boosted(given: dict[str, Any], seed: int) -> tuple[dict[str, Any], list[float]]:
    """Train by boosting; how good the classifier is, and its loss."""
    settings = settings_for_here(**{**given, "method": "exact"}, seed=seed)
    run, told = settings.run, []
    data = data_of(run, lambda *_: None)
    info = family_type(run.family, "exact").data_info(data)
    family = build_family(run.family, asdict(settings.family), asdict(info), "exact")
    boosting.train(family, data, run, device="cpu", on_start=lambda: None, on_step=lambda *step: told.append(step[2]))
    pixels, labels = data.gather(data.evaluation_indices(EXAMPLES[run.family]))
    with torch.no_grad():
        logits = told[-1].eval().logits(family.condition(pixels))
    found = classification_scores([(logits.softmax(dim=-1).numpy(), labels)])
    return dict(found), [found["cross_entropy"]]


def without_none(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def is_measured(task: str) -> bool:
    """Whether a table can have it: of a family, what was there from the beginning; else one arm of each method."""
    needed = {"begun as one", "plain", "plain, short"} if "-" in task else arms(task, STEPS[task]).keys() - {*LATER}
    return all(found(training) for arm, training in arms(task, STEPS[task]).items() if arm in needed)


def tables() -> dict[Path, str]:
    """The files that follow from the trainings."""
    entries = {task: entry(task) for task in SETTINGS if is_measured(task)}
    return {PAGE: page(), PACKAGED: json.dumps(entries, indent=1) + "\n", METHODS: methods_page(entries)}


def page() -> str:
    lines = [
        "# Arms at equal layer evaluations",
        "",
        "Made by `tests/bench/four_arms.py`, whose first lines say what the arms are, from",
        "[four_arms.jsonl](four_arms.jsonl). Mean over the seeds, and in brackets each seed, on the hold-out part, EMA",
        "weights; the error is the standard error over examples of one seed. `fashion` is Fashion-MNIST (28x28),",
        "`moby-dick` the built-in novel, `addresses` the State of the Union addresses, both in characters. Seconds are",
        "of one core and with the evaluation, beside other programs: they compare nothing. The end-to-end arms of vit",
        "were trained by an ordinary loop of PyTorch.",
        f"Two cores, {' and '.join(sorted({row['environment'] for row in trainings()}))}, fp32.",
        "",
    ]
    for task in SETTINGS:
        if any(found(training) for training in arms(task, STEPS[task]).values()):
            lines += section(task)
    return "\n".join(lines)


def section(task: str) -> list[str]:
    """The page's part of one task: at the usual length, and what was measured at longer ones."""
    return [line for times in LENGTHS for line in _part(task, times)]


def _part(task: str, times: int) -> list[str]:
    """At one length; nothing where nothing was measured."""
    measures, settings, steps = MEASURES[task], SETTINGS[task], times * STEPS[task]
    if not any(found(training) for training in arms(task, steps).values()):
        return []
    told = [name for name in ("width", "depth", "heads", "patch", "length", "batch") if name in settings]
    shown = ", ".join(f"{name} {settings[name]}" for name in told)
    examples = f"; {EXAMPLES[task]} examples evaluated" if EXAMPLES[task] else ""
    plural = "block" if BLOCKS[task] == 1 else "blocks"
    lines = [
        f"{'##' if times == 1 else '###'} {task}: {BLOCKS[task]} {plural}, {steps} steps of each",
        "",
        f"{DATA[task]}; {shown}{examples}",
        "",
        "| arm | " + " | ".join(SHOWN.get(name, name.replace("_", " ")) for name in measures) + " | error | seconds |",
        "|---|" + "---|" * (len(measures) + 2),
    ]
    levels, curves = [], []
    for arm, training in arms(task, steps).items():
        rows = found(training)
        if not rows:
            continue
        cells = [
            f"{statistics.mean(row[name] for row in rows):.4f} ({', '.join(f'{row[name]:.4f}' for row in rows)})"
            for name in measures
        ]
        seconds = statistics.mean(row["seconds"] for row in rows)
        rate = f" (rate {rate_of(rows[0]):g})" if rate_of(rows[0]) != LEARNING["learning_rate"] else ""
        lines.append(f"| {arm}{rate} | {' | '.join(cells)} | {rows[0]['error']:.4f} | {seconds:.0f} |")
        if len(rows[0].get("levels") or ()) > 1:
            levels.append(f"- {arm}: {', '.join(f'{level:.3f}' for level in rows[0]['levels'])}")
        if rows[0].get("curve"):
            points = (f"{point['steps']}: {point['bits_per_character']:.3f}" for point in rows[0]["curve"])
            curves.append(f"- {arm}: {', '.join(points)}")
    if levels:
        lines += ["", "Loss per noise level, high noise first (first seed):", "", *levels]
    if curves:
        lines += ["", "Bits a character after so many noise levels or iterations (first seed):", "", *curves]
    return [*lines, ""]


def entry(task: str) -> dict[str, Any]:
    """What both methods reached: what `edgeblocks.planning.recommendation` reads."""
    measure, settings = MEASURES[task][0], SETTINGS[task]
    kinds = arms(task, STEPS[task])
    as_one = found(kinds["begun as one"]) if "begun as one" in kinds else []
    rows = {
        "diffusion": as_one or found(kinds.get("blocks", kinds["one block"])),
        "exact": found(kinds.get("unrolled") or kinds.get("plain") or kinds["one block"]),
    }
    if found(kinds.get("greedy", {"family": "none"})):
        rows["greedy"] = found(kinds["greedy"])
    count = min(map(len, rows.values()))
    shallow = {}
    if "plain, short" in kinds:
        short = kinds["plain, short"]
        value = statistics.mean(row[measure] for row in found(short))
        shallow = {"shallow": round(value, 5), "shallow_layers": short["depth"]}
    errors = [error_of_mean([row[measure] for row in of], of) for of in rows.values()]
    sees = f" that see {settings['sliding_window']} tokens" if "sliding_window" in settings else ""
    blocks = f"{BLOCKS[task]} block{'s' if BLOCKS[task] > 1 else ''}"
    return {
        "measure": SHOWN.get(measure, measure.replace("_", " ")),
        "higher_is_better": measure == "top1",
        **{method: round(statistics.mean(row[measure] for row in of), 5) for method, of in rows.items()},
        # Of the difference of two methods, the two whose figures are the least certain.
        "error": round(math.hypot(*sorted(errors)[-2:]), 5),
        "conditions": (
            f"{DATA[task]}, {settings['depth']} layers of width {settings['width']}{sees}, {blocks}, "
            f"{STEPS[task]} steps of batch {settings['batch']}, {count} seed{'s' if count > 1 else ''}"
        ),
        **shallow,
    }


def error_of_mean(values: list[float], rows: list[dict[str, Any]]) -> float:
    """Of a mean over seeds: from the examples' standard error, or from the seeds' spread where that is more."""
    of_examples = statistics.mean(row["error"] ** 2 for row in rows) ** 0.5
    return max(of_examples, statistics.stdev(values) if len(values) > 1 else 0.0) / len(values) ** 0.5


def methods_page(entries: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Which method for which family",
        "",
        "`edgeblocks plan` recommends a method from this table and from what each would take under the budget. Made",
        "by `tests/bench/four_arms.py` from the trainings of [four arms](four_arms.md): the same data, equal layer",
        "evaluations (of `looped` equal steps: end to end its core runs several times in each), EMA weights, hold-out",
        "examples. Blocks of `diffusion` begin as one, as is usual; from random weights they were worse everywhere.",
        "The error is the standard error of a difference; one below twice of it counts as none. Fewer layers",
        "are those of one block, trained end to end with as many layer evaluations: where they are best, the training",
        "was too short for depth to be of use, and longer ones may turn out otherwise. `greedy` trains as many layers",
        "at a time. `ar-sliding` is ar whose layers see two tokens each, so that depth is needed from the beginning;",
        "there each arm has the best of several learning rates, by the first seed. These are small networks and one",
        "kind of data: compare on yours with `edgeblocks compare` before a long run.",
        "",
        "| family | measure | diffusion | exact | greedy | error | best | fewer layers | conditions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, one in entries.items():
        reached = {name: one[name] for name in ("diffusion", "exact", "greedy") if name in one}
        sign = 1 if one["higher_is_better"] else -1
        top = max(sign * value for value in reached.values())
        best = [name for name, value in reached.items() if top - sign * value <= 2 * one["error"]]
        shallow = f"{one['shallow']:.4f} ({one['shallow_layers']} layers)" if "shallow" in one else "–"
        greedy = f"{one['greedy']:.4f}" if "greedy" in one else "–"
        lines.append(
            f"| {task} | {one['measure']} | {one['diffusion']:.4f} | {one['exact']:.4f} | {greedy} "
            f"| {one['error']:.4f} | {', '.join(best) if len(best) < len(reached) else 'none'} | {shallow} "
            f"| {one['conditions']} |"
        )
    return "\n".join([*lines, *by_length(), ""])


def by_length() -> list[str]:
    """How good the arms are that matter after more evaluations: points of curves, each a training of its own."""
    lines = [
        "",
        "## After longer trainings",
        "",
        "![Quality of the arms by the length of the training](methods.png)",
        "",
        "The same arms with 1, 4 and 12 times as many layer evaluations, each a training of its own with its own",
        "schedule (means over seeds, their number in brackets). `plain` is the whole depth end to end; of dit and mdlm",
        "that is `one block`.",
        "",
        f"| family | times as long | {' | '.join(CURVED)} |",
        "|---|---|" + "---|" * len(CURVED),
    ]
    for task, arm_rows in longer_trainings().items():
        for times in LENGTHS:
            of_arms = {arm: rows[times] for arm, rows in arm_rows.items() if times in rows}
            cells = [
                f"{_mean(task, of_arms[arm]):.4f} ({len(of_arms[arm])})" if arm in of_arms else "–" for arm in CURVED
            ]
            if len(of_arms) > 1:
                lines.append(f"| {task} | {times} | {' | '.join(cells)} |")
    return lines


def longer_trainings() -> dict[str, dict[str, dict[int, list[dict[str, Any]]]]]:
    """What was measured of each task's arms, by how many times as long they were trained."""
    found_rows: dict[str, dict[str, dict[int, list[dict[str, Any]]]]] = {}
    for task, times, arm in itertools.product(SETTINGS, LENGTHS, CURVED):
        kinds = {} if task == "looped" else arms(task, times * STEPS[task])
        if arm in kinds and (rows := found(kinds[arm])):
            found_rows.setdefault(task, {}).setdefault(arm, {})[times] = rows
    return found_rows


def _mean(task: str, rows: list[dict[str, Any]]) -> float:
    return statistics.mean(row[MEASURES[task][0]] for row in rows)


def draw(path: Path) -> None:
    """Curves of those tasks that were trained for more than one length."""
    import matplotlib.pyplot as plt

    drawn = {
        task: arm_rows
        for task, arm_rows in longer_trainings().items()
        if any(len(rows) > 1 for rows in arm_rows.values())
    }
    if not drawn:
        return
    figure, all_axes = plt.subplots(1, len(drawn), figsize=(3.6 * len(drawn), 3.4), layout="constrained", squeeze=False)
    for axes, (task, arm_rows) in zip(all_axes[0], drawn.items(), strict=True):
        for number, arm in enumerate(CURVED):
            rows = arm_rows.get(arm, {})
            values = [_mean(task, rows[times]) for times in sorted(rows)]
            axes.plot(sorted(rows), values, marker="o", markersize=4, color=f"C{number}", label=arm)
        measure = MEASURES[task][0]
        axes.set(title=task, xlabel="layer evaluations", ylabel=SHOWN.get(measure, measure.replace("_", " ")))
        axes.set_xscale("log")
        axes.set_xticks(LENGTHS, [f"{times}x" for times in LENGTHS])
        axes.minorticks_off()
    all_axes[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
