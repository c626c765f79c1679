"""Ways to train, by name."""

import re

import pytest

from edgeblocks.compare.arms import Arm, arms_of
from edgeblocks.errors import ConfigError


def test_extras_have_one_order():
    """So that one arm has one folder."""
    assert Arm.parse("plain+8bit+ckpt").name == "plain+ckpt+8bit"
    with pytest.raises(ConfigError):
        Arm.parse("plain+8bit+8bit")


@pytest.mark.parametrize("name", ["exakt", "exact+8bit", ""])
def test_an_arm_that_does_not_exist_is_refused(name):
    with pytest.raises(ConfigError, match=f"there is no arm '{re.escape(name)}'"):
        arms_of(f"diffusion,{name}", print)
