import gc
import shutil

import pytest
import torch
from support.scheduled_blocks import VISITS, contents, make_store, run_visits, train

from edgeblocks.errors import RunError, StorageError
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.offload.block_slots import BlockSlots
from edgeblocks.offload.tiers import DiskTier


@pytest.fixture
def scheduling():
    """Makes schedulers and stops their threads at the end."""
    made = []

    def make(store, slots):
        made.append(BlockSlots(DiskTier(store), slots=slots))
        return made[-1]

    yield make
    for scheduler in made:
        for event in list(scheduler.store.held):
            scheduler.store.release(*event)
        scheduler.close()


@pytest.mark.parametrize("visits", VISITS, ids=lambda visits: "".join(map(str, visits)))
@pytest.mark.parametrize("slots", [1, 2])
def test_streamed_visits_leave_the_same_files_as_resident_ones(tmp_path, scheduling, slots, visits):
    """One, two, or as many slots as blocks: after any sequence of visits all files are equal byte for byte."""
    files = []
    for count in (3, slots):
        store = make_store(tmp_path / str(count))
        before = contents(store)
        run_visits(scheduling(store, count), visits)
        files.append(contents(store))
        assert all((a != b) == (block in visits) for block, (a, b) in enumerate(zip(before, files[-1], strict=True)))
    assert files[0] == files[1]


def test_one_slot_loads_trains_and_writes_in_turn(tmp_path, scheduling):
    """With one slot a block is on disk before the next is read."""
    store = make_store(tmp_path)
    run_visits(scheduling(store, 1), [0, 1, 2, 0])
    assert store.log == [(what, block) for block in (0, 1, 2, 0) for what in ("read", "write")]


def test_two_slots_write_behind_and_read_ahead(tmp_path, scheduling):
    """With two slots the next block is read before, and the former written during, a visit: in this order."""
    store = make_store(tmp_path)
    run_visits(scheduling(store, 2), [0, 1, 2, 0])
    assert store.log == [
        ("read", 0),
        ("read", 1),
        ("write", 0),
        ("read", 2),
        ("write", 1),
        ("read", 0),
        ("write", 2),
        ("write", 0),
    ]


def test_resident_blocks_are_read_once_and_written_after_each_visit(tmp_path, scheduling):
    """With a slot for each block nothing is loaded again, and every visit still reaches the disk."""
    store = make_store(tmp_path)
    run_visits(scheduling(store, 3), [0, 1, 2, 0, 1, 2])
    assert [block for what, block in store.log if what == "read"] == [0, 1, 2]
    assert [block for what, block in store.log if what == "write"] == [0, 1, 2, 0, 1, 2]


def test_the_next_block_is_loaded_during_the_visit(tmp_path, scheduling):
    """While block 0 is visited, block 1 arrives; while block 1 is visited, block 0 is written and block 2 arrives."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, 2)
    with scheduler.visit(0, then=1):
        store.wait_for("read", 1)
    with scheduler.visit(1, then=2):
        store.wait_for("write", 0)
        store.wait_for("read", 2)
        assert ("write", 1) not in store.log


def test_a_visit_does_not_wait_for_the_former_blocks_write(tmp_path, scheduling):
    """With block 0's write held back, the visit of block 1 begins; block 2 is read only after the write."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, 2)
    with scheduler.visit(0, then=1):
        store.wait_for("read", 1)
    store.hold("write", 0)
    with scheduler.visit(1, then=2) as resident:
        train(resident, 1)
        assert store.log == [("read", 0), ("read", 1)]
        store.release("write", 0)
        store.wait_for("read", 2)
    assert store.log[2:4] == [("write", 0), ("read", 2)]


def test_a_block_is_not_trained_while_it_is_written(tmp_path, scheduling):
    """A block visited twice in a row is on disk before the second visit changes it."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, 3)
    with scheduler.visit(0, then=0) as resident:
        train(resident, 1)
    with scheduler.visit(0, then=None) as resident:
        assert store.log == [("read", 0), ("write", 0)]
        assert store.header(0).step == 1
        train(resident, 1)
    scheduler.flush()
    assert store.header(0).step == 2


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_more_than_the_slots_are_in_memory(tmp_path, scheduling, slots):
    """Through a run there are `slots` buffers of the largest block's size, and no other."""
    store = make_store(tmp_path)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is BlockBuffer}
    scheduler = scheduling(store, slots)
    for visit, then in ((0, 1), (1, 2), (2, 0), (0, None)):
        with scheduler.visit(visit, then=then) as resident:
            train(resident, 1)
            buffers = [thing for thing in gc.get_objects() if type(thing) is BlockBuffer and id(thing) not in before]
            assert len(buffers) == slots
            assert {buffer.num_bytes for buffer in buffers} == {store.layouts[2].num_bytes}


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_an_exception_in_a_visit_leaves_the_file_as_it_was(tmp_path, scheduling, slots):
    """The half-trained block is forgotten: its file is untouched, and a later visit begins from it."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, slots)
    run_visits(scheduler, [0, 1, 2])
    before = contents(store)
    with pytest.raises(KeyError), scheduler.visit(1, then=2) as resident:
        train(resident, 1)
        raise KeyError("in the middle of a step")
    scheduler.flush()
    assert contents(store) == before
    with scheduler.visit(1, then=None) as resident:
        assert resident.step == 2
        train(resident, 2)
    scheduler.flush()
    expected = make_store(tmp_path / "undisturbed")
    run_visits(scheduling(expected, 3), [0, 1, 2, 1])
    assert contents(store) == contents(expected)


def refuse_writes_of(store, block):
    """A folder in the place of the block's file: the final rename fails, for the superuser too."""
    store.path(block).unlink()
    store.path(block).mkdir()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_failed_write_surfaces_at_the_latest_at_flush(tmp_path, scheduling, slots):
    """A write that fails in the background is a StorageError in the training thread, and the block is not kept."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, slots)

    def visit_and_flush():
        with scheduler.visit(0, then=1) as resident:
            train(resident, 1)
            refuse_writes_of(store, 0)
        scheduler.flush()

    with pytest.raises(StorageError, match="cannot write block 0"):
        visit_and_flush()
    scheduler.flush()
    with pytest.raises(StorageError, match="cannot read block 0"), scheduler.visit(0, then=None):
        pytest.fail("the lost block was given")


def test_the_first_of_two_failed_writes_is_raised_and_none_at_the_next_flush(tmp_path, scheduling):
    """Who handles the first failure flushes again: the second one must not take its place."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, 3)
    for block in (1, 2):
        with scheduler.visit(block, then=None) as resident:
            train(resident, 1)
            refuse_writes_of(store, block)
    with pytest.raises(StorageError, match="cannot write block 1"):
        scheduler.flush()
    scheduler.flush()


