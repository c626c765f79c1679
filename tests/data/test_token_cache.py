"""The tokens on the disk: written once, never half, never resident, and never another's."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from edgeblocks.data import cache as cache_module
from edgeblocks.data.text import open_text
from edgeblocks.errors import StorageError

CONTENT = np.random.default_rng(0).integers(32, 127, 20_000, dtype=np.uint8).tobytes()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(CONTENT)
    return path


def opened(source, cache_dir, **settings):
    settings = {"tokenizer": "bytes", "vocabulary": 300, "length": 50, "hold_out": 0.1} | settings
    return open_text(str(source), cache_dir=cache_dir, **settings)


def the_cache(cache_dir):
    (folder,) = (path for path in cache_dir.iterdir() if path.suffix != ".lock")
    return folder


def check(text):
    windows, _ = text.gather(np.array([0, 4090, 19_950]))
    for window, start in zip(windows, (0, 4090, 19_950), strict=True):
        assert bytes(window.astype(np.uint8)) == CONTENT[start : start + 50]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def test_pages_have_4096_bytes_of_the_smallest_type(source, tmp_path):
    """The layout that the module promises, for a vocabulary of 256 and of more."""
    opened(source, tmp_path / "bytes")
    assert np.load(the_cache(tmp_path / "bytes") / "tokens.npy").shape == (5, 4096)
    pytest.importorskip("tokenizers")
    opened(source, tmp_path / "pairs", tokenizer="bpe")
    pages = np.load(the_cache(tmp_path / "pairs") / "tokens.npy")
    assert pages.shape[1] == 2048 and pages.dtype == np.uint16


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_second_opening_tokenises_nothing(source, tmp_path, kind):
    """No progress is reported, and everything known comes back; another length reads the same cache."""
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    first, calls = opened(source, tmp_path / "cache", tokenizer=kind), []
    again = opened(source, tmp_path / "cache", tokenizer=kind, length=60, progress=lambda *call: calls.append(call))
    assert calls == [] and again.length == 60
    for name in ("num_tokens", "train_tokens", "fingerprint", "characters_per_token", "bytes_per_token", "vocabulary"):
        assert getattr(again, name) == getattr(first, name)
    assert again.tokenizer.to_json() == first.tokenizer.to_json()


def test_other_text_or_settings_get_a_cache_of_their_own(source, tmp_path):
    """A changed file, another tokenizer or another share never reads the old tokens."""
    opened(source, tmp_path / "cache")
    opened(source, tmp_path / "cache", tokenizer="chars")
    opened(source, tmp_path / "cache", hold_out=0.2)
    source.write_bytes(CONTENT[::-1])
    os.utime(source, ns=(1, 1))
    assert bytes(opened(source, tmp_path / "cache").gather(np.array([0]))[0][0].astype(np.uint8)) == CONTENT[:-51:-1]
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_the_fingerprint_is_that_of_the_tokens(source, tmp_path):
    """The same text elsewhere has the same one, another text or tokenizer another."""
    first = opened(source, tmp_path / "cache").fingerprint
    (tmp_path / "copy.md").write_bytes(CONTENT)
    (tmp_path / "other.md").write_bytes(CONTENT[1:])
    assert opened(tmp_path / "copy.md", tmp_path / "cache").fingerprint == first
    assert opened(tmp_path / "other.md", tmp_path / "cache").fingerprint != first
    assert opened(source, tmp_path / "cache", tokenizer="chars").fingerprint != first


@pytest.mark.parametrize(("name", "place"), [("tokens.npy", -3700), ("checks.npy", -1)])
def test_a_flipped_byte_is_found_before_use(source, tmp_path, name, place):
    """Of a token and of a check: the page is named with what to delete; the others are read as they are."""
    text = opened(source, tmp_path / "cache")
    flip(the_cache(tmp_path / "cache") / name, place)  # in the last page
    text.gather(np.array([0, 4090]))
    with pytest.raises(StorageError, match=r"tokens\.npy is damaged: page 4 of 5 is not what was written; .* delete"):
        text.gather(np.array([0, 19_000]))


def test_a_cache_cut_while_in_use_is_an_error_and_no_crash(source, tmp_path):
    """Through a memory map this would be a bus error, which kills the process."""
    text = opened(source, tmp_path / "cache")
    os.truncate(the_cache(tmp_path / "cache") / "tokens.npy", 5000)
    with pytest.raises(StorageError, match=r"tokens\.npy ends before byte \d+, inside a page: .*delete"):
        text.gather(np.array([19_000]))


@pytest.mark.parametrize("start", [-1, 19_951])
def test_a_window_out_of_range_is_refused(source, tmp_path, start):
    """The zeros after the last token are no text."""
    with pytest.raises(IndexError, match=r"outside 0\.\.19950"):
        opened(source, tmp_path / "cache").gather(np.array([start]))


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
@pytest.mark.parametrize("name", ["tokens.npy", "checks.npy", "meta.json"])
def test_a_damaged_cache_is_built_again(source, tmp_path, name, damage):
    """A file of another size, a missing one, a description or a header that was changed."""
    opened(source, tmp_path / "cache")
    file = the_cache(tmp_path / "cache") / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "gone":
        file.unlink()
    else:
        flip(file, 30)
    check(opened(source, tmp_path / "cache"))


def test_a_changed_tokenizer_in_a_cache_is_not_believed(source, tmp_path):
    """Its digest stands in the description."""
    pytest.importorskip("tokenizers")
    first = opened(source, tmp_path / "cache", tokenizer="bpe")
    path = the_cache(tmp_path / "cache") / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("1.0", "1.1", 1), encoding="utf-8")
    assert opened(source, tmp_path / "cache", tokenizer="bpe").fingerprint == first.fingerprint
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["vocabulary"], 300),
        (["vocabulary"], "256"),
        (["vocabulary"], 10**400),
        (["kind"], "chars"),
        (["kind"], "bpe"),
        (["kind"], []),
        (["train"], 5),
        (["train", "tokens"], 10**6),
        (["train", "tokens"], True),
        (["held_out", "tokens"], -1),
        (["held_out", "characters"], 10**400),
        (["fingerprint"], None),
        (["version"], 99),
    ],
    ids=str,
)
def test_a_description_that_lies_is_not_believed(source, tmp_path, keys, value):
    """Even with a checksum that is right, types and numbers are compared with the files."""
    first = opened(source, tmp_path / "cache")
    path = the_cache(tmp_path / "cache") / "meta.json"
    meta = json.loads(path.read_text())
    place = meta
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    del meta["sha256"]
    path.write_text(json.dumps({**meta, "sha256": cache_module.meta_digest(meta)}))
    again = opened(source, tmp_path / "cache")
    check(again)
    assert (again.fingerprint, again.train_tokens) == (first.fingerprint, first.train_tokens)


def test_an_interrupted_build_leaves_nothing(source, tmp_path):
    """Ctrl-C in the middle, then a new start."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(source, tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    check(opened(source, tmp_path / "cache"))


