"""Ways to train the same network, one after the other, each in a process of its own: quality, time and memory.

All train on the same data in the same batches with the same schedule, for as many layer evaluations (B blocks of L/B
layers, each with K steps, make as many as K steps of L layers), or for as long a time. `diffusion` and `exact` keep the
budget; ordinary training (`compare.plain_training`) has none, and its peak is reported whatever it is.

A comparison lies in a folder with one run a method and seed. The same comparison again goes on with what is missing.
"""

import contextlib
import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from edgeblocks import api
from edgeblocks.compare.plain_training import PlainSummary
from edgeblocks.config import RunSettings, Settings, read_yaml
from edgeblocks.errors import ConfigError, DoesNotFitError, EdgeblocksError, RunError
from edgeblocks.methods import EXACT, METHODS, MethodName
from edgeblocks.prepare import check_method
from edgeblocks.progress import Listener
from edgeblocks.registry import build_target, family_type
from edgeblocks.report.comparison import Comparison, Mark, Row
from edgeblocks.runs.create import environment
from edgeblocks.runs.directory import open_run, write_text
from edgeblocks.runs.open_data import data_of
from edgeblocks.runs.schema import QualityFields, checked_record, read_records
from edgeblocks.tasks import TASKS
from edgeblocks.training.interruption import Interruption

DEFAULT_ARMS = ("diffusion", "exact", "plain", "plain+ckpt+8bit")
MEANINGS: dict[str, str] = {
    **{name: method.summary for name, method in METHODS.items()},
    "plain": "an ordinary loop, everything in memory: weights, their mean, gradients, 32-bit moments of AdamW",
    "ckpt": "activations recomputed",
    "8bit": "bitsandbytes' AdamW8bit",
}
EVALUATIONS = 8
PROBE_STEPS = 20
_EXTRAS = {"ckpt": "--checkpointing", "8bit": "--eight-bit"}
_SIGKILL = -9


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    >>> Arm.parse("plain+8bit"), Arm.parse("exact").method
    (Arm(method='plain', extras=('8bit',)), 'exact')
    """

    method: MethodName | Literal["plain"]
    extras: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """
        Raises:
            ConfigError: there is no such way.
        """
        method, *extras = cast("list[Any]", text.strip().split("+"))
        known = method in (*METHODS, "plain") and len(set(extras)) == len(extras)
        if not known or (extras and method != "plain") or not set(extras) <= _EXTRAS.keys():
            raise ConfigError(
                f"--arms: there is no arm '{text.strip()}'; there are {', '.join(METHODS)}, plain, plain+ckpt, "
                f"plain+8bit and plain+ckpt+8bit"
            )
        return cls(method=method, extras=tuple(extra for extra in _EXTRAS if extra in extras))

    @property
    def name(self) -> str:
        return "+".join((self.method, *self.extras))

    @property
    def meaning(self) -> str:
        return ", ".join(MEANINGS[part] for part in (self.method, *self.extras))

    @property
    def is_plain(self) -> bool:
        return self.method == "plain"

    @property
    def network(self) -> MethodName:
        """The method whose network it trains: ordinary training is end to end."""
        return EXACT.name if self.method == "plain" else self.method


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is compared."""

    settings: Settings
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    minutes: float | None
    """Of training of each arm; None where all make the same number of steps."""


