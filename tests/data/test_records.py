"""Records of text, .jsonl, .json, .csv and .tsv: read as documents, or told with a cure."""

import json

import pytest
from support.text_files import WORDS, opened, whole_text

from edgeblocks.errors import DataError


def as_lines(key="text"):
    return "".join(json.dumps({"id": 1, key: word}) + "\r\n" for word in WORDS)


def as_table(delimiter, key="text"):
    return f"id{delimiter}{key}\n" + "".join(f'1{delimiter}"{word}"\n' for word in WORDS)


RECORDS = {
    "a.jsonl": as_lines(),
    "a.ndjson": as_lines(),
    "lines.json": "\n" + as_lines(),
    "strings.json": json.dumps(WORDS),
    "array.json": json.dumps([{"text": word} for word in WORDS], indent=1),
    "a.csv": "\ufeff" + as_table(","),
    "semicolons.csv": as_table(";"),
    "a.tsv": as_table("\t"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_read_as_documents_under_any_of_their_names(tmp_path, name):
    """The text alone is trained on, under its key, or another that is named."""
    (tmp_path / name).write_text(RECORDS[name], encoding="utf-8")
    assert whole_text(tmp_path / name, tmp_path / "cache") == "\n".join(WORDS)
    if name == "strings.json":
        return
    (tmp_path / name).write_text(RECORDS[name].replace("text", "content"), encoding="utf-8")
    assert whole_text(tmp_path / name, tmp_path / "cache", text_key="content") == "\n".join(WORDS)
    with pytest.raises(DataError, match=r"no (key|column) .text..*, but .*content.*--text-key"):
        opened(tmp_path / name, tmp_path / "cache")


def odd_records():
    yield (
        "a.log",
        '{"text": "a"}\n',
        r"a\.log holds lines of JSON under a name that .*; name it a\.log\.jsonl, or \.txt",
    )
    yield "a.json", '[{"text": "a"}, {"text": null}]', r'a\.json, item 2: "text" is None, not a string; mend'
    yield "a.json", '[{"text": "a"}', r"a\.json is not read: it is not JSON .*; a \.json file is one array of objects"
    yield "a.json", '{"text": {"de": "a"}}', r"is \{'de': 'a'\}, not a string; write the text itself there"
    yield "a.json", "[" + " " * 2**24 + "]", r"is one array of 16777218 bytes, .*jq -c"
    yield "a.json", '{"data": [{"text": "a"}]}', r"has no key .text., and an array under 'data'; give that one: jq -c"
    yield "a.json", '{\n "text": "a"\n}', r"line 1 is not read: .*, or the file is one array of them: jq -s"
    yield "a.csv", 'text\n"a\nb\n', r"a\.csv is not read after byte 10: unexpected end of data; mend the row"
    yield "a.csv", "id,text\n1\n", r"a\.csv, row 1 has 1 columns, and `text` is column 2; mend"
    yield (
        "a.csv",
        "text,id\nwhales, ships and more,1\n",
        r"a\.csv, row 1 has 3 columns, and the first line names 2; a text with ',' in it stands in quotation marks",
    )
    yield "a.csv", "text,text\na,b\n", r"a\.csv has 2 columns 'text' in its first line; rename all but one"
    yield "a.csv", 'id,txet\n1,"x', r"has no column 'text' in its first line, but 'id', 'txet'; did you mean 'txet'\?"
    for encoding in ("utf-32", "utf-16"):
        yield (
            "a.csv",
            "text\na\n".encode(encoding),
            rf"in {encoding.upper()}, and .*: iconv -f {encoding.upper()} -t UTF-8",
        )
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        content = "Ein Text über Wale, ".encode(encoding) * 9
        yield "a b.txt", content, rf"in {encoding}, .*: iconv -f {encoding} -t UTF-8 '/.*/a b\.txt' > new"
    # What is made is another file, of the same kind: a table under the name of plain text would be read as prose.
    yield "a.csv", "text\na\n".encode("utf-16"), r"a\.csv > new\.csv$"
    yield "new.txt", "text".encode("utf-16"), r"new\.txt > newer\.txt$"
    yield "new.txt", b"%PDF-1.7", r"pdftotext /.*/new\.txt newer\.txt$"
    yield "a.txt", b"a\0b", r"a\.txt > new\.txt$"
    yield "a.txt", b"\x1f\x8b\x08", r"a\.txt is packed with gzip, not text; first: gunzip -k /.*/a\.txt"
    yield "a.docx", b"PK\x03\x04..", r"is a zip archive \(or a document of an office program, which is one\), not text"
    yield (
        "a.jsonl",
        b"PAR1",
        r"is a \.parquet file of another name, not text; first: mv /.*/a\.jsonl /.*/a\.jsonl\.parquet",
    )
    yield "a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", r"a\.doc is a document of an office program, not text; save"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet"):
        yield name, pointer, r"is a pointer of Git LFS in the place of a file, not text; fetch .*: git lfs pull"


@pytest.mark.parametrize(("name", "content", "message"), list(odd_records()), ids=lambda part: str(part)[:12])
def test_records_and_files_of_other_kinds_are_told_with_a_cure(tmp_path, name, content, message):
    """None of them is trained on as prose."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name, tmp_path / "cache")


def test_cells_that_are_empty_behind_the_last_column_are_none(tmp_path):
    """As spreadsheets and some programs end their lines."""
    (tmp_path / "a.csv").write_text("text,id\n" + "".join(f'"{word}",1,,\n' for word in WORDS), encoding="utf-8")
    assert whole_text(tmp_path / "a.csv", tmp_path / "cache") == "\n".join(WORDS)


def test_a_command_that_is_advised_names_the_file_as_it_is_typed_here(tmp_path, monkeypatch):
    """In its own folder, above it, and beside it; in one line, whatever it is called."""
    name = "odd\nname.txt"
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / name).write_bytes(b"a\0b")
    for place, typed in (("below", ""), (".", "below/"), ("/", f"{tmp_path}/below/"[1:])):
        monkeypatch.chdir(tmp_path / place)
        with pytest.raises(DataError) as caught:
            opened(tmp_path / "below" / name, tmp_path / "cache")
        assert str(caught.value).endswith(f"tr -d '\\000' < $'{typed}odd\\nname.txt' > new.txt")
