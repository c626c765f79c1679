"""Settings from the command line, a file and a preset: which wins, and all mistakes at once."""

import os

import pytest
from support.given_settings import problems_of, resolve

from edgeblocks.errors import ConfigError
from edgeblocks.families.dit import DitSettings
from edgeblocks.settings import presets
from edgeblocks.settings.presets import load_preset, preset_names
from edgeblocks.settings.reading import parse_assignments, read_yaml


def test_all_problems_are_reported_at_once():
    """Unknown keys, wrong types, and values out of range of the run and of the family come in one error."""
    given = {"patchh": 2, "steps": 0, "learning_rate": "fast", "width": 130, "label_dropout": 1.5}
    problems = problems_of(given)
    assert len(problems) == len(given)
    for key in given:
        assert sum(key in problem for problem in problems) == 1, f"{key} in {problems}"


def test_wrong_types_of_the_family_do_not_hide_problems_of_the_run():
    """A family setting of the wrong type and a run setting out of range are both reported."""
    problems = problems_of({"heads": "four", "hold_out": 0.9})
    assert sorted(problem.partition("=")[0] for problem in problems) == ["heads", "hold_out"]


@pytest.mark.parametrize(("wrong", "right"), [("lerning_rate", "learning_rate"), ("dept", "depth"), ("step", "steps")])
def test_a_misspelled_key_names_the_right_one(wrong, right):
    """An unknown setting is answered with the closest known one."""
    (problem,) = problems_of({wrong: 1})
    assert f"unknown setting '{wrong}'" in problem
    assert f"did you mean '{right}'" in problem


def test_a_key_like_nothing_known_lists_all():
    """Where no known key is close, all are listed."""
    (problem,) = problems_of({"qqqqqqqq": 1})
    for key in ("learning_rate", "width", "mem_budget"):
        assert key in problem


def test_a_misspelled_preset_or_family_names_the_choice():
    """An unknown preset lists the presets and the closest; an unknown family lists the families."""
    (problem,) = problems_of({"preset": "dit-sx"})
    assert "did you mean 'dit-" in problem
    assert all(name in problem for name in preset_names())
    (problem,) = problems_of({"family": "did"})
    assert "'did'" in problem
    assert "dit" in problem.replace("'did'", "")


def test_precedence_is_given_over_config_over_preset_over_default():
    """Each source wins over the next; None in `given` means not given."""
    default = DitSettings()
    preset = load_preset("dit-s")
    assert (preset["width"], preset["heads"]) != (default.width, default.heads)
    settings = resolve(
        {"width": 512, "heads": None, "seed": 7}, {"preset": "dit-s", "width": 256, "heads": 8, "seed": 3}
    )
    assert settings.family.width == 512  # given
    assert settings.family.heads == 8  # config file
    assert settings.family.depth == preset["depth"]
    assert settings.family.p_mean == default.p_mean
    assert settings.run.seed == 7
    assert settings.run.preset == "dit-s"


def test_a_given_preset_wins_over_the_config_files():
    """The preset itself follows the precedence, before its values are read."""
    settings = resolve({"preset": "dit-l"}, {"preset": "dit-s"})
    assert settings.family.width == load_preset("dit-l")["width"]


@pytest.mark.parametrize("given", [{"preset": 5}, {"preset": ["dit-s"]}, {"family": ["dit"]}, {"family": 3}, {7: 1}])
def test_nonsense_names_in_a_file_are_configuration_errors(given):
    """A preset, family or key that is no text is reported like any other mistake."""
    assert problems_of(config=given)


def test_a_preset_of_another_family_is_refused(monkeypatch, tmp_path):
    """A preset whose family is not the one asked for is an error that names both."""
    (tmp_path / "odd.yaml").write_text("family: vit\n")
    monkeypatch.setattr(presets.resources, "files", lambda _: tmp_path)
    (problem,) = problems_of({"family": "dit", "preset": "odd"})
    assert "'vit'" in problem
    assert "'dit'" in problem


def test_numbers_in_scientific_notation_need_no_dot(tmp_path):
    """`3e-4` is a number with --set and in a file, for settings of the run and of the family."""
    assignments = parse_assignments(["learning_rate=3e-4", "sigma_min=2e-3"])
    assert assignments == {"learning_rate": 3e-4, "sigma_min": 2e-3}
    path = tmp_path / "settings.yaml"
    path.write_text("learning_rate: 3e-4\nsigma_min: 2e-3\n")
    for settings in (resolve(assignments), resolve(config=read_yaml(path))):
        assert settings.run.learning_rate == 3e-4
        assert settings.family.sigma_min == 2e-3


def test_dashes_in_keys_are_underscores():
    """--set accepts a key as the flags are written."""
    assert parse_assignments(["learning-rate=0.1", " ema-length =0.2"]) == {"learning_rate": 0.1, "ema_length": 0.2}


@pytest.mark.parametrize("assignment", ["patch", "=2", ""])
def test_an_assignment_without_key_or_equals_sign_is_refused(assignment):
    """The error shows how to write it."""
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignments([assignment])


def test_values_keep_what_follows_the_first_equals_sign():
    """A path may hold an equals sign, brackets or a colon."""
    assert parse_assignments(["data=a=b.npz"]) == {"data": "a=b.npz"}
    assert parse_assignments(["data=[a: b"]) == {"data": "[a: b"}


def test_an_unreadable_file_is_a_configuration_error(tmp_path):
    """Missing, a folder, broken YAML, not text, or not a mapping: the file is named."""
    broken, listing, binary = (tmp_path / name for name in ("broken.yaml", "list.yaml", "binary.yaml"))
    broken.write_text("a: [1")
    listing.write_text("- a\n- b\n")
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "missing.yaml", tmp_path, broken, listing, binary):
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert str(path) in str(caught.value)


def test_a_settings_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    """Opening it would block until somebody writes."""
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_yaml(tmp_path / "a.yaml")
