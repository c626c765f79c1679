"""What goes wrong around a run: disks, permissions, folders, damaged files, a second process, other places and budgets.

Each fault ends the run with a message that names the file and the cure, the saved state is whole afterwards, and the
run goes on to the bits of the reference once the fault is mended. The campaign's tiny run is the subject.
"""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from killing import (
    BLOCKS,
    VISIT_STEPS,
    Campaign,
    ChildError,
    Subject,
    assert_equal_runs,
    examine,
    fork_server,
    in_child,
    read_block,
)
from safetensors.numpy import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits, mounts and the fork server are Linux's here"),
]
HALF = [18, 18, 14, 12]


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
    def planned(self, prepared, run): ...
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
    from edgeblocks.checkpoint import create_run, open_run, seal_run
    from edgeblocks.trainer import create_blocks

    os.environ["EDGEBLOCKS_CACHE"] = str(cache)
    former = open_run(like)
    plan, settings = {**former.plan, **changes.pop("plan", {})}, former.settings
    data = replace(former.data, **changes.pop("data", {}))
    family = replace(settings.family, **changes.pop("family", {}))
    settings = replace(settings, run=settings.run.model_copy(update=changes), family=family)
    if fails_at == "files":
        limit_files(limit)
    sources = {"data_source": former.data_source, "data_fingerprint": former.data_fingerprint}
    run = create_run(path, settings, plan, data, **sources, class_names=former.class_names)
    if fails_at == "blocks":
        limit_files(limit)
    create_blocks(run.family(), run.store(), run.layers, settings.run.seed)
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
    from edgeblocks.checkpoint import locked

    with locked(path, print):
        connection.send(os.getpid())
        time.sleep(600)


def train(out, cache, settings, folder):
    from edgeblocks import api

    os.environ["EDGEBLOCKS_CACHE"] = str(cache)
    os.chdir(folder)
    return api.train(out=out, **settings).summary


# Fixtures


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.fixture(scope="module")
def cache(campaign):
    """The decoded images."""
    return campaign.folder / "cache"


@pytest.fixture(scope="module")
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


# Full disks

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


# Permissions and folders that go away


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
    text = refused("StorageError", resume, half, cache, None, 70, shutil.rmtree, (half / "blocks",))
    refused_thing = r"(write block \d \(36\d KB\)|read block \d)"  # whichever comes first
    assert re.match(rf"cannot {refused_thing}: {half}/blocks/block_00\d.safetensors: No such file", text), text
    text = refused("RunError", resume, half, cache)
    assert f"block 0 is missing: there is no file {half}/blocks/block_000.safetensors" in text
    assert "--reinit-block 0" in text
    in_child(resume, half, cache, {"reinit_blocks": range(BLOCKS)})
    assert_equal_runs(half, campaign.reference)


# Damaged files


def rewrite(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content)))


def flipped(content, place):
    content[int(place * len(content))] ^= 16
    return content


def older(path):
    """A block file as an older version wrote it."""
    rewrite(path, lambda content: content.replace(b'"format_version":"1"', b'"format_version":"0"'))


BLOCK = "blocks/block_002.safetensors"
DAMAGES = {
    "flipped weight": (
        lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.1)),
        r"block 2 is damaged: the weights",
    ),
    "flipped EMA": (lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.6)), r"block 2 is damaged: the ema in"),
    "flipped state": (
        lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.9)),
        r"block 2 is damaged: the optimizer",
    ),
    "flipped header": (
        lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.002)),
        r"block 2 is damaged: .*header",
    ),
    "truncated": (lambda run, _: os.truncate(run / BLOCK, 200_000), r"block 2 is damaged: .* 200000 bytes .*cut short"),
    "empty": (lambda run, _: os.truncate(run / BLOCK, 0), r"block 2 is damaged: .*cut short \(0 bytes\)"),
    "missing": (lambda run, _: (run / BLOCK).unlink(), r"block 2 is missing: there is no file"),
    "of another block": (
        lambda run, _: shutil.copy(run / "blocks/block_001.safetensors", run / BLOCK),
        r"is block 1 of run .*, but block 2 of run .* belongs here",
    ),
    "of another run": (
        lambda run, other: shutil.copy(other / BLOCK, run / BLOCK),
        r"is block 2 of run (?!REST)\w{8}, but block 2 of run \w{8} belongs here",
    ),
    "of an older version": (
        lambda run, _: older(run / BLOCK),
        r"block format version 0; this edgeblocks reads version 1. Use the edgeblocks that wrote it",
    ),
}


