"""Files that anyone may have written: what is refused before it is opened, read or parsed."""

import json
import os

import pytest

from edgeblocks.files.untrusted import (
    MOST_JSON_DEPTH,
    MOST_JSON_VALUES,
    MalformedFileError,
    open_regular,
    parse_json,
    read_object,
    read_text,
    shown,
)


def test_a_pipe_is_not_waited_for(tmp_path):
    """Opening a pipe without a writer would block for ever; a device, a folder and a loop are refused as well."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "zero", "loop", ".", "missing"):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)


def test_a_file_is_not_read_beyond_its_limit(tmp_path):
    """A file with a hole of 1 TB is refused by its size, a system's file that claims none by what comes out of it."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(MalformedFileError, match="it has 1000000000000 bytes, and at most 100 are read"):
        read_text(tmp_path / "hole", most_bytes=100)
    with pytest.raises(MalformedFileError, match="and at most 100 are read"):
        read_text(tmp_path / "../../../../../../../../proc/self/status", most_bytes=100)


def test_text_that_is_not_utf8_is_named(tmp_path):
    """With the place of the first wrong byte."""
    (tmp_path / "text").write_bytes(b"abc\xff")
    with pytest.raises(MalformedFileError, match=r"not UTF-8 text .* at byte 3"):
        read_text(tmp_path / "text", most_bytes=100)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "[" * 300 + "]" * 300, '{"a": "' + "[" * 1000 + '"'])
def test_json_nested_without_end_is_refused(text):
    """However deep, and whether closed or not: no RecursionError, here or where the value is shown later."""
    with pytest.raises(MalformedFileError, match=f"more than {MOST_JSON_DEPTH} levels deep|not JSON|are read"):
        parse_json(text)


def test_brackets_inside_texts_do_not_count_as_depth():
    """A name full of brackets is a name."""
    value = {"names": ["[{" * 1000, '\\"[[' * 100]}
    assert parse_json(json.dumps(value)) == value


def test_as_many_values_as_fill_the_memory_are_refused():
    """Sixteen million bytes of `{},` would become more than a gigabyte."""
    with pytest.raises(MalformedFileError, match=f"at most {MOST_JSON_VALUES} are read"):
        parse_json("[" + "{}," * 5_000_000 + "1]")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", '{"a": [1, -1e999]}'])
def test_numbers_that_are_none_are_refused_unless_wanted(text):
    """NaN and infinity, also those that only become it while they are read."""
    with pytest.raises(MalformedFileError, match="is not a finite number"):
        parse_json(text)
    parse_json(text, finite=False)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "1" * 5000, "\ud800", "[1,]"])
def test_what_is_no_json_is_refused(text):
    """A number of 5,000 digits included, which Python refuses to read."""
    with pytest.raises(MalformedFileError, match="not JSON"):
        parse_json(text)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"a"'])
def test_a_file_holds_an_object(tmp_path, text):
    """Any other JSON value is named by its type."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(MalformedFileError, match="an object is expected, found"):
        read_object(tmp_path / "a.json")


def test_a_key_that_is_there_twice_counts_once(tmp_path):
    """The last one, as every JSON reader has it."""
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    assert read_object(tmp_path / "a.json") == {"a": 2}


@pytest.mark.parametrize(
    "value", [[[[[[[[]]]]]]] * 1000, "x" * 10**6, 10**5000, {n: n for n in range(10**4)}, b"x" * 999], ids=type
)
def test_any_value_is_shown_in_one_short_line(value):
    """For messages: no more than some 160 characters."""
    assert 0 < len(shown(value)) <= 160
