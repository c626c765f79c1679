"""Whatever ends a run, and whenever: it goes on, and ends with the bits of a run that nobody disturbed."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support.child_processes import ChildError, in_child
from support.killing import Campaign, Moment
from support.watched_run import (
    CACHING,
    CREATING,
    EVALUATING,
    FINISHING,
    PLANNING,
    SAMPLING,
    STARTING,
    VISITING,
    WRITING,
    read_block,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks its processes and looks into /proc"),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A reference run, and one like it that is valid and not trained yet."""
    return Campaign(tmp_path_factory.mktemp("kills"), seed=0)


@pytest.fixture
def valid_run(campaign, tmp_path):
    """A run that can be resumed, at step 0."""
    return Path(shutil.copytree(campaign.sealed_copy, tmp_path / "run"))


def saved_steps(run):
    return [read_block(path)[2] for path in sorted((run / "blocks").glob("*.safetensors"))]


def lengthen(run, steps):
    """Let the run have so many steps that it does not end while it is watched."""
    text = (run / "config.yaml").read_text().partition("#")[0]  # without its checksum
    (run / "config.yaml").write_text(re.sub(r"(?m)^steps: \d+$", f"steps: {steps}", text))


def no_orphan_in(campaign, seconds):
    """Wait until nothing that a killed process started is running."""
    deadline = time.monotonic() + seconds
    while campaign.orphans() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not campaign.orphans()


MOMENTS = {
    1: (
        *((CACHING, 0), (STARTING, 0.03), (VISITING, 0.1), (WRITING, 0), (WRITING, 0.003), (SAMPLING, 0.01)),
        *((EVALUATING, 0.01), (FINISHING, 0)),
    ),
    2: (
        *((CACHING, 0.002), (PLANNING, 1), (CREATING, 0), (VISITING, 0.2), (WRITING, 0.001), (SAMPLING, 0)),
        *((EVALUATING, 0), (FINISHING, 0.002), (FINISHING, 0.004)),
    ),
}


