"""Blocks of a run trained on a Ray cluster: each is sent to a node, and comes home after every visit.

A node gets a copy of the run with one block in it, and of the others their headers. There the ordinary command trains
it, under the node's own budget. What comes home is taken as from any copy (`runs.gathering`): verified, then in one
instant. So a worker that is lost loses what it did since its last visit at most; its block is placed again, by Ray, and
goes on from what came home.
"""

import json
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from edgeblocks.cluster.connection import ANSWER_S, CLOSE_S, Cluster
from edgeblocks.cluster.transfers import Transfers
from edgeblocks.cluster.worker import Report, Worker
from edgeblocks.errors import DoesNotFitError, EdgeblocksError, InterruptedRunError
from edgeblocks.progress import BlockProgress, Listener
from edgeblocks.runs.apart import steps_left
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.history import trained_s
from edgeblocks.runs.schema import RecordFields, checked_record
from edgeblocks.training.interruption import Interrupted, Interruption
from edgeblocks.units import format_bytes, format_duration

_POLL_S = 0.3
_WAITING_S = 30.0
"""After which a user hears that no node takes any block."""
_MOST_LOSSES = 5
"""Of one block's workers, without a visit in between."""
_MISSING = "No module named 'edgeblocks"
"""In Ray's words, where a node does not have the package."""
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Of which sums may depend; Ray sets the first for its workers."""


def _without_package(told: str) -> EdgeblocksError | None:
    """Where a node says that it has no edgeblocks, what to do about it; else None."""
    lines = [line.strip() for line in told.splitlines() if _MISSING in line]
    if not lines:
        return None
    return EdgeblocksError(
        f"a node of the cluster has no edgeblocks, or was started with another Python than the one that has it: pip "
        f"install 'edgeblocks[cluster]=={metadata.version('edgeblocks')}' on every node, and `ray start` from there "
        f"({lines[-1][:200]})"
    )


def _added_up(before_s: float | None, after_s: float | None) -> str:
    """How long nodes have trained; nothing where an earlier record has no time."""
    if before_s is None or after_s is None:
        return ""
    return f", whose training of one block after the other adds up to {format_duration(after_s - before_s)}"


@dataclass
class _Task:
    """A block that is on a node, or waits for one."""

    block: int
    actor: Any
    placed: Any
    """What Ray gives once a node has taken it."""
    size: int
    """Bytes of memory that it asks for, under which it is trained there."""
    is_in_vain: bool = False
    """Whether no node has that much any more."""
    node: str | None = None
    began: float = 0.0
    first_step: int = 0
    step: int = 0
    """Known of its records; 0 before it has made one there."""
    seen: tuple[int, int, int] | None = None
    """The version of its file that is at home."""

    @property
    def steps_per_s(self) -> float:
        """Since it began there."""
        return max(0, self.step - self.first_step) / max(time.monotonic() - self.began, 1e-9)


class Spread:
    """The training of a run's blocks on a cluster. The run is locked by this process."""

    def __init__(self, run: RunDirectory, cluster: Cluster, listener: Listener, *, workers: int | None) -> None:
        """
        Args:
            workers: at most so many blocks at a time; None: all.
        """
        self._run, self._cluster, self._ray, self._listener = run, cluster, cluster.ray, listener
        self._store = run.store()
        self._saved = run.saved_steps(self._store)
        self._most = workers
        self._running: dict[int, _Task] = {}
        self._losses: dict[int, int] = {}
        self._records: dict[int, RecordFields] = {}
        """Of the last step of each block that nodes have told of."""
        self._too_small = 0
        """Bytes of memory that are known not to be enough."""
        self._nodes: dict[str, str] = {}
        """Names of the machines that have trained a block, by what Ray calls the nodes on them."""
        self._idle_since: float | None = None
        """Since when no node trains a block."""
        self._said_idle = False
        self._interruption = Interruption(listener.note)
        self._transfers = Transfers(run, self._store, cluster, listener, self._interruption)

    def train(self, blocks: Sequence[int], *, go_on_with: str) -> None:
        """Train these blocks to their last step.

        Raises:
            InterruptedRunError: stopped by a signal; what was trained is saved and came home.
            EdgeblocksError: a node's training failed, or workers of a block are lost again and again.
        """
        if not blocks:
            return
        self._listener.stage("training on the cluster")
        waiting, started, trained_before_s = deque(blocks), time.monotonic(), trained_s(self._run)
        try:
            with self._interruption.listening() as interruption:
                while waiting or self._running:
                    if interruption.signal_name is not None:
                        self._stop_all()
                        raise InterruptedRunError(
                            f"stopped by {interruption.signal_name}; saved at steps "
                            f"{', '.join(map(str, self._saved))} of {self._run.settings.run.steps}. Go on with: "
                            f"{go_on_with}"
                        )
                    self._place_some(waiting)
                    for task in list(self._running.values()):
                        if self._advanced(task):
                            continue
                        self._end(task)
                        if task.block in steps_left(self._run):
                            waiting.append(task.block)
                    self._tell(blocks)
                    time.sleep(_POLL_S)
        except InterruptedRunError:
            raise
        except EdgeblocksError:
            self._stop_all()
            raise
        finally:
            for task in list(self._running.values()):
                self._end(task)
            self._transfers.clear(self._nodes)
        self._listener.note(
            f"the cluster took {format_duration(time.monotonic() - started)} on "
            f"{', '.join(sorted({*self._nodes.values()}))}{_added_up(trained_before_s, trained_s(self._run))}"
        )

    def _host_bytes(self) -> int:
        plan = self._run.trainable_plan
        return plan.ram_budget_bytes or plan.budget_bytes

    def _uses_gpu(self) -> bool:
        return self._run.settings.run.target == "cuda"

    def _free_rooms(self) -> list[int]:
        """Bytes of memory of blocks that nodes could take now besides ours, the largest first.

        Raises:
            DoesNotFitError: no node has enough for any.
        """
        found = self._cluster.rooms(self._host_bytes(), with_gpu=self._uses_gpu())
        enough = [room for room in found if room > self._too_small]
        if found and not enough:
            raise DoesNotFitError(
                f"no node of the cluster has enough memory for a block: the largest gives {format_bytes(found[0])} "
                f"(`ray start --memory` says how much one gives)",
                self._too_small,
            )
        for task in self._running.values():
            if task.size in enough:
                enough.remove(task.size)
            elif task.node is None:
                task.is_in_vain = True  # the node that it was meant for has left
        return enough

    def _place_some(self, waiting: deque[int]) -> None:
        """Ask Ray for nodes for blocks that wait, as many as the nodes have room for."""
        free = self._free_rooms()
        while waiting and free and (self._most is None or len(self._running) < self._most):
            self._place(waiting.popleft(), free.pop(0))
        if any(task.node is not None for task in self._running.values()):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif not self._said_idle and time.monotonic() - self._idle_since > _WAITING_S:
            self._said_idle = True
            self._listener.note(
                f"no node has taken a block for {format_duration(_WAITING_S)}: one needs a processor"
                f"{' and a GPU' * self._uses_gpu()} and memory free, best {format_bytes(self._host_bytes())}; `ray "
                f"status` tells what the nodes have"
            )

    def _place(self, block: int, size: int) -> None:
        actor = (
            self._ray.remote(Worker)
            .options(
                num_cpus=1,
                num_gpus=int(self._uses_gpu()),
                memory=size,
                scheduling_strategy="SPREAD",  # else Ray fills half of one node before it takes the next
            )
            .remote(self._transfers.token)
        )
        self._running[block] = _Task(block=block, actor=actor, placed=actor.node.remote(), size=size)

    def _advanced(self, task: _Task) -> bool:
        """Go on with a block; says whether it is on its node, or waits for one, after that.

        Raises:
            EdgeblocksError: its training failed there.
        """
        try:
            if task.node is None:
                if self._ray.wait([task.placed], timeout=0)[0]:
                    self._begin(task)
                return task.node is not None or not task.is_in_vain
            report: Report = self._cluster.get(task.actor.poll.remote(self._transfers.file_name(task.block)))
            self._hear(task, report)
            if report.version != task.seen:
                self._bring_home(task)
                task.seen = report.version
            if report.exit_code is None:
                return True
        except Interrupted:
            return True
        except self._ray.exceptions.RayError as error:
            self._lost(task, error)
            return False
        if report.exit_code == DoesNotFitError.exit_code:
            self._too_small = max(self._too_small, task.size)
            self._listener.note(f"block {task.block} does not fit on {task.node}: {report.told}")
        elif report.exit_code != 0:
            raise _without_package(report.told) or EdgeblocksError(
                f"block {task.block} on {task.node}: its training ended with {report.exit_code}: {report.told}"
            )
        return False

    def _begin(self, task: _Task) -> None:
        """Send the run to the node that has taken a block, and begin.

        Raises:
            EdgeblocksError: that node cannot train it.
            Interrupted: a signal came while data were sent.
        """
        node, node_id = self._cluster.get(task.placed)
        there, here = self._cluster.get(task.actor.version.remote()), metadata.version("edgeblocks")
        if there != here:
            raise EdgeblocksError(
                f"{node} has edgeblocks {there}, and this machine {here}, whose numbers may differ: pip install "
                f"'edgeblocks[cluster]=={here}' there"
            )
        self._transfers.send(task.actor, task.block)
        self._nodes.setdefault(node_id, node)
        arguments = ["--blocks-here", str(task.block)]
        smaller = task.size < self._host_bytes()
        if smaller:
            flag = "--mem-budget" if self._run.trainable_plan.ram_budget_bytes is None else "--ram-budget"
            arguments += [flag, str(task.size)]
        arguments += self._transfers.data_on(task.actor, node)
        environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
        self._cluster.get(task.actor.start.remote(arguments, environment))
        task.seen = self._cluster.get(task.actor.poll.remote(self._transfers.file_name(task.block))).version
        task.node, task.began, task.first_step = node, time.monotonic(), self._saved[task.block]
        under = f", under {format_bytes(task.size)}" if smaller else ""
        self._listener.note(f"block {task.block} is trained on {node}{under}")

    def _hear(self, task: _Task, report: Report) -> None:
        for note in report.notes:
            self._listener.note(f"block {task.block} on {task.node}: {note}")
        with suppress(ValueError):
            record = checked_record(RecordFields, json.loads(report.record or b"{}"))
            if record is not None and record.block == task.block:  # else it is one that came with the copy
                task.step = record.step
                self._records[task.block] = record

    def _tell(self, blocks: Sequence[int]) -> None:
        """How far all blocks are, to the listener."""
        steps = self._run.settings.run.steps
        rows, left, rate, longest_s = [], 0, 0.0, 0.0
        for block, saved in enumerate(self._saved):
            task = self._running.get(block)
            record = self._records.get(block)
            step = saved if task is None else max(saved, task.step)
            otherwise = "done" if saved >= steps else "waits" if block in blocks else "elsewhere"
            rows.append(
                BlockProgress(
                    block=block,
                    step=step,
                    saved=saved,
                    steps=steps,
                    where=otherwise if task is None or task.node is None else task.node,
                    is_training=task is not None and task.node is not None,
                    loss=None if record is None else record.smoothed_loss,
                    examples_per_s=None if record is None else record.examples_per_s,
                    used_bytes=None if record is None else record.used_bytes,
                )
            )
            left += steps - step if block in blocks else 0
            if task is not None and task.steps_per_s > 0:
                rate += task.steps_per_s
                longest_s = max(longest_s, (steps - step) / task.steps_per_s)
        self._listener.blocks(rows, max(left / rate, longest_s) if rate else None)

    def _bring_home(self, task: _Task) -> None:
        if self._transfers.bring_home(task.actor, task.block):
            self._losses.pop(task.block, None)
        self._saved = self._run.saved_steps(self._store)

    def _lost(self, task: _Task, error: Exception) -> None:
        if (refused := _without_package(str(error))) is not None:
            raise refused from error
        losses = self._losses[task.block] = self._losses.get(task.block, 0) + 1
        if losses > _MOST_LOSSES:
            raise EdgeblocksError(
                f"block {task.block} was lost {losses} times without a visit that came home; the last time: {error}"
            ) from error
        where = "" if task.node is None else f" on {task.node}"
        self._listener.note(
            f"the worker of block {task.block}{where} is lost ({type(error).__name__}); it goes on elsewhere from step "
            f"{self._store.header(task.block).step}"
        )

    def _stop_all(self) -> None:
        """Have all workers save and end, and take what they have made."""
        on_nodes = [task for task in self._running.values() if task.node is not None]
        for task in on_nodes:
            with suppress(self._ray.exceptions.RayError):
                self._cluster.get(task.actor.stop.remote())
        for task in on_nodes:
            with suppress(self._ray.exceptions.RayError):
                report = self._ended(task)
                if report.version != task.seen:
                    self._bring_home(task)

    def _ended(self, task: _Task) -> Report:
        """The last report of a worker that was stopped; the present one where it takes too long."""
        until = time.monotonic() + ANSWER_S
        while True:
            report: Report = self._cluster.get(task.actor.poll.remote(self._transfers.file_name(task.block)))
            if report.exit_code is not None or time.monotonic() > until:
                return report
            time.sleep(_POLL_S)

    def _end(self, task: _Task) -> None:
        """Give the node back."""
        del self._running[task.block]
        with suppress(self._ray.exceptions.RayError):
            if task.node is not None:
                self._ray.get(task.actor.close.remote(), timeout=CLOSE_S)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(task.actor)
