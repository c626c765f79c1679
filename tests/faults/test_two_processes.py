"""Two processes on one run: only one trains it."""

import os
import shutil
import signal

import pytest
from support.child_processes import fork_server, in_child
from support.faulty_runs import (
    HALF,
    assert_goes_on,
    assert_sound,
    hold_lock,
    lay_out_elsewhere,
    refused,
    resume,
    stopped_at_step,
)
from support.watched_run import BLOCKS

pytestmark = pytest.mark.slow


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(half, campaign, cache):
    """The refusal names the process that trains; after its kill -9 the next resume goes on at once."""
    holder = stopped_at_step(half, cache, 70)
    try:
        text = refused("RunError", resume, half, cache)
        assert text.startswith(f"{half} is being trained by process {holder.pid} on "), text
        assert "wait until it ends, or stop it (Ctrl-C saves), then start again" in text
        text = refused("RunError", resume, half, cache, {"reinit_blocks": [0], "max_disk_writes": "1kB"})
        assert "is being trained by" in text
    finally:
        holder.kill()
        holder.join()
    assert_sound(half)
    assert_goes_on(half, campaign)


def test_a_run_that_is_being_created_is_locked_too(tmp_path):
    """Before the manifest exists a second `train --out` is refused; the lock's file alone is no lock."""
    receiving, sending = fork_server().Pipe(duplex=False)
    holder = fork_server().Process(target=hold_lock, args=(tmp_path / "run", sending))
    holder.start()
    pid = receiving.recv()
    try:
        text = refused("RunError", hold_lock, tmp_path / "run", sending)
        assert f"is being trained by process {pid} on" in text
    finally:
        holder.kill()
        holder.join()
    assert (tmp_path / "run/lock").exists()
    next_holder = fork_server().Process(target=hold_lock, args=(tmp_path / "run", sending))
    next_holder.start()
    assert receiving.poll(30)
    next_holder.kill()
    next_holder.join()


def test_a_run_that_was_made_anew_is_not_written_by_the_process_of_the_old_one(half, campaign, cache):
    """Deleted while it is trained and trained again in the same place: the lock went too, yet the blocks are safe."""
    holder = stopped_at_step(half, cache, sum(HALF) + 2)  # before it has written anything
    try:
        shutil.rmtree(half)
        in_child(lay_out_elsewhere, half, campaign.sealed_copy, cache, {})
        os.kill(holder.pid, signal.SIGCONT)
        holder.join(60)
        assert holder.exitcode == 1
    finally:
        holder.kill()
        holder.join()
    assert_sound(half, steps=[0] * BLOCKS)
    assert_goes_on(half, campaign)
