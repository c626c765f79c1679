"""Settings that come with the package."""

import pytest
from support.given_settings import resolve

from edgeblocks.settings.presets import load_preset, preset_names


@pytest.mark.parametrize(
    ("preset", "width", "depth", "heads"),
    [("dit-s", 384, 12, 6), ("dit-b", 768, 12, 12), ("dit-l", 1024, 24, 16), ("dit-xl", 1152, 28, 16)],
)
def test_presets_are_those_of_the_dit_paper(preset, width, depth, heads):
    """Width, depth and heads of table 1 in arXiv 2212.09748."""
    family = resolve({"preset": preset}).family
    assert (family.width, family.depth, family.heads) == (width, depth, heads)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_resolves(preset):
    """All presets hold known keys and valid values, and name their family."""
    settings = resolve({"preset": preset})
    assert settings.run.preset == preset
    assert settings.run.family == load_preset(preset)["family"]
    assert not settings.family.problems()
