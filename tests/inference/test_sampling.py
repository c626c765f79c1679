"""What a run's blocks make when the caller leaves the chain's length to the run."""

import numpy as np
import pytest
from support.random_run import make_run, make_text_run, torch_runner

from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.run import _fitting

NUM_BLOCKS = 20
"""More than the noise levels that are usual for images."""


@pytest.fixture(scope="module")
def deep_run(tmp_path_factory):
    """A run of images with a block for each of its layers."""
    return make_run(tmp_path_factory.mktemp("deep") / "run", layers=(1,) * NUM_BLOCKS, width=16, heads=2)


def test_images_of_many_blocks_take_a_level_of_each(deep_run):
    """Without a number of steps, a run of more blocks than usual steps is sampled with one level a block."""
    runner, levels = torch_runner(deep_run), []
    found = deep_run.sample(n=1, solver="euler", runner=runner, on_level=levels.append)
    assert sorted(runner.loads) == list(range(NUM_BLOCKS))
    assert levels == list(range(1, NUM_BLOCKS + 1))
    np.testing.assert_array_equal(
        found, deep_run.sample(n=1, steps=NUM_BLOCKS, solver="euler", runner=torch_runner(deep_run))
    )


def test_samples_that_walk_the_chain_in_groups_are_the_same(deep_run):
    """Bit for bit; each group loads every block once, and the levels are told as for one."""
    whole, groups, levels = torch_runner(deep_run), torch_runner(deep_run), []
    whole.micro_batch = groups.micro_batch = groups.together = 2
    expected = deep_run.sample(n=5, steps=NUM_BLOCKS, runner=whole)
    found = deep_run.sample(n=5, steps=NUM_BLOCKS, runner=groups, on_level=levels.append)
    np.testing.assert_array_equal(found, expected)
    assert groups.loads == whole.loads * 3
    assert levels == sorted(levels) and levels[-1] == NUM_BLOCKS


def test_a_budget_that_does_not_hold_all_samples_takes_some_at_a_time():
    """All together where they fit, with as many blocks in memory as fit; else half as many, and so on."""
    room = {(8, 3): None, (8, 2): None, (8, 1): None, (4, 3): None, (4, 2): 16, (1, 1): None}

    def micro_batch_of(*, residents, held_bytes):
        found = room[(held_bytes - 3) // 10, residents]
        if found is None:
            raise DoesNotFitError("too much", 1)
        return found

    assert _fitting(micro_batch_of, most_together=8, sample_bytes=10, made_bytes=3, most_residents=3) == (16, 2, 4)
    with pytest.raises(DoesNotFitError):
        _fitting(micro_batch_of, most_together=1, sample_bytes=10, made_bytes=3, most_residents=1)


def test_an_export_of_many_blocks_takes_as_many_levels(deep_run, tmp_path):
    """The deployed chain's own default is what was exported: torch's, one level a block."""
    pytest.importorskip("onnxruntime")
    from edgeblocks.export.sampler import Sampler

    deep_run.export(tmp_path / "exported")
    found = Sampler(tmp_path / "exported").sample(1, solver="euler")
    expected = deep_run.sample(n=1, solver="euler", runner=torch_runner(deep_run))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_run_that_is_no_classifier_is_told_what_it_makes(deep_run, tmp_path):
    """`classify` names what the run does: one of text is not told that it makes images."""
    text = make_text_run(tmp_path / "text", layers=(1,), width=16, heads=2, length=16, hold_out=0.0005)
    pixels = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(ConfigError, match=r"mdlm, which writes text \(sample_text\) and does not classify images"):
        text.classify(pixels)
    with pytest.raises(ConfigError, match="dit, which makes images and does not classify images"):
        deep_run.classify(pixels)
