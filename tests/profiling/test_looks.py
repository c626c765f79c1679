"""How many passes the looks at a network take, before they are made."""

import pytest
from support.random_run import make_run, make_text_run

from edgeblocks.inference.metrics import validation_loss
from edgeblocks.inference.quality import run_quality
from edgeblocks.inference.sampling import always, sample_images, sample_texts
from edgeblocks.inference.staged_weights import loaded_ema
from edgeblocks.profiling.looks import expected_looks, pass_seconds
from edgeblocks.progress import Progress, Silent
from edgeblocks.registry import build_target
from edgeblocks.runs.open_data import open_run_data
from edgeblocks.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"width": 8, "heads": 1, "evaluations": 3, "sample_steps": 4, "hold_out": 0.02}


class Counted:
    """A runner that counts the examples which go through its networks."""

    def __init__(self, run):
        self.runner, self.passes = run.runner(loaded_ema(run.directory, slots=2), micro_batch=16), 0
        original = self.runner.network

        def network(block):
            found = original(block)
            if not hasattr(found, "is_counted"):
                found.is_counted = True
                found.layers[0].register_forward_pre_hook(self._count, with_kwargs=True)
            return found

        self.runner.network = network

    def _count(self, module, args, kwargs):
        self.passes += len(args[0])

    def during(self, make):
        before = self.passes
        make()
        return self.passes - before


@pytest.mark.parametrize(
    ("family", "method"), [("dit", "diffusion"), ("vit", "diffusion"), ("vit", "exact"), ("mdlm", "diffusion")]
)
def test_they_are_as_many_as_are_made(tmp_path, family, method):
    """Of a grid of samples, of a measure of quality, and of the evaluation at the end."""
    make = make_text_run if family == "mdlm" else make_run
    own = {"data": "moby-dick", "length": 8, "hold_out": 0.0001} if family == "mdlm" else {}
    run = make(tmp_path / "run", layers=(1, 1), family=family, method=method, **{**SMALL, **own})
    directory, counted = run.directory, Counted(run)
    data = open_run_data(directory.data_settings, Silent(), budget_bytes=10**10, target=build_target("cpu"))
    kind, usual = directory.family(), TASKS[directory.family().task]
    looks = expected_looks(directory.settings.run, kind, directory.partition, data)
    assert looks.evaluations == 3 and looks.grids == (0 if family == "vit" else 4)
    quality = counted.during(lambda: run_quality(directory, counted.runner, data))
    assert quality == looks.evaluation_passes
    last = counted.during(
        lambda: validation_loss(kind, counted.runner, data, seed=0, most_examples=usual.loss_examples)
    )
    assert last == looks.last_passes
    if family == "dit":
        runners = always(counted.runner)
        grid = counted.during(lambda: sample_images(directory, runners, n=usual.grid_samples, steps=4, seed=0))
        assert grid == looks.grid_passes
    if family == "mdlm":
        grid = counted.during(lambda: sample_texts(directory, always(counted.runner), n=usual.grid_samples, seed=0))
        assert grid <= looks.grid_passes  # a text without gaps is not run again


def test_the_time_left_has_the_looks_to_come():
    """Steps at the pace of this process, without the looks that were made, and what is still to be looked at."""
    import time

    progress = Progress(steps_before=100, steps_done=100, steps_total=200, started=time.perf_counter() - 60)
    assert progress.left_s is None
    progress.steps_done, progress.previews_s, progress.looks_left_s = 150, 10.0, 7.0
    assert progress.left_s == pytest.approx(50 + 7, rel=0.02)
    assert pass_seconds(4.0, batch=2, again=True) == 0.5
