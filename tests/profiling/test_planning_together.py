"""While a run is planned there are two processes: a budget above 600 MB bounds them together, measured from outside."""

import os
import re
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.outside import EDGEBLOCKS, largest_together

MB = 10**6
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the cap and the measure need Linux")


@pytest.fixture
def no_answers(tmp_path):
    """Surroundings in which nothing is known of any network or data."""
    return {**os.environ, "EDGEBLOCKS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


def told_mb(done):
    """What `plan` says that its processes take together."""
    return int(re.search(r"while planning: two processes, together up to (\d+) MB", done["out"])[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("dit", "--set", "width=1024", "--set", "depth=24", "--mem-budget", "3GB"),
        pytest.param(
            ("ar", "--tokenizer", "bpe", "--vocab", "20000", "--mem-budget", "650MB"), marks=pytest.mark.thorough
        ),
    ],
)
def test_a_large_network_takes_no_more_to_plan_than_is_told(settings, no_answers, tmp_path):
    """Of which the sum seen is a good part. Depth and vocabulary add nothing to it, width that of one layer."""
    done = largest_together(*EDGEBLOCKS, "plan", *settings, env=no_answers, cwd=tmp_path)
    assert done["code"] == 0, done["err"]
    assert 0.8 * told_mb(done) < done["together_bytes"] / MB < min(told_mb(done), 700)


@pytest.mark.slow
def test_what_reading_left_behind_is_given_back_before_the_second_process_starts(no_answers, tmp_path):
    """Four million labels are sorted and counted before planning: they passed a budget of 650 MB together."""
    images = np.random.default_rng(0).integers(0, 256, (4_000_000, 2, 2, 1), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", images=images, labels=np.arange(len(images)) % 10)
    asked = ("plan", "vit", "--data", "many.npz", "--set", "patch=1", "--mem-budget", "650MB")
    done = largest_together(*EDGEBLOCKS, *asked, env=no_answers, cwd=tmp_path)
    assert done["code"] == 0, done["err"]
    assert done["together_bytes"] <= 650 * MB


HOLDS = """
import sys
import numpy as np
import pyarrow
import pyarrow.parquet
import edgeblocks
held = np.ones({held_bytes} // 8)
from edgeblocks.errors import EdgeblocksError
try:
    print(edgeblocks.plan(width=32, heads=2, depth=3, batch=4, mem_budget=sys.argv[1]).plan.machine)
except EdgeblocksError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_a_program_that_holds_much_is_told_which_budget_planning_takes(no_answers, tmp_path):
    """The child is refused memory past the budget; what is advised is enough, and is kept to by both together.

    An answer that is in the cache changes nothing of it.
    """
    program = tmp_path / "program.py"
    program.write_text(HOLDS.format(held_bytes=300 * MB))
    refused = largest_together(sys.executable, program, "610MB", env=no_answers, cwd=tmp_path)
    assert refused["code"] == 3 and refused["together_bytes"] <= 610 * MB
    told = r"planning takes up to \d+ MB in two processes, of which this one holds \d+ MB \(what this process already"
    assert re.search(told, refused["err"]), refused["err"]
    advised = re.search(r"use --mem-budget (\d+)MB or more", refused["err"])[1]
    done = largest_together(sys.executable, program, f"{advised}MB", env=no_answers, cwd=tmp_path)
    assert done["code"] == 0, done["err"]
    assert done["together_bytes"] <= int(advised) * MB
    again = largest_together(sys.executable, program, "610MB", env=no_answers, cwd=tmp_path)
    assert again["code"] == 3 and "planning takes up to" in again["err"], again["err"]


@pytest.fixture
def books(tmp_path):
    """What `plan` is asked of a table of 120 MB of text, but for the budget."""
    table = pyarrow.table({"text": [f"book {number} " + "whales and ships " * 180_000 for number in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "books.parquet")
    return "plan", "mdlm", "--data", "books.parquet", "--set", "width=32", "--mem-budget"


def refused_at_350_mb(asked, no_answers, tmp_path):
    """The budgets that the message names: the smallest one, and, above 600 MB, the smallest for both processes."""
    refused = largest_together(*EDGEBLOCKS, *asked, "350MB", env=no_answers, cwd=tmp_path)
    told = (
        r"after the interpreter that reads it \([\d.]+ MB\); use --mem-budget (\d+)MB to 600MB, or (\d+)MB or more the"
    )
    found = re.search(told, refused["err"])
    assert refused["code"] == 3 and found is not None, refused["err"]
    return found.groups()


@pytest.mark.slow
def test_a_process_that_reads_text_is_counted_with_the_one_that_waits(books, no_answers, tmp_path):
    """Above 600 MB; below, each is bounded by itself. The message says what is counted, and names budgets."""
    refused = largest_together(*EDGEBLOCKS, *books, "640MB", env=no_answers, cwd=tmp_path)
    told = (
        r"after the interpreter that reads it and the process that waits for it \(\d+ MB\); use --mem-budget \d+MB or"
    )
    assert refused["code"] == 3 and re.search(told, refused["err"]), refused["err"]
    assert int(refused_at_350_mb(books, no_answers, tmp_path)[1]) > 640


@pytest.mark.slow
@pytest.mark.thorough
def test_a_budget_that_a_refused_reader_names_is_enough(books, no_answers, tmp_path):
    """Either of them, at the first try."""
    for budget_mb in refused_at_350_mb(books, no_answers, tmp_path):
        surroundings = {**no_answers, "EDGEBLOCKS_CACHE": str(tmp_path / f"cache-{budget_mb}")}
        done = largest_together(*EDGEBLOCKS, *books, f"{budget_mb}MB", env=surroundings, cwd=tmp_path)
        assert done["code"] == 0, done["err"]
        assert done["together_bytes"] <= max(600, int(budget_mb)) * MB
