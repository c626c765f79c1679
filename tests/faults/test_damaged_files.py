"""Files of a run that were damaged: each is named before it is used, and can be mended."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from support.child_processes import in_child
from support.faulty_runs import (
    BLOCK,
    HALF,
    assert_goes_on,
    assert_sound,
    lay_out_elsewhere,
    refused,
    resume,
    saved_steps,
    train,
)
from support.watched_run import BLOCKS, assert_equal_runs, read_block

pytestmark = pytest.mark.slow


def rewrite(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content)))


def flipped(content, place):
    content[int(place * len(content))] ^= 16
    return content


def older(path):
    """A block file as an older version wrote it."""
    rewrite(path, lambda content: content.replace(b'"format_version":"1"', b'"format_version":"0"'))


DAMAGES = {
    "flipped weight": (
        lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.1)),
        r"block 2 is damaged: the weights",
    ),
    "flipped EMA": (lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.6)), r"block 2 is damaged: the ema in"),
    "flipped state": (
        lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.9)),
        r"block 2 is damaged: the optimizer",
    ),
    "flipped header": (
        lambda run, _: rewrite(run / BLOCK, lambda c: flipped(c, 0.002)),
        r"block 2 is damaged: .*header",
    ),
    "truncated": (lambda run, _: os.truncate(run / BLOCK, 200_000), r"block 2 is damaged: .* 200000 bytes .*cut short"),
    "empty": (lambda run, _: os.truncate(run / BLOCK, 0), r"block 2 is damaged: .*cut short \(0 bytes\)"),
    "missing": (lambda run, _: (run / BLOCK).unlink(), r"block 2 is missing: there is no file"),
    "of another block": (
        lambda run, _: shutil.copy(run / "blocks/block_001.safetensors", run / BLOCK),
        r"is block 1 of run .*, but block 2 of run .* belongs here",
    ),
    "of another run": (
        lambda run, other: shutil.copy(other / BLOCK, run / BLOCK),
        r"is block 2 of run (?!REST)\w{8}, but block 2 of run \w{8} belongs here",
    ),
    "of an older version": (
        lambda run, _: older(run / BLOCK),
        r"block format version 0; this edgeblocks reads version 1. Use the edgeblocks that wrote it",
    ),
}


@pytest.fixture(scope="module")
def other_run(campaign, cache):
    """A run like the campaign's, with another identity."""
    run = campaign.folder / "other"
    in_child(lay_out_elsewhere, run, campaign.sealed_copy, cache, {})
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_named_before_use_and_trained_again_alone(half, other_run, campaign, cache, damage):
    """The message names block and file; the others lose no step; --reinit-block 2 gives the reference's bits."""
    inflict, message = DAMAGES[damage]
    inflict(half, other_run)
    text = refused("RunError", resume, half, cache)
    assert re.search(message, text), text
    assert str(half / BLOCK) in text
    for block in (0, 1, 3):
        assert read_block(half / f"blocks/block_{block:03d}.safetensors")[2] >= HALF[block]
    in_child(resume, half, cache, {"reinit_blocks": [2]})
    assert_equal_runs(half, campaign.reference)


def test_only_the_named_block_of_a_finished_run_is_trained_again(campaign, cache, tmp_path):
    """--reinit-block 3 on a finished run: the files of the other blocks are not even written, the bits come back."""
    run = Path(shutil.copytree(campaign.reference, tmp_path / "run"))
    (run / "blocks/block_003.safetensors").unlink()
    before = {path: path.stat().st_ino for path in (run / "blocks").glob("*")}
    in_child(resume, run, cache, {"reinit_blocks": [3]})
    assert {path: path.stat().st_ino for path in before} == before
    assert_equal_runs(run, campaign.reference)


def test_a_wrong_block_number_is_refused(half, cache):
    """--reinit-block 4 where there are blocks 0 to 3."""
    text = refused("ConfigError", resume, half, cache, {"reinit_blocks": [4]})
    assert text == f"--reinit-block 4: {half} has the blocks 0 to 3"
    assert saved_steps(half / "blocks") == HALF


SMALL_FILES = {
    "config.yaml flipped": ("config.yaml", lambda c: c.replace(b"seed: 0", b"seed: 1"), r"config.yaml .*checksum"),
    "plan.json flipped": (
        "plan.json",
        lambda c: c.replace(b'"visit_steps": 6', b'"visit_steps": 7'),
        r"plan.json .*checksum",
    ),
    "manifest.json flipped": (
        "manifest.json",
        lambda c: c.replace(b'"mean": 0.', b'"mean": 0.1'),
        r"manifest.json .*checksum",
    ),
    "config.yaml cut": ("config.yaml", lambda c: c[:100], r"is damaged"),
    "plan.json cut": ("plan.json", lambda c: c[:100], r"plan.json is damaged"),
    "manifest.json cut": ("manifest.json", lambda c: c[:100], r"manifest.json is damaged"),
    "config.yaml missing": ("config.yaml", None, r"config.yaml.*No such file"),
    "plan.json missing": ("plan.json", None, r"plan.json.*No such file"),
    "manifest.json missing": ("manifest.json", None, r"no manifest.json"),
    "manifest.json of an older version": (
        "manifest.json",
        lambda c: re.sub(rb',\s+"sha256": "\w+"', b"", c).replace(b'"format_version": 2', b'"format_version": 0'),
        r"has run format version 0; this edgeblocks .* reads version 2. Use the edgeblocks that wrote it",
    ),
}


@pytest.mark.parametrize("damage", SMALL_FILES)
def test_a_damaged_description_is_named_before_use(half, cache, damage):
    """config.yaml, plan.json, manifest.json: the file is named, with the way to mend it, and no block is touched."""
    name, change, message = SMALL_FILES[damage]
    before = {path: path.read_bytes() for path in (half / "blocks").iterdir()}
    if change is None:
        (half / name).unlink()
    else:
        content = bytearray((half / name).read_bytes())
        changed = change(content)
        assert changed != content
        (half / name).write_bytes(bytes(changed))
    text = refused("RunError", resume, half, cache)
    assert re.search(message, text), text
    assert "version" in damage or "from a copy" in text, text
    assert {path: path.read_bytes() for path in (half / "blocks").iterdir()} == before


def test_a_run_that_lost_its_manifest_is_not_trained_over(half, campaign, cache, tmp_path):
    """`train --out` into a run whose manifest.json is gone: refused, because its blocks are trained."""
    manifest = (half / "manifest.json").rename(tmp_path / "manifest.json")
    text = refused("ConfigError", train, half, cache, campaign.settings, tmp_path)
    assert str(half) in text
    assert "manifest.json" in text
    assert_sound(half)
    manifest.rename(half / "manifest.json")
    assert_goes_on(half, campaign)


def test_records_that_were_cut_are_passed_over(half, cache):
    """Half a line at the end of metrics.jsonl, as a power cut leaves it, does not stop a run."""
    path = half / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    in_child(resume, half, cache)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(record["block"], record["step"]) for record in records}) == len(records) == 36 * BLOCKS - 1
