"""Plans for a device with a memory of its own beside the host's."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.made_up_plans import (
    EXACT_GPU_REQUESTS,
    GPU,
    GPU_REQUESTS,
    GPUS,
    HOST,
    MACHINE,
    MB,
    REQUEST,
    costs,
    plan_or_refusal,
    total_s,
)

from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise
from edgeblocks.errors import DoesNotFitError
from edgeblocks.methods import EXACT
from edgeblocks.planning import memory as footprint
from edgeblocks.planning.planner import make_plan
from edgeblocks.runs.written_plan import written_plan
from edgeblocks.units import advised_budget


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """The trace takes seconds and must not fall into a test with a deadline."""
    costs()


@given(GPUS, st.one_of(GPU_REQUESTS, EXACT_GPU_REQUESTS))
def test_a_plan_for_a_gpu_keeps_both_promises(machine, request):
    """Predicted peaks of device and host are within their budgets; every block or stage lives in exactly one place.

    The host has room for one gradient where gradients wait for the norm of all, and for what enters a stage where that
    waits on disk.
    """
    plan = plan_or_refusal(machine, request)
    assume(not isinstance(plan, DoesNotFitError))
    chosen = plan.chosen
    assert chosen.predicted_peak_bytes == sum(chosen.breakdown.values()) <= request.budget_bytes
    ram_budget_bytes = machine.host.memory_bytes if request.ram_budget_bytes is None else request.ram_budget_bytes
    assert chosen.predicted_host_peak_bytes == sum(chosen.host_breakdown.values()) <= ram_budget_bytes
    assert plan.ram_budget_bytes == ram_budget_bytes
    assert all(size >= 0 for size in (*chosen.breakdown.values(), *chosen.host_breakdown.values()))
    assert chosen.host_breakdown["runtime"] == machine.host.runtime_bytes
    assert chosen.host_breakdown["staging"] == chosen.block_bytes
    assert sum(chosen.host_breakdown.values()) >= machine.planning_bytes
    # A block is made in float32 before it is rounded.
    float32_bytes = chosen.breakdown["gradients"] if request.master == "bf16" else 0
    assert sum(chosen.host_breakdown.values()) >= machine.host.runtime_bytes + chosen.block_bytes + float32_bytes
    assert chosen.breakdown["planning"] == 0
    tiers = chosen.tiers
    assert tiers["device"] + tiers["ram"] + tiers["disk"] == list(range(chosen.blocks))
    assert chosen.host_breakdown["blocks"] == len(tiers["ram"]) * chosen.block_bytes
    assert chosen.slots in (1, 2, chosen.blocks)
    assert bool(tiers["device"]) == (chosen.slots == chosen.blocks)
    assert ("gradients" in chosen.host_breakdown) == (request.clip_by == "network")
    if request.clip_by == "network":
        assert chosen.host_breakdown["gradients"] == chosen.breakdown["gradients"]
    assert ("boundaries" in chosen.host_breakdown) == (plan.boundary_disk_bytes > 0)
    if request.tier == "ram":
        assert not tiers["disk"]
    if request.tier == "disk":
        assert chosen.slots <= 2
        assert not tiers["ram"]


@given(GPUS, GPU_REQUESTS, st.integers(100 * MB, 3000 * MB), st.integers(100 * MB, 3000 * MB))
def test_more_ram_never_gives_more_blocks_nor_keeps_fewer_in_ram(machine, request, one_bytes, other_bytes):
    """Of two RAM budgets the larger fits if the smaller does, with no more blocks; of equally many, no fewer in RAM."""
    small, large = sorted((one_bytes, other_bytes))
    with_small, with_large = (
        plan_or_refusal(machine, replace(request, ram_budget_bytes=size, visit_steps=10)) for size in (small, large)
    )
    if isinstance(with_large, DoesNotFitError):
        assert isinstance(with_small, DoesNotFitError)
    elif not isinstance(with_small, DoesNotFitError):
        assert with_large.chosen.blocks <= with_small.chosen.blocks
        if with_large.chosen.blocks == with_small.chosen.blocks:
            assert with_large.chosen.ram_blocks >= with_small.chosen.ram_blocks
            assert total_s(with_large.chosen) <= total_s(with_small.chosen) * (1 + 1e-9)


@given(GPUS, GPU_REQUESTS)
def test_a_refusal_for_a_gpu_names_the_memory_that_is_too_small(machine, request):
    """The budget that the message names works when the other is ample, a megabyte less does not."""
    request = replace(
        request, budget_bytes=request.budget_bytes // 2, ram_budget_bytes=request.ram_budget_bytes or 900 * MB
    )
    refusal = plan_or_refusal(machine, request)
    assume(isinstance(refusal, DoesNotFitError))
    on_host = "on the host" in str(refusal)
    assert on_host != ("on the device:" in str(refusal))
    flag, named, other = ("--ram-budget", "ram_budget_bytes", "budget_bytes")
    if not on_host:
        flag, named, other = ("--mem-budget", "budget_bytes", "ram_budget_bytes")
    assert f"use {flag} {advised_budget(refusal.as_fixed_bytes)} or more" in str(refusal)
    fixed = request if "as well" not in str(refusal) else replace(request, **{other: 10**12})
    make_plan(costs(), machine, replace(fixed, **{named: refusal.as_fixed_bytes}))
    with pytest.raises(DoesNotFitError):
        make_plan(costs(), machine, replace(fixed, **{named: refusal.as_fixed_bytes - MB}))


def test_a_refusal_names_both_memories_where_both_are_too_small():
    """One message has both flags, and both together work."""
    with pytest.raises(DoesNotFitError, match=r"on the host.*--ram-budget \d+MB.*--mem-budget \d+MB") as caught:
        make_plan(costs(), GPU, replace(REQUEST, budget_bytes=100 * MB, ram_budget_bytes=900 * MB))
    ram, memory = (
        int(str(caught.value).partition(f"{flag} ")[2].partition("MB")[0]) for flag in ("--ram-budget", "--mem-budget")
    )
    make_plan(costs(), GPU, replace(REQUEST, budget_bytes=memory * MB, ram_budget_bytes=ram * MB))


def test_a_block_of_a_gpu_is_loaded_over_the_link_and_from_disk_where_it_lives_there():
    """Loading costs the link, and the disk for the share of blocks that live there; storing costs both for all."""

    def streaming_s(ram_blocks, **fixed):
        room = HOST.runtime_bytes + 100 * MB + (1 + ram_blocks) * block_bytes
        chosen = make_plan(costs(), GPU, replace(request, ram_budget_bytes=room, **fixed)).chosen
        assert chosen.ram_blocks == (0 if chosen.slots == 4 else ram_blocks)
        return chosen.slots, chosen.streaming_s * chosen.visit_steps

    request = replace(REQUEST, blocks=4, visit_steps=10)
    block_bytes = make_plan(costs(), GPU, request).chosen.block_bytes
    link_s, read_s, write_s = block_bytes / 1e10, block_bytes / 1e9, block_bytes / 3e8
    few = {"budget_bytes": 370 * MB, "micro_batch": 1, "checkpointing": True}
    for ram_blocks in range(5):
        slots, moving_s = streaming_s(ram_blocks, **few)
        assert slots == 2
        assert moving_s == pytest.approx(0.25 * (2 * link_s + (1 - ram_blocks / 4) * read_s + write_s))
    slots, moving_s = streaming_s(0)
    assert slots == 4
    assert moving_s == pytest.approx(0.25 * (link_s + write_s))


def test_stages_of_a_gpu_pass_the_link_and_the_disk_where_they_live_there():
    """What moves takes the link's time; what lives in RAM no disk, whose bytes and whose time become less and less."""
    request = replace(REQUEST, method=EXACT, blocks=6, micro_batch=8, checkpointing=True, visit_steps=1000)
    slow = replace(GPU, flops_per_s=1e9)  # so that moving hides behind the computation, but for its share
    tight = make_plan(costs(), slow, replace(request, tier="disk")).chosen
    room = sum(tight.host_breakdown.values())
    ends = ("first", "middle", "last")
    moments = max(costs().moment_bytes(2, "adamw8bit", end) for end in ends)
    weights = 4 * max(costs().parameters(2, end) for end in ends)
    whole = 2 * weights + moments
    link_bytes = 8 * weights + 6 * (whole - weights) + 6 * whole  # of two slots: `stage_order.traffic_of_a_step`
    found = []
    for ram_blocks in (0, 3, 6):
        budgets = {"budget_bytes": tight.predicted_peak_bytes, "ram_budget_bytes": room + ram_blocks * whole}
        plan = make_plan(costs(), slow, replace(request, **budgets))
        chosen = plan.chosen
        assert (chosen.slots, chosen.ram_blocks) == (2, ram_blocks)
        assert chosen.tiers["disk"] == list(range(ram_blocks, 6))
        found.append((chosen.streaming_s, chosen.bytes_written, chosen.disk_bytes))
    assert found == sorted(found, reverse=True) and len(set(found)) == 3
    saving_s = 0.25 * 6 * (whole / 1e10 + whole / 3e8) / 1000
    assert found[2][0] == pytest.approx(0.25 * link_bytes / 1e10 + saving_s)
    disk_s = (8 * weights + 6 * (whole - weights)) / 1e9 + 6 * whole / 3e8
    assert found[0][0] == pytest.approx(found[2][0] + 0.25 * disk_s)
    assert found[2][1] == 2 * 6 * whole, "created and saved once"
    assert found[0][1] - found[2][1] == 6 * whole * request.steps


