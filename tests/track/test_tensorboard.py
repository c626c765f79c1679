"""`--track tensorboard`: what TensorBoard reads of a run."""

import subprocess
import sys

import pytest
from support.commands import assert_refused, invoke
from support.equality import SMALL

from edgeblocks.callbacks import Sampled
from edgeblocks.errors import RunError
from edgeblocks.track.tensorboard import TensorBoard

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = {**SMALL, "width": 16, "depth": 4, "blocks": 2, "batch": 4, "steps": 3, "sample_grids": 1, "sample_steps": 2}
FLAGS = [part for key, value in FLAGS.items() for part in ("--set", f"{key}={value}")] + ["--mem-budget", "4GB"]


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("tracked") / "run"
    done = invoke("train", *FLAGS, "--out", out, "--track", "tensorboard")
    assert done.exit_code == 0, done.output
    return out


def test_scalars_images_and_settings_are_written_into_the_run(run):
    """Losses of each block over its own steps, memory over all, the grid of samples, the figure at the end."""
    found = read(run / "tensorboard")
    tags = found.Tags()
    assert {"loss/block_0", "loss/block_1", "learning_rate/block_0", "memory/used_MB", "memory/budget_MB"} <= set(
        tags["scalars"]
    )
    assert {"validation_loss", "memory/peak_MB"} <= set(tags["scalars"]) and tags["images"] == ["samples"]
    assert [point.step for point in found.Scalars("loss/block_1")] == [1, 2, 3]
    assert [point.step for point in found.Scalars("memory/used_MB")] == [1, 2, 3, 4, 5, 6]
    assert {point.value for point in found.Scalars("memory/budget_MB")} == {4000.0}
    assert found.Images("samples")[0].step == 3


def test_a_resumed_run_goes_on_in_the_same_folder_and_another_one_can_be_named(run, tmp_path):
    done = invoke("train", "--resume", run, "--steps", "4", "--track", "tensorboard", "--track-folder", tmp_path / "t")
    assert done.exit_code == 0, done.output
    assert [point.step for point in read(tmp_path / "t").Scalars("loss/block_0")] == [4]


def test_texts_are_shown_as_they_stand(tmp_path):
    board = TensorBoard(tmp_path)
    board._writer = board._make(str(tmp_path))
    board.sampled(Sampled(step=2, path=tmp_path / "s.txt", texts=("call *me*", "x")))
    board.close()
    tags = read(tmp_path).Tags()["tensors"]
    assert {"samples/0/text_summary", "samples/1/text_summary"} <= set(tags)


def test_wrong_wishes_are_refused(tmp_path):
    assert_refused(invoke("train", "--track", "wandb", "--out", tmp_path / "a"), 2, r"--track wandb: there is tensorb")
    assert_refused(invoke("train", "--track-folder", tmp_path), 2, r"--track-folder belongs to --track")


def test_a_link_in_a_run_is_not_followed(run, tmp_path):
    """A run that came from elsewhere does not choose where its files go."""
    from edgeblocks.callbacks import Planned

    (tmp_path / "tensorboard").symlink_to(run)
    with pytest.raises(RunError, match=r"is a link to .*--track-folder"):
        TensorBoard().planned(Planned(run=tmp_path, settings={"steps": 1}, plan={}, resumed_from=None))


def test_its_library_is_in_memory_before_anything_is_planned():
    """So that the plan's `runtime` counts it; afterwards nothing more of it is imported."""
    code = (
        "import sys, tempfile; from edgeblocks.track.tensorboard import TensorBoard; board = TensorBoard();"
        "from edgeblocks.callbacks import Planned, Step; from pathlib import Path;"
        "before = set(sys.modules);"
        "board.planned(Planned(run=Path(tempfile.mkdtemp()), settings={'steps': 1}, plan={}, resumed_from=None));"
        "board._writer.add_scalar('a', 1.0, 1); board.close();"
        "new = {name for name in set(sys.modules) - before if name.split('.')[0] in ('tensorboard', 'torch')};"
        "assert not new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
