"""Functions called in processes of their own, forked by a server that has imported torch and run none of its operators.

(The threads of libgomp do not survive a fork.) A kill then costs as little as what was done before it.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LONGEST_ATTEMPT_S = 120.0


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


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        connection.send((True, function(*arguments)))
    except BaseException as error:
        connection.send((False, (type(error).__name__, str(error), traceback.format_exc())))