@pytest.fixture(scope="module")
def other_run(campaign, cache):
    """A run like the campaign's, with another identity."""
    run = campaign.folder / "other"
    in_child(lay_out_elsewhere, run, campaign.sealed_copy, cache, {})
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_named_before_use_and_trained_again_alone(half, other_run, campaign, cache, damage):
    """The message names block and file; the others lose no step; --reinit-block 2 gives the reference's bits."""
    inflict, message = DAMAGES[damage]
    inflict(half, other_run)
    text = refused("RunError", resume, half, cache)
    assert re.search(message, text), text
    assert str(half / BLOCK) in text
    for block in (0, 1, 3):
        assert read_block(half / f"blocks/block_{block:03d}.safetensors")[2] >= HALF[block]
    in_child(resume, half, cache, {"reinit_blocks": [2]})
    assert_equal_runs(half, campaign.reference)


def test_only_the_named_block_of_a_finished_run_is_trained_again(campaign, cache, tmp_path):
    """--reinit-block 3 on a finished run: the files of the other blocks are not even written, the bits come back."""
    run = Path(shutil.copytree(campaign.reference, tmp_path / "run"))
    (run / "blocks/block_003.safetensors").unlink()
    before = {path: path.stat().st_ino for path in (run / "blocks").glob("*")}
    in_child(resume, run, cache, {"reinit_blocks": [3]})
    assert {path: path.stat().st_ino for path in before} == before
    assert_equal_runs(run, campaign.reference)


def test_a_wrong_block_number_is_refused(half, cache):
    """--reinit-block 4 where there are blocks 0 to 3."""
    text = refused("ConfigError", resume, half, cache, {"reinit_blocks": [4]})
    assert text == f"--reinit-block 4: {half} has the blocks 0 to 3"
    assert saved_steps(half / "blocks") == HALF


SMALL_FILES = {
    "config.yaml flipped": ("config.yaml", lambda c: c.replace(b"seed: 0", b"seed: 1"), r"config.yaml .*checksum"),
    "plan.json flipped": (
        "plan.json",
        lambda c: c.replace(b'"visit_steps": 6', b'"visit_steps": 7'),
        r"plan.json .*checksum",
    ),
    "manifest.json flipped": (
        "manifest.json",
        lambda c: c.replace(b'"mean": 0.', b'"mean": 0.1'),
        r"manifest.json .*checksum",
    ),
    "config.yaml cut": ("config.yaml", lambda c: c[:100], r"is damaged"),
    "plan.json cut": ("plan.json", lambda c: c[:100], r"plan.json is damaged"),
    "manifest.json cut": ("manifest.json", lambda c: c[:100], r"manifest.json is damaged"),
    "config.yaml missing": ("config.yaml", None, r"config.yaml.*No such file"),
    "plan.json missing": ("plan.json", None, r"plan.json.*No such file"),
    "manifest.json missing": ("manifest.json", None, r"no manifest.json"),
    "manifest.json of an older version": (
        "manifest.json",
        lambda c: re.sub(rb',\s+"sha256": "\w+"', b"", c).replace(b'"format_version": 1', b'"format_version": 0'),
        r"has run format version 0; this edgeblocks .* reads version 1. Use the edgeblocks that wrote it",
    ),
}


