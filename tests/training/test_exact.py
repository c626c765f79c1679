"""End-to-end training in stages: ordinary back-propagation, whatever is in memory."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS, SLOTS, plain_training, trained, waiting_in, whole_weights, with_slots
from support.shapes import checked_shapes
from support.small_blocks import all_bytes, filled_buffer, layout_of, store_in

import edgeblocks
from edgeblocks.cli.console import evaluation_report
from edgeblocks.errors import EdgeblocksError, InterruptedRunError, RunError, WriteLimitError
from edgeblocks.offload.block_buffer import PARTS
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.sections import network_of, stages_of, whole_name
from edgeblocks.offload.stage_slots import Need, StageSlots
from edgeblocks.planning.stage_order import traffic_of_a_step, uses_of_a_step
from edgeblocks.progress import Silent
from edgeblocks.runs.open_data import data_of
from edgeblocks.training.streamed_backward import StreamedBackward

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12


@pytest.fixture(scope="module", params=KINDS)
def resident(request, tmp_path_factory):
    """A run of four stages that are all in memory; two micro-batches, fp32 optimizer state, no clipping."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    made = {"blocks": 4, "tier": "ram", "optimizer": "adamw", "clip": 1e9, "steps": STEPS}
    return request.param, made, trained(request.param, out, **made)


def test_losses_and_weights_are_those_of_plain_pytorch(resident):
    """After twelve steps bit for bit: torch.optim.AdamW, the same batches in the same micro-batches."""
    _, _, run = resident
    named, losses = plain_training(run, steps=STEPS)
    told = [record["loss"] for record in run.directory.metrics()]
    assert told == losses and len(set(losses)) == STEPS
    weights = whole_weights(run)
    assert weights.keys() == named.keys()
    for name, parameter in named.items():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy(), err_msg=name)


def test_streamed_stages_give_the_bits_of_resident_ones(resident, tmp_path):
    """With one, two or three of four stages in memory, activation checkpointing, and a checkpoint every seven steps.

    The look at the end, which brings the stages in turn, gives the same as well. Which numbers: `SLOTS`.
    """
    kind, made, run = resident
    settings = {**made, "tier": "disk", "checkpointing": True, "visit_steps": 7}
    with pytest.raises(InterruptedRunError), checked_shapes():
        trained(kind, tmp_path / "begun", listener=StopAfter(1), **settings)
    for slots in SLOTS[kind]:
        again = edgeblocks.resume(with_slots(tmp_path / "begun", run, slots))
        assert_same_bits(run.path, again.path, blocks=4)
        assert again.summary["metrics"]["validation"] == run.summary["metrics"]["validation"]
        assert not list((again.path / "blocks").glob(".*"))


@pytest.mark.parametrize(
    "resident",
    [pytest.param(kind, marks=[] if kind == "vit" else pytest.mark.thorough) for kind in KINDS],
    indirect=True,
)
def test_it_is_exported_and_evaluated(resident, tmp_path):
    """As one graph, whose output `export` compares with torch's; and what `eval` says has no word of noise levels.

    The others have the graph of a block that is trained alone, which is exported in their own tests.
    """
    kind, _, run = resident
    run.export(tmp_path / "onnx")
    assert len(list((tmp_path / "onnx").glob("*.onnx"))) == 1
    if kind in ("vit", "ar"):
        text = evaluation_report(run.evaluate(samples=2))
        assert "noise" not in text and "chain" not in text


def test_the_limit_of_writes_holds_and_everything_is_saved(tmp_path):
    """Stages that are swapped count, as checkpoints do; the meter goes on where it was when the run goes on."""
    settings = {"blocks": 4, "tier": "disk", "steps": 200, "max_disk_writes": "12MB"}
    with pytest.raises(WriteLimitError, match="Everything is saved"):
        trained("dit", tmp_path / "run", **settings)
    store = edgeblocks.load(tmp_path / "run").directory.store()
    headers = [store.header(stage) for stage in range(4)]
    assert len({header.step for header in headers}) == 1 and 0 < headers[0].step < 200
    written = max(header.run_bytes_written for header in headers)
    assert 6e6 < written <= 12e6
    with pytest.raises(WriteLimitError):
        edgeblocks.resume(tmp_path / "run")
    assert store.header(0).step == headers[0].step


def test_a_listener_that_fails_ends_the_run_saved(tmp_path):
    class Broken(Silent):
        def step(self, progress):
            if progress.step == 5:
                raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        trained("dit", tmp_path / "run", listener=Broken(), blocks=2)
    store = edgeblocks.load(tmp_path / "run").directory.store()
    assert [store.header(stage).step for stage in range(2)] == [5, 5]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """A step whose loss was a number can still ruin them; the checkpoint before it stays, and can be used."""
    ruinous = {"learning_rate": 1e9, "warmup": 0, "clip": 1e30, "visit_steps": 1, "blocks": 2}
    with pytest.raises(EdgeblocksError, match="intact"):
        trained("dit", tmp_path / "run", **ruinous)
    run = edgeblocks.load(tmp_path / "run")
    assert all(np.isfinite(value).all() for value in whole_weights(run).values())


