"""Where documents come from: files and folders, their order and identity, and words for what cannot be read."""

import json
import os
import unicodedata

import pytest
from support.text_files import opened, whole_text

from edgeblocks.data.documents import find_text
from edgeblocks.errors import DataError, NoRoomToReadError


def test_text_replaced_by_other_text_of_the_same_size_and_time_is_noticed(tmp_path):
    """Archives set fixed times; the old text is never trained on."""
    for letter in "ab":
        for name in ("1.txt", "2.txt"):
            path = tmp_path / "texts" / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(letter * 100)
            os.utime(path, (0, 0))
        assert whole_text(tmp_path / "texts", tmp_path / "cache").startswith(letter * 100)
        assert whole_text(tmp_path / "texts" / "1.txt", tmp_path / "cache") == letter * 100


def test_documents_of_a_folder_are_joined_by_newlines_in_the_order_of_their_names(tmp_path):
    """Sub-folders after the folder's own files; hidden, empty and other files are left out."""
    folder = tmp_path / "texts"
    (folder / "a").mkdir(parents=True)
    for name, content in {"b.txt": "second", "a.md": "first", "a/c.txt": "third", "empty.txt": ""}.items():
        (folder / name).write_text(content)
    (folder / ".hidden.txt").write_text("never")
    (folder / "picture.png").write_bytes(b"\0\xff")
    (folder / "z.jsonl").write_text('{"text": "a \\ud83d\\udc0b"}\n\n{"text": "half \\ud83d", "n": NaN}\n')
    assert whole_text(folder, tmp_path / "cache") == "first\nsecond\na 🐋\nhalf \ufffd\nthird"
    assert whole_text(folder, tmp_path / "cache", tokenizer="chars") == "first second a half third"


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Editors of Windows write one."""
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfab\r\n")
    assert whole_text(tmp_path / "text.txt", tmp_path / "cache") == "ab\r\n"


def wrong_files():
    yield "empty.txt", b"", r"is empty: 0 bytes in 1 file\(s\); give a file with text in it"
    yield (
        "a.txt",
        b"some text\0",
        r"a\.txt is not text: byte 9 is NUL, as in a binary file; give text in UTF-8, or remove",
    )
    yield (
        "a.txt",
        b"x" * 70_000 + b"caf\xe9 au lait",
        r"invalid continuation byte at byte 70003 \(0xe9\); .* iconv -f ISO",
    )
    yield "a.txt", b"caf\xc3", r"unexpected end of data at byte 3 \(0xc3\)"
    yield "a.txt", "text".encode("utf-16"), r"is text in UTF-16, .*: iconv -f UTF-16 -t UTF-8 /.*/a\.txt > new\.txt"
    yield (
        "a.jsonl",
        b'{"text": "a"}\n{"body": "b"}',
        r'a\.jsonl, line 2 has no key "text", but .body.; name the key .* --text-key',
    )
    yield "a.jsonl", b'{"text": "a"}\n\n{"text": 5}', r'a\.jsonl, line 3: "text" is 5, not a string; mend'
    yield "a.jsonl", b"[1]", r"a\.jsonl, line 1 is \[1\], not an object with the key"
    yield "a.jsonl", b'{"text": "a', r"a\.jsonl, line 1 is not read: it is not JSON .*; every line of a \.jsonl file"
    yield "a.jsonl", b"x" * (2**24 + 1), r"a\.jsonl, line 1 is longer than 16777216 bytes, .*; divide it"
    yield (
        "a.jsonl",
        b'{"text": ""}\n{"text": ""}',
        r"the text gives no tokens: its documents are empty, .*; give a source",
    )
    yield "a.txt", b"\xef\xbb\xbf", r"the text gives no tokens"
    yield "a.txt", b"ten tokens", r"is too short: 9 tokens in the training part and 1 tokens in the hold-out part, .*8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    list(wrong_files()),
    ids=lambda part: f"{len(part)}" if isinstance(part, bytes) else part,
)
def test_a_file_that_cannot_be_used_is_told_with_its_place_and_a_cure(tmp_path, name, content, message):
    """Which file, at which byte or line, and what to do; no cache is left behind."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.partial")) == []


