"""Fine-tunings that are killed at random instants, whatever is trained: each goes on, and ends with the bits of a run
that nobody disturbed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.equality import assert_same_bits
from support.small_model import write_conversations, write_model

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

WAYS = {
    "full": ["--blocks", "2", "--set", "tier=disk"],
    "tables": ["--blocks", "2", "--set", "tier=disk", "--train-embeddings"],
    "lora": ["--tune", "lora", "--lora-rank", "3"],
    "blocks": ["--tune", "blocks", "--train-blocks", "1,2"],
}
_KILLS = 3


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The command, but for what is trained."""
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "model").mkdir()
    write_model(folder / "model")
    write_conversations(folder / "talks.jsonl")
    how = ["--packing", "--length", "60", "--batch", "2", "--steps", "60", "--mem-budget", "2GB"]
    return ["finetune", folder / "model", "--data", folder / "talks.jsonl", *how, "--set", "visit_steps=10"]


def started(*arguments):
    program = Path(sys.executable).with_name("edgeblocks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([program, *map(str, arguments)], env=environment, text=True, **quiet)


def records_of(run):
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_it_ends_with_the_same_bits(asked, tmp_path, way):
    """Three times in four while it trains, else at any instant, also before there is a run."""
    chosen, moments = [*asked, *WAYS[way]], random.Random(way)
    calm, run = tmp_path / "calm", tmp_path / "run"
    process = started(*chosen, "--out", calm)
    assert process.wait() == 0, process.stderr.read()
    killed = 0
    while True:
        before = records_of(run)
        goes_on = (run / "manifest.json").exists()
        process = started("train", "--resume", run) if goes_on else started(*chosen, "--out", run)
        if killed < _KILLS:
            in_training = moments.random() < 0.75
            while in_training and process.poll() is None and records_of(run) == before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 2))
            process.kill()
            killed += 1
        said = process.communicate()[1]
        if process.returncode == 0:
            break
        assert process.returncode == -9, said
    assert_same_bits(calm, run, blocks=len(list((calm / "blocks").glob("*.safetensors"))))
    losses = [json.loads((path / "summary.json").read_text())["metrics"]["validation_loss"] for path in (calm, run)]
    assert losses[0] == losses[1]
