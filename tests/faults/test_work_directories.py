"""Work directories: where the blocks are while a run is trained."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
from support.faulty_runs import HALF, assert_goes_on, refused, resume, saved_steps, small_disk, stopped_at_step, train

pytestmark = pytest.mark.slow


def test_blocks_are_in_the_work_directory_while_training_and_come_home(half_away, campaign, cache):
    """Half trained, all block files are in the work directory and none at home; finished, it is the other way round."""
    run, work_dir = half_away
    (away,) = work_dir.iterdir()
    assert saved_steps(away) == HALF
    assert not (run / "blocks").exists()
    assert_goes_on(run, campaign)
    assert list(work_dir.iterdir()) == []


def test_a_work_directory_that_moved_is_found_where_the_user_says(half_away, campaign, cache, tmp_path):
    """Without its disk the run says which file is missing; --work-dir names the new place; it comes home from there."""
    run, work_dir = half_away
    moved = work_dir.rename(tmp_path / "moved")
    text = refused("StorageError", resume, run, cache)
    assert f"{work_dir} does not exist" in text
    assert "--work-dir" in text
    assert_goes_on(run, campaign, {"work_dir": str(moved)})
    assert list(moved.iterdir()) == []


UNUSABLE = {
    "missing": (None, r"--work-dir {} does not exist"),
    "a file": ("file", r"--work-dir {} is not a folder"),
    "read-only": ("ro", r"--work-dir {} cannot be written"),
    "without room": ("size=1m", r"{}.* (needs \d+ kB|No space left)"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_work_directory_is_refused_before_training(campaign, cache, tmp_path, case):
    """Missing, no folder, read-only, or without room: the folder is named, and no run directory is made."""
    kind, message = UNUSABLE[case]
    work_dir = tmp_path / "work"
    with contextlib.ExitStack() as disks:
        if kind == "file":
            work_dir.write_text("")
        elif kind is not None:
            disks.enter_context(small_disk(work_dir, kind))
        settings = {**campaign.settings, "work_dir": str(work_dir)}
        text = refused("StorageError", train, tmp_path / "run", cache, settings, tmp_path)
    assert re.search(message.format(re.escape(str(work_dir))), text), text
    assert "--work-dir" in text
    assert not (tmp_path / "run").exists()


def test_copies_of_a_run_do_not_share_a_work_directory(half_away, cache, tmp_path):
    """A copied run directory names the same work directory: whoever comes second is refused, not mixed with it."""
    run, _ = half_away
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    holder = stopped_at_step(run, cache, 70)
    try:
        assert f"is being trained by process {holder.pid}" in refused("RunError", resume, copy, cache)
    finally:
        holder.kill()
        holder.join()
