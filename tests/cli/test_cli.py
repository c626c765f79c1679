"""The command line: wrong uses with their message and exit code, and what a terminal and a pipe see."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import assert_refused, invoke

import edgeblocks
from edgeblocks.cli.console import training_report
from edgeblocks.cli.console_progress import ConsoleListener
from edgeblocks.progress import Progress
from edgeblocks.runs.summary import Metrics, Summary, read_summary

TINY = ["--steps", "2", "--batch", "4", "--set", "depth=3", "--set", "width=16", "--set", "sample_grids=0"]
TINY += ["--set", "hold_out=0.005"]  # to evaluate takes longer than to train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    settings = {"depth": 3, "width": 16, "steps": 2, "batch": 4, "sample_grids": 1, "sample_steps": 3}
    edgeblocks.train(out=out, data="digits", mem_budget="2GB", hold_out=0.02, **settings)
    return out


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


WRONG_SETTINGS = {
    "budget without a unit": (["--mem-budget", "600"], 2, r"600 is 600 B, .* write --mem-budget 600MB if you mean"),
    "budget of zero": (["--mem-budget", "0"], 2, r"'0' is 0 bytes; a size must be larger than zero"),
    "budget that is no size": (["--mem-budget", "6 potatoes"], 2, r"'potatoes' in '6 potatoes' is not a unit; use KB"),
    "negative budget": (["--mem-budget", "-5GB"], 2, r"'-5GB' is not a size; write for example 6GB"),
    "budget over the machine": (
        ["--mem-budget", "900TB"],
        2,
        r"but this machine has .*; use at most --mem-budget \d+MB",
    ),
    "budget below the interpreter": (
        ["--mem-budget", "100MB"],
        3,
        r"no plan fits 100 MB: the smallest needs .* use --mem-budget \d+MB"
        r" or more \((the interpreter and its|this process already holds)",
    ),
    "unknown key": (["--set", "pach=2"], 2, r"unknown setting 'pach' for the family 'dit'; did you mean 'patch'\?"),
    "no value": (["--set", "patch"], 2, r"--set patch: write key=value, for example --set patch=2"),
    "unknown family": (["vae"], 2, r"there is no family 'vae'; there are: ar, dit, looped"),
    "unknown preset": (["--preset", "dit-huge"], 2, r"there is no preset 'dit-huge'; there are: ar-b, .*dit-b, dit-l"),
    "no steps": (["--steps", "0"], 2, r"steps=0: input should be greater than or equal to 1"),
    "too many blocks": (["--blocks", "99"], 2, r"--blocks 99 is impossible: the network has 12 layers.*use 1 to 12"),
    "blocks in words": (["--blocks", "many"], 2, r"blocks='many': a whole number of at least 1, or auto, is needed"),
    "heads": (["--set", "heads=5"], 2, r"heads=5: width=128 is not divisible by it; use --set heads="),
    "patch": (["--set", "patch=3"], 2, r"patch=3 does not divide the image height 8; use --set patch=.*image_size"),
    "wrong type": (["--set", "width=wide"], 2, r"width='wide': input should be a valid integer"),
    "partition": (
        ["--partition", "halves"],
        2,
        r"partition='halves': input should be 'equal-probability' or 'uniform'",
    ),
    "no such data": (["--data", "no/such/place"], 2, r"no/such/place"),
    "no such config": (["--config", "none.yaml"], 2, r"cannot read none.yaml: No such file"),
    "negative seed": (["--seed", "-1"], 2, r"seed=-1: input should be greater than or equal to 0"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_refused_with_the_reason_and_the_cure(case, tmp_path):
    """Each wrong use of `train` ends with its exit code and message, before anything is written."""
    arguments, exit_code, message = WRONG_SETTINGS[case]
    result = invoke("train", *arguments, "--out", tmp_path / "run")
    assert_refused(result, exit_code, message)
    assert not (tmp_path / "run").exists()


def test_all_mistakes_are_reported_together():
    """Four mistakes in one command line give four lines."""
    result = invoke("plan", "--set", "pach=2", "--set", "width=99", "--mem-budget", "6 potatoes", "--steps", "0")
    assert result.exit_code == 2
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 4


def test_the_smallest_budget_in_the_refusal_works(tmp_path):
    """The budget that the refusal names is accepted, and the run stays inside it."""
    refused = invoke("plan", "--mem-budget", "120MB", *TINY)
    smallest = re.search(r"use --mem-budget (\d+MB) or more", refused.stderr)
    assert smallest, refused.stderr
    # A little is added because the interpreter of the test run is not that of the refused command.
    budget = f"{int(smallest[1].removesuffix('MB')) + 20}MB"
    assert invoke("plan", "--mem-budget", budget, *TINY).exit_code == 0


def write_png(path, seed=0, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_corrupt_picture_is_named_and_the_run_goes_on(tmp_path):
    """One broken PNG among good ones is skipped by name; training works on the others."""
    for index in range(12):
        write_png(tmp_path / f"set/{'ab'[index % 2]}/{index}.png", index)
    (tmp_path / "set/a/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    result = invoke("train", "--data", tmp_path / "set", "--mem-budget", "2GB", "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 0, result.output
    told = result.stderr.replace("\\", "/")
    assert "read: 12 images in 2 classes of 6 each; left out: 1 unreadable\n" in told
    assert "skipped 1 unreadable files: a/broken.png" in told


def test_a_batch_larger_than_the_set_is_told(tmp_path):
    """The pictures are in each step several times: with how often, and what would do."""
    for index in range(12):
        write_png(tmp_path / f"set/{'ab'[index % 2]}/{index}.png", index)
    result = invoke("plan", "--data", tmp_path / "set", "--mem-budget", "2GB", *TINY, "--batch", "22")
    assert result.exit_code == 0, result.output
    told = "a batch of 22 is more than the 11 training examples: each is in every step 2 times, with noise of its own"
    assert f"{told}; --batch 11 takes each once" in result.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), r"set.npz"),
        (lambda path: np.savez(path, pictures=np.zeros((4, 8, 8), np.uint8)), r"holds the arrays pictures"),
        (lambda path: np.savez(path, images=np.full((4, 8, 8), np.nan)), r"NaN|not finite"),
        (lambda path: np.savez(path, images=np.zeros((0, 8, 8), np.uint8)), r"set.npz"),
    ],
    ids=["truncated npz", "no images in it", "NaN", "empty"],
)
def test_unusable_archives_are_refused(tmp_path, make, message):
    """A damaged or wrong .npz ends with exit code 2 and its name."""
    make(tmp_path / "set.npz")
    result = invoke("train", "--data", tmp_path / "set.npz", "--mem-budget", "2GB", "--out", tmp_path / "run", *TINY)
    assert_refused(result, 2, message)


def test_an_empty_folder_is_refused(tmp_path):
    """A folder without images says what was looked for."""
    (tmp_path / "empty").mkdir()
    assert_refused(invoke("train", "--data", tmp_path / "empty", *TINY, "--out", tmp_path / "run"), 2, r"empty")


def flip(path, place):
    """Flip one bit; 0.45 of the file lies in the EMA weights."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES = {
    "flipped byte": (lambda run: flip(run / "blocks/block_001.safetensors", 0.45), r"block 1 is damaged: .*checksum"),
    "flipped header": (lambda run: flip(run / "blocks/block_001.safetensors", 0.001), r"block 1 is damaged: .*header"),
    "missing block": (lambda run: (run / "blocks/block_002.safetensors").unlink(), r"block 2 is missing"),
    "truncated block": (
        lambda run: os.truncate(run / "blocks/block_000.safetensors", 20_000),
        r"block 0 is damaged: .*cut short",
    ),
    "swapped blocks": (
        lambda run: shutil.copy(run / "blocks/block_000.safetensors", run / "blocks/block_001.safetensors"),
        r"is block 0 of run .*, but block 1 .* belongs here",
    ),
    "another version": (
        lambda run: replace_in(run / "manifest.json", '"format_version": 2', '"format_version": 7'),
        r"has run format version 7; this edgeblocks .* reads version 2",
    ),
    "no manifest": (lambda run: (run / "manifest.json").unlink(), r"is not a run directory: it has no manifest.json"),
    "cut manifest": (lambda run: os.truncate(run / "manifest.json", 50), r"manifest.json is damaged"),
    "unknown key in its config": (
        lambda run: replace_in(run / "config.yaml", "overlap:", "overlapp:"),
        r"is damaged: unknown setting 'overlapp'",
    ),
    "plan of another network": (
        lambda run: replace_in(run / "config.yaml", "depth: 3", "depth: 5"),
        r"its blocks have 3 layers, the network 5",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_run_is_found_before_use(case, copy, tmp_path):
    """Each damage of a run directory ends `sample` with exit code 1 and the file's or block's name."""
    damage, message = DAMAGES[case]
    damage(copy)
    result = invoke("sample", copy, "-o", tmp_path / "grid.png", "--n", "2", "--steps", "3")
    assert_refused(result, 1, message)
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--steps", "2"], 2, r"2 sampling steps cannot visit 3 blocks.*use --steps 3 or more"),
        (["--n", "0"], 2, r"--n 0: at least one sample is needed"),
        (["--class", "eleven"], 2, r"--class eleven: there is no such class; the 10 classes are 0, 1"),
        (["--solver", "rk4"], 2, r"--solver rk4: there are heun and euler"),
        (["--length", "9"], 2, r"this network makes no text, so --length means nothing to it; leave it out"),
        (["-o", "grid.jpg"], 2, r"-o grid.jpg: the grid is a PNG picture"),
        (["--guidance", "-1"], 2, r"--guidance -1.0 must be a number of at least 0"),
        (["--mem-budget", "90MB"], 3, r"the chain needs .* even for one sample at a time"),
    ],
)
def test_wrong_sampling_is_refused(run, arguments, exit_code, message):
    """Each wrong use of `sample` ends with its exit code and message."""
    assert_refused(invoke("sample", run, *arguments), exit_code, message)


