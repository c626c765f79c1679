"""Ends a tiny run at random instants, goes on with it, and compares what comes out with a run that nobody disturbed.

A campaign is a series of attempts. Each is a process that trains a new run, or resumes it once it is valid; a signal
ends it at some moment: in a phase that it has reported, when the temporary file of a block is seen, or after a random
time. After each the run directory is examined from outside (`watched_run`), and the next attempt goes on. A run that
gets to its end is compared bit for bit with the reference, and a new one begins.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.child_processes import LONGEST_ATTEMPT_S, fork_server
from support.watched_run import (
    BLOCKS,
    CACHING,
    CREATING,
    EVALUATING,
    FINISHING,
    GRID_STEPS,
    PHASES,
    PLANNING,
    SAMPLING,
    SETTINGS,
    STARTING,
    VISIT_STEPS,
    VISITING,
    WRITING,
    Subject,
    assert_equal_runs,
    examine,
    make_images,
)


class Reporter:
    """A listener that tells the parent each phase as it begins."""

    def __init__(self, connection: Connection, sealed_copy: Path | None) -> None:
        self._connection, self._sealed_copy, self._phase = connection, sealed_copy, ""
        self._out: Path | None = None

    def enter(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._connection.send(("phase", phase))

    def stage(self, text: str) -> None:
        if text == "training":
            if self._sealed_copy is not None and self._out is not None:
                shutil.copytree(self._out, self._sealed_copy)
            self.enter(VISITING)
        else:
            self.enter(PLANNING if text.startswith("planning") else text)

    def advance(self, done: int, total: int, text: str) -> None:
        if text == "decoding":
            self.enter(CACHING)
        elif text == "evaluating" and done == total:
            self.enter(FINISHING)

    def planned(self, plan_text: Any, out: Any) -> None:
        self._out = out

    def note(self, text: str) -> None:
        pass

    def step(self, progress: Any) -> None:
        visit_ends = progress.step % VISIT_STEPS == 0
        looks = visit_ends and progress.step in GRID_STEPS and progress.block == BLOCKS - 1
        self.enter(SAMPLING if looks else WRITING if visit_ends else VISITING)


def train_or_resume(connection: Connection, out: str, cache: str, settings: dict[str, Any], sealed_copy: str) -> None:
    """The child process of an attempt. Its last message says how it ended."""
    os.environ["EDGEBLOCKS_CACHE"] = cache
    os.environ["EDGEBLOCKS_TEST_CAMPAIGN"] = cache  # by which processes that it starts are known
    from edgeblocks import api
    from edgeblocks.errors import InterruptedRunError

    reporter = Reporter(connection, Path(sealed_copy) if sealed_copy else None)
    reporter.enter(STARTING)
    try:
        if (Path(out) / "manifest.json").exists():
            api.resume(out, listener=reporter)
        else:
            api.train(out=out, listener=reporter, **settings)
    except InterruptedRunError as error:
        connection.send(("interrupted", str(error)))
    except KeyboardInterrupt:
        connection.send(("interrupted", "KeyboardInterrupt"))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
    else:
        connection.send(("finished", ""))


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When an attempt is ended: `wait_s` after a phase was reported first (None: after the process was started).

    In the phase WRITING the wait begins when the temporary file of a block is seen.
    """

    phase: str | None
    wait_s: float


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended: `kind` is killed, interrupted, or finished; `phase` is what it was doing."""

    kind: str
    phase: str
    message: str


def attempt(subject: Subject, moment: Moment, number: signal.Signals, *, sealed_copy: Path | None = None) -> Ending:
    """Train or resume in a child process, which gets the signal at that moment.

    Raises:
        AssertionError: the attempt failed by itself, or hangs.
    """
    context, before = fork_server(), set(subject.remains())
    receiving, sending = context.Pipe(duplex=False)
    arguments = (sending, str(subject.out), str(subject.cache), subject.settings, str(sealed_copy or ""))
    process = context.Process(target=train_or_resume, args=arguments)
    process.start()
    sending.close()
    started = time.monotonic()
    due = started + moment.wait_s if moment.phase is None else None
    heard, phase, signalled = [("phase", STARTING)], STARTING, False
    try:
        while True:
            assert time.monotonic() < started + LONGEST_ATTEMPT_S, f"hangs in the phase '{phase}'"
            if due is None and (subject.is_writing_a_block() if moment.phase == WRITING else moment.phase == phase):
                due = time.monotonic() + moment.wait_s
            if due is not None and not signalled and time.monotonic() >= due:
                os.kill(process.pid, number)
                signalled = True
            waits = due is None and moment.phase == WRITING
            left = 0.0 if waits else 1.0 if signalled or due is None else max(0.0, due - time.monotonic())
            if receiving.poll(left):
                heard.append(receiving.recv())
                phase = heard[-1][1] if heard[-1][0] == "phase" else phase
    except EOFError:
        process.join()
    finally:
        if process.exitcode is None:
            process.kill()
            process.join()
        receiving.close()
    kind, message = heard[-1]
    assert kind != "failed", f"failed in the phase '{phase}':\n{message}"
    if kind == "phase":
        early = number == signal.SIGINT and phase == STARTING  # before anything could catch the KeyboardInterrupt
        assert process.exitcode == (1 if early else -number), f"ended with {process.exitcode} in the phase '{phase}'"
        new = [what for path, what in subject.remains().items() if path not in before]
        return Ending(kind="killed", phase=new[0] if new else phase, message="")
    return Ending(kind=kind, phase=phase, message=message)


@dataclass
class Report:
    """What came of a campaign."""

    ended: Counter[str] = field(default_factory=Counter)
    """Attempts that a signal ended, by phase."""
    finished_runs: int = 0
    missing_pictures: int = 0
    """Of finished runs: pictures that the reference has and they have not."""
    leftovers: int = 0
    """Of finished runs: files that a killed process left and nobody removed."""
    seconds: float = 0.0

    def table(self) -> str:
        rows = [f"{phase:<22}{self.ended[phase]:>6}" for phase in PHASES]
        rows += [f"{'in all':<22}{self.ended.total():>6}", ""]
        return "\n".join(rows) + (
            f"{self.finished_runs} runs were finished, all equal to the reference bit for bit; {self.missing_pictures} "
            f"pictures are missing in them, {self.leftovers} files were left over; {self.seconds:.0f} s"
        )


class Campaign:
    """Disturbs one run after another: one with all blocks in memory, one streamed, one with a work directory."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self._random = folder, random.Random(seed)
        self.settings = {**SETTINGS, "data": str(make_images(folder / "images.npz"))}
        self.reference, self.sealed_copy = folder / "reference", folder / "sealed"
        self._number = 0
        subject = self._subject(self.reference, {"tier": "disk"})
        never = Moment(phase="never", wait_s=0.0)
        ending = attempt(subject, never, signal.SIGKILL, sealed_copy=self.sealed_copy)
        assert ending.kind == "finished", ending
        examine(subject)
        assert_equal_runs(self.reference, self.reference)

    def run(self, kills: int, *, first: tuple[Moment, ...] = ()) -> Report:
        """Kill until so many kills were made: at these moments first, then at random ones.

        Raises:
            AssertionError: a run did not go on, is damaged, or ended with other bits.
        """
        report, started = Report(), time.monotonic()
        subject, moments = self.new_subject(), list(first)
        while report.ended.total() < kills:
            ending = self.disturb(subject, moments.pop(0) if moments else self._moment(subject), signal.SIGKILL)
            report.ended[ending.phase] += ending.kind == "killed"
            if ending.kind == "finished":
                self.check_finished(subject, report)
                subject = self.new_subject()
        self.finish(subject, report)
        report.seconds = time.monotonic() - started
        return report

    def disturb(self, subject: Subject, moment: Moment, number: signal.Signals) -> Ending:
        """One attempt, after which the run is examined."""
        if moment.phase in (CACHING, PLANNING) or self._random.random() < 0.3:
            shutil.rmtree(subject.cache, ignore_errors=True)  # planning keeps its costs there too
        ending = attempt(subject, moment, number)
        examine(subject)
        return ending

    def finish(self, subject: Subject, report: Report | None = None) -> Report:
        """Let a run come to its end, and compare it."""
        report = report or Report()
        ending = attempt(subject, Moment(phase="never", wait_s=0.0), signal.SIGKILL)
        assert ending.kind == "finished", ending
        examine(subject)
        self.check_finished(subject, report)
        return report

    def check_finished(self, subject: Subject, report: Report) -> None:
        assert_equal_runs(subject.out, self.reference)
        report.finished_runs += 1
        wanted = {path.name for path in self.reference.glob("samples/*")}
        report.missing_pictures += len(wanted - {path.name for path in subject.out.glob("samples/*")})
        strays = [*subject.work_dir.iterdir()] if subject.work_dir else []
        report.leftovers += len(strays) + sum(what != CACHING for what in subject.remains().values())
        shutil.rmtree(subject.out)
        shutil.rmtree(subject.work_dir or subject.out, ignore_errors=True)

    def new_subject(self, kind: int | None = None) -> Subject:
        """The next run: 0 and 2 are trained from the beginning, 1 is valid already and holds one block in memory."""
        kind, out = self._number % 3 if kind is None else kind, self.folder / f"run-{self._number}"
        if kind == 0:
            return self._subject(out, {"tier": "ram"})
        if kind == 2:
            work_dir = self.folder / f"work-{self._number}"
            work_dir.mkdir()
            return self._subject(out, {"tier": "disk", "work_dir": str(work_dir)}, work_dir)
        shutil.copytree(self.sealed_copy, out)
        plan = json.loads((out / "plan.json").read_text())
        plan.pop("sha256", None)
        (out / "plan.json").write_text(json.dumps({**plan, "slots": 1}))
        return self._subject(out, {})

    def _subject(self, out: Path, settings: dict[str, Any], work_dir: Path | None = None) -> Subject:
        self._number += 1
        return Subject(out=out, work_dir=work_dir, cache=self.folder / "cache", settings={**self.settings, **settings})

    def _moment(self, subject: Subject) -> Moment:
        """A random moment. A run that is not valid yet is ended early more often than not."""
        longest_s: list[tuple[int, str | None, float]] = [
            (25, None, 1.0),
            (20, WRITING, self._random.choice((0.0, 0.004))),
            (12, SAMPLING, 0.08),
            (8, EVALUATING, 0.05),
            (10, FINISHING, 0.01),
            (10, CACHING, 0.02),
            (15, VISITING, 0.7),
        ]
        if not subject.sealed:
            longest_s = [(20, PLANNING, 4.0), (15, CACHING, 0.02), (25, CREATING, 0.06), *longest_s[1:5]]
        weights = [weight for weight, _, _ in longest_s]
        _, phase, most_s = self._random.choices(longest_s, weights)[0]
        return Moment(phase=phase, wait_s=self._random.uniform(0, most_s))

    def orphans(self) -> list[int]:
        """Processes that killed ones had started, such as the trace of costs, and that still run."""
        mark = f"EDGEBLOCKS_TEST_CAMPAIGN={self.folder / 'cache'}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found
