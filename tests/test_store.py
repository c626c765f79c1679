import hashlib
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from edgeblocks.durable import write_atomically
from edgeblocks.errors import RunError, StorageError
from edgeblocks.store import (
    GROUP_SIZE,
    PARTS,
    BlockBuffer,
    BlockLayout,
    BlockStore,
    bind_parameters_,
    is_quantizable,
    state_bytes,
)

RUN_ID = "0123456789abcdef"


class Small(nn.Module):
    """Vectors before matrices, large and small ones, as the layout must sort them."""

    def __init__(self, width=64):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(5))
        self.first = nn.Linear(width, 128)
        self.inner = nn.Sequential(nn.Linear(7, 3), nn.Linear(128, 64))


def layout_of(optimizer="adamw8bit", width=64):
    return BlockLayout.of(Small(width), optimizer)


def filled_buffer(layout, seed=0):
    """A buffer of random bytes that are finite numbers where they are fp32."""
    buffer = BlockBuffer(layout)
    generator = torch.Generator().manual_seed(seed)
    for part in PARTS:
        for _, tensor in buffer.tensors(part):
            if tensor.dtype == torch.uint8:
                tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return buffer


def store_in(folder, layouts=None, run_id=RUN_ID):
    return BlockStore(folder, layouts or [layout_of(), layout_of()], run_id)


def all_bytes(buffer):
    return b"".join(bytes(buffer.part_bytes(part).numpy()) for part in buffer.parts)


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
    assert store.bytes_read == buffer.num_bytes


def test_the_layout_puts_quantized_matrices_first_and_vectors_last():
    """Weights are ordered: large matrices, other matrices, vectors; ema has the same order, so one slice fits both."""
    layout = layout_of()
    names = [entry.name for entry in layout.entries if entry.part == "weights"]
    assert names == [
        "weights.first.weight",
        "weights.inner.1.weight",
        "weights.inner.0.weight",
        "weights.scale",
        "weights.first.bias",
        "weights.inner.0.bias",
        "weights.inner.1.bias",
    ]
    ema_names = [entry.name for entry in layout.entries if entry.part == "ema"]
    assert ema_names == [name.replace("weights.", "ema.") for name in names]
    assert layout.num_quantized == 2 * 128 * 64
    assert layout.num_decayed == layout.num_quantized + 21
    assert layout.num_parameters == layout.num_decayed + 5 + 128 + 3 + 64


def test_without_8_bit_state_nothing_is_quantized():
    """With adamw the quantized stretch is empty, and all moments are fp32."""
    layout = layout_of("adamw")
    assert layout.num_quantized == 0
    assert layout.num_decayed == 2 * 128 * 64 + 21
    assert layout.part_span("optimizer")[1] == 8 * layout.num_parameters


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_tensors_fill_the_file_without_gaps(optimizer):
    """Each entry begins where the former ends, aligned to its type; parts are contiguous."""
    layout, end = layout_of(optimizer), 0
    for entry in layout.entries:
        assert entry.start == end
        assert entry.start % entry.dtype.itemsize == 0
        end += entry.num_bytes
    assert end == layout.num_bytes
    starts = [layout.part_span(part) for part in PARTS]
    assert starts[0][0] == 0
    for (start, size), (following, _) in itertools.pairwise(starts):
        assert start + size == following
    assert sum(size for _, size in starts) == layout.num_bytes


def test_state_bytes_are_those_of_the_layout():
    """state_bytes, which plans use, foretells each part; 8-bit state takes 2.03 bytes a parameter, fp32 8."""
    for optimizer in ("adamw8bit", "adamw"):
        layout = layout_of(optimizer)
        quantizable = sum(p.numel() for p in Small().parameters() if is_quantizable(p.shape))
        foretold = state_bytes(layout.num_parameters, quantizable, optimizer)
        assert foretold == {part: layout.part_span(part)[1] for part in PARTS}
    large = state_bytes(10**6 * GROUP_SIZE, 10**6 * GROUP_SIZE, "adamw8bit")
    assert large["optimizer"] / (10**6 * GROUP_SIZE) == pytest.approx(2.03, abs=0.005)
    assert large["weights"] == large["ema"] == 4 * 10**6 * GROUP_SIZE


