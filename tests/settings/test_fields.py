"""What a setting may be: types, ranges, paths."""

import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.given_settings import problems_of, resolve

from edgeblocks.errors import ConfigError
from edgeblocks.families.dit import DitSettings
from edgeblocks.settings.fields import RunSettings
from edgeblocks.settings.reading import read_yaml


@pytest.mark.parametrize("key", list(RunSettings.model_fields))
def test_every_run_setting_rejects_wrong_types(key):
    """Each field of RunSettings refuses a list and a text (or, where a text is fine, a number), naming the field."""
    takes_text = isinstance(RunSettings().model_dump()[key], str) or key in ("vae", "work_dir", "init", "init_fresh")
    for wrong in ([1, 2], {"a": 1}, 5 if takes_text else "certainly not"):
        if wrong == 5 and RunSettings().model_dump()[key] == "auto" and key != "shared":
            wrong = 0.5  # noqa: PLW2901 - 5 blocks are fine, and half of the steps
        try:
            resolve({key: wrong})
        except ConfigError as error:
            assert any(key in problem or "family" in problem for problem in error.problems), error.problems
        else:
            pytest.fail(f"{key}={wrong!r} was taken")


@pytest.mark.parametrize(
    "key", [key for key, value in RunSettings().model_dump().items() if type(value) in (int, float)]
)
def test_no_number_is_given_by_true(key):
    """YAML's `yes` is not a count: a boolean is refused where a number is needed."""
    (problem,) = problems_of({key: True})
    assert problem.startswith(f"{key}=True")


@pytest.mark.parametrize("field", fields(DitSettings), ids=lambda field: field.name)
def test_every_family_setting_rejects_wrong_types(field):
    """Each field of DitSettings refuses a text, a list and (unless it is one) a boolean."""
    for wrong in ["many", [1], *([] if isinstance(field.default, bool) else [True])]:
        (problem,) = problems_of({field.name: wrong})
        assert problem.startswith(f"{field.name}={wrong!r}")
        assert ": input should be a valid " in problem
    if isinstance(field.default, int):
        (problem,) = problems_of({field.name: 1.5})
        assert problem.startswith(f"{field.name}=1.5")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch", -1),
        ("hold_out", 0.6),
        ("learning_rate", 0.0),
        ("ema_length", 0.3),
        ("overlap", -0.1),
        ("blocks", 0),
        ("micro_batch", 1.5),
        ("visit_steps", "soon"),
        ("tier", "device"),
        ("optimizer", "sgd"),
        ("partition", "even"),
        ("mem_budget", "6XB"),
        ("mem_budget", "120%"),
        ("data", ""),
        ("image_size", 0),
        ("width", 0),
        ("depth", -1),
        ("p_std", 0.0),
        ("sigma_min", 0.0),
        ("sigma_min", 90.0),
        ("label_dropout", 1.0),
    ],
)
def test_a_value_out_of_range_is_named_with_its_value(key, value):
    """Values that make no sense are refused before anything runs."""
    (problem,) = problems_of({key: value})
    assert key in problem
    assert str(value) in problem


