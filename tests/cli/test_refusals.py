"""Wrong uses of the command, each with its message and exit code."""

import os
import re
import shutil

import numpy as np
import pytest
from support.commands import TINY, assert_refused, invoke

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
    result = invoke("train", "--data", tmp_path / "set.npz", "--mem-budget", "4GB", "--out", tmp_path / "run", *TINY)
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
        r"only --data, --max-disk-writes, --mem-budget, --precision, --ram-budget, --steps, --target, --vae, "
        r"--work-dir may ",
    )


def test_a_family_beside_resume_is_named_as_it_was_typed(copy):
    assert_refused(invoke("train", "mdlm", "--resume", copy), 2, "may be others; leave out 'mdlm', or start a new run")
    assert_refused(invoke("train", "mldm"), 2, r"there is no family 'mldm'; .*did you mean 'mdlm'\?")


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
