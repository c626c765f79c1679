"""A run directory as an object: what it makes once, and what a change makes anew."""

import pytest
from support.random_run import make_run


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run", layers=(1, 1), width=16, heads=2).directory


def test_a_family_is_made_once(directory):
    """What is asked of a run again and again is not made again: the same family, the same parts of the noise levels."""
    assert directory.family() is directory.family()
    assert directory.partition is directory.partition


def test_a_change_makes_both_anew(directory):
    """A run with other settings, or another plan, has the family and the noise levels of those."""
    before = directory.family(), directory.partition
    changed = directory.changed({"overlap": 0.2, "sigma_max": 40.0})
    assert changed.family().settings.sigma_max == 40.0
    assert changed.partition.ranges[0] != before[1].ranges[0]
    planned = directory.planned_again(directory.plan.model_copy(update={"micro_batch": 2}))
    assert planned.plan.micro_batch == 2 and planned.partition == before[1]
    assert (directory.family(), directory.partition) == before