def test_a_run_directory_is_not_overwritten(run):
    """Training into an existing run is refused with the way to go on."""
    assert_refused(invoke("train", "--out", run, *TINY), 2, r"holds a run already; go on with --resume")


def test_resume_takes_no_settings(run):
    """--resume with settings that would change the result is refused and names them."""
    assert_refused(
        invoke("train", "--resume", run, "--batch", "9"),
        2,
        r"only --data, --max-disk-writes, --mem-budget, --ram-budget, --steps, --target, --work-dir may be others; ",
    )


def test_changed_data_are_noticed_on_resume(tmp_path):
    """A run is not resumed on other images than it was trained on."""
    for seed in (0, 1):
        images = np.random.default_rng(seed).integers(0, 255, (20, 8, 8), dtype=np.uint8)
        if seed == 0:
            np.savez(tmp_path / "set.npz", images=images)
            result = invoke("train", "--data", tmp_path / "set.npz", "--out", tmp_path / "run", *TINY)
            assert result.exit_code == 0, result.output
    np.savez(tmp_path / "set.npz", images=images)
    os.utime(tmp_path / "set.npz", ns=(1, 1))
    again = invoke("train", "--resume", tmp_path / "run", "--reinit-block", "0")
    assert_refused(again, 1, r"the data of .* have changed")


