"""Blocks of a device with memory of its own: three tiers, the same bits, both budgets."""

import json

import pytest
import torch
from support.equality import SMALL, assert_same_bits
from support.scheduled_blocks import VISITS, contents, make_store, run_visits
from support.separate_memory import SeparateMemory

import edgeblocks
from edgeblocks.errors import DoesNotFitError, OutOfBudgetError, StorageError
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.offload.block_slots import BlockSlots
from edgeblocks.offload.tiers import DiskTier, HostTier
from edgeblocks.progress import Silent


@pytest.fixture
def gpu_scheduling():
    """Makes schedulers of a device with memory of its own, and stops their threads."""
    made = []

    def make(store, *, slots, ram_blocks):
        host = HostTier(store, SeparateMemory(), ram_blocks=ram_blocks)
        made.append(BlockSlots(host, slots=slots))
        return made[-1], host

    yield make
    for scheduler in made:
        scheduler.close()


@pytest.mark.parametrize("visits", VISITS, ids=lambda visits: "".join(map(str, visits)))
@pytest.mark.parametrize("ram_blocks", [0, 1, 3])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_tier_leaves_the_same_files(tmp_path, gpu_scheduling, slots, ram_blocks, visits):
    """Slots on the device, copies in RAM or none: after any visits the files are those of plain memory, byte for byte.

    A block with a copy is read from disk once at most.
    """
    plain = make_store(tmp_path / "plain")
    scheduler = BlockSlots(DiskTier(plain), slots=3)
    run_visits(scheduler, visits)
    scheduler.close()
    store = make_store(tmp_path / "tiers")
    scheduler, host = gpu_scheduling(store, slots=slots, ram_blocks=ram_blocks)
    run_visits(scheduler, visits)
    assert contents(store) == contents(plain)
    assert all(store.log.count(("read", block)) <= 1 for block in range(ram_blocks))
    sizes = [layout.num_bytes for layout in store.layouts]
    assert host.device.device_buffers == [max(sizes)] * slots
    assert host.device.host_buffers == [*sizes[:ram_blocks], *([max(sizes)] if ram_blocks < 3 else [])]


def test_a_write_that_fails_leaves_a_copy_that_is_not_used(tmp_path, gpu_scheduling, monkeypatch):
    """The disk refuses a visit's write: the next visit starts from the file, not from the copy in RAM."""
    store = make_store(tmp_path)
    scheduler, _ = gpu_scheduling(store, slots=1, ram_blocks=3)
    with scheduler.visit(0, then=None) as resident:
        resident.step = 1
    (tmp_path / "block_000.safetensors").rename(tmp_path / "kept")
    (tmp_path / "block_000.safetensors").mkdir()  # what cannot be replaced by a file
    with pytest.raises(StorageError), scheduler.visit(0, then=None) as resident:
        resident.buffer.flat("weights").fill_(99)
        resident.step = 2
    (tmp_path / "block_000.safetensors").rmdir()
    (tmp_path / "kept").rename(tmp_path / "block_000.safetensors")
    with scheduler.visit(0, then=None) as resident:
        assert resident.step == 1
        assert torch.equal(resident.buffer.flat("weights"), torch.ones_like(resident.buffer.flat("weights")))


def test_a_loader_moves_the_ema_weights_alone(tmp_path):
    """Inference on a device takes the EMA weights of one block there, and no more."""
    store = make_store(tmp_path)
    device = SeparateMemory()
    loader = EmaLoader(store, device=device)
    for block in (0, 2, 2):
        with loader.ema_weights(block) as buffer:
            assert float(buffer.flat("ema").mean()) == block + 1
    ema_bytes = [layout.part_span("ema")[1] for layout in store.layouts]
    assert device.copied_bytes == ema_bytes[0] + ema_bytes[2]
    assert device.device_buffers == [max(ema_bytes)]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    out = tmp_path_factory.mktemp("cpu") / "run"
    edgeblocks.train(out=out, steps=20, mem_budget="4GB", visit_steps=5, **SMALL)
    return out