@pytest.mark.parametrize("slots", [2, 3])
def test_a_failed_write_stops_later_visits(tmp_path, scheduling, slots):
    """Without a flush between visits the failure still surfaces, within the next round over all blocks."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, slots)
    visited = []

    def rounds():
        for visit, then in ((0, 1), (1, 2), (2, 0), (0, 1), (1, 2)):
            with scheduler.visit(visit, then=then) as resident:
                train(resident, 1)
                visited.append(visit)
                if len(visited) == 1:
                    refuse_writes_of(store, 0)

    with pytest.raises(StorageError, match="block 0"):
        rounds()
    assert visited in ([0], [0, 1], [0, 1, 2])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_damaged_block_is_named_when_it_is_visited(tmp_path, scheduling, slots):
    """A failed load is the RunError of that block, in its own visit and not in the one before."""
    store = make_store(tmp_path)
    content = bytearray(store.path(1).read_bytes())
    content[-1] ^= 1
    store.path(1).write_bytes(content)
    scheduler = scheduling(store, slots)
    with scheduler.visit(0, then=1) as resident:
        train(resident, 1)
    with pytest.raises(RunError, match="block 1 is damaged"), scheduler.visit(1, then=2):
        pytest.fail("a damaged block was given")
    scheduler.flush()
    assert store.header(0).step == 1


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_ema_weights_between_visits_are_the_latest(tmp_path, scheduling, slots):
    """Between visits each block's EMA is what its last visit left; the visits that follow are not disturbed."""
    store = make_store(tmp_path / "watched")
    scheduler = scheduling(store, slots)
    for visits in ([0, 1, 2], [0, 1, 2]):
        run_visits(scheduler, visits)
        for block in (0, 1, 2, 0):
            with scheduler.ema_weights(block) as buffer:
                on_disk = BlockBuffer(store.layouts[block], ["ema"])
                store.read(block, on_disk)
                assert torch.equal(buffer.flat("ema"), on_disk.flat("ema"))
    expected = make_store(tmp_path / "plain")
    run_visits(scheduling(expected, 3), [0, 1, 2, 0, 1, 2])
    assert contents(store) == contents(expected)


def test_ema_weights_see_a_visit_that_was_not_flushed(tmp_path, scheduling):
    """Looking at a block waits for its write: what is shown is what is on disk."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, 2)
    with scheduler.visit(0, then=1) as resident:
        train(resident, 3)
        expected = resident.buffer.flat("ema").clone()
    with scheduler.ema_weights(0) as buffer:
        assert store.header(0).step == 3
        assert torch.equal(buffer.flat("ema"), expected)


def test_the_ema_loader_reads_only_when_the_block_changes(tmp_path):
    """EmaLoader holds one block's EMA and nothing else, and reads a block again only after another one."""
    store = make_store(tmp_path)
    loader = EmaLoader(store)
    for block in (0, 0, 1, 1, 0):
        with loader.ema_weights(block) as buffer:
            assert (buffer.flat("ema") == block + 1).all()
            assert buffer.num_bytes == store.layouts[2].part_span("ema")[1]
    assert store.log == [("read", 0), ("read", 1), ("read", 0)]


def test_the_ema_loader_forgets_a_failed_block(tmp_path):
    """After a failed read no stale weights pass for the block's own."""
    store = make_store(tmp_path)
    loader = EmaLoader(store)
    with loader.ema_weights(0):
        pass
    shutil.move(store.path(1), tmp_path / "elsewhere")
    with pytest.raises(RunError, match="block 1 is missing"), loader.ema_weights(1):
        pytest.fail("a missing block was given")
    with loader.ema_weights(0) as buffer:
        assert (buffer.flat("ema") == 1).all()


def test_times_count_loading_storing_and_waiting(tmp_path, scheduling):
    """All three grow with visits, and waiting is no longer than the whole."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, 1)
    run_visits(scheduler, [0, 1, 2])
    times = scheduler.times
    assert times.load_s > 0
    assert times.store_s > 0
    assert times.stall_s >= 0.9 * (times.load_s + times.store_s), "with one slot the training thread waits for all"


def test_a_failed_write_surfaces_before_another_block_is_looked_at(tmp_path, scheduling):
    """Looking at any block's EMA waits for all writes: a lost block 0 is not passed over by a look at block 1."""
    store = make_store(tmp_path)
    scheduler = scheduling(store, 3)
    with scheduler.visit(0, then=1) as resident:
        train(resident, 1)
        refuse_writes_of(store, 0)
    with pytest.raises(StorageError, match="cannot write block 0"), scheduler.ema_weights(1):
        pytest.fail("block 1 was given")
