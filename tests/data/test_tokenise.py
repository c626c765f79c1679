"""Tokenising in another process: the same cache, the same errors, and an end as soon as it is asked for."""

import numpy as np
import pytest
from support.modules_in_the_way import put_in_the_way

from edgeblocks.data.text import open_text
from edgeblocks.data.tokenise import tokenise_in_child
from edgeblocks.errors import ConfigError, DataError, NoRoomToReadError


def asked(tmp_path, **others):
    request = {"source": str(tmp_path / "a.txt"), "tokenizer": "bytes", "vocabulary": 300, "length": 8}
    return request | {"hold_out": 0.1, "text_key": "text", "cache_dir": str(tmp_path / "cache"), **others}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.txt").write_text("the white whale " * 40_000)


def test_the_cache_is_that_of_the_same_process(source, tmp_path):
    """It is found there, and its progress was heard."""
    calls = []
    tokenise_in_child({**asked(tmp_path), "budget_bytes": None}, lambda *call: calls.append(call))
    assert calls[-1] == (640_000, 640_000, "tokenising")

    def again():
        raise AssertionError("tokenised a second time")

    given = {**asked(tmp_path), "cache_dir": tmp_path / "cache"}
    text = open_text(given.pop("source"), **given, elsewhere=again)
    assert text.num_tokens == 640_000 and text.gather(np.array([4]))[0][0].tobytes()[::8] == b"white wh"


def test_errors_are_those_that_reading_raises(source, tmp_path):
    """Of each kind, with all that they say."""
    with pytest.raises(DataError, match=r"data '.*none\.txt' does not exist"):
        tokenise_in_child({**asked(tmp_path, source=str(tmp_path / "none.txt")), "budget_bytes": None}, print)
    with pytest.raises(ConfigError) as wrong:
        tokenise_in_child({**asked(tmp_path, length=0, hold_out=0.9), "budget_bytes": None}, print)
    assert len(wrong.value.problems) == 2
    with pytest.raises(NoRoomToReadError, match=r"a\.txt' with tokenizer: bytes") as small:
        tokenise_in_child({**asked(tmp_path), "budget_bytes": 10**7}, print)
    assert small.value.taken_bytes > 10**7 and small.value.needed_bytes == 20_000_000


def test_a_file_in_the_folder_of_the_command_is_not_taken_for_a_library(source, tmp_path, monkeypatch):
    """A user's random.py, or what a run that came from elsewhere holds, would be run in its place."""
    put_in_the_way(tmp_path)
    monkeypatch.chdir(tmp_path)
    tokenise_in_child({**asked(tmp_path), "budget_bytes": None}, lambda *_: None)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_interrupt_ends_it_and_leaves_nothing(source, tmp_path):
    """Ctrl-C reaches this process; the other one is ended, and has removed what it wrote."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise_in_child({**asked(tmp_path), "budget_bytes": None}, interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