def test_what_a_killed_build_left_is_never_read_and_later_removed(source, tmp_path):
    """Half a cache has another name."""
    code = (
        "import os, sys, pathlib; from edgeblocks.data.text import open_text;"
        "open_text(sys.argv[1], tokenizer='bytes', vocabulary=0, length=50, hold_out=.1,"
        "          cache_dir=pathlib.Path(sys.argv[2]), progress=lambda *_: os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "cache")], check=False)
    assert killed.returncode == -9
    remains = the_cache(tmp_path / "cache")
    assert remains.suffix == ".partial"
    check(opened(source, tmp_path / "cache"))
    assert remains.exists()  # it could be a build that has just begun
    long_ago = time.time() - 3600
    os.utime(remains, (long_ago, long_ago))
    opened(source, tmp_path / "cache", hold_out=0.3)
    assert not remains.exists()


def test_a_disk_that_fills_up_is_an_error_of_ours(source, tmp_path):
    """The kernel's refusal (here of a file over a limit) becomes StorageError, and the remains are removed."""
    code = (
        "import pathlib, resource, sys; from edgeblocks.data.text import open_text\n"
        "from edgeblocks.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: open_text(sys.argv[1], tokenizer='bytes', vocabulary=0, length=50, hold_out=.1,\n"
        "               cache_dir=pathlib.Path(sys.argv[2]))\n"
        "except StorageError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "the token cache cannot be written in" in done.stdout and "free some space" in done.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def test_sets_are_closed_with_their_last_user(source, tmp_path):
    """Opening often does not use up the process's file descriptors."""
    opened(source, tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        opened(source, tmp_path / "cache")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


MEMORY_PROBE = """
import pathlib, sys
from edgeblocks.data.text import open_text

def peak_kb():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

base = peak_kb()
text = open_text(sys.argv[1], tokenizer=sys.argv[3], vocabulary=0, length=1024, hold_out=0.1,
                 cache_dir=pathlib.Path(sys.argv[2]))
order = text.order(batch=32, seed=0, block=0)
total = sum(int(text.gather(order.indices(step))[0].sum()) for step in range(100))
print(peak_kb() - base, text.num_tokens, text.resident_bytes)
"""


@pytest.mark.parametrize("kind", ["chars", "bytes"])
def test_a_text_larger_than_the_memory_is_built_and_read_within_a_few_megabytes(tmp_path, kind):
    """100 MB of text, no line ends in it, raise the peak by less than 16 MB, building included."""
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"the whale, the whale! " * 45_455)
    command = [sys.executable, "-c", MEMORY_PROBE, str(path), str(tmp_path / "cache"), kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak_kb, num_tokens, resident_bytes = map(int, done.stdout.split())
    assert num_tokens > 90e6
    assert peak_kb < 16_000
    assert resident_bytes == 0


PAIRS_PROBE = """
import pathlib, sys
from edgeblocks.data.text import open_text
from edgeblocks.errors import NoRoomToReadError

def peak_kb():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

def opened(room_bytes):
    return open_text(sys.argv[1], tokenizer="bpe", vocabulary=2000, length=64, hold_out=0.1,
                     cache_dir=pathlib.Path(sys.argv[2]), room_bytes=room_bytes)

base = peak_kb()
try:
    opened(61_000_000)
except NoRoomToReadError as error:
    needed_bytes = error.needed_bytes
opened(needed_bytes)
print((peak_kb() - base) * 1024, needed_bytes)
"""


@pytest.mark.parametrize("text", ["a book", "random words"])
def test_byte_pairs_are_learned_and_encoded_within_the_room_that_is_asked_for(tmp_path, text):
    """The refusal names what is enough, and the peak stays below it, even where no word is seen twice."""
    pytest.importorskip("tokenizers")
    source = "moby-dick"
    if text == "random words":
        letters = np.random.default_rng(0).integers(ord("a"), ord("q"), (600_000, 7), dtype=np.uint8)
        letters[:, -1] = ord(" ")
        source = tmp_path / "words.txt"
        source.write_bytes(letters.tobytes())
    command = [sys.executable, "-c", PAIRS_PROBE, str(source), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak_bytes, needed_bytes = map(int, done.stdout.split())
    assert 61_000_000 < needed_bytes < 195_000_000
    assert peak_bytes < needed_bytes