def test_a_full_disk_ends_the_run_cleanly_and_it_can_go_on(tmp_path):
    """When a block file cannot be written the run ends with exit 1 and resumes once there is room, with equal bits."""
    edgeblocks_path = Path(sys.executable).with_name("edgeblocks")
    settings = "--steps 8 --batch 4 --set depth=3 --set width=64 --set sample_grids=0 --set visit_steps=2"
    train = f"{edgeblocks_path} train --mem-budget 2GB {settings} --set hold_out=0.02"

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


def test_training_says_how_it_goes_on_standard_error_and_prints_the_summary(edgeblocks_command, tmp_path):
    """A pipe of either sees no control characters; standard output has planned beside measured and the next command."""
    out = tmp_path / "run"
    done = edgeblocks_command("train", *TINY, "--mem-budget", "2GB", "--out", out)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout + done.stderr) & {"\r", "\x1b"}
    for expected in ("predicted peak", f"run directory: {out}", "creating blocks", "written", "loss 0:"):
        assert expected in done.stderr
    assert done.stdout == training_report(read_summary(out / "summary.json"), out) + "\n"
    for expected in ("planned", "measured", "validation loss", "next: edgeblocks sample"):
        assert expected in done.stdout


def test_a_report_has_dashes_for_what_a_summary_lacks():
    """An earlier edgeblocks wrote less into it; what is there is told."""
    report = training_report(Summary(peak_bytes=5_000_000, metrics=Metrics(validation_loss=float("nan"))), "run")
    assert re.search(r"peak memory +- +5 MB\nbudget +-\n", report) and "; - written to disk" in report
    assert "validation loss nan\n" in report