@pytest.mark.usefixtures("gpu_like")
@pytest.mark.parametrize(("tier", "ram_blocks"), [("ram", 3), ("disk", 0)])
def test_training_on_a_device_equals_training_on_the_processor(on_cpu, tmp_path, tier, ram_blocks):
    """Blocks that wait in RAM or on disk: the processor's weights bit for bit, and the processor's samples.

    Plan and summary tell of both memories.
    """
    settings = {**SMALL, "steps": 20, "visit_steps": 5, "target": "cuda", "micro_batch": 16, "checkpointing": False}
    tight = edgeblocks.plan(**settings, mem_budget="2GB", tier="disk").plan.chosen
    settings["mem_budget"] = str(tight.predicted_peak_bytes)  # all blocks do not fit the device
    run = edgeblocks.train(out=tmp_path / "run", tier=tier, **settings)
    plan = run.directory.plan
    assert (plan.slots, plan.ram_blocks) == (2, ram_blocks)
    assert plan.tiers == {"device": [], "ram": [0, 1, 2][:ram_blocks], "disk": [0, 1, 2][ram_blocks:]}
    assert plan.machine["host"]["memory_bytes"] == SeparateMemory().host_bytes()
    assert plan.predicted_host_peak_bytes <= plan.ram_budget_bytes == SeparateMemory().host_bytes() // 2
    assert run.summary["peak_bytes"] <= run.summary["budget_bytes"]
    assert run.summary["ram_peak_bytes"] > run.summary["peak_bytes"]
    assert_same_bits(on_cpu, run.path)
    assert (run.sample(n=4, steps=4) == edgeblocks.load(on_cpu).sample(n=4, steps=4)).all()


@pytest.mark.usefixtures("gpu_like")
def test_a_run_moves_between_a_processor_and_a_device(on_cpu, tmp_path):
    """Begun on the processor, gone on with on a device and finished on the processor: the same bits."""
    out = tmp_path / "run"

    class StopAt(Silent):
        def __init__(self, steps):
            self.left = steps

        def step(self, progress):
            self.left -= 1
            if not self.left:
                raise OutOfBudgetError("enough")

    settings = {**SMALL, "steps": 20, "visit_steps": 5, "mem_budget": "4GB", "micro_batch": 16}
    with pytest.raises(OutOfBudgetError):
        edgeblocks.train(out=out, listener=StopAt(21), **settings)
    with pytest.raises(OutOfBudgetError):
        edgeblocks.resume(out, target="cuda", mem_budget="2GB", listener=StopAt(20))
    assert "ram_budget_bytes" in json.loads((out / "plan.json").read_text())
    run = edgeblocks.resume(out, target="cpu")
    assert not run.directory.plan.is_beside_a_host
    assert run.directory.settings.run.ram_budget is None
    assert_same_bits(on_cpu, out)


@pytest.mark.usefixtures("gpu_like")
def test_a_ram_budget_that_is_too_small_is_refused(tmp_path):
    """The refusal names the host, its parts and the flag."""
    with pytest.raises(DoesNotFitError, match=r"on the host: .*--ram-budget \d+MB or more"):
        edgeblocks.train(out=tmp_path / "run", target="cuda", ram_budget="100MB", mem_budget="2GB", steps=2, **SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("gpu_like")
def test_a_host_that_grows_past_its_budget_ends_the_run_saved(on_cpu, tmp_path, monkeypatch):
    """Something else in the process takes the host's memory: the run ends with the flag, and goes on with more."""
    settings = {**SMALL, "steps": 20, "visit_steps": 5, "target": "cuda", "mem_budget": "2GB", "micro_batch": 16}

    class Greedy(Silent):
        def step(self, progress):
            if progress.steps_done == 12:
                monkeypatch.setattr(SeparateMemory, "host_growth_bytes", 40_000_000_000)

    with pytest.raises(OutOfBudgetError, match=r"the host's budget of .* is used up: .* --ram-budget \d+MB"):
        edgeblocks.train(out=tmp_path / "run", listener=Greedy(), ram_budget="90%", **settings)
    monkeypatch.setattr(SeparateMemory, "host_growth_bytes", 0)
    edgeblocks.resume(tmp_path / "run")
    assert_same_bits(on_cpu, tmp_path / "run")
