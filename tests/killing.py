"""Ends a tiny run at random instants, goes on with it, and compares what comes out with a run that nobody disturbed.

A campaign is a series of attempts. Each is a process that trains a new run, or resumes it once it is valid; a signal
ends it at some moment: in a phase that it has reported, when the temporary file of a block is seen, or after a random
time. After each the run directory is examined from outside, with other readers than edgeblocks' own, and the next
attempt goes on. A run that gets to its end is compared bit for bit with the reference, and a new one begins.

The processes are forked by multiprocessing's fork server, which has imported torch and run none of its operators (the
threads of libgomp do not survive a fork), so that a kill costs as little as what was done before it.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

BLOCKS, STEPS, VISIT_STEPS = 4, 36, 6
GRID_STEPS = (18, 36)
SETTINGS: dict[str, Any] = {
    "width": 32,
    "heads": 2,
    "depth": 4,
    "blocks": BLOCKS,
    "steps": STEPS,
    "visit_steps": VISIT_STEPS,
    "batch": 8,
    "micro_batch": 8,
    "checkpointing": False,
    "sample_grids": len(GRID_STEPS),
    "sample_steps": 4,
    "mem_budget": "2GB",
}
LONGEST_ATTEMPT_S = 120.0

STARTING, CACHING, PLANNING, CREATING = "starting", "building the cache", "planning", "creating blocks"
VISITING, WRITING, SAMPLING, PICTURE = "visiting", "writing a block", "sampling", "writing a picture"
EVALUATING, FINISHING, RETURNING, SMALL_FILE = "evaluating", "finishing", "bringing blocks home", "writing a small file"
PHASES = (
    *(STARTING, CACHING, PLANNING, CREATING, VISITING, WRITING),
    *(SAMPLING, PICTURE, EVALUATING, FINISHING, RETURNING, SMALL_FILE),
)
_NAMES = re.compile(
    r"(config\.yaml|(plan|env|manifest|summary)\.json|metrics\.jsonl|lock"
    r"|blocks(\.arriving)?(/block_\d{3}\.safetensors)?|samples(/step_\d{7}\.png)?|(.*/)?\.[^/]*\.tmp)"
)


def make_images(path: Path) -> Path:
    """An .npz of images with three classes; it is decoded into a cache before it is trained on."""
    random_ = np.random.default_rng(0)
    np.savez(path, images=random_.integers(0, 256, (400, 8, 8, 1), dtype=np.uint8), labels=np.arange(400) % 3)
    return path


# What runs in the child processes


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

    def planned(self, prepared: Any, run: Any) -> None:
        self._out = run.path

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


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        connection.send((True, function(*arguments)))
    except BaseException as error:
        connection.send((False, (type(error).__name__, str(error), traceback.format_exc())))


# The parent's side


def fork_server() -> Any:
    """A multiprocessing context whose children begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "edgeblocks.api", "edgeblocks.families.dit", "edgeblocks.targets.cpu"])
    return context


