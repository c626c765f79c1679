"""`edgeblocks settings`: every setting, with what is checked of it."""

import json
from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import Field
from support.commands import assert_refused, invoke

from edgeblocks.families.settings import FamilySettings
from edgeblocks.registry import family_type
from edgeblocks.settings.fields import RunSettings
from edgeblocks.settings.table import family_settings, run_settings

FAMILIES = ("dit", "vit", "mdlm", "ar", "looped")


def test_every_setting_has_a_meaning_a_range_and_its_default():
    """Of all families too; none is told twice in other words."""
    tables = [run_settings(), family_settings({name: family_type(name).settings_type for name in FAMILIES})]
    assert [setting.name for setting in tables[0]] == list(RunSettings.model_fields)
    for setting in (one for table in tables for one in table):
        assert setting.meaning and setting.allowed and setting.default, setting
        assert not setting.meaning.endswith("."), setting


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [("hold_out", 0.5, 0.6), ("image_size", 4096, 4097), ("overlap", 1, 1.1), ("ema_length", 0, 0.28)],
)
def test_the_range_that_is_told_is_the_one_that_is_checked(name, inside, outside):
    told = {setting.name: setting.allowed for setting in run_settings()}
    expected = {"hold_out": "0 to 0.5", "image_size": "none or 1 to 4,096", "overlap": "0 to 1"}
    assert told[name] == expected.get(name, "0 to below 0.28")
    RunSettings(**{name: inside})
    with pytest.raises(ValueError, match=name):
        RunSettings(**{name: outside})


def test_a_family_of_ones_own_is_listed_too():
    """What its fields say; a meaning where they have one."""

    @dataclass(frozen=True, kw_only=True)
    class Own(FamilySettings):
        kernel: Annotated[int, Field(ge=1, le=9, description="side of a kernel")] = 3
        plain: Annotated[float, Field(gt=0)] = 0.5

    kernel, plain = family_settings({"own": Own})
    assert (kernel.name, kernel.default, kernel.allowed, kernel.meaning) == (
        "kernel",
        "3",
        "1 to 9",
        "side of a kernel",
    )
    assert plain.allowed == "above 0" and plain.meaning == ""


def test_the_command_prints_them_for_one_family_or_for_all(monkeypatch):
    """No line wider than the terminal; JSON has the same; an unknown family is refused."""
    monkeypatch.setenv("COLUMNS", "90")
    printed = invoke("settings", "vit").stdout
    assert "randaugment_strength" in printed and "code_width" not in printed and "of every run:" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 90
    found = json.loads(invoke("settings", "--json").stdout)
    assert {"width", "steps", "code_width"} <= {setting["name"] for setting in found}
    assert_refused(invoke("settings", "vti"), 2, "there is no family 'vti'")
