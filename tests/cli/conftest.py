import shutil
from pathlib import Path

import pytest

import edgeblocks


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    settings = {"depth": 3, "width": 16, "steps": 2, "batch": 4, "sample_grids": 1, "sample_steps": 3}
    edgeblocks.train(out=out, data="digits", mem_budget="4GB", hold_out=0.02, **settings)
    return out


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))
