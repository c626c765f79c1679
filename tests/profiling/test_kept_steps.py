"""What a run's steps took is found again by the same network on the same machine, and nothing damaged is believed."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from support.given_settings import resolve

from edgeblocks.families.base import ImageInfo
from edgeblocks.limits import MOST_LAYERS
from edgeblocks.planning.corrections import MeasuredSteps
from edgeblocks.profiling.kept_answers import keep_answer
from edgeblocks.profiling.kept_steps import NAME, KeptSteps

DATA = ImageInfo(channels=1, height=8, width=8, num_classes=10, mean=0.5, scale=2.0)
TAKEN = MeasuredSteps(
    step_s=0.7,
    short_s=0.6,
    long_s=0.9,
    batch=16,
    blocks=3,
    micro_batch=4,
    checkpointing=True,
    optimizer="adamw",
    trained=(1, 2),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path))
    return tmp_path


def of(**given):
    return KeptSteps(resolve({"width": 64, "heads": 2, "depth": 4, **given}), DATA, device="cpu")


def test_what_is_kept_is_read_by_the_same_network_alone(monkeypatch):
    """Another batch or budget is the same network; another width, method, precision or number of threads is not."""
    of().keep(TAKEN)
    assert of().read() == TAKEN == of(batch=128, mem_budget="1GB", optimizer="adamw8bit").read()
    other_mean = replace(DATA, mean=0.25)
    assert KeptSteps(resolve({"width": 64, "heads": 2, "depth": 4}), other_mean, device="cpu").read() == TAKEN
    for other in ({"width": 128}, {"depth": 5}, {"method": "exact"}, {"precision": "bf16"}):
        assert of(**other).read() is None, other
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert of().read() is None
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("edgeblocks.profiling.kept_answers._code_digest", lambda: "another version")
    assert of().read() is None


def test_a_file_that_was_cut_or_changed_is_no_answer(cache):
    """At any byte."""
    of().keep(TAKEN)
    (path,) = cache.glob(f"{NAME}-*")
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:place])
        assert of().read() is None
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert of().read() is None
    path.write_bytes(os.urandom(100))
    assert of().read() is None
    path.unlink()
    assert of().read() is None
    of().keep(TAKEN)
    assert of().read() == TAKEN


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_s": 0.0},
        {"step_s": -1.0},
        {"short_s": 0.8},
        {"long_s": float("inf")},
        {"long_s": float("nan")},
        {"step_s": "0.7"},
        {"blocks": MOST_LAYERS + 1},
        {"blocks": 0},
        {"micro_batch": 17},
        {"trained": ["a"]},
        {"more": 1},
    ],
)
def test_values_that_no_run_can_have_are_no_answer(cache, wrong):
    """With a sound checksum, as of another program."""
    of().keep(TAKEN)
    (path,) = cache.glob(f"{NAME}-*")
    keep_answer(path, json.loads(json.dumps({**asdict(TAKEN), **wrong})))
    assert of().read() is None