def test_stages_that_all_stay_in_memory_are_preferred_to_fewer_that_do_not():
    """The cut changes no number, so the plan may cut where nothing has to be moved."""
    wanted = {**KINDS["vit"], "method": "exact", "width": 512, "depth": 8, "heads": 8, "batch": 64}
    wanted["micro_batch"] = "auto"
    whole = edgeblocks.plan(**wanted, mem_budget="4GB").plan.chosen
    assert whole.slots == whole.blocks == 1
    cut = edgeblocks.plan(**{**wanted, "micro_batch": 32}, mem_budget="4GB", blocks=8, tier="ram").plan.chosen
    budget_bytes = cut.predicted_peak_bytes + 20_000_000  # the interpreter is measured again
    assert budget_bytes < whole.predicted_peak_bytes
    chosen = edgeblocks.plan(**wanted, mem_budget=str(budget_bytes)).plan.chosen
    assert chosen.slots == chosen.blocks > 1


def test_a_finished_run_that_lost_a_stage_is_not_called_finished(resident, tmp_path):
    _, _, run = resident
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run/blocks/block_002.safetensors").unlink()
    with pytest.raises(RunError, match=r"block 2 is missing.*trained together"):
        edgeblocks.resume(tmp_path / "run")


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(resident, tmp_path):
    kind, made, run = resident
    with pytest.raises(InterruptedRunError, match="saved at step 9 of 12"):
        trained(kind, tmp_path / "run", listener=StopAfter(9), **made)
    edgeblocks.resume(tmp_path / "run")
    assert_same_bits(run.path, tmp_path / "run", blocks=4)


def test_the_cut_changes_no_gradient(resident):
    """One stage or six: the same bits. A gradient that was not carried to the stem would show in its parameters."""
    _, _, run = resident
    family = run.directory.family()
    whole = family.block(num_layers=6, checkpointing=False)
    whole.reset_tables_()
    named = dict(whole.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in named.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    data = data_of(run.directory.settings.run, lambda *_: None)
    batch = family.draw(*data.gather(np.arange(8)), run.directory.partition.ranges[0], generator)
    family.loss(whole, batch).mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in named.values())
    for layers in ((6,), (3, 3), (1, 1, 1, 1, 1, 1)):
        stages = [network_of(family, section) for section in stages_of(layers)]
        for number, stage in enumerate(stages):
            stage.reset_tables_()
            with torch.no_grad():
                for name, parameter in stage.named_parameters():
                    parameter.copy_(named[whole_name(name, layers, number)])
        going = StreamedBackward(family, batch, num_stages=len(layers))
        for number in range(len(layers) - 1):
            going.forward(number, stages[number], micro_batch=8)
        for number in reversed(range(len(layers))):
            going.backward(number, stages[number], micro_batch=8, checkpointing=number % 2 == 0)
        for number, stage in enumerate(stages):
            for name, parameter in stage.named_parameters():
                assert torch.equal(parameter.grad, named[whole_name(name, layers, number)].grad), (layers, name)


LAYOUTS = [layout_of(width=width) for width in (64, 32, 64, 16)]


@given(
    slots=st.integers(1, 4),
    uses=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20),
    ahead=st.booleans(),
    ram_stages=st.one_of(st.none(), st.integers(0, 4)),
)
def test_a_stage_is_what_it_was_when_it_was_used_last(tmp_path_factory, slots, uses, ahead, ram_stages):
    """Whatever the order of uses, with and without a look ahead; a use that changes nothing needs weights alone.

    In the processor's memory, and on a device with so many stages in its host's.
    """
    folder = tmp_path_factory.mktemp("slots")
    store = store_in(folder, LAYOUTS)
    expected = []
    for stage, layout in enumerate(LAYOUTS):
        expected.append(filled_buffer(layout, seed=stage))
        store.write(stage, expected[stage], step=0)
    given_out = StageSlots(waiting_in(folder, store, ram_stages), slots=slots)
    needs = [Need(stage=stage, parts=PARTS if changes else ("weights",), changes=changes) for stage, changes in uses]
    for number, need in enumerate(needs):
        then = needs[number + 1] if ahead and number + 1 < len(needs) else None
        with given_out.use(need, then=then) as buffer:
            for part in need.parts:
                assert torch.equal(buffer.part_bytes(part), expected[need.stage].part_bytes(part))
            if need.changes:
                for held in (buffer, expected[need.stage]):
                    held.content.bitwise_xor_(1 + number % 7)  # low bits: a weight stays a number
    for step in (2, 3):  # the second finds stages that nothing has changed since the first
        files = NextBlocks(store)
        given_out.checkpoint(files, step=step, trained=(True,) * 4, finish=lambda stage, buffer: None)
        files.commit()
        for stage in range(4 if step == 2 else 0):
            with given_out.use(Need(stage=stage, parts=PARTS, changes=stage == 1), then=None) as buffer:
                assert all_bytes(buffer) == all_bytes(expected[stage])
                if stage == 1:
                    for held in (buffer, expected[stage]):
                        held.content.bitwise_xor_(8)
    given_out.close()
    assert sorted(path.name for path in folder.iterdir()) == [f"block_{stage:03d}.safetensors" for stage in range(4)]
    again = store.buffer()
    for stage in range(4):
        assert store.read(stage, again) == 3 and all_bytes(again) == all_bytes(expected[stage])


