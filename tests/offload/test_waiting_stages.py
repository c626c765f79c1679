"""End-to-end training on a device with memory of its own: the processor's bits, wherever its stages wait."""

import json
import time

import pytest
import torch
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS, trained, waiting_in
from support.made_up_plans import MB
from support.separate_memory import SeparateMemory
from support.small_blocks import all_bytes, filled_buffer, layout_of, store_in

import edgeblocks
from edgeblocks.errors import InterruptedRunError, OutOfBudgetError
from edgeblocks.offload.block_buffer import PARTS
from edgeblocks.offload.checkpoint import NextBlocks
from edgeblocks.offload.scratch import DeviceScratchFile
from edgeblocks.offload.stage_slots import Need, StageSlots
from edgeblocks.planning.stage_order import traffic_of_a_step, uses_of_a_step

pytestmark = pytest.mark.usefixtures("one_thread")

MADE = {"blocks": 4, "micro_batch": 8, "steps": 8, "visit_steps": 3, "clip": 0.05}
SETTINGS = {
    "fp32": {"optimizer": "adamw"},
    "8 bit, one norm": {"optimizer": "adamw8bit", "clip_by": "network"},
    "some frozen": {"optimizer": "adamw", "clip_by": "network", "train_blocks": "1,3"},
    "text": {"optimizer": "adamw8bit", "micro_batch": 2},
}
KIND_OF = dict.fromkeys(SETTINGS, "vit") | {"fp32": "dit", "text": "ar"}


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Runs on the processor with all stages in memory, each made once."""
    made = {}

    def run(name):
        if name not in made:
            out = tmp_path_factory.mktemp("cpu") / "run"
            made[name] = trained(KIND_OF[name], out, **{**MADE, **SETTINGS[name], "tier": "ram"})
        return made[name]

    return run


def begun_on_a_device(out, name, steps, **more):
    """A run on a device that was stopped after so many steps."""
    settings = {**MADE, **SETTINGS[name], "target": "cuda", "mem_budget": "2GB", **more}
    with pytest.raises(InterruptedRunError):
        trained(KIND_OF[name], out, listener=StopAfter(steps), **settings)
    return out


def assert_same_training(one, other):
    """Every loss, every norm, every byte of every stage, and what the look at the end found."""
    told = [[(record["loss"], record["gradient_norm"]) for record in run.directory.metrics()] for run in (one, other)]
    assert told[0] == told[1] and len(told[0]) == 8
    assert_same_bits(one.path, other.path, blocks=4)
    assert other.summary["metrics"]["validation"] == one.summary["metrics"]["validation"]
    assert not list((other.path / "blocks").glob(".*"))


@pytest.mark.usefixtures("gpu_like")
@pytest.mark.parametrize(
    ("name", "slots", "ram_blocks", "boundaries"),
    [
        ("fp32", 2, 4, "ram"),
        ("8 bit, one norm", 3, 0, "ram"),
        ("some frozen", 1, 3, "disk"),
        ("text", 2, 2, "disk"),
    ],
)
def test_training_on_a_device_equals_training_on_the_processor(on_cpu, tmp_path, name, slots, ram_blocks, boundaries):
    """However many stages are on the device and in its host's memory; interrupted on the way, with checkpoints.

    All numbers of slots and of stages in the host's memory are tried without a run, in `test_exact`.
    Buffers are those of the slots on the device, and on the host the copies, one staging buffer for the others, and
    room for one gradient where gradients wait for the norm of all.
    """
    one = on_cpu(name)
    out = begun_on_a_device(tmp_path / "run", name, 4, boundaries=boundaries)
    plan = json.loads((out / "plan.json").read_text())
    del plan["sha256"]
    looks = one.directory.plan.look_micro_batch
    changed = {"slots": slots, "ram_blocks": ram_blocks, "look_micro_batch": looks}
    (out / "plan.json").write_text(json.dumps({**plan, **changed}))
    again = edgeblocks.resume(out)
    device = SeparateMemory.newest
    assert_same_training(one, again)
    layouts, stages = again.directory.store().layouts, again.directory.trained
    sizes = [layout.num_bytes for layout in layouts]
    assert device.device_buffers == [max(sizes)] * slots
    gradient = max(layout.num_parameters for layout, learns in zip(layouts, stages, strict=True) if learns)
    assert device.host_buffers == [
        *sizes[:ram_blocks],
        *([max(sizes[ram_blocks:])] if ram_blocks < 4 else []),
        *([4 * gradient] if "clip_by" in SETTINGS[name] else []),
    ]
    if ram_blocks == 4 and boundaries == "ram" and "clip_by" not in SETTINGS[name]:
        files_bytes = sum(again.directory.store().file_bytes(stage) for stage in range(4))
        written = again.summary["disk_bytes_written"]
        assert 4 * files_bytes < written <= 5 * files_bytes, "created and saved after steps 3, 4, 6 and 8, no more"


@pytest.mark.usefixtures("gpu_like")
@pytest.mark.parametrize(("tier", "ram_blocks"), [pytest.param("ram", 4, marks=pytest.mark.thorough), ("disk", 0)])
def test_a_planned_run_is_used_as_any_other(on_cpu, tmp_path, tier, ram_blocks):
    """Under the smallest budget that streams: both memories hold what was planned, the plan tells the places.

    Its samples are the processor's, it is evaluated and exported, and a sample grid is made on the way.
    """
    wanted = {**KINDS["dit"], "method": "exact", **MADE, **SETTINGS["fp32"], "target": "cuda", "warmup": 5}
    tight = edgeblocks.plan(**wanted, mem_budget="2GB", tier="disk").plan.chosen
    budget = str(tight.predicted_peak_bytes)  # all stages do not fit the device
    run = edgeblocks.train(out=tmp_path / "run", **wanted, mem_budget=budget, tier=tier, sample_grids=2)
    device, plan = SeparateMemory.newest, run.directory.plan
    assert (plan.slots, plan.ram_blocks) == (2, ram_blocks)
    assert plan.tiers == {"device": [], "ram": [0, 1, 2, 3][:ram_blocks], "disk": [0, 1, 2, 3][ram_blocks:]}
    planned, on_host = plan.breakdown, plan.host_breakdown
    assert sum(device.device_buffers) <= planned["weights"] + planned["ema"] + planned["optimizer"]
    assert sum(device.host_buffers) <= on_host["blocks"] + on_host["staging"]
    assert run.summary["peak_bytes"] <= run.summary["budget_bytes"]
    assert plan.predicted_host_peak_bytes <= plan.ram_budget_bytes
    assert any("not yet run on a GPU" in warning for warning in plan.warnings)
    assert len(list((run.path / "samples").glob("*.png"))) == 2
    one = on_cpu("fp32")
    assert_same_bits(one.path, run.path, blocks=4)
    assert (run.sample(n=4, steps=4) == one.sample(n=4, steps=4)).all()
    assert SeparateMemory.newest.copied_bytes > 0, "the EMA weights were put on the device"
    if tier == "ram":
        assert run.evaluate(samples=0)["steps"] == [8] * 4
        run.export(tmp_path / "onnx")


@pytest.mark.usefixtures("gpu_like")
def test_a_run_of_which_most_is_frozen_is_sampled_on_a_device(on_cpu, tmp_path):
    """Frozen stages have no optimizer state, so the file with most bytes is not the one with most weights."""
    out = begun_on_a_device(tmp_path / "run", "some frozen", 4)
    run = edgeblocks.resume(out)
    assert run.evaluate(samples=0)["validation"] == on_cpu("some frozen").evaluate(samples=0)["validation"]


@pytest.mark.usefixtures("gpu_like")
def test_a_run_moves_between_a_processor_and_a_device(on_cpu, tmp_path):
    """Begun on the processor, gone on with on a device and finished on the processor: the same bits."""
    out = tmp_path / "run"
    settings = {**MADE, **SETTINGS["8 bit, one norm"], "tier": "ram"}
    with pytest.raises(InterruptedRunError):
        trained("vit", out, listener=StopAfter(2), **settings)
    with pytest.raises(InterruptedRunError):
        edgeblocks.resume(out, target="cuda", mem_budget="2GB", listener=StopAfter(5))
    assert "ram_budget_bytes" in json.loads((out / "plan.json").read_text())
    run = edgeblocks.resume(out, target="cpu", mem_budget="4GB")
    assert not run.directory.plan.is_beside_a_host
    assert_same_training(on_cpu("8 bit, one norm"), run)


@pytest.mark.usefixtures("gpu_like")
def test_a_host_that_grows_past_its_budget_ends_the_run_saved(on_cpu, tmp_path, monkeypatch):
    """The run ends with the flag, at the step before, and goes on with more to the same bits."""

    class Greedy(StopAfter):
        def step(self, progress):
            if progress.step == 4:
                monkeypatch.setattr(SeparateMemory, "host_growth_bytes", 40_000 * MB)

    settings = {**MADE, **SETTINGS["fp32"], "target": "cuda", "mem_budget": "2GB", "ram_budget": "90%"}
    with pytest.raises(OutOfBudgetError, match=r"the host's budget of .* is used up: .* --ram-budget \d+MB"):
        trained("dit", tmp_path / "run", listener=Greedy(0), **settings)
    saved = edgeblocks.load(tmp_path / "run").directory
    assert saved.saved_steps(saved.store()) == [4] * 4
    monkeypatch.setattr(SeparateMemory, "host_growth_bytes", 0)
    assert_same_training(on_cpu("fp32"), edgeblocks.resume(tmp_path / "run"))


@pytest.mark.parametrize("trained_stages", [(True,) * 5, (False, True, False, True)])
@pytest.mark.parametrize("ram_stages", [0, 1, 3, 4])
def test_a_step_moves_what_the_plan_counts(tmp_path, trained_stages, ram_stages):
    """Measured in the fourth step: bytes over the link, and bytes that stages not in RAM put on disk."""
    layout = layout_of(width=16)
    count = len(trained_stages)
    sizes = {part: layout.part_span(part)[1] for part in PARTS}
    rest_bytes = sizes["ema"] + sizes["optimizer"]
    for slots in range(1, count + 1):
        folder, device = tmp_path / str(slots), SeparateMemory()
        folder.mkdir()
        store = store_in(folder, [layout] * count)
        for stage in range(count):
            store.write(stage, filled_buffer(layout, seed=stage), step=0)
        given_out = StageSlots(waiting_in(folder, store, ram_stages, device), slots=slots)
        needs, moved = [Need.of(use) for use in uses_of_a_step(trained_stages)], []
        for _ in range(4):
            for need, then in zip(needs, [*needs[1:], needs[0]], strict=True):
                with given_out.use(need, then=then):
                    pass
            given_out.flush()  # waits for what is on its way
            moved.append((store.bytes_written, device.copied_bytes))
        given_out.close()
        written, copied = (after - before for before, after in zip(moved[2], moved[3], strict=True))
        to_disk = traffic_of_a_step(trained_stages, slots, in_ram=ram_stages)
        assert written == to_disk.offloaded * layout.num_bytes
        over_link = traffic_of_a_step(trained_stages, slots)
        fetched = over_link.weights_loaded * sizes["weights"] + over_link.rest_loaded * rest_bytes
        assert copied == fetched + over_link.offloaded * layout.num_bytes


def test_a_stage_is_saved_while_another_one_is_on_its_way(tmp_path):
    """The training thread saves a stage through the buffer through which the I/O thread fetches one, slowly."""

    class Slow(SeparateMemory):
        def copy_(self, destination, source):
            time.sleep(0.05)
            super().copy_(destination, source)

    store = store_in(tmp_path, [layout_of()] * 2)
    stages = [filled_buffer(layout, seed=stage) for stage, layout in enumerate(store.layouts)]
    for stage, buffer in enumerate(stages):
        store.write(stage, buffer, step=0)
    given_out = StageSlots(waiting_in(tmp_path, store, 0, Slow()), slots=2)
    needs = [Need(stage=stage, parts=PARTS, changes=False) for stage in range(2)]
    with given_out.use(needs[0], then=needs[1]):
        pass
    files = NextBlocks(store)
    given_out.checkpoint(files, 1, (True, False), lambda stage, buffer: None)
    files.commit()
    with given_out.use(needs[1], then=None) as buffer:
        assert all_bytes(buffer) == all_bytes(stages[1])
    given_out.close()
    again = store.buffer()
    assert store.read(0, again) == 1 and all_bytes(again) == all_bytes(stages[0])


def test_gradients_of_a_device_pass_through_its_hosts_memory(tmp_path):
    """What is written is what comes back, of any size up to the largest; nothing is left behind."""
    device = SeparateMemory()
    file = DeviceScratchFile(tmp_path, "a gradient", device, largest_bytes=4096)
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (1024, 10)]
    for start, gradient in zip((0, 4096), gradients, strict=True):
        file.write(start, gradient.view(torch.uint8))
    for start, gradient in zip((4096, 0), reversed(gradients), strict=True):
        back = torch.zeros_like(gradient)
        file.read(start, back.view(torch.uint8))
        assert torch.equal(back, gradient)
    assert device.host_buffers == [4096]
    assert not list(tmp_path.iterdir())