@pytest.mark.parametrize("source", ["nowhere", "~nobody-of-this-name/text", "a\0b.txt", "\ud800", "x" * 5000])
def test_a_source_that_is_not_there_lists_what_is_accepted(tmp_path, source):
    """A typing mistake, nobody's home folder, a NUL, half a character, a name longer than any."""
    with pytest.raises(DataError, match=r'give "moby-dick" \(built in\), a text file in UTF-8, a \.jsonl, \.json,'):
        opened(source, tmp_path)


def test_a_folder_without_text_says_what_was_looked_for(tmp_path):
    """The endings of names."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        DataError, match=r"holds no text: looked for \.jl, \.jsonl, .*\.txt in it and in its sub-folders"
    ):
        opened(tmp_path / "folder", tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_long_document_is_refused_with_the_room_that_all_need(tmp_path, kind):
    """Before it is taken: what it takes depends on its own length; and the room that is named does for the longest."""
    path, long = tmp_path / f"long.{kind}", "whale " * 500_000
    documents = ["short", long, long * 2, "short"]
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=2, compression="zstd")
        assert path.stat().st_size < 10_000  # which unpack to 9 MB
    else:
        lines = [json.dumps({"text": text}) for text in documents]
        path.write_text(f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines))
    room_bytes = 30_000_000 + (90_000_000 if kind == "parquet" else 0)
    with pytest.raises(NoRoomToReadError, match=r"long\.(json|parquet)") as caught:
        opened(path, tmp_path / "cache", room_bytes=room_bytes)
    assert caught.value.needed_bytes > room_bytes + 2 * len(long)
    with pytest.raises(NoRoomToReadError):
        opened(path, tmp_path / "cache", room_bytes=caught.value.needed_bytes - 1)
    text = opened(path, tmp_path / "cache", room_bytes=caught.value.needed_bytes, hold_out=0)
    assert text.num_tokens == len("\n".join(documents))


def test_a_file_and_its_change_have_different_identities(source, tmp_path):
    """The cache of one is not taken for the other's, even where its size and its time are the same."""
    os.utime(source, (0, 0))
    first = find_text(str(source))
    other = tmp_path / "other"
    other.write_bytes(source.read_bytes()[::-1])
    os.utime(other, (0, 0))
    other.replace(source)
    assert find_text(str(source)).identity != first.identity


def test_what_was_read_and_left_out_is_told_from_the_cache_too(tmp_path):
    """Files, documents and tokens; empty documents, and files of a folder that are no text, by their endings."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("hello whale " * 99)
    (folder / "b.ndjson").write_text('{"text": "x"}\n{"text": ""}\n\n{"text": ""}\n')
    for name in ("c.pdf", "inner/d.pdf", "e.csv", "README", ".hidden"):
        (folder / name).write_text("no text")
    expected = (
        "2 files of 1.23 KB, 2 documents, 1,190 tokens; left out: 2 empty documents, files of the folder "
        "(2 .pdf, 1 .csv, 1 without an ending)"
    )
    for _ in range(2):
        assert opened(folder, tmp_path / "cache").reading == expected
    assert opened("moby-dick", tmp_path / "cache").reading.startswith("moby-dick (built in, 1.22 MB), 1 document, ")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.csv").write_text("text")
    with pytest.raises(DataError, match=r"its \.csv files are read one at a time: give one by name"):
        opened(tmp_path / "tables", tmp_path / "cache")


def test_files_have_the_same_order_wherever_a_folder_was_unpacked(tmp_path):
    """A Mac takes names apart, é into e and an accent, which sort elsewhere; and a name is found as it is typed."""
    texts = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        folder.mkdir()
        for name in ("zebra", "école", "egg"):
            (folder / f"{unicodedata.normalize(form, name)}.txt").write_text(f"{name} " * 9)
        texts.append(whole_text(folder, tmp_path / "cache"))
        assert whole_text(folder / "école.txt", tmp_path / "cache") == "école " * 9
    assert texts[0] == texts[1]
