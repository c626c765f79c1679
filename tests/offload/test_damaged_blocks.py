"""Block files that were damaged, or are others: each is found before it is used."""

import hashlib
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_blocks import RUN_ID, filled_buffer, layout_of, store_in

from edgeblocks.errors import RunError, StorageError
from edgeblocks.offload.block_buffer import PARTS, BlockBuffer
from edgeblocks.offload.block_files import BlockStore


@pytest.fixture
def written(tmp_path):
    """A store with block 1 written at step 17, and what was written."""
    store = store_in(tmp_path)
    buffer = filled_buffer(store.layouts[1])
    store.write(1, buffer, step=17)
    return store, buffer


def test_one_bad_ema_byte_does_not_bar_the_weights(written):
    """Parts have checksums of their own: a damaged optimizer state leaves the EMA readable."""
    store, buffer = written
    content = bytearray(store.path(1).read_bytes())
    content[-1] ^= 1  # the last optimizer code
    store.path(1).write_bytes(content)
    ema = BlockBuffer(store.layouts[1], ["ema"])
    store.read(1, ema)
    assert torch.equal(ema.flat("ema"), buffer.flat("ema"))
    with pytest.raises(RunError, match="block 1 is damaged: the optimizer"):
        store.read(1, BlockBuffer(store.layouts[1]))


def test_damage_after_a_read_is_found(written):
    """A file that was read and found sound, and is changed in place by another program: the next read finds it."""
    store, _ = written
    os.utime(store.path(1), ns=(1, 1))
    store.read(1, BlockBuffer(store.layouts[1]))
    with store.path(1).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(RunError, match="block 1 is damaged: the optimizer"):
        store.read(1, BlockBuffer(store.layouts[1]))


def damaged_copy(store, content, folder):
    """A store with the same run whose block 1 has this content."""
    copy = BlockStore(folder, store.layouts, store.run_id)
    copy.path(1).write_bytes(content)
    return copy


def header_bytes(content):
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("part", PARTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_any_part_is_found(written, tmp_path_factory, part, share, bit):
    """One bit, anywhere in weights, EMA or optimizer state: RunError that names the block and the part."""
    store, _ = written
    content = bytearray(store.path(1).read_bytes())
    start, size = store.layouts[1].part_span(part)
    content[header_bytes(content) + start + int(share * size)] ^= 1 << bit
    copy = damaged_copy(store, content, tmp_path_factory.mktemp("copy"))
    with pytest.raises(RunError, match=f"block 1 is damaged: the {part}"):
        copy.read(1, BlockBuffer(store.layouts[1]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_is_found(written, tmp_path_factory, share, bit):
    """One bit, anywhere in the header or its length: RunError that names the block, in `read` and in `header`."""
    store, _ = written
    content = bytearray(store.path(1).read_bytes())
    content[int(share * header_bytes(content))] ^= 1 << bit
    copy = damaged_copy(store, content, tmp_path_factory.mktemp("copy"))
    for ask in (copy.header, lambda block: copy.read(block, BlockBuffer(store.layouts[1]))):
        with pytest.raises(RunError, match=r"block 1 |block_001"):
            ask(1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_found(written, tmp_path_factory, share):
    """A file cut anywhere, the empty one included: RunError that names the block and says it was cut short."""
    store, _ = written
    content = store.path(1).read_bytes()
    copy = damaged_copy(store, content[: int(share * len(content))], tmp_path_factory.mktemp("copy"))
    for ask in (copy.header, lambda block: copy.read(block, BlockBuffer(store.layouts[1]))):
        with pytest.raises(RunError, match=r"block 1 is damaged: .*(cut short|unreadable)"):
            ask(1)


def test_bytes_appended_to_a_file_are_found(written):
    """A file that is longer than its layout is no block file."""
    store, _ = written
    with store.path(1).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(RunError, match="block 1 is damaged"):
        store.header(1)


def test_a_missing_file_is_named(tmp_path):
    """A block without a file: RunError with the block and the path."""
    store = store_in(tmp_path)
    for ask in (store.header, lambda block: store.read(block, BlockBuffer(store.layouts[0]))):
        with pytest.raises(RunError, match="block 0 is missing") as caught:
            ask(0)
        assert str(store.path(0)) in str(caught.value)


def test_a_folder_in_place_of_a_file_is_a_storage_error(tmp_path):
    """What the system refuses to read is a StorageError that names the path."""
    store = store_in(tmp_path)
    store.path(0).mkdir()
    with pytest.raises(StorageError, match="block 0"):
        store.header(0)


def test_a_file_of_another_run_is_refused(written, tmp_path_factory):
    """A block of another run, though whole: RunError that names both runs."""
    store, _ = written
    other = BlockStore(store.folder, store.layouts, "fedcba9876543210")
    with pytest.raises(RunError, match=r"block 1 of run 01234567.*block 1 of run fedcba98"):
        other.read(1, BlockBuffer(store.layouts[1]))


def test_a_file_of_another_block_is_refused(written):
    """Two files swapped by hand: RunError that names both blocks."""
    store, _ = written
    store.path(1).rename(store.path(0))
    with pytest.raises(RunError, match=r"is block 1 of run .*but block 0"):
        store.header(0)


def test_a_file_of_another_network_is_refused(written):
    """Settings that were changed after training: RunError that says so, also where the bytes are equally many."""
    store, _ = written
    for layouts in ([layout_of(width=32)] * 2, [layout_of("adamw")] * 2):
        with pytest.raises(RunError, match=r"block_001.*another network"):
            BlockStore(store.folder, layouts, RUN_ID).header(1)


def test_a_file_of_another_format_version_is_refused(written):
    """A newer format, correctly signed: RunError with both versions."""
    store, _ = written
    content = store.path(1).read_bytes()
    end = header_bytes(content)
    table = json.loads(content[8:end])
    table["__metadata__"]["format_version"] = "2"
    del table["__metadata__"]["header_sha256"]
    metadata = table.pop("__metadata__")
    metadata["header_sha256"] = hashlib.sha256(json.dumps([table, metadata], sort_keys=True).encode()).hexdigest()
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    store.path(1).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(RunError, match=r"block_001.*version 2.*version 1"):
        store.header(1)


def test_any_file_that_is_no_block_is_refused(tmp_path):
    """JSON of other shapes, and safetensors files of others, are damage and no crash."""
    store = store_in(tmp_path)
    for text in (
        b"[]",
        b"{}",
        b"null",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"format_version": "x"}}',
        b"\xff\xff",
    ):
        store.path(0).write_bytes(len(text).to_bytes(8, "little") + text + b"data")
        with pytest.raises(RunError, match="block 0 is damaged"):
            store.header(0)
