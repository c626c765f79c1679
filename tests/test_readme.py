"""What the README promises can be typed as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.readme import README, code_after


@pytest.mark.slow
def test_the_python_example_runs_as_printed(tmp_path):
    """The README's Python lines train, sample and export in an empty directory."""
    code = code_after("test: python") + "\nassert images.shape == (16, 8, 8, 1), images.shape\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/python-onnx/manifest.json").exists()


def test_every_command_in_the_readme_has_valid_options(edgeblocks_command):
    """Each `edgeblocks VERB` line of the README uses only options that the verb has."""
    commands = re.findall(r"(?:^|&& )(?:\$ |\.venv/bin/)?edgeblocks (\w+) +([^\n#&]*)", README, re.MULTILINE)
    assert len(commands) > 6
    helps = {verb: edgeblocks_command(verb, "--help", env={"COLUMNS": "200"}).stdout for verb, _ in commands}
    for verb, rest in commands:
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helps[verb]), f"{verb} {option}"


def test_local_links_and_pictures_exist():
    """No link of the README points to a file that is not there."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
    assert (Path(__file__).parents[1] / "docs/digits.png").stat().st_size > 1000
