"""Several ways to train the same network, one after the other: quality, time and memory of each.

All train on the same data in the same batches with the same schedule, for as many layer evaluations (B blocks of L/B
layers, each with K steps, make as many as K steps of L layers), or for as long a time. `diffusion` and `exact` keep the
budget; ordinary training (`compare.plain_training`) has none, and its peak is reported whatever it is.

Each training has a process of its own, and this one never imports torch, which would lie beside it in memory: what
needs torch is asked of processes that end before the training begins (`settling`).

A comparison lies in a folder with one run a method and seed. The same comparison again goes on with what is missing.
"""

import contextlib
import json
import math
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml

from edgeblocks.children import installed_modules_first, python_module
from edgeblocks.compare.arms import Arm
from edgeblocks.compare.wanted import Asked, Measured, Settled
from edgeblocks.errors import ConfigError, DoesNotFitError, EdgeblocksError, RunError, StorageError
from edgeblocks.files.durable import write_atomically
from edgeblocks.files.own import is_link
from edgeblocks.methods import imported
from edgeblocks.progress import Listener
from edgeblocks.report.comparison import Comparison, Mark, Row
from edgeblocks.runs.schema import QualityFields, checked_record, read_records
from edgeblocks.tasks import TASKS
from edgeblocks.training.interruption import Interruption

EVALUATIONS = 8
PROBE_STEPS = 20
_SIGKILL = -9


def compare(asked: Asked, out: Path | None, listener: Listener) -> tuple[Comparison, Path]:
    """Train every arm with every seed and gather the figures, which are written to compare.json; and the folder.

    Args:
        out: the folder; None: compare/FAMILY-DATA, the same for the same comparison, so that it goes on there.

    Raises:
        ConfigError: an arm cannot train this family, or the folder holds another comparison.
        RunError: a process ended in a way that no arm should.
        KeyboardInterrupt: stopped; the same call again goes on.
    """
    listener.stage("looking at the settings and the data")
    settled: Settled = _apart("settled", asked)
    run, usual = settled.run, TASKS[settled.task]
    folder = out or Path("compare") / re.sub(r"[^\w.-]", "_", f"{run.family}-{Path(run.data).stem or 'data'}")
    _check_folder(settled, folder)
    trainings = []
    for number, (arm, seed) in enumerate(product_of(settled)):
        listener.note(
            f"{number + 1} of {len(settled.arms) * len(settled.seeds)}: {arm.name}, seed {seed}: {arm.meaning}"
        )
        trainings.append(_Training(settled, arm, seed, folder, listener))
        trainings[-1].run()
    done = [training for training in trainings if training.failure is None]
    figures = _apart("measured", [(training.path, training.arm.is_plain) for training in done]) if done else []
    measured = dict(zip(done, figures, strict=True))
    rows = [training.row(measured.get(training)) for training in trainings]
    content: Comparison = {
        "family": run.family,
        "measure": usual.measure.name,
        "higher_is_better": usual.measure.higher_is_better,
        "examples": max((row["quality"][-1].get("examples") or 0 for row in rows if row["failure"] is None), default=0)
        or usual.quality_examples,
        "equal": _what_is_equal(settled),
        "evaluations_a_step": None if settled.unrolled else settled.depth * run.batch,
        "minutes": settled.minutes,
        "settings": settled.settings,
        "environment": settled.environment,
        "arms": rows,
    }
    _write(folder / "compare.json", json.dumps(content, indent=1))
    return content, folder


def product_of(settled: Settled) -> Iterator[tuple[Arm, int]]:
    """Arms take turns, so that after each seed there is something to compare."""
    for seed in settled.seeds:
        for arm in settled.arms:
            yield arm, seed


def _what_is_equal(settled: Settled) -> str:
    if settled.minutes is not None:
        return "time"
    return "steps" if settled.unrolled else "layer evaluations"


