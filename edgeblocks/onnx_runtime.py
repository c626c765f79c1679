"""onnxruntime as it is used here: it reports to nobody, answers Ctrl-C, and reads from any path.

The one place that imports it.
"""

import contextlib
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeblocks.errors import ConfigError

TELEMETRY_OFF = {"ORT_DISABLE_TELEMETRY": "1"}
"""For the environment of a process, before onnxruntime is imported in it: from 1.29 on it reports its use to its maker
unless this is said."""
CODE_BYTES = 6_000_000
"""Of the library's kernels that a first run reads from its file, beyond what a bounded process leaves for code: 12 MB
in all, measured."""
_PROVIDER = "ExecutionProvider"
"""How the names of all execution providers end."""
_NOTHING = 4
"""What onnxruntime prints by itself: its errors are raised as well, and would stand in the terminal twice."""
_STOPPING_S = 10.0
_Result = TypeVar("_Result")


def switch_telemetry_off() -> None:
    """In this process, unless the user's own setting says otherwise; for libraries that may import onnxruntime."""
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


def onnxruntime() -> ModuleType:
    """The library, which reports to nobody."""
    switch_telemetry_off()
    import onnxruntime as library

    module: ModuleType = library
    return module


def matrix_rounding() -> Any:
    """The library's class that rounds a graph's matrices to a few bits."""
    onnxruntime()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # Its module has the process print all notes of all libraries from its import on.
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    return MatMulNBitsQuantizer


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What graphs run on.

    threads: that work inside one operator; None: as many as onnxruntime chooses, one a core.
    provider: an execution provider's short name, such as cpu, cuda or coreml. Operators that it does not have run on
        the processor. No other one than cpu was run yet.

    Raises:
        ConfigError: fewer than one thread, or a provider that the installed onnxruntime does not have.
    """

    threads: int | None = None
    provider: str = "cpu"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads}: at least one is needed")
        if self.provider.lower() != "cpu" and not self._full_names():
            library = onnxruntime()
            there = ", ".join(map(_short, library.get_available_providers()))
            known = self.provider.lower() in map(_short, library.get_all_providers())
            why = "does not have it" if known else "knows no such execution provider"
            cure = "; its other packages, such as onnxruntime-gpu, have others" if known else ""
            raise ConfigError(
                f"--provider {self.provider}: the installed onnxruntime {library.__version__} {why}; available are "
                f"{there}{cure}"
            )

    def providers(self) -> list[str]:
        """As onnxruntime takes them: the one that was asked for, and the processor for what it does not have."""
        return list(dict.fromkeys([*self._full_names(), f"CPU{_PROVIDER}"]))

    def _full_names(self) -> list[str]:
        available = onnxruntime().get_available_providers()
        return [name for name in available if _short(name) == self.provider.lower()]


def _short(provider: str) -> str:
    """
    >>> _short("CUDAExecutionProvider")
    'cuda'
    """
    return provider.removesuffix(_PROVIDER).lower()


PROCESSOR = Hardware()
"""As onnxruntime uses it unless it is told otherwise."""


class Kept:
    """What a graph gave, in onnxruntime's memory: it goes into the next run without a copy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """None of what no chain has."""
        return np.dtype(np.float32) if self.value.data_type() == "tensor(float)" else None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())


