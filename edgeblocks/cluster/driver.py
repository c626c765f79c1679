"""Blocks of a run trained on a Ray cluster: each is sent to a node, and comes home after every visit.

A node gets a copy of the run with one block in it, and of the others their headers. There the ordinary command trains
it, under the node's own budget. What comes home is taken as from any copy (`runs.gathering`): verified, then in one
instant. So a worker that is lost loses what it did since its last visit at most; its block is placed again, by Ray, and
goes on from what came home.
"""

import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeblocks.cluster.worker import Report, Worker
from edgeblocks.data.tokenizer import TOKENIZER_FILE
from edgeblocks.errors import ConfigError, EdgeblocksError, InterruptedRunError
from edgeblocks.files.own import create, make_folder
from edgeblocks.offload.block_files import BlockStore, storage_error
from edgeblocks.progress import Listener
from edgeblocks.runs.apart import steps_left
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.gathering import take_block
from edgeblocks.settings.fields import BUILT_IN_DATA
from edgeblocks.tasks import PYTHON_DATA
from edgeblocks.training.interruption import Interruption
from edgeblocks.units import format_bytes

_PIECE_BYTES = 2**23
_POLL_S = 0.3
_ANSWER_S = 120.0
"""After which a worker that does not answer is given up."""
_WAITING_S = 30.0
"""After which a user hears that no node takes a block."""
_MOST_LOSSES = 5
"""Of one block's workers, without a visit in between."""
_SENT = ("config.yaml", "plan.json", "manifest.json", "env.json", TOKENIZER_FILE, "metrics.jsonl")
_MISSING = "No module named 'edgeblocks"
"""In Ray's words, where a node does not have the package."""
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Of which sums may depend; Ray sets the first for its workers."""


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if _MISSING in line]
    return lines[-1][:200]


class Cluster:
    """A Ray cluster that this process has joined. Made before a run is planned: the memory it takes is counted."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: auto, ray://HOST:PORT or HOST:PORT.

        Raises:
            ConfigError: Ray is not installed, or there is no such cluster.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"--cluster needs Ray ({error}): pip install 'edgeblocks[cluster]', here and on every node"
            ) from error
        self.ray: ModuleType = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ConfigError(
                f"--cluster {address}: {str(error).splitlines()[0] if str(error) else type(error).__name__}; start one "
                f"with `ray start --head` and join it from every node, or name it as ray://HOST:PORT"
            ) from error

    def leave(self) -> None:
        self.ray.shutdown()


@contextmanager
def joined(address: str | None, workers: int | None) -> Iterator[Cluster | None]:
    """A cluster, left at the end; None where none is asked for.

    Raises:
        ConfigError: it cannot be joined, or the number of workers is none.
    """
    if workers is not None and (address is None or workers < 1):
        raise ConfigError(f"--workers {workers}: the number of blocks that a --cluster trains at a time, at least 1")
    if address is None:
        yield None
        return
    cluster = Cluster(address)
    try:
        yield cluster
    finally:
        cluster.leave()


@dataclass
class _Task:
    """A block that is on a node, or waits for one."""

    block: int
    actor: Any
    placed: Any
    """What Ray gives once a node has taken it."""
    asked: float = field(default_factory=time.monotonic)
    node: str | None = None
    seen: tuple[int, int, int] | None = None
    """The version of its file that is at home."""
    said: bool = False


