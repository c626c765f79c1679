"""Exports that former versions wrote: two blocks of width 8 on digits, with random weights.

`blocks` is of the last version that wrote a graph a block only, `chain` of the first one that wrote the whole chain in
one file. `expected.npy` beside each is what that version made of it.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.commands import invoke

import edgeblocks
from edgeblocks.export.manifest import read_manifest

ARCHIVE = Path(__file__).with_name("former_exports.tar.xz")


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    folder = tmp_path_factory.mktemp("former")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(("form", "version"), [("blocks", 2), ("chain", 3)])
def test_an_export_of_a_former_version_still_runs(former, tmp_path, form, version):
    """It makes the images that it made then, from Python and from the command line, and is described."""
    expected = np.load(former / form / "expected.npy").astype(int)
    assert read_manifest(former / form).format_version == version
    found = edgeblocks.open_export(former / form).sample(2, steps=4, guidance=2, seed=1)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 20
    asked = ("--n", "2", "--steps", "4", "--guidance", "2", "--seed", "1")
    assert invoke("run", former / form, "-o", tmp_path / "grid.png", *asked).exit_code == 0
    assert "images" in invoke("info", former / form).stdout