@pytest.mark.parametrize("kind", MOMENTS, ids={1: "one block in memory", 2: "with a work directory"}.get)
def test_a_run_killed_in_every_phase_ends_with_the_bits_of_one_that_was_not(campaign, kind):
    """kill -9 while a cache is built, planned, created, trained, written, sampled, evaluated, brought home: --resume.

    Nothing that the killed processes left is there at the end, and the trace of costs, which outlives a process that is
    killed while planning, has ended by itself.
    """
    subject, kills = campaign.new_subject(kind), 0
    for phase, wait_s in MOMENTS[kind]:
        kills += campaign.disturb(subject, Moment(phase=phase, wait_s=wait_s), signal.SIGKILL).kind == "killed"
    assert kills >= len(MOMENTS[kind]) - 3, "a slow parent may miss a moment, but not most of them"
    assert sum(subject.steps.values()) > 0
    assert campaign.finish(subject).leftovers == 0
    assert no_orphan_in(campaign, seconds=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_asked_to_stop_saves_its_last_step_and_goes_on(campaign, number):
    """SIGTERM, Ctrl-C and SIGHUP while training, sampling and evaluating: the steps it names are in the files."""
    subject = campaign.new_subject(1)
    campaign.disturb(subject, Moment(phase=STARTING, wait_s=0.02), number)
    heard = 0
    for phase, wait_s in ((VISITING, 0.1), (VISITING, 0.03), (SAMPLING, 0.01), (EVALUATING, 0)):
        before = dict(subject.steps)
        ending = campaign.disturb(subject, Moment(phase=phase, wait_s=wait_s), number)
        if ending.kind == "finished":
            break  # what is left takes some 40 ms, which a busy machine may miss
        assert ending.kind == "interrupted"
        heard += 1
        steps = ", ".join(str(subject.steps[block]) for block in sorted(subject.steps))
        assert f"stopped by {number.name}; saved at steps {steps} of 36" in ending.message
        assert f"edgeblocks train --resume {subject.out}" in ending.message
        # No step is lost; on a busy machine none may have been made in so short a time.
        assert all(subject.steps[block] >= made for block, made in before.items())
    assert heard
    assert sum(subject.steps.values()) > 0
    campaign.finish(subject)


class Sender:
    """A listener that sends signals to its own process at given steps, and may fail to hear of one."""

    def __init__(self, signals, deaf_at=None):
        self._signals, self._deaf_at = signals, deaf_at

    def stage(self, text): ...
    def advance(self, done, total, text): ...
    def planned(self, plan_text, out): ...
    def note(self, text): ...

    def step(self, progress):
        for number in self._signals.get(progress.steps_done, ()):
            os.kill(os.getpid(), number)
        if progress.steps_done == self._deaf_at:
            raise BrokenPipeError(32, "Broken pipe")


def resume_with(run, signals, deaf_at=None, ignored=()):
    """In a child process: resume, with signals at steps."""
    from edgeblocks import api

    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    api.resume(run, listener=Sender(signals, deaf_at))


def test_a_second_ctrl_c_does_not_wait_and_loses_no_more_than_the_visit(valid_run, campaign):
    """Two Ctrl-C in one step: KeyboardInterrupt at once, the block's file is as it was before the visit."""
    with pytest.raises(ChildError) as caught:
        in_child(resume_with, valid_run, {9: (signal.SIGINT, signal.SIGINT)})
    assert caught.value.kind == "KeyboardInterrupt"
    assert saved_steps(valid_run) == [6, 0, 0, 0]


def test_a_run_under_nohup_outlives_its_terminal(valid_run, campaign):
    """A signal that was ignored when the process began stays ignored: SIGHUP under nohup, Ctrl-C behind an `&`."""
    with pytest.raises(ChildError) as caught:
        in_child(resume_with, valid_run, {2: (signal.SIGHUP,), 5: (signal.SIGTERM,)}, None, (signal.SIGHUP,))
    assert caught.value.kind == "InterruptedRunError"
    assert "stopped by SIGTERM; saved at steps 5, 0, 0, 0" in caught.value.message


def test_a_listener_whose_pipe_was_closed_costs_no_step(valid_run, campaign):
    """`edgeblocks train 2>&1 | head`, or a terminal that is gone: the run ends, and what was trained is saved."""
    with pytest.raises(ChildError) as caught:
        in_child(resume_with, valid_run, {}, 10)
    assert caught.value.kind == "BrokenPipeError"
    assert saved_steps(valid_run) == [6, 4, 0, 0]


def test_a_closed_terminal_ends_the_command_with_everything_saved(valid_run, campaign):
    """When the terminal window is closed, the kernel's SIGHUP stops the run after the step, and --resume goes on."""
    lengthen(valid_run, 2000)
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("edgeblocks")), "train", "--resume", str(valid_run)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - there is no other way to a terminal
        env={**os.environ, "EDGEBLOCKS_CACHE": str(campaign.folder / "cache")},
    )
    os.close(terminal)
    try:
        seen = b""
        while seen.count(b"loss") < 3:
            seen += os.read(main, 4096)
        os.close(main)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    steps = saved_steps(valid_run)
    last = json.loads((valid_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["step"] <= steps[last["block"]] < 2000
    with pytest.raises(ChildError, match="stopped by SIGTERM") as caught:
        in_child(resume_with, valid_run, {sum(steps) + 3: (signal.SIGTERM,)})
    assert sum(saved_steps(valid_run)) == sum(steps) + 3, caught.value


def test_a_picture_that_was_due_when_the_run_was_killed_is_made_on_resume(campaign):
    """A run that was killed after its last visit and before the picture of it has all pictures when it is finished."""
    subject = campaign.new_subject(1)
    assert campaign.disturb(subject, Moment(phase=EVALUATING, wait_s=0), signal.SIGKILL).kind == "killed"
    (subject.out / "samples/step_0000036.png").unlink()
    assert campaign.finish(subject).missing_pictures == 0