class Session:
    """A graph in memory, ready to run."""

    def __init__(self, path: Path, hardware: Hardware = PROCESSOR) -> None:
        """
        Raises:
            Exception: onnxruntime cannot load it; its errors have no common base.
        """
        self._library = onnxruntime()
        options = session_options(hardware.threads)
        providers = hardware.providers()

        def stop() -> None:
            with contextlib.suppress(AttributeError):  # before 1.22; then the end of the process ends it
                options.set_load_cancellation_flag(True)

        def load() -> Any:
            with _in_utf8(path) as readable:
                # Without its own fallback, which prints on standard output.
                return self._library.InferenceSession(readable, options, providers, enable_fallback=0)

        self._session = _stoppable(load, stop)
        if self._session.get_providers()[0] != providers[0]:  # it goes on without, where a driver is missing
            raise ConfigError(
                f"--provider {hardware.provider}: onnxruntime has it and cannot start it here, so that the graph would "
                f"run on the processor; look whether its driver and libraries are installed, or leave it out"
            )

    @property
    def output_names(self) -> list[str]:
        """Of what `run` gives, in its order."""
        return [output.name for output in self._session.get_outputs()]

    def run(self, feed: Mapping[str, NDArray[np.generic] | Kept], *, keep: str | None = None) -> list[Any]:
        """The outputs.

        Args:
            keep: the output that is `Kept`.

        Raises:
            Exception: as `__init__`.
            KeyboardInterrupt: Ctrl-C, within a moment, however long the graph would have run.
        """
        options = self._library.RunOptions()
        options.log_severity_level = _NOTHING

        def stop() -> None:
            options.terminate = True

        if keep is None:
            found: list[Any] = _stoppable(lambda: self._session.run(None, feed, options), stop)
            return found
        made = self._library.OrtValue.ortvalue_from_numpy
        given = {
            name: one.value if isinstance(one, Kept) else made(np.ascontiguousarray(one)) for name, one in feed.items()
        }
        names = self.output_names
        values = _stoppable(lambda: self._session.run_with_ort_values(names, given, options), stop)
        return [Kept(one) if name == keep else one.numpy() for name, one in zip(names, values, strict=True)]


def session_options(threads: int | None = None) -> Any:
    """Options for little memory that cost no speed.

    Measured on a block of 11M parameters (45 MB), 64 samples of 64 tokens, 2 threads; peak resident set and run time:
    as onnxruntime sets them 456 MB, 402 ms; without memory pattern 295 MB, 407 ms; without prepacking (a second copy of
    each weight) 25 MB less while loading; without the arena 321 MB, 440 ms, so the arena stays. Threads that spin while
    they wait slow down whatever else runs (455 against 435 ms on two shared cores).
    """
    options = onnxruntime().SessionOptions()
    options.enable_mem_pattern = False
    options.log_severity_level = _NOTHING
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@contextlib.contextmanager
def _in_utf8(path: Path) -> Iterator[Path]:
    """A path to the same file that is text: onnxruntime takes no other bytes. The folder gets another name for it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="edgeblocks-") as folder:
            (Path(folder) / "export").symlink_to(path.parent.absolute(), target_is_directory=True)
            yield Path(folder) / "export" / path.name
        return
    yield path


class _Helper:
    """A thread that does what it is given; Python runs no signal's handler while the main one is inside a library."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="onnxruntime", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self._work.get()()

    def result(self, work: Callable[[], _Result], stop: Callable[[], None]) -> _Result:
        results: list[_Result] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def answer() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._work.put(answer)
        try:
            done.wait()
        except BaseException:
            stop()
            if not done.wait(_STOPPING_S):
                global _helper  # noqa: PLW0603 - it is busy until the process ends; the next call needs another
                _helper = None
            raise
        if errors:
            raise errors[0]
        return results[0]


_helper: _Helper | None = None


def prepare() -> None:
    """Before memory is bounded: the library's code, and a thread with its stack, are no part of what graphs take."""
    onnxruntime()
    _started()


def _started() -> _Helper:
    global _helper  # noqa: PLW0603 - one thread for all sessions, made at the first one
    if _helper is None:
        _helper = _Helper()
    return _helper


def _stoppable(work: Callable[[], _Result], stop: Callable[[], None]) -> _Result:
    """The result of `work`; a signal, such as Ctrl-C, calls `stop`, and its error is raised."""
    if threading.current_thread() is not threading.main_thread():
        return work()  # which alone gets signals
    return _started().result(work, stop)