def _apart(function: str, *arguments: object) -> Any:
    """What a function of `settling` gives, found in a process of its own, which Ctrl-C ends at once.

    Raises:
        EdgeblocksError: it raised one, or the process was killed.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    with installed_modules_first():
        child.start()
    sender.close()  # the child's is the only one left: that it ends without an answer is noticed
    try:
        answer = receiver.recv()
    except EOFError as error:
        raise EdgeblocksError(
            "the process that looks at settings and data ended without an answer, most likely because memory ran out; "
            "close other programs and start again"
        ) from error
    except BaseException:
        child.kill()
        raise
    child.join()
    if isinstance(answer, EdgeblocksError):
        raise answer
    return answer


def _answer(sender: Connection, function: str, arguments: Sequence[object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked ends this one
    try:
        answer = imported(f"edgeblocks.compare.settling:{function}")(*arguments)
    except EdgeblocksError as error:
        answer = error
    sender.send(answer)


def _check_folder(settled: Settled, out: Path) -> None:
    """That the folder is new, or holds this comparison; it may be asked for other arms and seeds."""
    path, text = out / "settings.yaml", f"# minutes of each arm: {settled.minutes}\n{_as_yaml(settled.settings)}"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder; choose another -o")
    links = sorted(entry.name for entry in out.iterdir() if is_link(entry)) if out.exists() else []
    if links:
        raise ConfigError(
            f"{out} holds links ({', '.join(links[:5])}), and arms would be written where they lead; copy "
            f"it with cp -rL, or choose another -o"
        )
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{out} holds a comparison with other settings or for another time ({path}); choose another -o"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no comparison; choose another -o")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, text)


def _as_yaml(settings: dict[str, object]) -> str:
    return yaml.safe_dump(settings, sort_keys=False)


def _write(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        StorageError: the disk refused.
    """
    try:
        write_atomically(path, [text.encode()])
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another place with -o") from error


class _Training:
    """One arm with one seed."""

    def __init__(self, settled: Settled, arm: Arm, seed: int, out: Path, listener: Listener) -> None:
        self.settled, self.arm, self.seed, self.listener = settled, arm, seed, listener
        self.path = out / f"{arm.name}-seed{seed}"

        self.failure: str | None = None
        """Why there is no result."""

    def run(self) -> None:
        """Train what is not trained yet."""
        try:
            if not (self.path / "summary.json").exists():
                self._train(self.path, self._steps())
        except _FailedError as error:
            self.listener.note(f"{self.arm.name} has no result: {error}")
            self.failure = str(error)

    def _steps(self) -> int:
        """Of the training: as set, or as many as a short trial shows to fill the time."""
        if self.settled.minutes is None:
            return self.settled.run.steps
        trial, steps_file = (self.path.with_name(f"{self.path.name}{end}") for end in ("-trial", ".steps"))
        if steps_file.exists():
            return int(steps_file.read_text())
        self.listener.note(f"a trial of {PROBE_STEPS} steps, to see how many fill {self.settled.minutes:g} minutes")
        if not (trial / "summary.json").exists():
            self._train(trial, PROBE_STEPS)
        (measured,) = _apart("measured", [(trial, self.arm.is_plain)])
        steps: int = max(1, round(self.settled.minutes * 60 / measured.step_s))
        _write(steps_file, str(steps))
        return steps

    def _train(self, path: Path, steps: int) -> None:
        """In a process of its own.

        Raises:
            _FailedError: it has no result, for a reason that the other arms do not share.
        """
        if self.arm.is_plain:
            self._run("edgeblocks.cli.plain", str(self._settings_file(path, steps)), str(path), *self.arm.flags)
        elif (path / "manifest.json").exists():
            self._run("edgeblocks.cli", "train", "--resume", str(path), "--json")
        else:
            settings = self._settings_file(path, steps)
            self._run("edgeblocks.cli", "train", "--config", str(settings), "--out", str(path), "--json")

    def _settings_file(self, path: Path, steps: int) -> Path:
        run = self.settled.run
        method = run.method if self.arm.is_plain else self.arm.method
        marks = (run.evaluations or EVALUATIONS) if path == self.path else 0
        changed = {"method": method, "seed": self.seed, "steps": steps, "evaluations": marks, "sample_grids": 0}
        file = path.with_name(f"{path.name}.yaml")
        _write(file, _as_yaml({**self.settled.settings, **changed}))
        return file

    def _run(self, *arguments: str) -> None:
        """Run a module of ours; its progress is shown, its result is in its files."""
        code = _exit_code(python_module(*arguments))
        if code == DoesNotFitError.exit_code:
            run = self.settled.run
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

    def row(self, measured: Measured | None) -> Row:
        """The figures, or why there are none.

        Raises:
            RunError: a training that ended has none.
        """
        row = Row(
            arm=self.arm.name, meaning=self.arm.meaning, seed=self.seed, path=str(self.path), failure=self.failure
        )
        if measured is None:
            return row
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
