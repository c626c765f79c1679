"""The wheel is one package out of three folders, with its data."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_built_wheel_holds_everything_and_works_elsewhere(tmp_path):
    """A wheel built from the tree, unpacked elsewhere, imports all parts and plans from its own presets and digits."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("edgeblocks-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for expected in (
        "edgeblocks/targets/cpu.py",
        "edgeblocks/export/sampler.py",
        "edgeblocks/export/web/index.html",
        "edgeblocks/export/web/chains.js",
        "edgeblocks/families/dit.py",
        "edgeblocks/recipes/dit-xl.yaml",
        "edgeblocks/targets/profiles/rtx3060-12gb.yaml",
        "edgeblocks/data/digits.npz",
        "edgeblocks/data/moby_dick.txt.xz",
        "edgeblocks/report/templates/page.html",
        "edgeblocks/py.typed",
    ):
        assert expected in names
    assert not any(name.startswith(("tests/", "targets/", "export/")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import edgeblocks, edgeblocks.targets.cpu, edgeblocks.export.sampler;"
        f"assert edgeblocks.__file__.startswith({str(tmp_path)!r}), edgeblocks.__file__;"
        "print(edgeblocks.plan(mem_budget='2GB', depth=3, width=16, steps=2).plan.chosen.blocks)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_the_folders_refuse_to_be_imported_under_their_own_names():
    """`import targets` from the source tree is an error that names the right package, not a second copy."""
    for folder in ("targets", "export"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert f"this package is edgeblocks.{folder}" in done.stderr
