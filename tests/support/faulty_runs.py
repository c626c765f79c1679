"""Faults for runs: what happens to one while it is trained, and how it is looked at afterwards.

The campaign's tiny run is the subject.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.child_processes import ChildError, fork_server, in_child
from support.watched_run import Subject, assert_equal_runs, examine, read_block

HALF = [18, 18, 14, 12]
BLOCK = "blocks/block_002.safetensors"


# What runs in child processes


class Strike:
    """A listener that calls a function once: when a stage begins, or when so many steps of all blocks were made."""

    def __init__(self, when, function, arguments):
        self._when, self._function, self._arguments = when, function, arguments

    def _reached(self, what):
        if what == self._when:
            self._when = None
            self._function(*self._arguments)

    def stage(self, text):
        self._reached(text)

    def step(self, progress):
        self._reached(progress.steps_done)

    def advance(self, done, total, text): ...
    def planned(self, plan_text, out): ...
    def note(self, text): ...


def limit_files(num_bytes):
    """From now on no file of this process may grow beyond so many bytes: a full disk, as a write sees it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def send(number):
    os.kill(os.getpid(), number)


def resume(run, cache, settings=None, when=None, function=None, arguments=()):
    """Resume, with something that happens meanwhile ("start": before); returns the summary."""
    from edgeblocks import api

    os.environ["EDGEBLOCKS_CACHE"] = str(cache)
    if when == "start":
        function(*arguments)
    return api.resume(run, listener=Strike(when, function, arguments), **(settings or {})).summary


def lay_out(path, like, cache, *, fails_at=None, limit=0, **changes):
    """Create a valid run at step 0 with the plan and the settings (but `changes`) of another one: planning is left out.

    Args:
        fails_at: the part before which the size of files is limited to `limit` bytes.
    """
    from edgeblocks.runs.create import create_blocks, create_run, seal_run
    from edgeblocks.runs.opening import open_run

    os.environ["EDGEBLOCKS_CACHE"] = str(cache)
    former = open_run(like)
    plan, settings = former.plan.model_copy(update=changes.pop("plan", {})), former.settings
    data = replace(former.data, **changes.pop("data", {}))
    family = replace(settings.family, **changes.pop("family", {}))
    settings = replace(settings, run=settings.run.model_copy(update=changes), family=family)
    if fails_at == "files":
        limit_files(limit)
    sources = {"data_source": former.data_source, "data_fingerprint": former.data_fingerprint}
    run = create_run(path, settings, plan, data, **sources, class_names=former.class_names)
    if fails_at == "blocks":
        limit_files(limit)
    create_blocks(run)
    if fails_at == "manifest":
        limit_files(limit)
    seal_run(run)


def lay_out_under_limit(path, like, cache, fails_at, limit):
    lay_out(path, like, cache, fails_at=fails_at, limit=limit)


def lay_out_elsewhere(path, like, cache, changes):
    lay_out(path, like, cache, **changes)


def refuse_writes(folder):
    """Take the permission to write from this process; the superuser's too, where the file system knows how."""
    if os.geteuid() == 0:
        subprocess.run(["chattr", "+i", str(folder)], check=True)
    else:
        Path(folder).chmod(0o555)


def allow_writes(folder):
    if os.geteuid() == 0:
        subprocess.run(["chattr", "-i", str(folder)], check=False, capture_output=True)
    else:
        Path(folder).chmod(0o755)


def hold_lock(path, connection):
    """Hold a run's lock until killed."""
    from edgeblocks.runs.locks import locked

    with locked(path, print):
        connection.send(os.getpid())
        time.sleep(600)


def train(out, cache, settings, folder):
    from edgeblocks import api

    os.environ["EDGEBLOCKS_CACHE"] = str(cache)
    os.chdir(folder)
    return api.train(out=out, **settings).summary


def lay_out_resized(path, like, cache, changes):
    """`lay_out` for images of another size, which have another fingerprint."""
    from edgeblocks.data.images import open_images
    from edgeblocks.runs.create import seal_run
    from edgeblocks.runs.opening import open_run

    former = open_run(like)
    images = open_images(
        former.data_source,
        image_size=changes["image_size"],
        hold_out=former.settings.run.hold_out,
        seed=former.settings.run.seed,
        cache_dir=Path(cache),
    )
    resized = replace(former, data_fingerprint=images.fingerprint)
    sealed = Path(path).with_name("resized")
    shutil.copytree(like, sealed)
    seal_run(replace(resized, path=sealed))
    lay_out(path, sealed, cache, **changes)


# The test's side


def saved_steps(folder):
    return [read_block(path)[2] for path in sorted(folder.glob("block_*.safetensors"))]


def refused(kind, function, *arguments):
    """The message of the error that a function ends with in a child process."""
    with pytest.raises(ChildError) as caught:
        in_child(function, *arguments)
    assert caught.value.kind == kind, caught.value
    return caught.value.message


def assert_sound(run, work_dir=None, steps=HALF):
    """Every file is whole, nothing half-written lies about, and no step was lost."""
    subject = Subject(out=run, work_dir=work_dir, cache=run, settings={}, steps=dict(enumerate(steps)))
    examine(subject)
    assert not subject.remains()


def assert_goes_on(run, campaign, settings=None):
    """Resumed, the run ends with the reference's bits."""
    in_child(resume, run, campaign.folder / "cache", settings)
    assert_equal_runs(run, campaign.reference)


@contextlib.contextmanager
def small_disk(folder, options):
    """A file system of its own in the memory, where this process may mount one."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def stopped_at_step(run, cache, step):
    """A process that trains the run and is stopped (SIGSTOP) in the middle of a visit."""
    process = fork_server().Process(target=resume, args=(run, cache, None, step, send, (signal.SIGSTOP,)))
    process.start()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    return process
