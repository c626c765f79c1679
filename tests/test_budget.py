"""The budget bounds the whole process, measured from outside, and the prediction is close."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": done.returncode, "out": done.stdout, "err": done.stderr, "peak_bytes": peak_bytes}))
"""


def measured(*arguments):
    """Run `edgeblocks ...` below a small parent process: exit code, output, and its peak resident set.

    (The resident set of a child that is started from a large process would begin with its parent's.)
    """
    command = [sys.executable, "-c", LAUNCHER, str(Path(sys.executable).with_name("edgeblocks")), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_a_network_larger_than_the_budget_is_created_trained_and_sampled(tmp_path):
    """68 million parameters (683 MB of state) train and sample with some 140 MB beyond the interpreter's own size."""
    settings = ["--steps", "2", "--batch", "4", "--set", "width=512", "--set", "heads=8", "--set", "sample_grids=1"]
    settings += ["--set", "sample_steps=12", "--set", "patch=4"]
    refused = measured("plan", *settings, "--mem-budget", "50MB")
    assert refused["code"] == 3
    smallest = int(refused["err"].split("use --mem-budget ")[1].split("MB")[0])
    budget_bytes = (smallest + 20) * 1_000_000
    train = measured("train", *settings, "--mem-budget", budget_bytes, "--out", tmp_path / "run", "--json")
    assert train["code"] == 0, train["err"]
    summary = json.loads(train["out"])
    assert summary["blocks"] == 12
    assert summary["disk_bytes"] > 1.3 * budget_bytes
    assert train["peak_bytes"] <= budget_bytes
    assert abs(train["peak_bytes"] / summary["predicted_peak_bytes"] - 1) < 0.1
    sample = measured("sample", tmp_path / "run", "--n", "8", "--steps", "12", "-o", tmp_path / "grid.png")
    assert sample["code"] == 0, sample["err"]
    assert sample["peak_bytes"] <= budget_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--batch", "64", "--set", "width=128"],
        ["--batch", "32", "--set", "width=192", "--set", "image_size=16", "--set", "checkpointing=true"],
        [
            "--batch",
            "16",
            "--set",
            "width=64",
            "--set",
            "image_size=32",
            "--set",
            "depth=24",
            "--set",
            "optimizer=adamw",
        ],
    ],
    ids=["narrow", "checkpointed", "deep"],
)
def test_prediction_is_within_ten_percent_of_the_measured_peak(tmp_path, settings):
    """For different shapes the peak measured from outside is at most the budget and within 10 % of the prediction."""
    plan = measured("plan", *settings, "--steps", "3", "--mem-budget", "4GB", "--json")
    predicted = json.loads(plan["out"])["predicted_peak_bytes"]
    budget_bytes = int(1.04 * predicted)
    out = tmp_path / "run"
    train = measured("train", *settings, "--steps", "3", "--mem-budget", budget_bytes, "--out", out, "--json")
    assert train["code"] == 0, train["err"]
    summary = json.loads(train["out"])
    assert train["peak_bytes"] <= budget_bytes
    assert abs(train["peak_bytes"] / summary["predicted_peak_bytes"] - 1) < 0.1
    assert abs(train["peak_bytes"] / summary["peak_bytes"] - 1) < 0.02
