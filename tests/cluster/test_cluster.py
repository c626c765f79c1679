"""Blocks on the nodes of a Ray cluster: the bits of one machine, whatever is lost on the way."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import TINY, assert_refused, invoke
from support.equality import assert_same_bits

import edgeblocks
from edgeblocks.errors import EdgeblocksError, InterruptedRunError

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"data": "digits", "depth": 2, "width": 16, "heads": 2, "batch": 8, "blocks": 2, "steps": 160, "shared": 0}
WANTED |= {"mem_budget": "4GB", "sample_grids": 0, "hold_out": 0.005, "visit_steps": 20, "tier": "ram"}


class OnAdvance:
    """A listener that calls a function once, when so many steps of all blocks are at home."""

    def __init__(self, steps=None, function=lambda: None):
        self._steps, self._function, self.notes = steps, function, []

    def advance(self, done, total, text):
        if text == "steps of all blocks" and self._steps is not None and done >= self._steps:
            self._steps = None
            self._function()

    def note(self, text):
        self.notes.append(text)

    def stage(self, text): ...
    def planned(self, plan_text, out): ...
    def step(self, progress): ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return edgeblocks.train(out=tmp_path_factory.mktemp("one") / "run", **WANTED)


@pytest.fixture(scope="module")
def nodes():
    """A head that has no room for a block, and two nodes with room for one each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        noticing = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": noticing}
        )
        cluster.first, cluster.second = (cluster.add_node(num_cpus=1, memory=5 * 10**9) for _ in range(2))
        yield cluster
        cluster.shutdown()


@pytest.mark.slow
def test_data_that_a_node_does_not_have_are_sent_to_it(nodes, tmp_path, monkeypatch):
    """Once, for the workers of a machine; the bits are those of one machine, and nothing is left there."""
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/b").mkdir()
    random = np.random.default_rng(0)
    for number in range(24):
        pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{'ab'[number % 2]}/{number}.png")
    monkeypatch.chdir(tmp_path)
    # A path that leads elsewhere in another process: nodes are started in a folder of Ray's.
    wanted = {**WANTED, "data": "/proc/self/cwd/photos", "image_size": 8, "hold_out": 0.2, "steps": 40}
    heard, before = OnAdvance(), set(Path(tempfile.gettempdir()).glob("edgeblocks-data-*"))
    run = edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, listener=heard, **wanted)
    assert_same_bits(edgeblocks.train(out=tmp_path / "one", **wanted).path, run.path, blocks=2)
    assert sum("sending the data" in note for note in heard.notes) == 1, heard.notes
    assert set(Path(tempfile.gettempdir()).glob("edgeblocks-data-*")) == before


@pytest.mark.slow
def test_a_cluster_gives_the_bits_of_one_machine_even_when_a_node_is_lost(whole, nodes, tmp_path):
    """A node is taken away after its first visits; its block is placed again and goes on from what came home."""
    heard = OnAdvance(60, lambda: nodes.remove_node(nodes.second, allow_graceful=False))
    run = edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, listener=heard, **WANTED)
    assert_same_bits(whole.path, run.path, blocks=2)
    assert run.summary["metrics"] == whole.summary["metrics"]
    assert sum("is lost" in note for note in heard.notes) >= 1, heard.notes
    assert {span["last_step"] for span in run.summary["trained_on"]} == {160}
    assert not list(run.path.rglob("*.tmp")) and not (run.path / "blocks.arriving").exists()


@pytest.mark.thorough  # ways that are alike are tested by hand-made copies, in runs_end_to_end
def test_stopped_on_a_cluster_a_run_goes_on_without_it(whole, nodes, tmp_path):
    """Ctrl-C: nodes save, what they made comes home, and the run is finished here."""
    heard = OnAdvance(20, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT; saved at steps"):
        edgeblocks.train(out=tmp_path / "run", cluster=nodes.address, workers=1, listener=heard, **WANTED)
    left = edgeblocks.load(tmp_path / "run").left
    assert sum(left.values()) <= 2 * 160 - 20
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
    assert edgeblocks.load(tmp_path / "run").left == {0: 160, 1: 160}


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
    assert edgeblocks.load(tmp_path / "run").left == {0: 160, 1: 160}


def test_what_no_cluster_can_do_is_refused(tmp_path):
    """Stages that depend on each other, a cluster that is not there, workers without one; nothing is begun."""
    small = [*TINY, "--mem-budget", "4GB", "--out", tmp_path / "new"]
    assert_refused(
        invoke("train", *small, "--method", "exact", "--cluster", "auto"), 2, "--cluster: with --method exact"
    )
    assert_refused(invoke("train", *small, "--workers", "2"), 2, "that a --cluster trains")
    assert not (tmp_path / "new").exists()


def test_nothing_of_ray_is_imported_where_it_is_not_asked_for():
    """Not by the package, nor by what trains."""
    code = (
        "import sys; from edgeblocks import api, cluster; from edgeblocks.cli import main; print('ray' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
