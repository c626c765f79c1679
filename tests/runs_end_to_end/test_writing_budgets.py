"""`weights` and `report` under `--mem-budget`: what they need is told before they begin, and what is told is enough."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support.outside import EDGEBLOCKS, measured
from support.random_run import make_run

import edgeblocks
from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.report.run_report import write_report

MB = 10**6
RESERVE_MB = 12
"""A budget that much smaller than the advised one is refused: what is asked for does not hide what is taken."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Blocks of 0.1 MB."""
    path = tmp_path_factory.mktemp("small") / "run"
    return make_run(path, layers=(1, 2), data="digits", width=32, heads=2).path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Blocks of 60 MB and more."""
    path = tmp_path_factory.mktemp("large") / "run"
    return make_run(path, layers=(3, 4), data="digits", width=576, heads=8).path


@pytest.fixture(scope="module")
def long(small):
    """With 30,000 records and 6 pictures of 2 MB, which take some 45 and 95 MB."""
    path = small.parent / "long"
    shutil.copytree(small, path)
    record = {"gradient_norm": 2.5, "learning_rate": 1e-3, "examples_per_s": 13.5, "used_bytes": 10**9}
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 15001):
            for block in range(2):
                own = {"block": block, "step": step, "loss": 1 / step, "seconds": step + block / 2}
                file.write(json.dumps({**own, **record}) + "\n")
    (path / "samples").mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for step in range(6):
        pixels = random.integers(0, 256, (800, 850, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / "samples" / f"step_{step:06d}.png")
    return path


@pytest.mark.parametrize(
    ("verb", "name", "ending"),
    [
        pytest.param("weights", "small", "safetensors", marks=pytest.mark.thorough),
        ("weights", "large", "safetensors"),
        pytest.param("report", "small", "html", marks=pytest.mark.thorough),
        ("report", "long", "html"),
    ],
)
def test_the_budget_that_is_advised_is_enough(verb, name, ending, request, tmp_path):
    """It is told with the numbers before anything is written, a smaller one is refused, and that one is kept to."""
    run, out = request.getfixturevalue(name), tmp_path / f"out.{ending}"

    def under(budget_mb):
        return measured(*EDGEBLOCKS, verb, run, "-o", out, "--mem-budget", f"{budget_mb}MB")

    refused = under(100)
    told = r"takes up to (\d+) MB of memory, and the budget is 100 MB: .*; use --mem-budget (\d+)MB or more"
    found = re.search(told, refused["err"])
    assert refused["code"] == 3 and found is not None, refused
    needed_mb, advised_mb = map(int, found.groups())
    assert needed_mb <= advised_mb <= needed_mb + 4
    assert under(advised_mb - RESERVE_MB)["code"] == 3 and not out.exists()
    done = under(advised_mb)
    assert done["code"] == 0 and out.stat().st_size > 0, done
    assert done["peak_bytes"] <= advised_mb * MB


def test_without_a_budget_nothing_is_refused_and_python_has_it_too(small, tmp_path):
    """The same errors from Python; a word that is no size is one of wrong use."""
    run = edgeblocks.load(small)
    with pytest.raises(DoesNotFitError, match=r"writing the weights of .* takes up to") as caught:
        run.save_weights(tmp_path / "w.safetensors", mem_budget="50MB")
    assert caught.value.smallest_bytes > 50 * MB
    with pytest.raises(DoesNotFitError, match=r"the report of .* takes up to"):
        write_report(small, tmp_path / "page.html", mem_budget="50MB")
    with pytest.raises(ConfigError, match="much"):
        run.save_weights(tmp_path / "w.safetensors", mem_budget="much")
    assert not list(tmp_path.iterdir())
    run.save_weights(tmp_path / "w.safetensors")
    write_report(small, tmp_path / "page.html")
    assert len(list(tmp_path.iterdir())) == 2
