"""Blocks on the nodes of a Ray cluster: the bits of one machine, whatever is lost on the way."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import TINY, assert_refused, invoke
from support.equality import assert_same_bits

import edgeblocks
from edgeblocks.children import python_module
from edgeblocks.errors import EdgeblocksError, InterruptedRunError

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"data": "digits", "depth": 2, "width": 16, "heads": 2, "batch": 8, "blocks": 2, "steps": 120, "shared": 0}
WANTED |= {"mem_budget": "4GB", "sample_grids": 0, "hold_out": 0.005, "visit_steps": 20, "tier": "ram"}


class OnAdvance:
    """A listener that calls a function once, when so many steps of all blocks are at home."""

    def __init__(self, steps=None, function=lambda: None):
        self._steps, self._function, self.notes = steps, function, []

    def blocks(self, rows, left_s):
        self.rows = rows
        if self._steps is not None and sum(row.saved for row in rows) >= self._steps:
            self._steps = None
            self._function()

    def note(self, text):
        self.notes.append(text)

    def stage(self, text): ...
    def advance(self, done, total, text): ...
    def planned(self, plan_text, out): ...
    def step(self, progress): ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return edgeblocks.train(out=tmp_path_factory.mktemp("one") / "run", **WANTED)


@pytest.fixture(scope="module")
def nodes():
    """A head that has no room for a block, and two nodes with room for one each; the second one has less memory."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        noticing = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": noticing}
        )
        cluster.first, cluster.second = (cluster.add_node(num_cpus=1, memory=size * 10**9) for size in (5, 2))
        yield cluster
        cluster.shutdown()


@pytest.mark.slow
def test_data_that_a_node_does_not_have_are_sent_to_it(nodes, tmp_path, monkeypatch):
    """Once, for the workers of a machine; the bits are those of one machine, and nothing is left there.

    What blocks begin as is trained by the head first.
    """
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/b").mkdir()
    random = np.random.default_rng(0)
    for number in range(24):
        pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{'ab'[number % 2]}/{number}.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edgeblocks.py").write_text("raise SystemExit('not this one')")  # which workers would find first
    # A path that leads elsewhere in another process: nodes are started in a folder of Ray's.
    wanted = {**WANTED, "data": "/proc/self/cwd/photos", "image_size": 8, "hold_out": 0.2, "steps": 40, "shared": 0.5}
    heard, before = OnAdvance(), set(Path(tempfile.gettempdir()).glob("edgeblocks-data-*"))
    run = edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, listener=heard, **wanted)
    assert_same_bits(edgeblocks.train(out=tmp_path / "one", **wanted).path, run.path, blocks=2)
    assert sum("sending the data" in note for note in heard.notes) == 1, heard.notes
    assert set(Path(tempfile.gettempdir()).glob("edgeblocks-data-*")) == before


@pytest.mark.slow
def test_a_head_that_is_killed_loses_a_visit_at_most(whole, nodes, tmp_path):
    """The run is sound, and goes on with the cluster to the same bits; nodes keep nothing of it."""
    out, before = tmp_path / "run", set(Path(tempfile.gettempdir()).glob("edgeblocks-worker-*"))
    settings = [f"{name}={value}" for name, value in WANTED.items() if name not in ("blocks", "steps", "mem_budget")]
    flags = [word for setting in settings for word in ("--set", setting)]
    command = ["train", "--blocks", "2", "--steps", "120", "--mem-budget", "4GB", *flags, "--out", str(out)]
    command += ["--cluster", nodes.address]
    head = subprocess.Popen(python_module("edgeblocks.cli", *command), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (out / "manifest.json").exists() or sum(edgeblocks.load(out).left.values()) == 2 * 120:
        assert head.poll() is None and time.monotonic() < until, head.communicate()
        time.sleep(0.1)
    head.kill()
    head.communicate()
    assert 0 < sum(edgeblocks.load(out).left.values()) < 2 * 120
    assert_same_bits(whole.path, edgeblocks.resume(out, cluster=nodes.address).path, blocks=2)
    assert set(Path(tempfile.gettempdir()).glob("edgeblocks-worker-*")) <= before


@pytest.fixture
def bare_node(nodes, tmp_path, monkeypatch):
    """A third node, with the most memory. Its Python has Ray and all else that is installed here, but no edgeblocks."""
    venv.create(tmp_path / "bare", symlinks=True)
    (site,) = (tmp_path / "bare/lib").glob("python*/site-packages")
    for path in (path for folder in map(Path, sys.path) if folder.name == "site-packages" for path in folder.iterdir()):
        if "edgeblocks" not in path.name and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))  # with which Ray starts a node's processes
        node = nodes.add_node(num_cpus=1, memory=7 * 10**9)
    yield node
    nodes.remove_node(node)


@pytest.mark.slow
def test_a_node_without_the_package_is_told(nodes, bare_node, tmp_path):
    """With what to do, before anything is trained."""
    with pytest.raises(EdgeblocksError, match=r"has no edgeblocks, .* pip install 'edgeblocks\[cluster\]==.* on every"):
        edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, **{**WANTED, "mem_budget": "6GB"})
    assert edgeblocks.load(tmp_path / "run").left == {0: 120, 1: 120}