def test_a_live_line_is_written_to_the_terminal_alone(run, tmp_path):
    """What a command makes goes to a file while its progress is seen; each live line ends before the next text."""
    main, terminal = pty.openpty()
    with (tmp_path / "told").open("w") as told:
        command = [Path(sys.executable).with_name("edgeblocks"), "eval", run, "--samples", "4"]
        process = subprocess.Popen(command, stdout=told, stderr=terminal)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(main, 4096):
            seen += part
    os.close(main)
    assert process.wait() == 0, seen
    assert b"\r" in seen and seen.endswith(b"\n")
    assert not set((tmp_path / "told").read_text()) & {"\r", "\x1b"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_error_begins_on_a_line_of_its_own(monkeypatch):
    """Also where a live line was being written."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="broken"), ConsoleListener() as listener:
        listener.advance(1, 3, "counting")
        raise ValueError("broken")
    assert sys.stderr.getvalue().strip(" ").endswith("\n")


def test_the_progress_line_of_a_narrow_terminal_has_what_counts(monkeypatch):
    """How far it is, how long it takes, where it is, its memory and its loss; in a pipe everything."""
    progress = Progress(
        block=0,
        step=244,
        steps_done=156,
        steps_total=200,
        losses={0: 0.623, **dict.fromkeys(range(1, 12), 0.5)},
        used_bytes=496_000_000,
        budget_bytes=600_000_000,
        bytes_written=189_000_000,
        examples_per_s=58.0,
        started=time.perf_counter() - 60,
    )
    monkeypatch.setenv("COLUMNS", "80")
    lines = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        listener = ConsoleListener()
        for done in (150, 156):
            listener._last = 0.0
            listener.step(dataclasses.replace(progress, steps_done=done))
        lines[stream.isatty()] = stream.getvalue().replace("\r", "\n").splitlines()[-1].rstrip()
    assert len(lines[True]) < 80
    for shown in (" 78%", "block 0 step 244", "loss 0:0.623", "496 MB/600 MB", " left"):
        assert shown in lines[True] and shown in lines[False]
    assert "189 MB written" in lines[False] and "stall" in lines[False] and "11:0.500" in lines[False]


def test_every_verb_prints_its_result_alone(run, tmp_path, capfd):
    """Standard output begins with the result; that a verb is at work is said on standard error."""
    first_words = {
        ("plan", *TINY, "--mem-budget", "2GB"): "edgeblocks: dit dit-tiny, ",
        ("train", *TINY, "--mem-budget", "2GB", "--dry-run"): "edgeblocks: dit dit-tiny, ",
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
    done = invoke("train", *TINY, "--mem-budget", "2GB", "--out", tmp_path / "run", "--json")
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    promised = (
        "family method blocks layers_per_block parameters steps budget_bytes predicted_peak_bytes peak_bytes "
        "ram_peak_bytes disk_bytes seconds images_or_tokens_per_s time_split metrics resumed_from"
    )
    assert set(promised.split()) <= summary.keys()
    assert {"compute", "load", "store", "data", "other"} <= summary["time_split"].keys()
    plan = json.loads(invoke("plan", *TINY, "--mem-budget", "2GB", "--json").stdout)
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


def test_a_family_beside_resume_is_named_as_it_was_typed(copy):
    assert_refused(invoke("train", "mdlm", "--resume", copy), 2, "may be others; leave out 'mdlm', or start a new run")
    assert_refused(invoke("train", "mldm"), 2, r"there is no family 'mldm'; .*did you mean 'mdlm'\?")


def test_a_terminal_that_does_not_know_a_character_gets_a_question_mark(run, edgeblocks_command):
    progress = edgeblocks_command("eval", run, "--samples", "0", env={"PYTHONIOENCODING": "ascii"})
    assert progress.returncode == 0 and "?" in progress.stdout and "Traceback" not in progress.stderr