@pytest.mark.parametrize(
    ("shape", "quantizable"),
    [((64, 64), True), ((16, 16, 16), True), ((4096,), False), ((32, 64), False), ((65, 64), False), ((68, 64), True)],
)
def test_only_large_matrices_of_whole_groups_are_quantized(shape, quantizable):
    """Two dimensions or more, 4,096 values or more, and a multiple of the group size."""
    assert is_quantizable(shape) == quantizable
    assert not quantizable or (math.prod(shape) % GROUP_SIZE == 0 and math.prod(shape) >= 4096)


def test_ema_alone_can_be_read(written):
    """A buffer for `ema` takes a third of the memory, reads only those bytes, and gets the EMA weights."""
    store, buffer = written
    ema = BlockBuffer(store.layouts[1], ["ema"])
    assert ema.num_bytes == 4 * store.layouts[1].num_parameters
    assert store.read(1, ema) == 17
    assert torch.equal(ema.flat("ema"), buffer.flat("ema"))
    assert store.bytes_read == ema.num_bytes
    names = [name for name, _ in ema.tensors("ema")]
    assert set(names) == set(dict(Small().named_parameters()))


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


def damaged_copy(store, content, folder):
    """A store with the same run whose block 1 has this content."""
    copy = BlockStore(folder, store.layouts, store.run_id)
    copy.path(1).write_bytes(content)
    return copy


def header_bytes(content):
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("part", PARTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
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


FULL_DISK = """
import pickle, resource, signal, sys
from pathlib import Path
from edgeblocks.errors import StorageError
sys.path.insert(0, sys.argv[2])
from test_store import filled_buffer, store_in
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
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), __file__.rpartition("/")[0]]
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


def test_bound_parameters_are_views_of_the_buffer():
    """A step on the flat weights is seen by the module at once, and the other way round."""
    layout, block = layout_of(), Small()
    buffer = filled_buffer(layout)
    bind_parameters_(block, buffer.tensors("weights"), torch.zeros(layout.num_parameters))
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        name: tuple(p.shape) for name, p in Small().named_parameters()
    }
    for name, view in buffer.tensors("weights"):
        assert torch.equal(block.get_parameter(name), view), name
    buffer.flat("weights").fill_(2.5)
    assert all((parameter == 2.5).all() for parameter in block.parameters())
    with torch.no_grad():
        block.scale.fill_(-1)
    assert (buffer.flat("weights") == -1).sum() == 5


def test_gradients_accumulate_in_the_flat_vector():
    """Two backward passes add up in the one vector, at the place of each parameter; zeroing the vector zeroes them."""
    layout, block, plain = layout_of(), Small(), Small()
    buffer, gradients = filled_buffer(layout), torch.zeros(layout.num_parameters)
    bind_parameters_(block, buffer.tensors("weights"), gradients)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(block.get_parameter(name))

    def loss(network, seed):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
        small = network.inner[0](x[:, :7]).square().sum()
        return network.inner[1](network.first(x)).square().sum() + small + network.scale.square().sum()

    for seed in (0, 1):
        loss(block, seed).backward()
        loss(plain, seed).backward()
    expected = torch.cat([plain.get_parameter(name).grad.flatten() for name, _ in buffer.tensors("weights")])
    assert expected.all()
    torch.testing.assert_close(gradients, expected)
    gradients.zero_()
    assert not any(parameter.grad.any() for parameter in block.parameters())
    loss(block, 1).backward()
    assert gradients.any()


def test_without_gradients_parameters_need_none():
    """Bound for inference, no parameter requires a gradient."""
    layout, block = layout_of(), Small()
    bind_parameters_(block, BlockBuffer(layout, ["ema"]).tensors("ema"))
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_binding_takes_a_block_from_the_meta_device():
    """A block built without memory gets all of it from the buffer."""
    with torch.device("meta"):
        block = Small()
    buffer = filled_buffer(layout_of())
    bind_parameters_(block, buffer.tensors("weights"))
    assert not any(parameter.is_meta for parameter in block.parameters())