def compare(wanted: Wanted, out: Path, listener: Listener) -> Comparison:
    """Train every arm with every seed and gather the figures, which are written to compare.json.

    Raises:
        ConfigError: an arm cannot train this family, or the folder holds another comparison.
        RunError: a process ended in a way that no arm should.
        KeyboardInterrupt: stopped; the same call again goes on.
    """
    _check(wanted)
    _check_folder(wanted, out)
    rows, usual = [], TASKS[family_type(wanted.settings.run.family).task]
    for number, (arm, seed) in enumerate(product_of(wanted)):
        listener.note(
            f"\n{number + 1} of {len(wanted.arms) * len(wanted.seeds)}: {arm.name}, seed {seed}: {arm.meaning}"
        )
        rows.append(_Training(wanted, arm, seed, out, listener).row())
    content: Comparison = {
        "family": wanted.settings.run.family,
        "measure": usual.measure.name,
        "higher_is_better": usual.measure.higher_is_better,
        "examples": max((row["quality"][-1].get("examples") or 0 for row in rows if row["failure"] is None), default=0)
        or usual.quality_examples,
        "equal": _what_is_equal(wanted),
        "evaluations_a_step": None
        if _is_unrolled(wanted)
        else wanted.settings.family.depth * wanted.settings.run.batch,
        "minutes": wanted.minutes,
        "settings": {**wanted.settings.run.model_dump(), **vars(wanted.settings.family)},
        "environment": environment(),
        "arms": rows,
    }
    write_text(out / "compare.json", json.dumps(content, indent=1))
    return content


def product_of(wanted: Wanted) -> Iterator[tuple[Arm, int]]:
    """Arms take turns, so that after each seed there is something to compare."""
    for seed in wanted.seeds:
        for arm in wanted.arms:
            yield arm, seed


def _is_unrolled(wanted: Wanted) -> bool:
    """Whether end-to-end training runs some layers several times a step, so that steps differ in layer evaluations."""
    return family_type(wanted.settings.run.family, "exact").unrolled


def _what_is_equal(wanted: Wanted) -> str:
    if wanted.minutes is not None:
        return "time"
    return "steps" if _is_unrolled(wanted) else "layer evaluations"


def _check(wanted: Wanted) -> None:
    """That every arm can train this family on these data, before one begins.

    Raises:
        ConfigError, DataError: with the reasons.
    """
    run, problems = wanted.settings.run, []
    if wanted.minutes is not None and not 0 < wanted.minutes < math.inf:
        problems.append(f"--minutes {wanted.minutes}: a number above 0 is needed")
    if run.method != RunSettings.model_fields["method"].default:
        problems.append(f"method={run.method}: compare trains with several methods; name them with --arms")
    begun = [name for name in ("init", "init_fresh", "train_blocks") if getattr(run, name) is not None]
    if begun and any(arm.is_plain for arm in wanted.arms):
        problems.append(
            f"{', '.join(begun)}: ordinary training begins with random weights and trains all of them, which would "
            f"compare different things; use --arms diffusion,exact"
        )
    if problems:
        raise ConfigError(*problems)
    target = build_target(run.target)
    target.prepare()  # says at once that there is no such device
    for arm in wanted.arms:
        family_type(run.family, arm.network)
        if not arm.is_plain:
            check_method(run.model_copy(update={"method": arm.network}))
    data_of(run, lambda *_: None)