@pytest.mark.parametrize("damage", SMALL_FILES)
def test_a_damaged_description_is_named_before_use(half, cache, damage):
    """config.yaml, plan.json, manifest.json: the file is named, with the way to mend it, and no block is touched."""
    name, change, message = SMALL_FILES[damage]
    before = {path: path.read_bytes() for path in (half / "blocks").iterdir()}
    if change is None:
        (half / name).unlink()
    else:
        content = bytearray((half / name).read_bytes())
        changed = change(content)
        assert changed != content
        (half / name).write_bytes(bytes(changed))
    text = refused("RunError", resume, half, cache)
    assert re.search(message, text), text
    assert "version" in damage or "from a copy" in text, text
    assert {path: path.read_bytes() for path in (half / "blocks").iterdir()} == before


def test_a_run_that_lost_its_manifest_is_not_trained_over(half, campaign, cache, tmp_path):
    """`train --out` into a run whose manifest.json is gone: refused, because its blocks are trained."""
    manifest = (half / "manifest.json").rename(tmp_path / "manifest.json")
    text = refused("ConfigError", train, half, cache, campaign.settings, tmp_path)
    assert str(half) in text
    assert "manifest.json" in text
    assert_sound(half)
    manifest.rename(half / "manifest.json")
    assert_goes_on(half, campaign)


def test_records_that_were_cut_are_passed_over(half, cache):
    """Half a line at the end of metrics.jsonl, as a power cut leaves it, does not stop a run."""
    path = half / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    in_child(resume, half, cache)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(record["block"], record["step"]) for record in records}) == len(records) == 36 * BLOCKS - 1


# Two processes


def stopped_at_step(run, cache, step):
    """A process that trains the run and is stopped (SIGSTOP) in the middle of a visit."""
    process = fork_server().Process(target=resume, args=(run, cache, None, step, send, (signal.SIGSTOP,)))
    process.start()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    return process


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


# Other places and other budgets


