"""Permissions and folders that go away while a run is trained."""

import re
import shutil
import subprocess

import pytest
from support.child_processes import ChildError, in_child
from support.faulty_runs import (
    HALF,
    allow_writes,
    assert_goes_on,
    assert_sound,
    refuse_writes,
    refused,
    resume,
    saved_steps,
)
from support.watched_run import BLOCKS, assert_equal_runs

pytestmark = pytest.mark.slow


@pytest.fixture
def forbidding(tmp_path):
    """Whether writes can be refused to this user here; lifted again afterwards."""
    try:
        refuse_writes(tmp_path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is the superuser, and the file system has no immutable folders (chattr +i)")
    allow_writes(tmp_path)
    yield
    for folder in (tmp_path, *tmp_path.rglob("*")):
        if folder.is_dir():
            allow_writes(folder)


FORBIDDEN = {
    "blocks": (70, r"cannot write block \d \(36\d KB\): {}/blocks/block_00\d.safetensors: "),
    "samples": (64, r"cannot write the picture {}/samples/step_0000018.png: "),
    ".": ("evaluating", r"cannot write: {}/summary.json: "),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
@pytest.mark.usefixtures("forbidding")
def test_permission_that_is_lost_while_training_ends_the_run_cleanly(half, campaign, cache, folder):
    """The file that may not be written is named, the saved state is whole, and with permission the run goes on."""
    when, message = FORBIDDEN[folder]
    text = refused("StorageError", resume, half, cache, None, when, refuse_writes, (half / folder,))
    assert re.match(message.format(re.escape(str(half))) + "(Operation not permitted|Permission denied)", text), text
    assert_sound(half)
    allow_writes(half / folder)
    assert_goes_on(half, campaign)


@pytest.mark.usefixtures("forbidding")
def test_a_run_that_may_not_be_written_is_refused_before_training(half, cache):
    """A read-only copy, with what a killed process left in it: the folder is named and nothing is trained."""
    (half / "blocks/.block_000.safetensors.1.tmp").write_bytes(b"half")
    refuse_writes(half / "blocks")
    text = refused("StorageError", resume, half, cache)
    assert re.search(r"blocks.*: (Operation not permitted|Permission denied)", text), text
    allow_writes(half / "blocks")
    assert saved_steps(half / "blocks") == HALF


def test_a_run_that_is_deleted_while_it_is_trained_ends_with_its_name(half, cache):
    """The run directory is gone: the message names what could not be written, and promises no saved state."""
    text = refused("StorageError", resume, half, cache, None, 70, shutil.rmtree, (half,))
    refused_thing = r"(write metrics|write block \d \(36\d KB\)|read block \d)"  # whichever comes first
    assert re.match(rf"cannot {refused_thing}: {half}/\S+: No such file or directory", text), text
    assert "saved state is intact" not in text
    assert "was deleted or its disk is gone; put it back from a copy, or start a new run" in text
    assert "there is no run directory" in refused("RunError", resume, half, cache)


def test_blocks_that_are_deleted_while_training_can_be_made_again(half, campaign, cache):
    """The folder of the blocks is gone: its files are named, and --reinit-block for all trains from the start."""
    with pytest.raises(ChildError) as caught:
        in_child(resume, half, cache, None, 70, shutil.rmtree, (half / "blocks",))
    path = rf"{half}/blocks/block_00\d.safetensors"
    first = rf"cannot (write block \d \(36\d KB\)|read block \d): {path}: No such file"  # whichever comes first
    before_the_folder_is_gone = rf"block \d is missing: there is no file {path}"
    assert re.match(f"{first}|{before_the_folder_is_gone}", caught.value.message), caught.value.message
    text = refused("RunError", resume, half, cache)
    assert f"block 0 is missing: there is no file {half}/blocks/block_000.safetensors" in text
    assert "--reinit-block 0" in text
    in_child(resume, half, cache, {"reinit_blocks": range(BLOCKS)})
    assert_equal_runs(half, campaign.reference)
