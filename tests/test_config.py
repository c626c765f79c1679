import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks import config
from edgeblocks.config import (
    RunSettings,
    load_preset,
    parse_assignments,
    preset_names,
    read_yaml,
    resolve_settings,
)
from edgeblocks.errors import ConfigError
from edgeblocks.families.dit import DitSettings
from edgeblocks.registry import family_type


def resolve(given=(), config=None):
    return resolve_settings(dict(given), family_settings=lambda name: family_type(name).settings_type, config=config)


def problems_of(given=(), config=None):
    with pytest.raises(ConfigError) as caught:
        resolve(given, config)
    return caught.value.problems


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


@pytest.mark.parametrize("key", list(RunSettings.model_fields))
def test_every_run_setting_rejects_wrong_types(key):
    """Each field of RunSettings refuses a list and a text (or, where a text is fine, a number), naming the field."""
    takes_text = isinstance(RunSettings().model_dump()[key], str) or key in ("work_dir", "init", "init_fresh")
    for wrong in ([1, 2], {"a": 1}, 5 if takes_text else "certainly not"):
        if wrong == 5 and RunSettings().model_dump()[key] == "auto":
            wrong = 0.5  # noqa: PLW2901 - 5 blocks are fine
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


@pytest.mark.parametrize("given", [{"preset": 5}, {"preset": ["dit-s"]}, {"family": ["dit"]}, {"family": 3}, {7: 1}])
def test_nonsense_names_in_a_file_are_configuration_errors(given):
    """A preset, family or key that is no text is reported like any other mistake."""
    assert problems_of(config=given)


def test_a_preset_of_another_family_is_refused(monkeypatch, tmp_path):
    """A preset whose family is not the one asked for is an error that names both."""
    (tmp_path / "odd.yaml").write_text("family: vit\n")
    monkeypatch.setattr(config.resources, "files", lambda _: tmp_path)
    (problem,) = problems_of({"family": "dit", "preset": "odd"})
    assert "'vit'" in problem
    assert "'dit'" in problem


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


def test_settings_cannot_be_changed():
    """Resolved settings are frozen, so that what config.yaml says is what ran."""
    settings = resolve()
    for target, key in ((settings.run, "steps"), (settings.family, "width"), (settings, "run")):
        with pytest.raises(Exception, match=r"frozen|cannot assign"):
            setattr(target, key, 3)
    assert set(asdict(settings.family)).isdisjoint(settings.run.model_dump())


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path)


BILLION_LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BILLION_LAUGHS, r"an alias \('a0'\) is not read here; write the value out"),
        ("data: &x [*x]", "an alias"),
        ("data: " + "[" * 10_000, "nested more than 8 levels deep"),
        ("data: " + "{a: " * 100, "nested more than 8 levels deep"),
        ("steps: 0x" + "f" * 5000, "a whole number has more than 40 digits"),
        ("steps: " + "9" * 5000, "a whole number has more than 40 digits"),
        ("steps: 1" + ":59" * 5000, "a whole number has more than 40 digits"),
        ("batch: !!int ''", "a value does not suit its tag"),
        ("batch: !!bool 5", "a value does not suit its tag"),
        ("data: !!timestamp soon", "a value does not suit its tag"),
        ("data: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("data: " + "x" * 70_000, "it has 70006 bytes, and at most 65536 are read"),
        ("\n".join(f"k{n}: 1" for n in range(300)), "holds 300 settings; there are fewer than 200"),
    ],
    ids=range(13),
)
def test_a_settings_file_that_is_short_to_write_and_long_to_use_is_refused(tmp_path, content, words):
    """Aliases, depth, digits, tags and sizes have limits; nothing but ConfigError is raised."""
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "a.yaml", content)


def test_a_settings_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    """Opening it would block until somebody writes."""
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_yaml(tmp_path / "a.yaml")


def test_a_date_is_a_text(tmp_path):
    """A folder may be named after a day, and after one that does not exist."""
    assert read(tmp_path / "a.yaml", "data: 2024-05-01") == {"data": "2024-05-01"}
    assert parse_assignments(["data=2024-99-99"]) == {"data": "2024-99-99"}


@pytest.mark.parametrize("assignment", ["data=*a", "data=" + "[" * 1000, "data=0x" + "f" * 9000, "data=!!bool 5"])
def test_an_assignment_that_is_no_yaml_is_a_text(assignment):
    """Whatever stands behind the equals sign, it is a value or a text."""
    assert parse_assignments([assignment]) == {"data": assignment.removeprefix("data=")}


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
