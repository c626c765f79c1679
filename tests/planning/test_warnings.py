"""What a plan warns of, and what it does not: its own choices."""

from dataclasses import replace

import pytest
from support.commands import invoke
from support.made_up_plans import MACHINE, REQUEST, costs

from edgeblocks.planning.planner import make_plan
from edgeblocks.prepare import good_layers
from edgeblocks.registry import family_type
from edgeblocks.settings.presets import load_preset, preset_names


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_in_its_familys_usual_cut_has_enough_layers_a_block(preset):
    """None is warned of for what nobody but the family chose."""
    content = load_preset(preset)
    family = family_type(content["family"])
    assert content["depth"] // family.preferred_blocks >= good_layers(content["family"])


def test_fewer_layers_than_a_familys_usual_cut_has_are_warned_of():
    """Twelve layers in four blocks: of a family with three blocks, or asked for; not of one that is cut into four."""
    four = replace(REQUEST, preferred_blocks=4)
    assert any("fewer than 4 cost quality" in text for text in make_plan(costs(), MACHINE, four).warnings)
    assert make_plan(costs(), MACHINE, replace(four, good_layers=3)).warnings == ()
    six = replace(four, good_layers=3, blocks=6)
    assert any("2 layers a block: fewer than 3" in text for text in make_plan(costs(), MACHINE, six).warnings)


def test_the_default_preset_of_every_family_is_planned_without_a_note():
    """`ar` is cut into four blocks of three layers by itself."""
    done = invoke("plan", "ar", "--mem-budget", "4GB")
    assert done.exit_code == 0 and "\nnote:" not in done.stdout, done.stdout
