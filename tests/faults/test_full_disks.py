"""Disks without room: the file is named, what was saved stays whole, and with room again the run goes on."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
from support.child_processes import in_child
from support.faulty_runs import (
    assert_goes_on,
    assert_sound,
    lay_out_elsewhere,
    lay_out_under_limit,
    limit_files,
    refused,
    resume,
    saved_steps,
    small_disk,
)
from support.watched_run import BLOCKS

pytestmark = pytest.mark.slow


FULL = {
    "metrics": (
        "training",
        lambda run: (run / "metrics.jsonl").stat().st_size + 200,
        r"cannot write metrics: {}/m.*l: ",
    ),
    "a block": (
        "training",
        lambda run: 200_000,
        r"cannot write block \d \(36\d KB\): {}/blocks/block_00\d.safeten\S*: ",
    ),
    "the summary": ("evaluating", lambda run: 1000, r"cannot write: {}/summary.json: "),
    "the former metrics": ("start", lambda run: 1000, r"cannot write: {}/metrics.jsonl: "),
}


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_is_full_when_a_file_is_written_ends_the_run_cleanly(half, campaign, cache, what):
    """The file and the free space are named; what was saved stays whole; with room again, --resume ends as ever."""
    when, limit, message = FULL[what]
    text = refused("StorageError", resume, half, cache, None, when, limit_files, (limit(half),))
    assert re.match(message.format(re.escape(str(half))), text), text
    assert re.search(r"File too large; [\d.]+ GB are free there. .*make room .*then go on with --resume$", text), text
    assert_sound(half)
    assert_goes_on(half, campaign)


LAYING_OUT = {
    "config.yaml": ("files", 500, r"cannot write: {}/config.yaml: File too large"),
    "plan.json": ("files", 1500, r"cannot write: {}/plan.json: File too large"),
    "a new block": (
        "blocks",
        100_000,
        r"cannot write block 0 \(36\d KB\): {}/blocks/block_000.safetensors: File too large",
    ),
    "manifest.json": ("manifest", 200, r"cannot write: {}/manifest.json: File too large"),
}


@pytest.mark.parametrize("what", LAYING_OUT)
def test_a_disk_that_is_full_when_a_run_is_created_leaves_no_half_valid_run(campaign, cache, tmp_path, what):
    """The file is named, the directory is no run yet, and training can start again in the same directory."""
    fails_at, limit, message = LAYING_OUT[what]
    run = tmp_path / "run"
    text = refused("StorageError", lay_out_under_limit, run, campaign.sealed_copy, cache, fails_at, limit)
    assert re.match(message.format(re.escape(str(run))), text), text
    assert_sound(run, steps=())
    assert "no manifest.json" in refused("RunError", resume, run, cache)
    in_child(lay_out_elsewhere, run, campaign.sealed_copy, cache, {})
    assert_goes_on(run, campaign)


def test_a_full_disk_under_the_image_cache_is_named_before_training(half, campaign, tmp_path):
    """The cache's folder is in the message, nothing half-built stays, and with room again the run goes on."""
    cache = tmp_path / "cache"
    text = refused("StorageError", resume, half, cache, None, "start", limit_files, (2000,))
    assert f"the image cache cannot be written in {cache}: File too large; it needs" in text
    assert "keep the cache on another disk" in text
    assert list(cache.iterdir()) == []
    assert_sound(half)
    assert_goes_on(half, campaign)


def test_a_full_disk_when_blocks_come_home_leaves_them_in_the_work_directory(half_away, campaign, cache):
    """The finished blocks stay where they are, the message says where, and with room again they are brought home."""
    run, work_dir = half_away
    text = refused("StorageError", resume, run, cache, None, "evaluating", limit_files, (100_000,))
    (away,) = work_dir.iterdir()
    assert text.startswith(f"cannot move the blocks from {away}, where they stay,: {run / 'blocks'}: "), text
    assert "File too large" in text
    assert saved_steps(away) == [36] * BLOCKS
    assert_sound(run, work_dir)
    assert_goes_on(run, campaign)
    assert list(work_dir.iterdir()) == []


def test_a_run_on_a_disk_without_a_free_byte_goes_on_when_there_are_some(half_trained, campaign, cache, tmp_path):
    """ENOSPC in the middle of a block's write: the file system keeps the former block, and the rest is as ever."""
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        run = Path(shutil.copytree(half_trained, disk / "run"))
        filler = disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while shutil.disk_usage(disk).free > 200_000:
                file.write(bytes(4096))
                file.flush()
        text = refused("StorageError", resume, run, cache)
        assert re.match(
            rf"cannot write block 2 \(36\d KB\): {run}/blocks/block_002.safetensors: No space left", text
        ), text
        assert "KB are free there" in text
        assert_sound(run)
        filler.unlink()
        assert_goes_on(run, campaign)


def test_a_picture_without_room_ends_the_run_between_visits(half, campaign, cache):
    """Nothing trained is lost when a grid of samples cannot be written, and it is made when there is room again."""
    with small_disk(half / "samples", "size=8k") as samples:
        filler = samples / "filler"
        filler.write_bytes(bytes(8192))
        text = refused("StorageError", resume, half, cache)
        assert f"cannot write the picture {samples}/step_0000018.png: No space left on device; free some space" in text
        filler.unlink()
        assert_sound(half, steps=[18, 18, 18, 18])
    assert_goes_on(half, campaign)