@pytest.mark.thorough  # ways that are alike are tested by hand-made copies, in runs_end_to_end
def test_stopped_on_a_cluster_a_run_goes_on_without_it(whole, nodes, tmp_path):
    """Ctrl-C: nodes save, what they made comes home, and the run is finished here."""
    heard = OnAdvance(20, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT; saved at steps"):
        edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, workers=1, listener=heard, **WANTED)
    left = edgeblocks.load(tmp_path / "run").left
    assert sum(left.values()) <= 2 * 120 - 20
    assert_same_bits(whole.path, edgeblocks.resume(tmp_path / "run").path, blocks=2)


class Hides(edgeblocks.Callback):
    """Moves a file when a training is about to begin: the driver has read it, nodes do not find it."""

    def __init__(self, path):
        self._path = path

    def planned(self, event):
        self._path.rename(self._path.with_suffix(".hidden"))


@pytest.mark.thorough
def test_data_that_a_node_does_not_find_end_the_training_with_its_words(nodes, tmp_path):
    """They are looked for before any step is made; the run stays as it was."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    wanted = {**WANTED, "data": str(tmp_path / "a.npz"), "hold_out": 0.1}
    with pytest.raises(EdgeblocksError, match=r"(?s)block \d on .*: its training ended with 2: .*a.npz"):
        edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, callbacks=[Hides(tmp_path / "a.npz")], **wanted)
    assert edgeblocks.load(tmp_path / "run").left == {0: 120, 1: 120}


class IsAnotherVersion(edgeblocks.Callback):
    """From when a training is about to begin this machine's package says that it is 9.9; those of the nodes do not."""

    def __init__(self, folder, patch):
        self._folder, self._patch = folder, patch
        (folder / "edgeblocks-9.9.dist-info").mkdir(parents=True)
        told = "Metadata-Version: 2.1\nName: edgeblocks\nVersion: 9.9\n"
        (folder / "edgeblocks-9.9.dist-info/METADATA").write_text(told)

    def planned(self, event):
        self._patch.syspath_prepend(self._folder)


@pytest.mark.slow
def test_a_node_with_another_version_is_told(nodes, tmp_path, monkeypatch):
    """Before anything is trained."""
    callbacks = [IsAnotherVersion(tmp_path / "site", monkeypatch)]
    with pytest.raises(EdgeblocksError, match=r"has edgeblocks .*, and this machine 9.9, whose numbers may differ"):
        edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, callbacks=callbacks, **WANTED)
    assert edgeblocks.load(tmp_path / "run").left == {0: 120, 1: 120}


@pytest.mark.slow
def test_a_cluster_gives_the_bits_of_one_machine_even_when_a_node_is_lost(whole, nodes, tmp_path):
    """A node is taken away in the middle of a visit; its block is placed again and goes on from what came home.

    One of the two nodes has less memory than the budget: it trains under what it has.
    """
    heard = OnAdvance(60, lambda: nodes.remove_node(nodes.first, allow_graceful=False))
    run = edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, listener=heard, **WANTED)
    assert_same_bits(whole.path, run.path, blocks=2)
    assert run.summary["metrics"] == whole.summary["metrics"]
    assert sum("is lost" in note for note in heard.notes) >= 1, heard.notes
    assert sum(note.endswith("under 2 GB") for note in heard.notes) >= 1, heard.notes
    assert sum("planned again for 2 GB" in note for note in heard.notes) >= 1, heard.notes
    assert {span["last_step"] for span in run.summary["trained_on"]} == {120}
    assert [(row.where, row.step, row.saved) for row in heard.rows] == [("done", 120, 120)] * 2
    assert sum(note.startswith("the cluster took ") for note in heard.notes) == 1, heard.notes
    assert not list(run.path.rglob("*.tmp")) and not (run.path / "blocks.arriving").exists()


def test_what_no_cluster_can_do_is_refused(tmp_path):
    """Stages that depend on each other, a cluster that is not there, workers without one; nothing is begun."""
    small = [*TINY, "--mem-budget", "4GB", "--out", tmp_path / "new"]
    for method in ("exact", "greedy"):
        refused = invoke("train", *small, "--method", method, "--cluster", "auto")
        assert_refused(refused, 2, f"--cluster: with --method {method} .* train with --method diffusion")
    nobody = invoke("train", *small, "--cluster", "127.0.0.1:1")
    assert_refused(nobody, 2, r"nobody answers there \(Connection refused\); start a cluster with `ray start --head`")
    assert_refused(invoke("train", *small, "--workers", "2"), 2, "that a --cluster trains")
    assert not (tmp_path / "new").exists()


def test_without_a_cluster_nothing_of_ray_is_imported_and_no_port_is_opened(tmp_path):
    """By a training in a process of its own, looked at while it makes its steps."""
    code = f"""
import sys, psutil, edgeblocks
class Looks(edgeblocks.Callback):
    def step(self, event):
        print([name for name in sys.modules if name.split(".")[0] == "ray"], psutil.Process().net_connections("inet"))
edgeblocks.train(out={str(tmp_path / "run")!r}, callbacks=[Looks()], **{ {**WANTED, "steps": 1} })
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[] []\n" * 2
