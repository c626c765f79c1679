"""What the verbs print and do, as one result."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import TINY, invoke

import edgeblocks


def write_png(path, seed=0, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_corrupt_picture_is_named_and_the_run_goes_on(tmp_path):
    """One broken PNG among good ones is skipped by name; training works on the others."""
    for index in range(12):
        write_png(tmp_path / f"set/{'ab'[index % 2]}/{index}.png", index)
    (tmp_path / "set/a/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    result = invoke("train", "--data", tmp_path / "set", "--mem-budget", "4GB", "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 0, result.output
    told = result.stderr.replace("\\", "/")
    assert "read: 12 images in 2 classes of 6 each; left out: 1 unreadable\n" in told
    assert "skipped 1 unreadable files: a/broken.png" in told


def test_a_batch_larger_than_the_set_is_told(tmp_path):
    """The pictures are in each step several times: with how often, and what would do."""
    for index in range(12):
        write_png(tmp_path / f"set/{'ab'[index % 2]}/{index}.png", index)
    result = invoke("plan", "--data", tmp_path / "set", "--mem-budget", "4GB", *TINY, "--batch", "22")
    assert result.exit_code == 0, result.output
    told = "a batch of 22 is more than the 11 training examples: each is in every step 2 times, with noise of its own"
    assert f"{told}; --batch 11 takes each once" in result.stderr


def test_a_full_disk_ends_the_run_cleanly_and_it_can_go_on(tmp_path):
    """When a block file cannot be written the run ends with exit 1 and resumes once there is room, with equal bits."""
    edgeblocks_path = Path(sys.executable).with_name("edgeblocks")
    settings = "--steps 8 --batch 4 --set depth=3 --set width=64 --set sample_grids=0 --set visit_steps=2"
    train = f"{edgeblocks_path} train --mem-budget 4GB {settings} --set hold_out=0.02"

    def shell(command):
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    whole = invoke(*train.split()[1:], "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    process = subprocess.Popen(
        f"exec {train} --out {tmp_path}/run --set tier=disk", shell=True, stdout=subprocess.DEVNULL, text=True
    )
    while not (tmp_path / "run/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    refused = shell(f"ulimit -f 100; exec {edgeblocks_path} train --resume {tmp_path}/run")
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert re.search(r"error: cannot write block \d .*File too large.*--resume", refused.stderr), refused.stderr
    assert not list((tmp_path / "run/blocks").glob("*.tmp"))
    assert invoke("train", "--resume", tmp_path / "run").exit_code == 0
    from safetensors.numpy import load_file

    for path in sorted((tmp_path / "whole/blocks").iterdir()):
        one, two = load_file(path), load_file(tmp_path / "run/blocks" / path.name)
        assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_help_answers_without_torch():
    """`--help` imports neither torch nor numpy, which keeps it under half a second."""
    code = (
        "import sys; from typer.testing import CliRunner; from edgeblocks.cli.main import app;"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output;"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for verb in ("plan", "train", "eval", "sample", "export", "run", "info"):
        assert invoke(verb, "--help").exit_code == 0


def test_every_verb_prints_its_result_alone(run, tmp_path, capfd):
    """Standard output begins with the result; that a verb is at work is said on standard error."""
    first_words = {
        ("plan", *TINY, "--mem-budget", "4GB"): "edgeblocks: dit dit-tiny, ",
        ("train", *TINY, "--mem-budget", "4GB", "--dry-run"): "edgeblocks: dit dit-tiny, ",
        ("eval", run, "--samples", "4"): "validation loss ",
        ("sample", run, "-o", tmp_path / "g.png", "--n", "4"): "saved 4 images to ",
        ("export", run, "-o", tmp_path / "onnx"): "exported 3 block(s) to ",
    }
    for command, words in first_words.items():
        done = invoke(*command)
        assert done.exit_code == 0 and done.stdout.startswith(words), (command, done.stdout, done.stderr)
        assert done.stderr, command
    assert capfd.readouterr() == ("", ""), "said by a library, not by the command"


def test_json_is_the_only_thing_on_standard_output(run, tmp_path):
    """--json prints one JSON object with the promised keys."""
    done = invoke("train", *TINY, "--mem-budget", "4GB", "--out", tmp_path / "run", "--json")
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    promised = (
        "family method blocks layers_per_block parameters steps budget_bytes predicted_peak_bytes peak_bytes "
        "ram_peak_bytes disk_bytes seconds images_or_tokens_per_s time_split metrics resumed_from"
    )
    assert set(promised.split()) <= summary.keys()
    assert {"compute", "load", "store", "data", "other"} <= summary["time_split"].keys()
    plan = json.loads(invoke("plan", *TINY, "--mem-budget", "4GB", "--json").stdout)
    assert plan["predicted_peak_bytes"] == sum(plan["breakdown"].values())
    for verb in (("eval", run, "--samples", "4"), ("sample", run, "-o", tmp_path / "g.png"), ("info", run)):
        assert isinstance(json.loads(invoke(*verb, "--json").stdout), dict)


def test_evaluation_reports_levels_and_the_floor(run):
    """`eval` prints at least 20 noise levels, the owning blocks, and the Frechet distance beside its floor."""
    result = invoke("eval", run, "--samples", "20", "--json")
    assert result.exit_code == 0, result.output
    evaluation = json.loads(result.stdout)
    levels = evaluation["validation"]["levels"]
    assert len(levels) >= 20
    assert {level["block"] for level in levels} == {0, 1, 2}
    assert evaluation["validation_loss"] == pytest.approx(np.mean([level["loss"] for level in levels]))
    assert evaluation["frechet"]["floor"] > 0
    assert evaluation["frechet"]["to_train"] > evaluation["frechet"]["floor"]


def test_samples_are_saved_during_training_and_do_not_depend_on_their_number(run, tmp_path):
    """The run has a grid; sample i of a seed is the same picture whether 3 or 5 are made."""
    grids = list((run / "samples").glob("*.png"))
    assert [path.name for path in grids] == ["step_0000002.png"]
    loaded = edgeblocks.load(run)
    few, more = loaded.sample(n=3, steps=4), loaded.sample(n=5, steps=4)
    assert (np.abs(few.astype(int) - more[:3].astype(int)) <= 1).all()
    assert invoke("sample", run, "-o", tmp_path / "grid.png", "--n", "5", "--class", "7").exit_code == 0
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_a_finished_run_that_is_resumed_stays_as_it_is(copy):
    """Its measurements too; a block that is made again is trained, and other settings are kept."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "lock"}
    done = invoke("train", "--resume", copy)
    assert done.exit_code == 0 and "is finished: it has made its 2 steps" in done.output
    assert {path: path.read_bytes() for path in before} == before
    assert invoke("train", "--resume", copy, "--reinit-block", "1").exit_code == 0
    assert (copy / "summary.json").read_bytes() != before[copy / "summary.json"]
    assert invoke("train", "--resume", copy, "--mem-budget", "3GB").exit_code == 0
    assert "mem_budget: 3GB" in (copy / "config.yaml").read_text()
