"""Columns of text in .parquet files: all that hold text are read, within their room."""

import subprocess
import sys

import pytest
from support.text_files import WORDS, opened, whole_text

from edgeblocks.data.parquet import _page_sizes
from edgeblocks.errors import DataError, NoRoomToReadError


def test_parquet_is_read_row_by_row(tmp_path):
    """A row is a document; a missing text is an empty one."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [f"document {number} " * 20 for number in range(500)]
    table = pyarrow.table({"id": range(501), "text": [*documents[:7], None, *documents[7:]]})
    parquet.write_table(table, tmp_path / "text.parquet", row_group_size=100)
    assert whole_text(tmp_path / "text.parquet", tmp_path / "cache") == "\n".join(documents)
    parquet.write_table(pyarrow.table({"body": documents}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"has no column 'text', but 'body' \(string\); name .* --text-key"):
        opened(tmp_path / "other.parquet", tmp_path / "cache")
    (tmp_path / "none.parquet").write_bytes(b"not one" * 100)
    with pytest.raises(DataError, match=r"none\.parquet is not a \.parquet file: .*; copy or save it again"):
        opened(tmp_path / "none.parquet", tmp_path / "cache")
    content = bytearray((tmp_path / "text.parquet").read_bytes())
    content[100:2000] = b"\xff" * 1900
    (tmp_path / "damaged.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged\.parquet is a damaged \.parquet file: .*; copy or save it again"):
        opened(tmp_path / "damaged.parquet", tmp_path / "cache")


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_sizes_of_pages_are_those_that_the_library_unpacks(tmp_path, dictionary, compression, version):
    """The headers of both versions, with statistics among them, say what the column's metadata say of all together."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [f"document {number} " * (number % 300) for number in range(3000)]
    options = {"use_dictionary": dictionary, "compression": compression, "data_page_version": version}
    parquet.write_table(pyarrow.table({"id": range(3000), "text": documents}), tmp_path / "a.parquet", **options)
    column = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1)
    sizes = _page_sizes(tmp_path / "a.parquet", column)
    assert (sizes.dictionary_bytes > 2**19) == dictionary
    assert 0 < sizes.largest_bytes <= column.total_uncompressed_size
    assert sizes.data_bytes + sizes.dictionary_bytes > column.total_uncompressed_size / 12
    assert whole_text(tmp_path / "a.parquet", tmp_path / "cache") == "\n".join(filter(None, documents))


def parquet_columns():
    pyarrow = pytest.importorskip("pyarrow")
    texts = [*WORDS, None]
    return {
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "string_view": pyarrow.array(texts, pyarrow.string_view()),
        "large_string": pyarrow.array(texts, pyarrow.large_string()),
        "binary": pyarrow.array([text and text.encode() for text in texts]),
        "null": pyarrow.nulls(61),
        "list": pyarrow.array([[text] for text in texts]),
    }


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string", "binary", "null", "list"])
def test_columns_of_text_of_all_types_are_read(tmp_path, kind):
    """Or refused with what helps: another name does not."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": parquet_columns()[kind]}), path)
    if kind in ("null", "list"):
        message = (
            "all of its texts are missing"
            if kind == "null"
            else r"is of type 'list<.*>', not of strings; cast it, .*\.map\("
        )
        with pytest.raises(DataError, match=message):
            opened(path, tmp_path / "cache")
    else:
        assert whole_text(path, tmp_path / "cache") == "\n".join(WORDS)


def test_bytes_of_a_column_that_are_no_text_are_told_by_their_row(tmp_path):
    """Old writers keep strings as bytes; pictures are bytes, too."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [b"a", b"\x89PNG"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2 is not text in UTF-8: .* at its byte 0"):
        opened(tmp_path / "a.parquet", tmp_path / "cache")


def test_reading_parquet_takes_room_of_its_own(tmp_path):
    """The library's memory counts, also where its file is one of many in a folder."""
    needed_bytes = []
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).write_text('{"text": "a"}')
        with pytest.raises(NoRoomToReadError) as caught:
            opened(tmp_path, tmp_path / "cache", room_bytes=1)
        needed_bytes.append(caught.value.needed_bytes)
    assert needed_bytes[1] == needed_bytes[0] + 90_000_000


def test_missing_pyarrow_is_a_setting_to_mend(tmp_path):
    """The message names the extra and another format."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = (
        "import pathlib, sys; sys.modules['pyarrow'] = None\n"
        "from edgeblocks.data.text import open_text\n"
        "from edgeblocks.errors import ConfigError\n"
        "try: open_text(sys.argv[1], tokenizer='bytes', vocabulary=0, length=8, hold_out=0,\n"
        "               cache_dir=pathlib.Path(sys.argv[2]))\n"
        "except ConfigError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet"), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "pip install 'edgeblocks[parquet]', or save the text as .jsonl" in done.stdout
