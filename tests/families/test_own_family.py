"""docs/own_family.md as a stranger follows it: a network of one's own in one file."""

import subprocess
import sys

import pytest
from support.pages import code_after

import edgeblocks
from edgeblocks import registry
from edgeblocks.errors import ConfigError
from edgeblocks.families.denoiser import ImageDenoiser, OwnDenoiser


@pytest.mark.slow
def test_the_page_works(tmp_path, edgeblocks_command):
    """Planned, trained from disk inside its budget, sampled, exported and verified; streamed equals resident.

    The exported network runs where the family is not known.
    """
    (tmp_path / "my_family.py").write_text(code_after("test: my_family.py"))
    more = (
        "assert images.shape == (4, 8, 8, 1)\n"
        "assert run.summary['peak_bytes'] <= run.summary['budget_bytes']\n"
        "plan = run.directory.plan\n"
        "assert plan['blocks'] == 3\n"
        "same = dict(settings, micro_batch=plan['micro_batch'], checkpointing=plan['checkpointing'])\n"
        "edgeblocks.train(**same, tier='ram', out='resident')\n"
        "from pathlib import Path\n"
        "from safetensors.numpy import load_file\n"
        "for path in sorted(Path('run/blocks').iterdir()):\n"
        "    one, two = load_file(path), load_file(Path('resident/blocks') / path.name)\n"
        "    assert all(one[name].tobytes() == two[name].tobytes() for name in one), path\n"
        "    assert abs(one['ema.layers.0.norm.weight'] - 1).max() < 0.1\n"
    )
    (tmp_path / "train.py").write_text(code_after("test: train.py") + more)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = edgeblocks_command("run", tmp_path / "onnx", "-o", tmp_path / "grid.png", "--n", "4")
    assert ran.returncode == 0, ran.stderr
    unknown = edgeblocks_command("eval", tmp_path / "run")
    assert unknown.returncode == 1
    assert "there is no family 'conv'" in unknown.stderr and "register_family" in unknown.stderr


class Local(ImageDenoiser):
    name = "dit"


def test_what_cannot_be_registered_is_refused(monkeypatch):
    """A taken name, no name, a class that another process could not import, and one with parts missing."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    with pytest.raises(ConfigError, match="a name that is not taken, found 'dit'"):
        edgeblocks.register_family(Local)
    with pytest.raises(ConfigError, match="found ''"):
        edgeblocks.register_family(ImageDenoiser)

    class Inside(ImageDenoiser):
        name = "inside"

    class Half(OwnDenoiser):
        name = "half"

        def stem(self): ...

    with pytest.raises(ConfigError, match=r"the top of a module .* inside\.py"):
        edgeblocks.register_family(Inside)
    with pytest.raises(ConfigError, match="the family 'half' lacks layer, readout"):
        edgeblocks.register_family(Half)
