"""Runs that faults can be tried on; nothing here runs where limits, mounts and the fork server are not Linux's."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
from support.child_processes import ChildError, in_child
from support.faulty_runs import HALF, lay_out_elsewhere, resume, send
from support.killing import Campaign

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture(scope="session")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.fixture(scope="session")
def cache(campaign):
    """The decoded images."""
    return campaign.folder / "cache"


@pytest.fixture(scope="session")
def half_trained(campaign, cache):
    """A run that was stopped after 62 of its 144 steps."""
    run = Path(shutil.copytree(campaign.sealed_copy, campaign.folder / "half"))
    with pytest.raises(ChildError, match="stopped by SIGTERM; saved at steps 18, 18, 14, 12"):
        in_child(resume, run, cache, None, sum(HALF), send, (signal.SIGTERM,))
    return run


@pytest.fixture
def half(half_trained, tmp_path):
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(half_trained, tmp_path / "run"))


@pytest.fixture
def half_away(campaign, cache, tmp_path):
    """A run with a work directory, stopped after 62 of its 144 steps: (run, work directory)."""
    run, work_dir = tmp_path / "run", tmp_path / "work"
    work_dir.mkdir()
    in_child(lay_out_elsewhere, run, campaign.sealed_copy, cache, {"work_dir": str(work_dir)})
    with pytest.raises(ChildError, match="stopped by SIGTERM; saved at steps 18, 18, 14, 12"):
        in_child(resume, run, cache, None, sum(HALF), send, (signal.SIGTERM,))
    return run, work_dir
