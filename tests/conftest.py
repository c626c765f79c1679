"""Shapes and types in annotations are checked at run time, in tests only; helpers to run the command as a user does."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from support.shapes import checked_shapes

# Before torch is loaded: threads that spin while they wait make small steps ten times slower and more as soon as
# another program needs a core.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import onnxruntime by themselves
# Programs that tests start keep their bytecode, as those of users do: each would compile the package anew, 0.3 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Two processes test at once, each with a core of its own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines are shared, hence no deadline. `EDGEBLOCKS_TESTS=thorough pytest` looks further.
settings.register_profile("usual", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("EDGEBLOCKS_TESTS", "usual"))

_CHECKED = (
    *(f"families.{name}" for name in ("ar", "causal_layers", "dit", "layers", "looped", "mdlm", "text_block")),
    *(f"families.{name}" for name in ("token_block", "token_denoiser", "token_loss")),
    *("inference.block_runner", "inference.frechet"),
)
"""Modules whose annotated shapes are checked when they are called."""
_hook = install_import_hook([f"edgeblocks.{name}" for name in _CHECKED], "beartype.beartype")
for _name in _CHECKED:
    assert find_spec(f"edgeblocks.{_name}"), f"edgeblocks.{_name} is gone: nothing would check its shapes"

pytest_plugins = ["support.known_answers"]
_FOLDERS_WITH_CHECKS = ("families", "inference")


def pytest_collection_modifyitems(items):
    """Tests whose claim others make as well, on another shape, are left to `EDGEBLOCKS_TESTS=thorough pytest`."""
    if settings.get_current_profile_name() != "thorough":
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="thorough: EDGEBLOCKS_TESTS=thorough"))


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """Decoded images and traced costs go to a folder of this test session, which its processes share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["EDGEBLOCKS_CACHE"] = str(folder / "cache")


@pytest.fixture(scope="module", autouse=True)
def _shapes(request):
    with checked_shapes(request.path.parent.name in _FOLDERS_WITH_CHECKS):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Networks this small lose time, not gain it, by waiting for a second thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu_like(monkeypatch):
    """`--target cuda` is a machine made of this processor."""
    from edgeblocks import registry

    monkeypatch.setitem(registry._TARGETS, "cuda", "support.separate_memory:SeparateMemory")


@pytest.fixture(scope="session")
def edgeblocks_command():
    """Runs `edgeblocks ...` in a process of its own and gives the finished process."""

    def run(*arguments, cwd=None, timeout=300, env=None):
        command = [str(Path(sys.executable).with_name("edgeblocks")), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=cwd,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
