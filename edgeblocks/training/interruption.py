"""Ctrl-C, SIGTERM and a closed terminal: training stops after the step, and saves."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(Exception):
    """Raised where a run is asked to stop in the middle of something that leaves no state behind."""


class Interruption:
    """Turns Ctrl-C, SIGTERM and a closed terminal into a request to stop after the step.

    Args:
        note: called at once with a line that the signal arrived, since a step can take a minute.
    """

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        self.signal_name: str | None = None
        self._note = note

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        if threading.current_thread() is not threading.main_thread():  # Python lets no other one set handlers
            yield self
            return
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        # What the parent had ignored stays ignored: SIGHUP under nohup, Ctrl-C behind the `&` of a script.
        watched = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        former = {number: signal.signal(number, self._on_signal) for number in watched}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        # A handler only leaves word: it runs between two lines of the step, where nothing can be saved.
        first, self.signal_name = self.signal_name is None, signal.Signals(number).name
        if first and self._note is not None:
            with suppress(RuntimeError, OSError):  # the signal came while the stream was written to, or it is closed
                self._note(
                    f"{self.signal_name}: stopping after this step, and saving. Ctrl-C again stops at once, with what "
                    f"the last visit saved"
                )
