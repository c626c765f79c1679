"""Who may write in a run directory, and where."""

import os
import shutil
from pathlib import Path

import pytest

import edgeblocks
from edgeblocks.errors import RunError
from edgeblocks.runs.directory import OWN_FOLDERS, OWN_NAMES
from edgeblocks.runs.locks import locked

TINY = {"depth": 3, "width": 16, "batch": 4, "data": "digits", "mem_budget": "2GB", "hold_out": 0.005}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that has made none of its steps, whose samples and evaluations are still to come."""
    out = tmp_path_factory.mktemp("locks") / "run"
    edgeblocks.train(out=out, steps=2, sample_grids=0, **TINY)
    (out / "summary.json").unlink()
    config = (out / "config.yaml").read_text().replace("steps: 2\n", "steps: 4\n")
    config = config.replace("evaluations: 0", "evaluations: 2").replace("sample_grids: 0", "sample_grids: 1")
    (out / "config.yaml").write_text("".join(line for line in config.splitlines(True) if "sha256" not in line))
    return out


def everything(folder):
    """All bytes and times in a folder."""
    return {path: (path.is_file() and path.read_bytes(), path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def outside(tmp_path):
    """A folder whose files must not change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("thesis.txt", ".notes.tmp", "block_000.safetensors", ".block_000.next"):
        (folder / name).write_text("my only copy")
    before = everything(folder)
    yield folder
    assert everything(folder) == before


BLOCK_FILES = ("block_000.safetensors", ".block_000.next", ".block_000.safetensors.PID.tmp", ".x.tmp")


@pytest.mark.parametrize(
    "name", [*OWN_NAMES, *OWN_FOLDERS, "samples/step_0000004.png", *map("blocks/{}".format, BLOCK_FILES)]
)
def test_a_link_in_a_run_directory_is_refused_before_anything_is_written(name, half, outside, tmp_path):
    """Whatever name of ours it has, and whether it leads to a file that is there, to a folder, or to nothing yet."""
    for target in (outside / "thesis.txt", outside, outside / "new"):
        run = Path(shutil.copytree(half, tmp_path / f"{target.name}-run"))
        place = run / name.replace("PID", str(os.getpid()))
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(target)
        before = everything(run)
        with pytest.raises(RunError) as caught, locked(run, print):
            pass
        assert f"holds a link where training writes: {place}. Through them files outside would be" in str(caught.value)
        assert everything(run) == before


def test_a_temporary_name_that_is_a_link_is_removed_and_not_what_it_leads_to(half, outside, tmp_path):
    """Names that are on their way are not ours for long; the run goes on beside them."""
    run = Path(shutil.copytree(half, tmp_path / "run"))
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "plan.json", "quality.jsonl"):
        (run / f".{name}.{os.getpid()}.tmp").symlink_to(outside / "thesis.txt")
    edgeblocks.resume(run)
    assert not list(run.glob(".*.tmp"))


def test_a_resumed_run_with_links_is_refused_as_a_whole(half, outside, tmp_path):
    """As it could be downloaded: its lock, its samples and its quality lead outside."""
    run = Path(shutil.copytree(half, tmp_path / "run"))
    for name in ("lock", "samples", "quality.jsonl"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside if name == "samples" else outside / "thesis.txt")
    with pytest.raises(RunError, match="holds 3 links where training writes"):
        edgeblocks.resume(run)


def test_a_link_to_the_run_directory_itself_is_the_users(half, tmp_path):
    """The folder that is named may be a link: what is in it counts."""
    run = Path(shutil.copytree(half, tmp_path / "run"))
    (tmp_path / "link").symlink_to(run)
    refused = pytest.raises(RunError, match=f"by process {os.getpid()} on")
    with locked(tmp_path / "link", print), refused, locked(run, print):
        pass


def test_a_work_directory_that_is_a_link_is_refused(half, outside, tmp_path):
    """The folder of this run in a work directory, and what is in it."""
    run = Path(shutil.copytree(half, tmp_path / "run"))
    (tmp_path / "work").mkdir()
    shutil.rmtree(run / "blocks")
    away = edgeblocks.load(run).directory.changed({"work_dir": str(tmp_path / "work")}).away_folder
    away.symlink_to(outside)
    with pytest.raises(RunError, match=f"holds a link where training writes: {away}"):
        edgeblocks.resume(run, work_dir=str(tmp_path / "work"))