class Spread:
    """The training of a run's blocks on a cluster. The run is locked by this process."""

    def __init__(self, run: RunDirectory, cluster: Cluster, listener: Listener, *, workers: int | None) -> None:
        """
        Args:
            workers: at most so many blocks at a time; None: all.
        """
        self._run, self._ray, self._listener = run, cluster.ray, listener
        self._store = run.store()
        self._most = workers
        self._running: dict[int, _Task] = {}
        self._losses: dict[int, int] = {}
        self._arriving = run.path / "blocks.arriving"
        self._token = secrets.token_hex(16)
        """Names the data that are sent to nodes."""

    def train(self, blocks: Sequence[int], *, go_on_with: str) -> None:
        """Train these blocks to their last step.

        Raises:
            InterruptedRunError: stopped by a signal; what was trained is saved and came home.
            EdgeblocksError: a node's training failed, or workers of a block are lost again and again.
        """
        waiting = deque(blocks)
        try:
            with Interruption(self._listener.note).listening() as interruption:
                while waiting or self._running:
                    if interruption.signal_name is not None:
                        self._stop_all()
                        raise InterruptedRunError(
                            f"stopped by {interruption.signal_name}; saved at steps "
                            f"{', '.join(map(str, self._run.saved_steps(self._store)))} of "
                            f"{self._run.settings.run.steps}. Go on with: {go_on_with}"
                        )
                    while waiting and (self._most is None or len(self._running) < self._most):
                        self._place(waiting.popleft())
                    for task in list(self._running.values()):
                        if self._advanced(task):
                            continue
                        self._end(task)
                        if task.block in steps_left(self._run):
                            waiting.append(task.block)
                    time.sleep(_POLL_S)
        except InterruptedRunError:
            raise
        except EdgeblocksError:
            self._stop_all()
            raise
        finally:
            for task in list(self._running.values()):
                self._end(task)
            shutil.rmtree(self._arriving, ignore_errors=True)

    def _place(self, block: int) -> None:
        """Ask Ray for a node with room for a block's training."""
        plan, settings = self._run.trainable_plan, self._run.settings.run
        host_bytes = plan.ram_budget_bytes or plan.budget_bytes
        actor = (
            self._ray.remote(Worker)
            .options(num_cpus=1, num_gpus=int(settings.target == "cuda"), memory=host_bytes)
            .remote()
        )
        self._running[block] = _Task(block=block, actor=actor, placed=actor.node.remote())

    def _advanced(self, task: _Task) -> bool:
        """Go on with a block; says whether it is on its node after that.

        Raises:
            EdgeblocksError: its training failed there.
        """
        try:
            if task.node is None:
                return self._placed(task)
            report: Report = self._get(task.actor.poll.remote(self._name(task.block)))
            if report.version != task.seen:
                self._bring_home(task)
                task.seen = report.version
            if report.exit_code is None:
                return True
        except self._ray.exceptions.RayError as error:
            self._lost(task, error)
            return False
        if report.exit_code != 0:
            raise EdgeblocksError(
                f"block {task.block} on {task.node}: its training ended with {report.exit_code}: {report.told}"
            )
        return False

    def _placed(self, task: _Task) -> bool:
        """Send the run to the node that has taken a block, once there is one, and begin."""
        if not self._ray.wait([task.placed], timeout=0)[0]:
            if not task.said and time.monotonic() - task.asked > _WAITING_S:
                task.said = True
                plan = self._run.trainable_plan
                needed = format_bytes(plan.ram_budget_bytes or plan.budget_bytes)
                self._listener.note(f"block {task.block} waits for a node with {needed} of memory and a processor free")
            return True
        node = self._get(task.placed)
        there, here = self._get(task.actor.version.remote()), metadata.version("edgeblocks")
        if there != here:
            raise EdgeblocksError(
                f"{node} has edgeblocks {there}, and this machine {here}, whose numbers may differ: pip install "
                f"'edgeblocks[cluster]=={here}' there"
            )
        self._send(task)
        settings = self._run.settings.run
        budgets = {"--mem-budget": settings.mem_budget, "--ram-budget": settings.ram_budget}
        arguments = ["--blocks-here", str(task.block)]
        arguments += [word for flag, value in budgets.items() if value is not None for word in (flag, value)]
        arguments += self._data_on(task, node)
        environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
        self._get(task.actor.start.remote(arguments, environment))
        task.seen = self._get(task.actor.poll.remote(self._name(task.block))).version
        task.node = node
        self._listener.note(f"block {task.block} is trained on {node}")
        return True

    def _data_on(self, task: _Task, node: str) -> list[str]:
        """What says where the data are on a node: nothing where they are under the same path, or come with the package.

        Else they are sent there, once for all workers of that machine. What they hold is compared when they are opened.
        """
        data = self._run.settings.run.data
        if data in BUILT_IN_DATA or data.startswith(PYTHON_DATA) or self._get(task.actor.finds.remote(data)):
            return []
        place: str | None = self._get(task.actor.data_sent.remote(self._token))
        if place is None:
            top = Path(data)
            files = sorted(path for path in top.rglob("*") if path.is_file()) if top.is_dir() else [top]
            size = sum(path.stat().st_size for path in files)
            self._listener.note(f"sending the data to {node}, {format_bytes(size)}")
            for path in files:
                with path.open("rb") as file:
                    name = str(path.relative_to(top.parent))
                    while piece := file.read(_PIECE_BYTES):
                        self._get(task.actor.receive.remote(self._token, name, piece))
            place = self._get(task.actor.keep_data.remote(self._token))
        return ["--data", str(place)]

    def _send(self, task: _Task) -> None:
        """The run's files, the block, and what stands for the others."""
        for name in _SENT:
            path = self._run.path / name
            if path.exists():
                self._get(task.actor.write.remote(name, path.read_bytes()))
        for piece in self._store.sound_pieces(task.block):
            self._get(task.actor.write.remote(f"blocks/{self._name(task.block)}", piece))
        for block in range(len(self._store.layouts)):
            if block != task.block:
                # As if it had made no step of its own, so that nothing there is evaluated with it.
                head = self._store.stand_in(block, self._run.shared_steps)
                size = len(head) + self._store.layouts[block].num_bytes
                self._get(task.actor.stand_in.remote(f"blocks/{self._name(block)}", head, size))

    def _bring_home(self, task: _Task) -> None:
        """Take the block as it is on its node now."""
        folder, name = self._arriving / "blocks", self._name(task.block)
        size = self._get(task.actor.hold.remote(name))
        try:
            shutil.rmtree(self._arriving, ignore_errors=True)
            make_folder(folder)
            with create(folder / name) as file:
                for start in range(0, size, _PIECE_BYTES):
                    file.write(self._get(task.actor.read.remote(start, _PIECE_BYTES)))
            with create(self._arriving / "metrics.jsonl") as file:
                file.write(self._get(task.actor.records.remote()))
        except OSError as error:
            raise storage_error(f"cannot take block {task.block}", folder / name, error) from error
        arrived = BlockStore(folder, self._store.layouts, self._run.run_id)
        if take_block(self._run, task.block, arrived, self._arriving):
            self._losses.pop(task.block, None)
        saved, wanted = self._run.saved_steps(self._store), self._run.settings.run.steps
        self._listener.advance(sum(saved), wanted * len(saved), "steps of all blocks")

    def _lost(self, task: _Task, error: Exception) -> None:
        if _MISSING in str(error):
            raise EdgeblocksError(
                f"a node of the cluster has no edgeblocks, or another Python than the one that it is installed in: pip "
                f"install 'edgeblocks[cluster]=={metadata.version('edgeblocks')}' on every node ({_last_line(error)})"
            ) from error
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
                self._get(task.actor.stop.remote())
        for task in on_nodes:
            with suppress(self._ray.exceptions.RayError):
                report = self._ended(task)
                if report.version != task.seen:
                    self._bring_home(task)

    def _ended(self, task: _Task) -> Report:
        """The last report of a worker that was stopped; the present one where it takes too long."""
        until = time.monotonic() + _ANSWER_S
        while True:
            report: Report = self._get(task.actor.poll.remote(self._name(task.block)))
            if report.exit_code is not None or time.monotonic() > until:
                return report
            time.sleep(_POLL_S)

    def _end(self, task: _Task) -> None:
        """Give the node back."""
        del self._running[task.block]
        with suppress(self._ray.exceptions.RayError):
            if task.node is not None:
                is_last = not any(other.node == task.node for other in self._running.values())
                self._ray.get(task.actor.close.remote(self._token if is_last else None), timeout=10)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(task.actor)

    def _name(self, block: int) -> str:
        return self._store.path(block).name

    def _get(self, reference: Any) -> Any:
        return self._ray.get(reference, timeout=_ANSWER_S)
