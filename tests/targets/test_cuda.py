"""The CUDA target: what a machine without a GPU says, and, marked `gpu`, what one with it does."""

import json

import pytest
import torch
from support.equality import SMALL, StopAfter, block_tensors

import edgeblocks
from edgeblocks.doctor import probes
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.offload.slots import StreamTimes
from edgeblocks.optim.adamw import GPU_CHUNK_SIZE, Workspace, adamw_8bit_state, adamw_8bit_step_
from edgeblocks.optim.cuda_step import choice_on, difference
from edgeblocks.optim.moments import GROUP_SIZE
from edgeblocks.targets.cuda import CudaTarget
from edgeblocks.training.boundaries import OnDisk

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_target_is_refused_with_what_to_do(tmp_path):
    """torch's build or its missing GPU, --target cpu and the doctor are named; nothing is created."""
    message = r"--target cuda: torch .*(built without CUDA|sees no GPU).* --target cpu .* edgeblocks doctor"
    with pytest.raises(ConfigError, match=message):
        edgeblocks.train(out=tmp_path / "run", target="cuda", **SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("former", [0.5, 0.05])
def test_the_cap_leaves_the_share_of_memory_as_it_was(monkeypatch, former):
    """A share that the program had set before holds afterwards too, and is not raised while a run is trained."""
    shares = [former]
    monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda: shares[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    target = CudaTarget()
    monkeypatch.setattr(target, "total_bytes", lambda: 1000)
    with target.capped(200):
        assert shares[-1] == min(former, 0.2)
    assert shares[-1] == former


@pytest.mark.gpu
@on_a_gpu
def test_the_doctor_measures_the_link_as_a_plan_does():
    """Each GPU has a name, memory, and a speed of its link in both directions."""
    found = probes._probe_gpus()
    assert found["note"] is None and len(found["gpus"]) == torch.cuda.device_count()
    for gpu in found["gpus"]:
        assert 0 < gpu["free_bytes"] <= gpu["total_bytes"]
        assert min(gpu["to_gpu_bytes_per_s"], gpu["from_gpu_bytes_per_s"]) > 1e9


@pytest.mark.gpu
@on_a_gpu
def test_a_machine_is_measured(tmp_path):
    """Speeds and memories of a GPU and its host are positive and smaller than the machine."""
    target = CudaTarget()
    target.prepare()
    machine = target.measure(tmp_path)
    assert 0 < machine.runtime_bytes < target.total_bytes()
    assert 0 < machine.host.runtime_bytes < machine.host.memory_bytes
    assert machine.flops_per_s > 1e11 and machine.host.link_bytes_per_s > 1e9


@pytest.mark.gpu
@on_a_gpu
def test_bytes_survive_both_ways():
    """Page-locked memory to the GPU and back, beside work on the default stream that wrote the source."""
    target = CudaTarget()
    target.prepare()
    here, there, back = target.host_memory(2**20), target.empty(2**20), target.host_memory(2**20)
    here.random_(0, 256)
    target.copy_(there, here)
    there.add_(1)
    target.copy_(back, there)
    assert torch.equal(back, here + 1)


@pytest.mark.gpu
@on_a_gpu
def test_the_cap_refuses_with_an_error_that_is_caught():
    """A tensor beyond the budget raises, and the process goes on."""
    target = CudaTarget()
    target.prepare()
    target.warm_up()
    budget_bytes = target.used_bytes() + 200_000_000
    with target.capped(budget_bytes):
        with pytest.raises(RuntimeError, match="out of memory"):
            target.empty(400_000_000)
        assert target.empty(1_000_000).numel() == 1_000_000
    assert target.peak_bytes() <= budget_bytes


@pytest.mark.gpu
@on_a_gpu
def test_the_8_bit_step_is_the_processors():
    """Our own: after one step the parameters agree to rounding, and the codes but for neighbours."""
    numel = 64 * GROUP_SIZE
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(numel, generator=generator) for _ in range(2)]
    results = []
    for device in ("cpu", "cuda"):
        parameters, gradients = (tensor.clone().to(device) for tensor in drawn)
        state = adamw_8bit_state(numel, device)
        settings = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "step": 1}
        workspace = Workspace(num_threads=1, chunk_size=GPU_CHUNK_SIZE, device=device)
        adamw_8bit_step_(parameters, gradients, *state, workspace=workspace, **settings)
        results.append((parameters.cpu(), state[0].cpu()))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
    assert (results[0][1] == results[1][1]).float().mean() > 0.99


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("broken", [None, float("nan"), float("inf"), 1e30])
def test_the_8_bit_step_of_bitsandbytes_is_ours(broken):
    """Its kernel passes the try, and a broken gradient makes its group NaN after the next step, and no other."""
    pytest.importorskip("bitsandbytes")
    choice = choice_on("cuda")
    assert choice.name.startswith("bitsandbytes"), choice.reason
    library = Workspace.for_device("cuda").library
    assert difference(library, "cuda") is None
    if broken is None:
        return
    numel = 3 * GROUP_SIZE
    parameters, gradients = torch.ones(2, numel, device="cuda").unbind()
    state, settings = adamw_8bit_state(numel, "cuda"), {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    gradients[GROUP_SIZE + 7] = broken
    for step in (1, 2):
        library.step_(parameters, gradients, *state, step=step, weight_decay=0.01, **settings)
        gradients[GROUP_SIZE + 7] = 1.0
    assert parameters.view(3, -1).isnan().all(1).tolist() == [False, True, False]
    assert parameters.view(3, -1).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_training_on_a_gpu_keeps_both_budgets_and_the_numbers(tmp_path, tier):
    """After ten steps the weights are the processor's up to rounding; both peaks are inside their budgets."""
    settings = {**SMALL, "steps": 10, "visit_steps": 3, "optimizer": "adamw"}
    on_cpu = edgeblocks.train(out=tmp_path / "cpu", mem_budget="4GB", target="cpu", **settings)
    run = edgeblocks.train(out=tmp_path / "gpu", mem_budget="2GB", target="cuda", tier=tier, **settings)
    assert run.summary["peak_bytes"] <= run.summary["budget_bytes"]
    assert run.summary["ram_peak_bytes"] <= run.directory.plan.ram_budget_bytes
    one, two = block_tensors(on_cpu.path), block_tensors(run.path)
    for name in one:
        if name[1].startswith("weights."):
            assert abs(one[name] - two[name]).max() < 2e-3, name


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_end_to_end_training_on_a_gpu_keeps_both_budgets_and_the_numbers(tmp_path, tier):
    """Two of three stages at a time on the GPU, interrupted: weights and losses are the processor's up to rounding.

    Ten steps; gradients wait for the norm of all, and what enters the stages waits on disk or on the GPU. Both peaks
    are inside their budgets, and the EMA weights make pictures there.
    """
    made = {"method": "exact", "steps": 10, "visit_steps": 3, "optimizer": "adamw", "clip_by": "network"}
    settings = {**SMALL, **made, "micro_batch": 8, "boundaries": tier}
    on_cpu = edgeblocks.train(out=tmp_path / "cpu", mem_budget="4GB", target="cpu", **settings)
    out, begun = tmp_path / "gpu", {**settings, "target": "cuda", "mem_budget": "2GB", "tier": "disk"}
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=out, listener=StopAfter(4), **begun)
    plan, copies = json.loads((out / "plan.json").read_text()), 3 if tier == "ram" else 0
    del plan["sha256"]
    (out / "plan.json").write_text(json.dumps({**plan, "ram_blocks": copies}))  # planned, all would fit the GPU
    run = edgeblocks.resume(out)
    assert run.directory.plan.slots == 2 and run.directory.plan.ram_blocks == copies
    assert run.summary["peak_bytes"] <= run.summary["budget_bytes"]
    assert run.summary["ram_peak_bytes"] <= plan["ram_budget_bytes"]
    one, two = block_tensors(on_cpu.path), block_tensors(run.path)
    for name in one:
        if name[1].startswith("weights."):
            assert abs(one[name] - two[name]).max() < 2e-3, name
    losses = [[record["loss"] for record in each.directory.metrics()] for each in (on_cpu, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert run.sample(n=2, steps=3).shape == (2, 8, 8, 1)


@pytest.mark.gpu
@on_a_gpu
def test_what_enters_a_stage_comes_back_to_the_gpu(tmp_path):
    """From disk, through the host's memory, bit for bit."""
    hidden = torch.randn(6, 5, 7, device="cuda")
    keeper = OnDisk(6, tmp_path, StreamTimes())
    keeper.put(1, slice(0, 6), hidden)
    back = keeper.of(1, slice(2, 6))
    assert back.device == hidden.device and torch.equal(back, hidden[2:6])
