"""A Ray cluster that this process has joined, and what its nodes have to give."""

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from edgeblocks.errors import ConfigError

ANSWER_S = 120.0
"""After which a worker that does not answer is given up."""
CLOSE_S = 10.0
"""The same where something is given back."""
_CONNECT_S = 5.0
"""After which nobody is taken to be at an address; Ray itself would wait for minutes, and write of its insides."""


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
        _check_answers(address)
        try:
            # Workers look for modules in the folder where this was called, before they look among those installed: a
            # user's random.py there would be run in the place of a library. There is nothing in this one.
            with contextlib.chdir("/"):
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            why = str(error).strip() or type(error).__name__
            raise _refused(address, why.splitlines()[0]) from error

    def get(self, reference: Any) -> Any:
        """What a worker answers.

        Raises:
            ray.exceptions.RayError: the worker is lost, or does not answer.
        """
        return self.ray.get(reference, timeout=ANSWER_S)

    def leave(self) -> None:
        self.ray.shutdown()

    def rooms(self, most_bytes: int, *, with_gpu: bool) -> list[int]:
        """Bytes of memory of each block that the nodes could train at the same time, the largest first.

        A block has `most_bytes`, and on a node that gives less to Ray (`ray start --memory`) what that one gives. Each
        takes a processor of the node, and a GPU where one is asked for.
        """
        found: list[int] = []
        for node in self.ray.nodes():
            there = node["Resources"] if node["Alive"] else {}
            room = min(most_bytes, int(there.get("memory", 0)))
            if room:
                blocks = min(
                    there["memory"] // room, there.get("CPU", 0), there.get("GPU", 0) if with_gpu else math.inf
                )
                found += [room] * int(blocks)
        return sorted(found, reverse=True)


@contextlib.contextmanager
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


def _check_answers(address: str) -> None:
    """That somebody is at a host and port, where the address has them.

    Raises:
        ConfigError: nobody is.
    """
    try:
        where = urlsplit(address if "://" in address else f"//{address}")
        host, port = where.hostname, where.port
    except ValueError as error:
        raise _refused(address, str(error)) from error
    if host is None or port is None:  # auto, or what Ray refuses in its own words
        return
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _refused(address, f"nobody answers there ({error.strerror or error})") from error


def _refused(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"--cluster {address}: {why}; start a cluster with `ray start --head` and join it from every node with `ray "
        f"start --address=HEAD:6379`, then name it as auto on one of them, as HEAD:6379, or from elsewhere as "
        f"ray://HEAD:10001; a firewall must let these ports through"
    )
