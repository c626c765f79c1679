"""Chromium without a window, driven over a pipe by its own protocol: no driver and no package is needed."""

import base64
import contextlib
import functools
import http.server
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ANSWER_S = 120
_WITH_PIPES = """
import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Starts a program that reads what is said to it from 3, and answers to 4."""


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


needs_browser = pytest.mark.skipif(chromium() is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


class Page:
    """A tab. `requests` are the addresses that it and its workers asked for."""

    def __init__(self, profile: str, reader: int, writer: int) -> None:
        self.profile, self._reader, self._writer = profile, reader, writer
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.problems: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self._call(method, self._session, **arguments)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def value(self, script: str) -> Any:
        """What an expression of the page is, or what its promise becomes."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, *, at_most_s: float = 60) -> float:
        """Until an expression is true; the seconds that it took."""
        began = time.perf_counter()
        while not self.value(f"Boolean({condition})"):
            if time.perf_counter() - began > at_most_s:
                raise AssertionError(condition, self.value("document.body.innerText"), self.problems)
            time.sleep(0.02)
        return time.perf_counter() - began

    def look(self, *, width: int, height: int, dark: bool = False) -> None:
        """Be a screen of this size."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, session: str | None = None, **arguments: Any) -> dict[str, Any]:
        found = self._ask(method, session, **arguments).get(timeout=_ANSWER_S)
        assert "error" not in found, (method, found)
        result: dict[str, Any] = found["result"]
        return result

    def _ask(self, method: str, session: str | None, **arguments: Any) -> "queue.Queue[dict[str, Any]]":
        number, answer = next(self._numbers), queue.Queue[dict[str, Any]]()
        self._answers[number] = answer
        message = {"id": number, "method": method, "params": arguments} | ({"sessionId": session} if session else {})
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        return answer

    def _read(self) -> None:
        with os.fdopen(self._reader, "rb") as file:
            left = b""
            while piece := file.read1(2**20):
                *messages, left = (left + piece).split(b"\0")
                for message in messages:
                    self._heard(json.loads(message))

    def _heard(self, message: dict[str, Any]) -> None:
        if "id" in message:
            waiting = self._answers.pop(message["id"], None)
            if waiting is not None:
                waiting.put(message)
            return
        told = message["params"]
        if message["method"] == "Target.attachedToTarget" and told["targetInfo"]["type"] == "worker":
            self._ask("Network.enable", told["sessionId"])  # the answer comes on this thread
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.problems.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
        elif message["method"] == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(told["entry"]["text"])


@contextlib.contextmanager
def browser(*options: str) -> Iterator[Page]:
    """A browser with one tab, of a profile that is thrown away."""
    to_browser, writer = os.pipe()
    reader, from_browser = os.pipe()
    profile = tempfile.mkdtemp(prefix="edgeblocks-browser-")
    command = [
        *(sys.executable, "-c", _WITH_PIPES, str(to_browser), str(from_browser), chromium() or "chromium"),
        *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
        *options,
    ]
    process = subprocess.Popen(
        command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(profile, reader, writer)
    finally:
        process.terminate()
        process.wait(timeout=20)
        os.close(writer)
        shutil.rmtree(profile, ignore_errors=True)


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None: ...


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which Python's static server has a folder."""
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
