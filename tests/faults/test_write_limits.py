"""A limit of what is written to the disk."""

import math
import re

import pytest
from support.faulty_runs import BLOCK, HALF, assert_goes_on, assert_sound, refused, resume, saved_steps
from support.watched_run import BLOCKS, VISIT_STEPS

pytestmark = pytest.mark.slow


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
