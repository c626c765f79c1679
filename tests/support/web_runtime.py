"""onnxruntime-web for tests: the package where it is on this machine, and one that is made up."""

import hashlib
import os
from pathlib import Path

import pytest

from edgeblocks.export import web_runtime
from edgeblocks.export.web_runtime import BYTES, PACKAGE, SHA256, VERSION

GIVEN = "EDGEBLOCKS_WEB_RUNTIME"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgeblocks" / f"{PACKAGE}-{VERSION}"
"""Of the user, where a page that was written once has left it; tests have a cache of their own."""


def real_runtime() -> Path | None:
    if given := os.environ.get(GIVEN):
        return Path(given).absolute()
    return _CACHE if _CACHE.is_dir() else None


needs_runtime = pytest.mark.skipif(
    real_runtime() is None, reason=f"no {PACKAGE} {VERSION}: `npm pack {PACKAGE}@{VERSION}`, and {GIVEN}=ITS.tgz"
)


def made_up_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few bytes that counts as the known one."""
    (folder / "dist").mkdir(parents=True)
    for name in (web_runtime.SCRIPT, web_runtime.WASM):
        content = f"made up: {name}".encode()
        (folder / "dist" / name).write_bytes(content)
        monkeypatch.setitem(SHA256, name, hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(BYTES, name, len(content))
    return folder
