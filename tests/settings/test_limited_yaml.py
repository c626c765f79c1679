"""Settings files and assignments that are short to write and long to use."""

import pytest

from edgeblocks.errors import ConfigError
from edgeblocks.settings.reading import parse_assignments, read_yaml


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


def test_a_date_is_a_text(tmp_path):
    """A folder may be named after a day, and after one that does not exist."""
    assert read(tmp_path / "a.yaml", "data: 2024-05-01") == {"data": "2024-05-01"}
    assert parse_assignments(["data=2024-99-99"]) == {"data": "2024-99-99"}


@pytest.mark.parametrize("assignment", ["data=*a", "data=" + "[" * 1000, "data=0x" + "f" * 9000, "data=!!bool 5"])
def test_an_assignment_that_is_no_yaml_is_a_text(assignment):
    """Whatever stands behind the equals sign, it is a value or a text."""
    assert parse_assignments([assignment]) == {"data": assignment.removeprefix("data=")}