def test_a_plan_says_that_the_link_is_waited_for():
    """Where all stages wait in RAM there is no word of the disk."""
    host = replace(HOST, link_bytes_per_s=1e8)
    request = replace(REQUEST, method=EXACT, batch=4, blocks=6, tier="disk")
    tight = make_plan(costs(), replace(GPU, host=host), request).chosen
    in_ram = replace(request, tier="ram", budget_bytes=tight.predicted_peak_bytes)
    warnings = " ".join(make_plan(costs(), replace(GPU, host=host), in_ram).warnings)
    assert "waiting for the link to the host takes" in warnings and "the disk" not in warnings
    assert "a larger --mem-budget holds more stages" in warnings


def test_a_gpus_memory_is_counted_apart_from_its_hosts():
    """The context and batches are on the device; the interpreter, the data and what planning took are on the host."""
    machine = replace(GPU, planning_bytes=1500 * MB)
    chosen = make_plan(costs(), machine, replace(REQUEST, blocks=4, data_bytes=100 * MB)).chosen
    batch_bytes = int(footprint.BATCH_COPIES * 64 * costs().batch_bytes_per_sample)
    assert chosen.breakdown["runtime"] == machine.runtime_bytes
    assert chosen.breakdown["data"] == batch_bytes
    gaps = int(footprint.SEGMENTS_SHARE * chosen.breakdown["activations"])
    known = (
        chosen.predicted_peak_bytes - chosen.breakdown["slack"] - machine.runtime_bytes + gaps + footprint.SLACK_BYTES
    )
    assert chosen.breakdown["slack"] == gaps + footprint.SLACK_BYTES + int(footprint.SLACK_SHARE * known)
    assert chosen.host_breakdown["data"] == 100 * MB + 2 * batch_bytes
    assert chosen.predicted_host_peak_bytes == 1500 * MB


