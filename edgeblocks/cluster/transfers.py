"""What goes between this machine and the nodes: the run, one block, the data; and the block on its way home."""

import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeblocks.cluster.connection import CLOSE_S, Cluster
from edgeblocks.cluster.worker import remove_data
from edgeblocks.data.tokenizer import TOKENIZER_FILE
from edgeblocks.files.own import create, make_folder
from edgeblocks.offload.block_files import BlockStore, storage_error
from edgeblocks.progress import Listener
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.gathering import take_block
from edgeblocks.settings.fields import BUILT_IN_DATA
from edgeblocks.tasks import PYTHON_DATA
from edgeblocks.training.interruption import Interrupted, Interruption
from edgeblocks.units import format_bytes

_PIECE_BYTES = 2**23
_SENT = ("config.yaml", "plan.json", "manifest.json", "env.json", TOKENIZER_FILE, "metrics.jsonl")


class Transfers:
    """Between a run on this machine and the workers (`Worker`) on the nodes of a cluster, in pieces."""

    def __init__(
        self, run: RunDirectory, store: BlockStore, cluster: Cluster, listener: Listener, interruption: Interruption
    ) -> None:
        """
        Args:
            interruption: looked at between the pieces of the data.
        """
        self._run, self._store, self._cluster = run, store, cluster
        self._listener, self._interruption = listener, interruption
        self._arriving = run.path / "blocks.arriving"
        self.token = secrets.token_hex(16)
        """Names the data that are sent to nodes."""
        self._has_sent_data = False

    def file_name(self, block: int) -> str:
        """Of a block's file, here and on nodes."""
        return self._store.path(block).name

    def data_on(self, actor: Any, node: str) -> list[str]:
        """What says where the data are on a node: nothing where they are under the same path, or come with the package.

        Else they are sent there, once for all workers of that machine. What they hold is compared when they are opened.

        Raises:
            Interrupted: a signal came while they were sent.
        """
        data = self._run.settings.run.data
        if data in BUILT_IN_DATA or data.startswith(PYTHON_DATA) or self._cluster.get(actor.finds.remote(data)):
            return []
        if not Path(data).exists():  # it was there when the run was opened; the node will say that it misses it
            return []
        place: str | None = self._cluster.get(actor.data_sent.remote(self.token))
        if place is None:
            self._send_data(actor, Path(data), node)
            place = self._cluster.get(actor.keep_data.remote(self.token))
            self._has_sent_data = True
        return ["--data", str(place)]

    def _send_data(self, actor: Any, top: Path, node: str) -> None:
        files = sorted(path for path in top.rglob("*") if path.is_file()) if top.is_dir() else [top]
        size = sum(path.stat().st_size for path in files)
        self._listener.note(f"sending the data to {node}, {format_bytes(size)}")
        for path in files:
            with path.open("rb") as file:
                name = str(path.relative_to(top.parent))
                while piece := file.read(_PIECE_BYTES):
                    if self._interruption.signal_name is not None:
                        raise Interrupted
                    self._cluster.get(actor.receive.remote(self.token, name, piece))

    def send(self, actor: Any, block: int) -> None:
        """The run's files, the block, and what stands for the others."""
        for name in _SENT:
            path = self._run.path / name
            if path.exists():
                self._cluster.get(actor.write.remote(name, path.read_bytes()))
        for piece in self._store.sound_pieces(block):
            self._cluster.get(actor.write.remote(f"blocks/{self.file_name(block)}", piece))
        for other in range(len(self._store.layouts)):
            if other != block:
                # As if it had made no step of its own, so that nothing there is evaluated with it.
                head = self._store.stand_in(other, self._run.shared_steps)
                size = len(head) + self._store.layouts[other].num_bytes
                self._cluster.get(actor.stand_in.remote(f"blocks/{self.file_name(other)}", head, size))

    def bring_home(self, actor: Any, block: int) -> bool:
        """Take the block as it is on its node now; says whether it is further than it was here."""
        folder, name = self._arriving / "blocks", self.file_name(block)
        size = self._cluster.get(actor.hold.remote(name))
        try:
            shutil.rmtree(self._arriving, ignore_errors=True)
            make_folder(folder)
            with create(folder / name) as file:
                for start in range(0, size, _PIECE_BYTES):
                    file.write(self._cluster.get(actor.read.remote(start, _PIECE_BYTES)))
            with create(self._arriving / "metrics.jsonl") as file:
                file.write(self._cluster.get(actor.records.remote()))
        except OSError as error:
            raise storage_error(f"cannot take block {block}", folder / name, error) from error
        arrived = BlockStore(folder, self._store.layouts, self._run.run_id)
        return take_block(self._run, block, arrived, self._arriving)

    def clear(self, nodes: Iterable[str]) -> None:
        """Remove what was on its way, and the data on nodes, which stayed there for the next blocks."""
        shutil.rmtree(self._arriving, ignore_errors=True)
        if not self._has_sent_data:
            return
        ray = self._cluster.ray
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        removing = [
            ray.remote(remove_data).options(num_cpus=0, scheduling_strategy=strategy(node, soft=False))
            for node in nodes
        ]
        with suppress(ray.exceptions.RayError):
            ray.wait([task.remote(self.token) for task in removing], num_returns=len(removing), timeout=CLOSE_S)