@pytest.mark.parametrize(
    "trained", [(True,), (True,) * 2, (True,) * 3, (True,) * 6, (False, True, False, True), (True, False, False, False)]
)
def test_a_step_moves_as_many_stages_as_the_plan_counts(tmp_path, trained):
    """Measured in the fourth step, when all have begun to change places; with one slot nothing is fetched early."""
    layouts = [layout_of(width=16)] * len(trained)
    for slots in range(1, len(trained) + 1):
        folder = tmp_path / str(slots)
        folder.mkdir()
        store = store_in(folder, layouts)
        for stage, layout in enumerate(layouts):
            store.write(stage, filled_buffer(layout, seed=stage), step=0)
        given_out, needs, written = (
            StageSlots(waiting_in(folder, store), slots=slots),
            [Need.of(use) for use in uses_of_a_step(trained)],
            [],
        )
        for _ in range(4):
            for need, then in zip(needs, [*needs[1:], needs[0]], strict=True):
                with given_out.use(need, then=then) as buffer:
                    block_bytes = buffer.content.numel()
            given_out.flush()  # waits for what is on its way
            written.append(store.bytes_written)
        given_out.close()
        assert (written[3] - written[2]) / block_bytes == traffic_of_a_step(trained, slots).offloaded


def test_a_checkpoint_puts_nothing_away(tmp_path):
    """It begins with the stages in memory; and what it has written does not wait anywhere else afterwards."""
    store = store_in(tmp_path, LAYOUTS)
    for stage, layout in enumerate(LAYOUTS):
        store.write(stage, filled_buffer(layout, seed=stage), step=0)
    given_out = StageSlots(waiting_in(tmp_path, store), slots=2)
    uses = [Need.of(use) for use in uses_of_a_step((True,) * 4)]
    for need, then in zip(uses, [*uses[1:], uses[0]], strict=True):
        with given_out.use(need, then=then):
            pass
    given_out.flush()
    before, files = store.bytes_written, NextBlocks(store)
    given_out.checkpoint(files, step=1, trained=(True,) * 4, finish=lambda stage, buffer: None)
    files.commit()
    saved = store.bytes_written
    assert saved - before == sum(store.path(stage).stat().st_size for stage in range(4))
    for stage in range(4):
        with given_out.use(Need(stage=stage, parts=PARTS, changes=False), then=None):
            pass
    assert store.bytes_written == saved
    given_out.close()


def test_a_run_that_is_killed_leaves_no_swap_file(tmp_path):
    """Stages wait in a file without a name, so that nothing stays behind even if the run is never resumed."""

    class Killed(Silent):
        def __init__(self):
            self.seen = set()

        def step(self, progress):
            self.seen |= {path.name for path in (tmp_path / "run/blocks").iterdir()}
            assert progress.bytes_written > 0

    listener = Killed()
    trained("dit", tmp_path / "run", listener=listener, blocks=4, tier="disk", steps=3)
    assert listener.seen == {f"block_{stage:03d}.safetensors" for stage in range(4)}


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_checkpoint_that_was_cut_short_is_whole_or_not_at_all(tmp_path, monkeypatch, written):
    """Killed while new files are written the former ones count; killed while they are renamed, the new ones."""
    layouts = LAYOUTS[:3]
    store = store_in(tmp_path, layouts)
    for stage, layout in enumerate(layouts):
        store.write(stage, filled_buffer(layout, seed=stage), step=1)
    files = NextBlocks(store)
    for stage, layout in enumerate(layouts[:written]):
        files.write(stage, filled_buffer(layout, seed=10 + stage), step=2)
    if written == 3:
        renamed = []

        usual = type(tmp_path).replace

        def replace(path, target):
            if len(renamed) == 2:
                raise KeyboardInterrupt
            renamed.append(path)
            return usual(path, target)

        monkeypatch.setattr(type(tmp_path), "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            files.commit()
        monkeypatch.undo()
    NextBlocks(store).recover()
    assert [store.header(stage).step for stage in range(3)] == [2 if written == 3 else 1] * 3
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
