"""Machines, request and a network that plans are made for; whatever Hypothesis draws of them."""

import functools
from dataclasses import replace

from hypothesis import strategies as st

from edgeblocks.errors import DoesNotFitError
from edgeblocks.methods import EXACT
from edgeblocks.planning.planner import make_plan
from edgeblocks.planning.plans import Host, Machine, PlanRequest
from edgeblocks.profiling.trace import trace_in_subprocess

MB = 1_000_000
MACHINE = Machine(
    name="made up",
    runtime_bytes=200 * MB,
    flops_per_s=5e10,
    memory_bytes_per_s=5e9,
    operator_s=5e-6,
    disk_read_bytes_per_s=1e9,
    disk_write_bytes_per_s=3e8,
)
REQUEST = PlanRequest(budget_bytes=2000 * MB, batch=64, steps=1000, optimizer="adamw8bit", preferred_blocks=3)
BUDGETS = st.integers(150 * MB, 1500 * MB)
REQUESTS = st.builds(
    replace,
    st.just(REQUEST),
    budget_bytes=BUDGETS,
    batch=st.integers(1, 200),
    steps=st.integers(1, 100_000),
    optimizer=st.sampled_from(["adamw8bit", "adamw"]),
    master=st.sampled_from(["fp32", "bf16"]),
    preferred_blocks=st.integers(1, 14),
    blocks=st.one_of(st.none(), st.integers(1, 12)),
    micro_batch=st.one_of(st.none(), st.integers(1, 200)),
    checkpointing=st.one_of(st.none(), st.booleans()),
    visit_steps=st.one_of(st.none(), st.integers(1, 5000)),
    tier=st.sampled_from([None, "ram", "disk"]),
    data_bytes=st.integers(0, 50 * MB),
)
MACHINES = st.builds(
    replace,
    st.just(MACHINE),
    runtime_bytes=st.integers(50 * MB, 300 * MB),
    flops_per_s=st.floats(1e9, 1e13),
    memory_bytes_per_s=st.floats(1e9, 1e12),
    operator_s=st.floats(1e-7, 1e-4),
    disk_read_bytes_per_s=st.floats(1e7, 1e10),
    disk_write_bytes_per_s=st.floats(1e7, 1e10),
    checksum_s_per_byte=st.floats(0, 1e-8),
)
HOST = Host(runtime_bytes=1000 * MB, memory_bytes=8000 * MB, link_bytes_per_s=1e10)
GPU = replace(MACHINE, host=HOST, update_s_per_parameter=1e-10, flops_per_s=5e12, memory_bytes_per_s=1e11)
HOSTS = st.builds(
    replace,
    st.just(HOST),
    runtime_bytes=st.integers(100 * MB, 1000 * MB),
    link_bytes_per_s=st.floats(1e9, 1e11),
)
GPUS = st.builds(replace, MACHINES, host=HOSTS, planning_bytes=st.integers(0, 500 * MB))
GPU_REQUESTS = st.builds(replace, REQUESTS, ram_budget_bytes=st.one_of(st.none(), st.integers(100 * MB, 3000 * MB)))
EXACT_GPU_REQUESTS = st.builds(
    replace,
    GPU_REQUESTS,
    method=st.just(EXACT),
    trained=st.sampled_from([None, (0,)]),
    clip_by=st.sampled_from(["stage", "network"]),
    boundaries=st.sampled_from([None, "ram", "disk"]),
    boundary_dtype=st.sampled_from(["float32", "bfloat16"]),
)


@functools.cache
def costs():
    """A dit of 12 layers of width 256 on 16x16 images: 5 MB of weights a layer."""
    network = {"width": 256, "depth": 12, "heads": 4, "patch": 2}
    data = {"channels": 3, "height": 16, "width": 16, "num_classes": 10, "mean": 0.5, "scale": 2.0}
    return trace_in_subprocess("dit", network, data, [1, 8, 64]).costs


def plan_or_refusal(machine, request):
    try:
        return make_plan(costs(), machine, request)
    except DoesNotFitError as error:
        return error


def total_s(candidate):
    return candidate.step_s + candidate.streaming_s