def _check_folder(wanted: Wanted, out: Path) -> None:
    """That the folder is new, or holds this comparison; it may be asked for other arms and seeds."""
    path, text = out / "settings.yaml", f"# minutes of each arm: {wanted.minutes}\n{wanted.settings.to_yaml()}"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder; choose another -o")
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{out} holds a comparison with other settings or for another time ({path}); choose another -o"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no comparison; choose another -o")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Of one training, which may be an ordinary one: that has one block, no budget, and does not split its time."""

    steps: int
    peak_bytes: int
    runtime_bytes: int
    """Of the process before there was a network: interpreter and libraries."""
    step_s: float
    """Of a step of all layers: where blocks are trained alone, of one step of each."""
    blocks: int = 1
    budget_bytes: int | None = None
    time_split: dict[str, float] | None = None


class _Training:
    """One arm with one seed."""

    def __init__(self, wanted: Wanted, arm: Arm, seed: int, out: Path, listener: Listener) -> None:
        self.wanted, self.arm, self.seed, self.listener = wanted, arm, seed, listener
        self.path = out / f"{arm.name}-seed{seed}"

    def row(self) -> Row:
        """Train what is not trained yet; the figures, or why there are none."""
        row = Row(arm=self.arm.name, meaning=self.arm.meaning, seed=self.seed, path=str(self.path), failure=None)
        try:
            if not (self.path / "summary.json").exists():
                self._train(self.path, self._steps())
        except _FailedError as error:
            self.listener.note(f"{self.arm.name} has no result: {error}")
            return {**row, "failure": str(error)}
        return self._with_figures(row)

    def _steps(self) -> int:
        """Of the training: as set, or as many as a short trial shows to fill the time."""
        if self.wanted.minutes is None:
            return self.wanted.settings.run.steps
        trial, steps_file = (self.path.with_name(f"{self.path.name}{end}") for end in ("-trial", ".steps"))
        if steps_file.exists():
            return int(steps_file.read_text())
        self.listener.note(f"a trial of {PROBE_STEPS} steps, to see how many fill {self.wanted.minutes:g} minutes")
        if not (trial / "summary.json").exists():
            self._train(trial, PROBE_STEPS)
        steps = max(1, round(self.wanted.minutes * 60 / self._measured(trial).step_s))
        write_text(steps_file, str(steps))
        return steps

    def _train(self, path: Path, steps: int) -> None:
        """In a process of its own.

        Raises:
            _FailedError: it has no result, for a reason that the other arms do not share.
        """
        if self.arm.is_plain:
            extras = [_EXTRAS[extra] for extra in self.arm.extras]
            self._run("edgeblocks.cli.plain", str(self._settings_file(path, steps)), str(path), *extras)
        elif (path / "manifest.json").exists():
            self._run("edgeblocks.cli", "train", "--resume", str(path), "--json")
        else:
            settings = self._settings_file(path, steps)
            self._run("edgeblocks.cli", "train", "--config", str(settings), "--out", str(path), "--json")

    def _settings_file(self, path: Path, steps: int) -> Path:
        settings = self.wanted.settings
        method = settings.run.method if self.arm.is_plain else self.arm.method
        marks = (settings.run.evaluations or EVALUATIONS) if path == self.path else 0
        changed = {"method": method, "seed": self.seed, "steps": steps, "evaluations": marks, "sample_grids": 0}
        settings = replace(settings, run=settings.run.model_copy(update=changed))
        file = path.with_name(f"{path.name}.yaml")
        write_text(file, settings.to_yaml())
        return file

    def _run(self, *arguments: str) -> None:
        """Run a module of ours; its progress is shown, its result is in its files."""
        code = _exit_code([sys.executable, "-m", *arguments])
        if code == DoesNotFitError.exit_code:
            run = self.wanted.settings.run
            raise _FailedError(
                f"it does not fit the budget of {run.mem_budget}; edgeblocks plan {run.family} --method "
                f"{self.arm.method} with the same settings names one that would do"
            )
        if code == _SIGKILL:
            raise _FailedError("the system killed it, most likely because memory ran out")
        if code == 130:
            raise KeyboardInterrupt
        if code != 0:
            raise _FailedError(f"it ended with exit code {code}; its message is on standard error")

    def _with_figures(self, row: Row) -> Row:
        measured = self._measured(self.path)
        quality = _marks(self.path / "quality.jsonl")
        if not quality:
            raise RunError(f"{self.path} has no figures of quality; remove it and compare again")
        return {
            **row,
            "steps": measured.steps,
            "peak_bytes": measured.peak_bytes,
            "runtime_bytes": measured.runtime_bytes,
            "step_s": measured.step_s,
            "blocks": measured.blocks,
            "budget_bytes": measured.budget_bytes,
            "time_split": measured.time_split,
            "seconds": quality[-1]["seconds"],
            "quality": quality,
            "memory": _thinned(_memory(self.path / "metrics.jsonl")),
        }

    def _measured(self, path: Path) -> _Measured:
        """The figures of a training's summary.

        Raises:
            RunError: it is damaged.
        """
        if self.arm.is_plain:
            plain = PlainSummary(**json.loads((path / "summary.json").read_text()))
            return _Measured(
                steps=plain.steps, peak_bytes=plain.peak_bytes, runtime_bytes=plain.runtime_bytes, step_s=plain.step_s
            )
        run = open_run(path)
        summary, breakdown = run.summary, run.trainable_plan.breakdown
        if summary is None or summary.step_s is None:
            raise RunError(f"{path} has no figures of time; remove it and compare again")
        blocks = len(run.file_layers)
        return _Measured(
            steps=run.settings.run.steps,
            blocks=blocks,
            peak_bytes=summary.peak_bytes,
            budget_bytes=summary.budget_bytes,
            runtime_bytes=breakdown["runtime"],
            step_s=summary.step_s * run.method.trained_apart(blocks),
            time_split=summary.time_split,
        )


def _exit_code(command: list[str]) -> int:
    """Run a command and return its exit code.

    Ctrl-C, SIGTERM and a closed terminal are passed on to it once; it saves what it has, and is waited for.

    Raises:
        KeyboardInterrupt: there was one of these.
    """
    with Interruption().listening() as interruption:
        # In a session of its own, so that a terminal's Ctrl-C does not reach it as well: to the child that would be a
        # second one, which does not wait for the step.
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        passed_on = False
        try:
            while child.poll() is None:
                if interruption.signal_name is not None and not passed_on:
                    child.send_signal(signal.SIGINT)
                    passed_on = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.2)
        except KeyboardInterrupt:
            child.kill()
            child.wait()
            raise
    if interruption.signal_name is not None:
        raise KeyboardInterrupt
    return child.returncode


class _FailedError(EdgeblocksError):
    """An arm has no result; the others are trained nevertheless."""


def _marks(path: Path) -> list[Mark]:
    """What was found of the quality, in the order of the training."""
    if not path.exists():
        return []
    found = (checked_record(QualityFields, record) for record in read_records(path))
    return [
        Mark(
            step=one.step,
            seconds=one.seconds,
            value=one.value,
            standard_error=one.standard_error,
            examples=one.examples,
        )
        for one in found
        if one is not None
    ]


def _memory(path: Path) -> list[tuple[float, int]]:
    """Seconds and bytes of the records that have both."""
    if not path.exists():
        return []
    found = ((record.get("seconds"), record.get("used_bytes")) for record in read_records(path))
    return [(seconds, used) for seconds, used in found if isinstance(seconds, float) and isinstance(used, int)]


def _thinned(points: Sequence[tuple[float, int]], most: int = 200) -> list[tuple[float, int]]:
    """At most `most` of them, evenly spaced."""
    return list(points[:: math.ceil(len(points) / most) or 1])


def free_path(family: str, data: str) -> Path:
    """compare/FAMILY-DATA: the same for the same comparison, so that it goes on there."""
    return Path("compare") / re.sub(r"[^\w.-]", "_", f"{family}-{Path(data).stem or 'data'}")


def wanted_of(
    arms: str | None,
    seeds: int,
    minutes: float | None,
    settings: Mapping[str, object],
    config: str | Path | None,
    *,
    note: Callable[[str], None],
) -> Wanted:
    """What is compared, from what a user types.

    Raises:
        ConfigError: it cannot be compared.
    """
    has_8bit = importlib.util.find_spec("bitsandbytes") is not None
    parsed = tuple(dict.fromkeys(Arm.parse(name) for name in (arms.split(",") if arms is not None else DEFAULT_ARMS)))
    if not has_8bit and arms is None:
        note("plain+ckpt+8bit is left out: bitsandbytes is not installed (pip install 'edgeblocks[compare]')")
        parsed = tuple(arm for arm in parsed if "8bit" not in arm.extras)
    if not has_8bit and any("8bit" in arm.extras for arm in parsed):
        raise ConfigError("--arms: 8bit needs bitsandbytes, which is not installed: pip install 'edgeblocks[compare]'")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: at least one is needed")
    if minutes is not None and config is not None and "steps" in read_yaml(Path(config)):
        raise ConfigError(f"--minutes and the steps of {config}: an arm trains for a time or for a number of steps")
    resolved = api.settings_for_here(config=config, **settings).with_whole_paths()
    first = resolved.run.seed
    return Wanted(settings=resolved, arms=parsed, seeds=tuple(range(first, first + seeds)), minutes=minutes)
