"""Answers kept in the cache folder, each in a small file of its own: what a network costs, what its steps took.

A file is named by everything that its answer depends on. It ends with a checksum: a damaged one is no answer.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any


def kept_answer(path: Path) -> dict[str, Any] | None:
    """A former answer; None where there is none, or a damaged one."""
    with contextlib.suppress(OSError, ValueError):
        text, _, digest = path.read_text().rstrip().rpartition("\n")
        answer = json.loads(text)
        if digest == hashlib.sha256(text.encode()).hexdigest() and isinstance(answer, dict):
            return answer
    return None


def keep_answer(path: Path, answer: Mapping[str, object]) -> None:
    """Write an answer down for other processes."""
    text = json.dumps(answer)
    with contextlib.suppress(OSError):  # a full or read-only cache costs time only
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
            file.write(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
        # In one piece: another process may look for the answer while it is written.
        Path(file.name).replace(path)


def fingerprint(request: object) -> str:
    """Changes with everything that an answer depends on: the request, the code, torch, the threads of a step."""
    threads = [os.environ.get("OMP_NUM_THREADS"), os.cpu_count(), platform.machine()]
    about = [request, _code_digest(), metadata.version("torch"), sys.version, threads]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code_digest() -> str:
    """Of the source of the whole package: costs come from families, offload, optim and training together."""
    package = resources.files("edgeblocks")
    assert isinstance(package, Path)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()
