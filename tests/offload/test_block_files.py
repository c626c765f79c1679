"""A block's file: what is written is what is read, and its layout is that of every safetensors reader."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.small_blocks import RUN_ID, Small, all_bytes, filled_buffer, layout_of, store_in

from edgeblocks.errors import StorageError
from edgeblocks.files.durable import write_atomically
from edgeblocks.offload import block_files
from edgeblocks.offload.block_buffer import PARTS, BlockBuffer


@pytest.fixture
def written(tmp_path):
    """A store with block 1 written at step 17, and what was written."""
    store = store_in(tmp_path)
    buffer = filled_buffer(store.layouts[1])
    store.write(1, buffer, step=17)
    return store, buffer


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_any_safetensors_reader_opens_a_block_file(tmp_path, optimizer):
    """The file has plain names weights.*, ema.*, optimizer.*, and safetensors reads the values that were written."""
    store = store_in(tmp_path, [layout_of(optimizer)])
    buffer = filled_buffer(store.layouts[0])
    store.write(0, buffer, step=3)
    expected = {f"{part}.{name}": tensor for part in PARTS for name, tensor in buffer.tensors(part)}
    parameters = dict(Small().named_parameters())
    with safe_open(store.path(0), framework="pt") as file:
        assert set(file.keys()) == set(expected)
        for name, parameter in parameters.items():
            for part in ("weights", "ema"):
                assert tuple(file.get_slice(f"{part}.{name}").get_shape()) == tuple(parameter.shape)
        assert file.metadata()["step"] == "3"
        assert file.metadata()["run_id"] == RUN_ID
    for name, tensor in load_file(store.path(0)).items():
        assert torch.equal(tensor, expected[name]), name
    assert expected["optimizer.exp_avg_codes"].numel() == (128 * 64 * 2 if optimizer == "adamw8bit" else 0)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_a_block_survives_its_file_bit_for_bit(tmp_path, optimizer):
    """Every byte of weights, EMA and optimizer state comes back, the 8-bit codes and NaN patterns too, and the step."""
    store = store_in(tmp_path, [layout_of(optimizer)])
    buffer = filled_buffer(store.layouts[0])
    buffer.part_bytes("weights")[:64] = 255  # NaNs with a payload
    store.write(0, buffer, step=12345)
    other = BlockBuffer(store.layouts[0])
    assert store.read(0, other) == 12345
    assert all_bytes(other) == all_bytes(buffer)
    assert store.bytes_written == store.path(0).stat().st_size


def test_ema_alone_can_be_read(written):
    """A buffer for `ema` takes a third of the memory, and gets the EMA weights."""
    store, buffer = written
    ema = BlockBuffer(store.layouts[1], ["ema"])
    assert ema.num_bytes == 4 * store.layouts[1].num_parameters
    assert store.read(1, ema) == 17
    assert torch.equal(ema.flat("ema"), buffer.flat("ema"))
    names = [name for name, _ in ema.tensors("ema")]
    assert set(names) == set(dict(Small().named_parameters()))


@pytest.fixture
def hashed(monkeypatch):
    """The sizes of what is hashed from now on."""
    sizes, digest = [], block_files._digest

    def counted(data):
        sizes.append(data.numel())
        return digest(data)

    monkeypatch.setattr(block_files, "_digest", counted)
    return sizes


def make_old(path):
    """A minute ago, so that any change from now on shows in the file's time."""
    former = time.time_ns() - 60 * 10**9
    os.utime(path, ns=(former, former))


def test_a_file_is_hashed_at_its_first_read_alone(written, hashed):
    """Text that is written token by token reads each block for each token: a part is hashed once in a file's life."""
    store, buffer = written
    make_old(store.path(1))
    ema, whole = BlockBuffer(store.layouts[1], ["ema"]), BlockBuffer(store.layouts[1])
    sizes = {part: buffer.part_bytes(part).numel() for part in PARTS}
    for _ in range(3):
        store.read(1, ema)
    assert hashed == [sizes["ema"]]
    store.read(1, whole)
    assert hashed == [sizes["ema"], sizes["weights"], sizes["optimizer"]]
    assert all_bytes(whole) == all_bytes(buffer)
    store.write(1, buffer, step=18)
    make_old(store.path(1))
    hashed.clear()
    assert [store.read(1, ema) for _ in range(2)] == [18, 18]
    assert hashed == [sizes["ema"]], "what this process wrote is read from the disk like any other file"


def test_a_file_that_was_just_written_is_hashed_at_each_read(written, hashed):
    """A change in the same tick of the file system's clock would not show in the file's time."""
    store, _ = written
    for _ in range(2):
        store.read(1, BlockBuffer(store.layouts[1], ["ema"]))
    assert len(hashed) == 2


def test_a_buffer_serves_smaller_blocks(tmp_path):
    """A buffer made for the largest block takes over a smaller block's layout without new memory, and back."""
    small, large = layout_of(width=32), layout_of(width=64)
    store = store_in(tmp_path, [small, large])
    sources = [filled_buffer(layout, seed) for seed, layout in enumerate((small, large))]
    for block, source in enumerate(sources):
        store.write(block, source, step=block)
    buffer = BlockBuffer(large)
    address = buffer.part_bytes("weights").data_ptr()
    for block in (0, 1, 0):
        store.read(block, buffer)
        assert all_bytes(buffer) == all_bytes(sources[block])
        assert buffer.part_bytes("weights").data_ptr() == address


FULL_DISK = """
import pickle, resource, signal, sys
from pathlib import Path
from edgeblocks.errors import StorageError
sys.path.insert(0, sys.argv[2])
from support.small_blocks import filled_buffer, store_in
folder = Path(sys.argv[1])
store = store_in(folder)
buffer = filled_buffer(store.layouts[0], seed=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (store.layouts[0].num_bytes // 2, resource.RLIM_INFINITY))
try:
    store.write(0, buffer, step=2)
except StorageError as error:
    print("StorageError:", error)
print(store.bytes_written)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_up_leaves_the_former_file(tmp_path):
    """When writing fails half way: StorageError with the path, the former block whole, no temporary file."""
    store = store_in(tmp_path)
    former = filled_buffer(store.layouts[0], seed=0)
    store.write(0, former, step=1)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, written_bytes = done.stdout.strip().splitlines()
    assert message.startswith("StorageError: cannot write block 0")
    assert str(store.path(0)) in message
    assert "--resume" in message
    assert written_bytes == "0"
    buffer = BlockBuffer(store.layouts[0])
    assert store.read(0, buffer) == 1
    assert all_bytes(buffer) == all_bytes(former)
    assert [path.name for path in tmp_path.iterdir()] == [store.path(0).name]


def test_writing_into_a_missing_folder_is_a_storage_error(tmp_path):
    """The error names the block, its size and the path."""
    store = store_in(tmp_path / "gone")
    with pytest.raises(StorageError, match="cannot write block 0") as caught:
        store.write(0, filled_buffer(store.layouts[0]), step=0)
    assert str(store.path(0)) in str(caught.value)


def test_a_failed_write_removes_its_temporary_file(tmp_path):
    """Whatever is raised on the way, the former content stays and nothing else is left."""
    path = tmp_path / "content"
    path.write_bytes(b"former")
    with pytest.raises(TypeError):
        write_atomically(path, [b"new", 3])
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