@pytest.mark.parametrize("budget", ["3GB", "1GB"])
def test_a_moved_run_under_another_budget_gives_the_same_bits(half, campaign, tmp_path, budget):
    """In another folder, with its data and its cache elsewhere, planned again with the same micro-batch."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = Path(shutil.move(half, elsewhere / "moved"))
    data = shutil.copy(campaign.folder / "images.npz", elsewhere / "same.npz")
    in_child(resume, run, elsewhere / "cache", {"mem_budget": budget, "data": str(data)})
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["budget_bytes"], plan["micro_batch"]) == (int(budget[0]) * 10**9, 8)
    assert_equal_runs(run, campaign.reference)


def test_a_copy_under_the_smallest_budget_gives_the_same_weights_up_to_rounding(campaign, cache, tmp_path):
    """Too small a budget is refused with one that works, under which micro-batches shrink: only sums are reordered."""
    shape = {"micro_batch": 64, "checkpointing": False, "step_bytes": 300_000_000}
    changes = {
        "batch": 64,
        "steps": 4,
        "image_size": 28,
        "sample_grids": 0,
        "micro_batch": "auto",
        "checkpointing": "auto",
        "optimizer": "adamw",
        "family": {"depth": 2, "width": 64},
        "data": {"height": 28, "width": 28},
        "plan": {"layers_per_block": [1, 1], "blocks": 2, "micro_batch": 64, "shapes": [shape], "visit_steps": 4},
    }
    whole = tmp_path / "whole"
    in_child(lay_out_resized, whole, campaign.sealed_copy, cache, changes)
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    in_child(resume, whole, cache)
    config = (copy / "config.yaml").read_bytes()
    text = refused("DoesNotFitError", resume, copy, cache, {"mem_budget": "20MB"})
    assert "the run has 2 blocks, which were fixed when it was created, and they do not fit 20 MB here" in text
    assert (copy / "config.yaml").read_bytes() == config
    named = re.search(r"go on with --mem-budget (\d+MB) or more", text)
    in_child(resume, copy, cache, {"mem_budget": named[1]})
    assert json.loads((copy / "plan.json").read_text())["micro_batch"] < 64
    for name in ("block_000.safetensors", "block_001.safetensors"):
        one, two = load_file(whole / "blocks" / name), load_file(copy / "blocks" / name)
        for key in one:
            if key.startswith("weights."):
                np.testing.assert_allclose(one[key], two[key], rtol=0, atol=2e-4, err_msg=key)


def lay_out_resized(path, like, cache, changes):
    """`lay_out` for images of another size, which have another fingerprint."""
    from edgeblocks import checkpoint
    from edgeblocks.data.images import open_images

    former = checkpoint.open_run(like)
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
    checkpoint.seal_run(replace(resized, path=sealed))
    lay_out(path, sealed, cache, **changes)


REFUSED_CHANGES = {
    "other data": (
        {"data": "digits"},
        "RunError",
        r"the data of .* have changed: digits is not what the run was trained",
    ),
    "no such data": ({"data": "no/such.npz"}, "DataError", r"no/such.npz' does not exist"),
    "no such work directory": ({"work_dir": "no/such/disk"}, "StorageError", r"no/such/disk does not exist"),
    "another work directory": ({"work_dir": "."}, "RunError", r"block 0 is missing: there is no file .*edgeblocks-"),
}


@pytest.mark.parametrize("change", REFUSED_CHANGES)
def test_a_refused_change_is_not_kept(half_away, campaign, cache, change):
    """A mistyped --data or --work-dir on resume: refused, and the next resume without it goes on as before."""
    run, _ = half_away
    settings, kind, message = REFUSED_CHANGES[change]
    config = (run / "config.yaml").read_bytes()
    assert re.search(message, refused(kind, resume, run, cache, settings))
    assert (run / "config.yaml").read_bytes() == config
    assert_goes_on(run, campaign)


def test_a_run_knows_its_data_and_its_work_directory_from_everywhere(campaign, cache, tmp_path):
    """Trained with relative paths, a run is resumed from another working directory."""
    shutil.copy(campaign.folder / "images.npz", tmp_path / "images.npz")
    (tmp_path / "work").mkdir()
    settings = {**campaign.settings, "data": "images.npz", "work_dir": "work", "max_disk_writes": "3MB"}
    assert "Everything is saved" in refused("WriteLimitError", train, tmp_path / "run", cache, settings, tmp_path)
    assert_goes_on(tmp_path / "run", campaign, {"max_disk_writes": "1GB"})


# Limits of writes, and work directories


def test_a_limit_of_writes_ends_the_run_before_it_is_passed(half, campaign, cache):
    """The run ends, saved, with no more written than allowed; with a larger limit it goes on to the same bits."""
    path = half / BLOCK
    file_bytes = path.stat().st_size
    allowed = 23 * (file_bytes - 2000)  # 23 files without their headers, which have 4 KB
    text = refused("WriteLimitError", resume, half, cache, {"max_disk_writes": str(allowed)})
    assert re.search(rf"the next visit would pass --max-disk-writes {allowed}. Everything is saved", text), text
    assert re.search(rf"edgeblocks train --resume {half} --max-disk-writes \dGB$", text), text
    assert_sound(half)
    steps = saved_steps(half / "blocks")
    assert sum(steps) > sum(HALF)
    visits = sum(math.ceil(step / VISIT_STEPS) for step in steps) + (steps[2] > 14)  # block 2 was stopped at step 14
    assert (BLOCKS + visits) * file_bytes <= allowed < (BLOCKS + visits + 2) * file_bytes
    assert "the next visit would pass" in refused("WriteLimitError", resume, half, cache)
    assert_goes_on(half, campaign, {"max_disk_writes": "1GB"})


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