@pytest.mark.parametrize("key", ["p_mean", "p_std", "sigma_max", "learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(key, value):
    """`.nan` and `.inf` are refused, whichever way a comparison with them falls."""
    problems = problems_of({key: value})
    assert any(key in problem for problem in problems)


def test_a_noise_distribution_with_no_mass_in_the_range_is_refused():
    """p_mean so far outside [sigma_min, sigma_max] that no quantile is left between them is a problem, not a crash."""
    problems = problems_of({"p_mean": -20.0})
    assert any("p_mean" in problem for problem in problems)


@given(
    seed=st.integers(0, 2**31),
    learning_rate=st.floats(1e-9, 1e3),
    sigma_min=st.floats(1e-8, 1.0),
    blocks=st.one_of(st.just("auto"), st.integers(1, 12)),
    checkpointing=st.sampled_from([True, False, "auto"]),
    data=st.text(min_size=1).filter(str.strip),
    flip=st.booleans(),
)
def test_settings_survive_their_yaml(**values):
    """Settings written by to_yaml and read as a config file are the same settings, to the last bit."""
    settings = resolve({"preset": "dit-b", **values})
    again = resolve(config=yaml.safe_load(settings.to_yaml()))
    assert again == settings
    assert type(again.run.checkpointing) is type(settings.run.checkpointing)


def test_settings_survive_a_file(tmp_path):
    """The same through config.yaml on disk, non-ASCII paths included; and one changed value is seen."""
    settings = resolve({"data": "bilder/grün.npz", "learning_rate": 3e-5})
    (tmp_path / "config.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    again = resolve(config=read_yaml(tmp_path / "config.yaml"))
    assert again == settings
    assert resolve({"width": 64}, read_yaml(tmp_path / "config.yaml")).family == replace(settings.family, width=64)


def test_settings_cannot_be_changed():
    """Resolved settings are frozen, so that what config.yaml says is what ran."""
    settings = resolve()
    for target, key in ((settings.run, "steps"), (settings.family, "width"), (settings, "run")):
        with pytest.raises(Exception, match=r"frozen|cannot assign"):
            setattr(target, key, 3)
    assert set(asdict(settings.family)).isdisjoint(settings.run.model_dump())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 2**31),
        ("batch", 2**21),
        ("seed", 2**64),
        ("blocks", 5000),
        ("micro_batch", 2**21),
        ("visit_steps", 2**31),
        ("sample_grids", 10**6),
        ("sample_steps", 10**6),
        ("warmup", 10**12),
        ("width", 2**21),
        ("depth", 10**9),
        ("heads", 10**6),
        ("patch", 10**6),
        ("sigma_max", 10**400),
        ("p_mean", -(10**400)),
        ("learning_rate", 10**400),
        ("mem_budget", "9" * 400 + "GB"),
        ("max_disk_writes", "9" * 400),
        ("data", "\ud800"),
        ("target", "\udcff"),
        ("work_dir", "a\0b"),
        ("work_dir", "~nobody-of-this-name/x"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "backslashreplace").decode(),
)
def test_a_size_that_nothing_can_hold_is_a_problem_of_its_own(key, value):
    """Before anything is allocated, and in words that name the setting."""
    problems = problems_of({key: value})
    assert len(problems) == 1 or key in ("width", "heads"), problems
    assert key in problems[0]


def test_a_wrong_value_is_shown_in_short():
    """A list of a million entries, or one inside itself a thousand times, does not fill the screen."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in ([0] * 10**6, deep, "x" * 10**6, {"a": 10**5000}):
        for key in ("steps", "heads"):
            (problem,) = problems_of({key: value})
            assert problem.startswith(f"{key}=") and len(problem) < 400


@pytest.mark.parametrize("name", ["data", "work_dir", "init", "tokenizer"])
def test_a_path_that_is_no_text_is_refused_with_its_bytes(name, tmp_path, monkeypatch):
    """As it is typed, or because of the folder that it is in; a run's files keep text."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9")
    with pytest.raises(ConfigError, match=rf"{name}=.*not UTF-8, .*: ln -s \$'{tmp_path}/d\\xe9' LINK"):
        resolve({name: folder})
    Path(folder).mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=rf"{name}={tmp_path}/d\\xe9/here: its path holds bytes that are not UTF-8"):
        resolve({name: "here"}).with_whole_paths()


def test_a_path_that_python_reads_as_another_encoding_names_the_setting():
    """In a locale without UTF-8 even sound names are read as bytes."""
    problems = problems_of({"data": "d\udcc3\udca9"})
    assert any("names are read as" in problem and "set PYTHONUTF8=1" in problem for problem in problems)


def test_a_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    """The one that the process is in."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match=r"data=here: the folder that .* in is gone; cd to another"):
        resolve({"data": "here"}).with_whole_paths()
