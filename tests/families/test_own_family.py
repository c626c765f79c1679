"""docs/own_family.md as a stranger follows it: a network of one's own in one file."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import Field
from support.commands import assert_refused, invoke
from support.pages import code_after

import edgeblocks
from edgeblocks import registry
from edgeblocks.errors import ConfigError
from edgeblocks.families.denoiser import DenoiserSettings, ImageDenoiser, OwnDenoiser
from edgeblocks.settings.reading import resolve_settings


@pytest.mark.slow
def test_the_page_works(tmp_path):
    """Planned, trained from disk inside its budget, sampled, exported and verified; streamed equals resident.

    The exported network runs where the family is not known.
    """
    (tmp_path / "my_family.py").write_text(code_after("test: my_family.py"))
    first = (
        "import torch\n"
        "traced, usual = [], torch.onnx.export\n"
        "torch.onnx.export = lambda *given, **named: traced.append(given) or usual(*given, **named)\n"
    )
    more = (
        "assert len(traced) == 4  # once to see that its parameters are not found, then each of three blocks\n"
        "assert images.shape == (4, 8, 8, 1)\n"
        "assert run.summary['peak_bytes'] <= run.summary['budget_bytes']\n"
        "plan = run.directory.plan\n"
        "assert plan.blocks == 3\n"
        "same = dict(settings, micro_batch=plan.micro_batch, checkpointing=plan.checkpointing)\n"
        "edgeblocks.train(**same, tier='ram', out='resident')\n"
        "from pathlib import Path\n"
        "from safetensors.numpy import load_file\n"
        "for path in sorted(Path('run/blocks').iterdir()):\n"
        "    one, two = load_file(path), load_file(Path('resident/blocks') / path.name)\n"
        "    assert all(one[name].tobytes() == two[name].tobytes() for name in one), path\n"
        "    assert abs(one['ema.layers.0.norm.weight'] - 1).max() < 0.1\n"
    )
    (tmp_path / "train.py").write_text(first + code_after("test: train.py") + more)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = invoke("run", tmp_path / "onnx", "-o", tmp_path / "grid.png", "--n", "4")
    assert ran.exit_code == 0, ran.stderr
    assert_refused(invoke("eval", tmp_path / "run"), 1, "there is no family 'conv'.*register_family")


@dataclass(frozen=True, kw_only=True)
class OwnSettings(DenoiserSettings):
    kernel: Annotated[int, Field(ge=1)] = 3
    groups: int = 4


@dataclass(frozen=True, kw_only=True)
class ForeignSettings:
    """Derived from nothing of the package's."""

    size: int = 3

    def problems(self):
        return ["size=2 is even"] if self.size % 2 == 0 else []


@pytest.mark.parametrize(
    ("settings_type", "given", "words"),
    [
        (
            OwnSettings,
            {"kernel": 0, "groups": "many", "label_dropout": 1.0},
            ["kernel=0", "groups='many'", "dropout=1.0"],
        ),
        (OwnSettings, {"width": 0, "kernel": True, "sigma_max": 1e-3}, ["width=0", "kernel=True", "sigma_max=0.001"]),
        (ForeignSettings, {"size": 1.5}, ["size=1.5"]),
        (ForeignSettings, {"size": 2}, ["size=2 is even"]),
    ],
)
def test_settings_of_ones_own_are_checked_by_their_annotations(settings_type, given, words):
    """Types and ranges, with those that are inherited, all at once; and what the settings find themselves."""
    with pytest.raises(ConfigError) as caught:
        resolve_settings({"family": "own", **given}, family_settings=lambda name: settings_type)
    assert len(caught.value.problems) == len(words)
    assert all(any(word in problem for problem in caught.value.problems) for word in words)


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