class ChildError(Exception):
    """What a function raised in a child process. `kind` is the name of its class."""

    def __init__(self, kind: str, message: str, shown: str) -> None:
        super().__init__(shown)
        self.kind, self.message = kind, message


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a process of its own, whose limits and surroundings it may change.

    Raises:
        ChildError: the function raised an error, or the process died.
    """
    context = fork_server()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, arguments))
    process.start()
    sending.close()
    try:
        if not receiving.poll(LONGEST_ATTEMPT_S):
            raise ChildError("Hang", "", f"nothing was heard for {LONGEST_ATTEMPT_S} s")
        succeeded, answer = receiving.recv()
    except EOFError:
        process.join()
        raise ChildError("Death", "", f"the process ended with {process.exitcode}") from None
    finally:
        if process.is_alive():
            process.join(5)
        process.kill()
        process.join()
        receiving.close()
    if not succeeded:
        raise ChildError(*answer)
    return answer


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


@dataclass
class Subject:
    """A run that is being trained, and where its parts lie."""

    out: Path
    work_dir: Path | None
    cache: Path
    settings: dict[str, Any]
    steps: dict[int, int] = field(default_factory=dict)
    """The saved step of each block after the latest attempt."""

    @property
    def sealed(self) -> bool:
        return (self.out / "manifest.json").exists()

    def block_folders(self) -> list[Path]:
        folders = [self.out / "blocks", *(self.work_dir.glob("edgeblocks-*") if self.work_dir else ())]
        return [folder for folder in folders if folder.is_dir()]

    def is_writing_a_block(self) -> bool:
        with contextlib.suppress(OSError):
            return any(path.suffix == ".tmp" for folder in self.block_folders() for path in folder.iterdir())
        return False

    def remains(self) -> dict[Path, str]:
        """What only a process at work or a killed one has, and the phase in which it is made."""
        found = {path: WRITING for folder in self.block_folders() for path in folder.glob(".*.tmp")}
        found |= dict.fromkeys(self.out.glob("samples/.*.tmp"), PICTURE)
        found |= dict.fromkeys(self.out.glob(".*.tmp"), SMALL_FILE)
        found |= dict.fromkeys(self.cache.glob("*.partial"), CACHING)
        return found | dict.fromkeys(self.out.glob("blocks.arriving"), RETURNING)


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


def read_block(path: Path) -> tuple[str, int, int]:
    """(run, block, step) of a whole block file, whose checksums are computed here and not by edgeblocks."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:start])
    metadata = table.pop("__metadata__")
    for part in ("weights", "ema", "optimizer"):
        spans = [entry["data_offsets"] for name, entry in table.items() if name.startswith(f"{part}.")]
        data = content[start + min(first for first, _ in spans) : start + max(last for _, last in spans)]
        assert hashlib.sha256(data).hexdigest() == metadata[f"{part}_sha256"], f"{path}: {part}"
    assert len(load_file(path)) == len(table)
    assert len(content) == start + max(entry["data_offsets"][1] for entry in table.values())
    return metadata["run_id"], int(metadata["block"]), int(metadata["step"])


def examine(subject: Subject) -> None:
    """Every file under its final name is whole and belongs there, and no saved step was lost.

    Raises:
        AssertionError: otherwise.
    """
    if not subject.out.exists():
        return
    names = [str(path.relative_to(subject.out)) for path in subject.out.rglob("*")]
    strange = [name for name in names if not _NAMES.fullmatch(name)]
    assert not strange, strange
    manifest = json.loads((subject.out / "manifest.json").read_text()) if subject.sealed else None
    for path in subject.out.glob("*.json"):
        json.loads(path.read_text())
    if (subject.out / "config.yaml").exists():
        assert yaml.safe_load((subject.out / "config.yaml").read_text())["steps"] == STEPS
    for path in subject.out.glob("samples/step_*.png"):
        with Image.open(path) as picture:
            picture.load()
    homes = []
    for folder in subject.block_folders():
        found = {path: read_block(path) for path in folder.glob("block_*.safetensors")}
        assert all(path.name == f"block_{block:03d}.safetensors" for path, (_, block, _) in found.items()), found
        runs = {run_id for run_id, _, _ in found.values()}
        if folder.parent != subject.out:  # folders of attempts that were killed before they were valid may be there
            assert all(folder.name == f"edgeblocks-{run_id[:12]}" for run_id in runs), (folder, runs)
        if manifest is not None and (folder.parent == subject.out or runs == {manifest["run_id"]}):
            assert runs == {manifest["run_id"]}, (folder, runs)
            homes.append({block: step for _, block, step in found.values()})
    if manifest is not None:
        steps = homes[0]  # at home where they are at home already, and the work directory is being emptied
        assert sorted(steps) == list(range(BLOCKS)), f"there are only the blocks {sorted(steps)}"
        assert all(step >= subject.steps.get(block, 0) for block, step in steps.items()), (subject.steps, steps)
        subject.steps = steps


def assert_equal_runs(out: Path, reference: Path) -> None:
    """All tensors of all block files, the metrics' steps and the validation losses are the reference's, bit for bit.

    Raises:
        AssertionError: otherwise.
    """
    for block in range(BLOCKS):
        name = f"blocks/block_{block:03d}.safetensors"
        one, two = load_file(out / name), load_file(reference / name)
        assert one.keys() == two.keys()
        different = [key for key in one if one[key].tobytes() != two[key].tobytes()]
        assert not different, f"{len(different)} tensors of block {block} differ, the first is {different[0]}"
        assert read_block(out / name)[2] == STEPS
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    made = sorted((record["block"], record["step"]) for record in records)
    assert made == [(block, step) for block in range(BLOCKS) for step in range(1, STEPS + 1)]
    first, second = (json.loads((path / "summary.json").read_text())["metrics"] for path in (out, reference))
    assert first["validation"] == second["validation"]
    for path in out.glob("samples/*.png"):
        assert path.read_bytes() == (reference / "samples" / path.name).read_bytes(), path


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
