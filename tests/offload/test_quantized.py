"""Blocks in 8 and 4 bits: how far off they are, and that what uses them computes with what they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.commands import assert_refused, invoke
from support.exact_runs import KINDS

import edgeblocks
from edgeblocks.methods import FROZEN_BYTES
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout
from edgeblocks.offload.float32_copy import Float32Copy
from edgeblocks.offload.quantized import NF4, WEIGHT_GROUP, expand_, quantize_, quantized_layout
from edgeblocks.runs.quantized_blocks import quantized_store

pytestmark = pytest.mark.usefixtures("one_thread")


class Odd(torch.nn.Module):
    """Matrices that groups do not cover, and vectors."""

    def __init__(self, rows, columns):
        super().__init__()
        self.first = torch.nn.Linear(columns, rows)
        self.second = torch.nn.Linear(rows, columns, bias=False)


def there_and_back(layout, values, kind):
    buffer, found = BlockBuffer(quantized_layout(layout, kind), ("ema",)).touched(), torch.full_like(values, torch.nan)
    quantize_(buffer, values)
    expand_(found, buffer)
    return found


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([0.0, 1e-30, 1e-3, 1e5]))
def test_a_value_is_off_by_half_a_step_of_its_group_and_a_vector_by_nothing(rows, columns, seed, scale):
    layout = BlockLayout.of(Odd(rows, columns), "adamw8bit", frozen=True)
    values = scale * torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(seed))
    found = there_and_back(layout, values, "int8")
    covered = layout.num_decayed // WEIGHT_GROUP * WEIGHT_GROUP
    groups, back = values[:covered].view(-1, WEIGHT_GROUP), found[:covered].view(-1, WEIGHT_GROUP)
    half = groups.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert bool(((groups - back).abs() <= half * (1 + 1e-5)).all())
    np.testing.assert_array_equal(found[covered:], values[covered:])


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.006), ("nf4", 0.09)])
def test_it_takes_as_many_bytes_as_plans_say_and_errs_as_docs_say(kind, error):
    layout = BlockLayout.of(torch.nn.Linear(512, 640, bias=False), "adamw8bit", frozen=True)
    assert quantized_layout(layout, kind).num_bytes == FROZEN_BYTES[kind] * layout.num_parameters
    values = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(0))
    found = there_and_back(layout, values, kind)
    assert float((found - values).norm() / values.norm()) == pytest.approx(error, rel=0.08)


def test_4_bits_are_those_of_bitsandbytes():
    """The same shares of the largest magnitude for the same values, and zeros where all are zero."""
    functional = pytest.importorskip("bitsandbytes.functional")
    layout = BlockLayout.of(Odd(70, 96), "adamw8bit", frozen=True)
    covered = layout.num_decayed // WEIGHT_GROUP * WEIGHT_GROUP
    values = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(0))
    values[:WEIGHT_GROUP] = 0
    values[WEIGHT_GROUP : 2 * WEIGHT_GROUP] = torch.tensor(NF4).repeat(4)
    codes, state = functional.quantize_4bit(values[:covered], blocksize=WEIGHT_GROUP, quant_type="nf4")
    expected = functional.dequantize_4bit(codes, state)
    np.testing.assert_array_equal(there_and_back(layout, values, "nf4")[:covered], expected.view(-1))


@pytest.fixture(scope="module", params=[("dit", "diffusion"), ("ar", "diffusion"), ("vit", "exact")], ids="-".join)
def run(request, tmp_path_factory):
    family, method = request.param
    wanted = {**KINDS[family], "method": method, "steps": 20, "sample_grids": 0, "mem_budget": "4GB"}
    wanted |= {"blocks": 2, "width": 64, "depth": 4, "hold_out": 0.01 if family != "ar" else 0.001}
    return edgeblocks.train(out=tmp_path_factory.mktemp(family) / "run", **wanted)


def expanded(run):
    """The network with the weights that its blocks in 8 bits stand for."""
    directory, values = run.directory, {}
    store = quantized_store(directory, len(directory.file_layers), "int8")
    for block, layout in enumerate(store.layouts):
        buffer, copy = store.buffer(("ema",)), Float32Copy([layout], torch.device("cpu"))
        store.read(block, buffer)
        for name, value in copy.hold_(buffer, "ema").tensors("ema"):
            values[directory.tensor_name(block, name)] = value.clone()
    network = run.network()
    network.load_state_dict(values)
    return network


def test_evaluation_is_that_of_the_rounded_weights(run, tmp_path):
    """Nearly that of the weights themselves; and not theirs."""
    whole = run.evaluate(samples=2)["validation_loss"]
    rounded = edgeblocks.load(run.path, frozen="int8").evaluate(samples=2)["validation_loss"]
    assert rounded != whole and rounded == pytest.approx(whole, rel=0.02)
    coarse = edgeblocks.load(run.path, frozen="nf4").evaluate(samples=2)["validation_loss"]
    assert coarse not in (rounded, whole) and coarse == pytest.approx(whole, rel=0.2)
    directory = run.directory
    if len(directory.layers) == 1:
        batch = directory.family().batch_spec(2)
        inputs = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in batch.items()}
        with torch.no_grad():
            expected = directory.family().scores(expanded(run), inputs)["loss"]
        with edgeblocks.load(run.path, frozen="int8").fitting_runner(samples=2) as runner, torch.no_grad():
            np.testing.assert_array_equal(directory.family().scores(runner.network(0), inputs)["loss"], expected)


def test_files_in_8_bits_are_made_once_and_again_where_their_block_is_another(run):
    directory, count = run.directory, len(run.directory.file_layers)
    store = quantized_store(directory, count, "int8")
    made = {block: store.path(block).stat().st_mtime_ns for block in range(count)}
    quantized_store(directory, count, "int8")
    assert {block: store.path(block).stat().st_mtime_ns for block in range(count)} == made
    masters = directory.store()
    buffer, former = masters.buffer(), masters.path(0).read_bytes()
    step = masters.read(0, buffer)
    buffer.flat("ema").mul_(2)
    masters.write(0, buffer, step)
    assert quantized_store(directory, count, "int8").header(0).made_of == masters.header(0).digests["ema"]
    assert store.path(0).stat().st_mtime_ns > made[0]
    masters.path(0).write_bytes(former)
    store.path(0).write_bytes(b"damaged")
    assert quantized_store(directory, count, "int8").header(0).made_of == masters.header(0).digests["ema"]
    assert (directory.blocks_folder / "int8").is_dir()


def test_blocks_in_8_bits_take_turns_in_one_memory(tmp_path):
    """Samples of a chain whose blocks all stay in memory are those of one block at a time."""
    wanted = {**KINDS["ar"], "blocks": 2, "steps": 4, "sample_grids": 0, "mem_budget": "4GB", "hold_out": 0.001}
    edgeblocks.train(out=tmp_path / "run", **wanted)
    rounded = edgeblocks.load(tmp_path / "run", frozen="int8")
    with rounded.fitting_runner(samples=2) as one:
        alone = rounded.sample_text(n=2, length=8, seed=1, runner=one)
    assert rounded.sample_text(n=2, length=8, seed=1) == alone


def test_the_command_line_has_it(run):
    result = invoke("eval", run.path, "--samples", 2, "--frozen", "int8", "--json")
    assert result.exit_code == 0
    message = "--frozen int4: blocks that wait are kept as none, int8, nf4"
    assert_refused(invoke("eval", run.path, "--frozen", "int4"), 2, message)