def test_plan_json_speaks_of_a_host_only_where_there_is_one():
    """Three tiers, the host's parts and its budget for a GPU; without one plan.json holds none of these words."""

    def content(machine):
        plan = make_plan(costs(), machine, replace(REQUEST, budget_bytes=450 * MB))
        partition = partition_noise(NoiseDistribution(), num_blocks=plan.chosen.blocks, kind="uniform", overlap=0.05)
        return json.loads(json.dumps(written_plan(plan, partition.ranges).to_json()))

    of_gpu, of_cpu = content(GPU), content(MACHINE)
    assert of_gpu["tiers"].keys() == {"device", "ram", "disk"}
    assert sum(of_gpu["host_breakdown"].values()) == of_gpu["predicted_host_peak_bytes"] <= of_gpu["ram_budget_bytes"]
    assert of_gpu["machine"]["host"] == asdict(HOST)
    assert of_gpu.keys() - of_cpu.keys() == {
        "host_breakdown",
        "predicted_host_peak_bytes",
        "ram_blocks",
        "ram_budget_bytes",
    }
    assert of_gpu["candidates"][0].keys() - of_cpu["candidates"][0].keys() == {"host_breakdown", "ram_blocks"}
    assert of_cpu["tiers"].keys() == {"ram", "disk"}
    assert of_cpu["machine"].keys() == asdict(MACHINE).keys() - {"host"}
