"""Plans: what they promise for any machine and any request, and what a refusal says."""

import json
import math
import re
from dataclasses import asdict, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.made_up_plans import (
    BUDGETS,
    MACHINE,
    MACHINES,
    MB,
    REQUEST,
    REQUESTS,
    costs,
    plan_or_refusal,
    total_s,
)

from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise
from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.methods import EXACT
from edgeblocks.planning import layer_costs
from edgeblocks.planning import memory as footprint
from edgeblocks.planning.pace import STREAMING_SHARE, USUAL_VISIT_S
from edgeblocks.planning.planner import inference_micro_batch, make_plan
from edgeblocks.planning.plans import micro_batches, split_layers
from edgeblocks.profiling.trace import trace_in_subprocess
from edgeblocks.runs.written_plan import written_plan
from edgeblocks.units import advised_budget


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """The trace takes seconds and must not fall into a test with a deadline."""
    costs()


@pytest.mark.parametrize(
    ("depth", "blocks", "budget", "cut", "begin"),
    [
        (12, None, 1000, (4, 4, 4), True),
        (12, 6, 1000, (2,) * 6, True),
        (12, 1, 1000, (12,), False),
        (12, 5, 1000, (3, 3, 2, 2, 2), False),
        (8, None, 1000, (2, 2, 2, 2), True),  # 3 blocks are preferred
        (7, None, 1000, (3, 2, 2), False),  # only 7 are of equal depth
    ],
)
def test_blocks_begin_as_one_where_they_can_be_of_equal_depth(depth, blocks, budget, cut, begin):
    """Left to the planner: unless that takes twice as many blocks. A cut that is asked for is kept; one is told why."""
    request = replace(REQUEST, blocks=blocks, shared=None, budget_bytes=budget * MB)
    plan = make_plan(replace(costs(), num_layers=depth), MACHINE, request)
    assert (plan.layers, plan.begins_as_one) == (cut, begin)
    why = any("cannot be cut into" in warning for warning in plan.warnings)
    assert why == (len(set(cut)) > 1)


@given(MACHINES, REQUESTS)
def test_a_plan_keeps_its_promises(machine, request):
    """The chosen plan's predicted peak is within the budget, covers every layer, and makes up the whole batch."""
    plan = plan_or_refusal(machine, request)
    assume(not isinstance(plan, DoesNotFitError))
    chosen = plan.chosen
    assert chosen.predicted_peak_bytes == sum(chosen.breakdown.values()) <= request.budget_bytes
    assert all(size >= 0 for size in chosen.breakdown.values())
    assert len(plan.layers) == chosen.blocks
    assert sum(plan.layers) == 12
    assert max(plan.layers) == chosen.layers_per_block
    assert max(plan.layers) - min(plan.layers) <= 1
    assert 1 <= chosen.micro_batch <= request.batch
    assert (chosen.accumulation - 1) * chosen.micro_batch < request.batch <= chosen.accumulation * chosen.micro_batch
    assert 1 <= chosen.slots <= chosen.blocks
    assert plan.parameters == sum(costs().parameters(count) for count in plan.layers)
    assert chosen in plan.candidates


@given(MACHINES, REQUESTS)
def test_what_the_user_fixed_is_respected(machine, request):
    """Blocks, micro-batch (up to the batch), checkpointing, visit length and tier are the user's where given."""
    plan = plan_or_refusal(machine, request)
    assume(not isinstance(plan, DoesNotFitError))
    chosen = plan.chosen
    assert request.blocks in (None, chosen.blocks)
    assert request.blocks is not None or chosen.blocks >= min(request.preferred_blocks, 12)
    assert request.micro_batch is None or chosen.micro_batch == min(request.micro_batch, request.batch)
    assert request.checkpointing in (None, chosen.checkpointing)
    assert request.visit_steps in (None, chosen.visit_steps)
    if request.tier == "ram":
        assert chosen.slots == chosen.blocks
    if request.tier == "disk":
        assert chosen.slots <= 2


@given(MACHINES, REQUESTS, BUDGETS)
def test_more_budget_never_gives_more_blocks(machine, request, other_bytes):
    """Of two budgets, the larger one fits if the smaller does, with at most as many blocks and no slower steps."""
    small, large = sorted((request.budget_bytes, other_bytes))
    with_small, with_large = (
        plan_or_refusal(machine, replace(request, budget_bytes=size, visit_steps=10)) for size in (small, large)
    )
    if isinstance(with_large, DoesNotFitError):
        assert isinstance(with_small, DoesNotFitError)
    elif not isinstance(with_small, DoesNotFitError):
        assert with_large.chosen.blocks <= with_small.chosen.blocks
        if with_large.chosen.blocks == with_small.chosen.blocks:
            assert total_s(with_large.chosen) <= total_s(with_small.chosen) * (1 + 1e-9)


@given(MACHINES, REQUESTS)
def test_a_refusal_names_a_budget_that_works(machine, request):
    """`smallest_bytes` fits when the planner is free, a megabyte less does not; the message shows it."""
    refusal = plan_or_refusal(machine, replace(request, budget_bytes=100 * MB))
    assume(isinstance(refusal, DoesNotFitError))
    free = replace(request, blocks=None, micro_batch=None, checkpointing=None, tier=None)
    make_plan(costs(), machine, replace(free, budget_bytes=refusal.smallest_bytes))
    with pytest.raises(DoesNotFitError):
        make_plan(costs(), machine, replace(free, budget_bytes=refusal.smallest_bytes - MB))
    assert advised_budget(refusal.smallest_bytes) in str(refusal)


def test_a_refusal_of_trained_stages_counts_them_in_their_own_cut():
    """Stages 2 and 3 of 4: fewer stages than that are no way out, and the advised budget trains these."""
    request = replace(REQUEST, method=EXACT, blocks=4, trained=(2, 3), tier="ram", budget_bytes=100 * MB)
    with pytest.raises(DoesNotFitError, match="without tier=ram, which you fixed") as caught:
        make_plan(costs(), MACHINE, request)
    for freed, needed in ((request, "as_fixed_bytes"), (replace(request, tier=None), "smallest_bytes")):
        enough = replace(freed, budget_bytes=getattr(caught.value, needed))
        assert make_plan(costs(), MACHINE, enough).chosen.blocks == 4


@given(MACHINES, REQUESTS)
def test_a_refusal_names_a_budget_that_works_as_fixed(machine, request):
    """`as_fixed_bytes` fits with all that the user fixed, and a megabyte less does not."""
    refusal = plan_or_refusal(machine, replace(request, budget_bytes=100 * MB))
    assume(isinstance(refusal, DoesNotFitError))
    make_plan(costs(), machine, replace(request, budget_bytes=refusal.as_fixed_bytes))
    with pytest.raises(DoesNotFitError):
        make_plan(costs(), machine, replace(request, budget_bytes=refusal.as_fixed_bytes - MB))


def test_the_advice_of_a_refusal_works_when_followed():
    """The first --mem-budget of the message works with the settings as they are; it lists what could be freed."""
    fixed = replace(REQUEST, blocks=1, micro_batch=64, checkpointing=False, tier="ram", budget_bytes=300 * MB)
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(costs(), MACHINE, fixed)
    advised = int(str(caught.value).partition("--mem-budget ")[2].partition("MB")[0]) * MB
    for name in ("--blocks", "micro_batch=64", "checkpointing=False", "tier=ram"):
        assert name in str(caught.value)
    make_plan(costs(), MACHINE, replace(fixed, budget_bytes=advised))


def test_the_refusal_itemises():
    """The message shows the budget, what the smallest plan needs, and its parts."""
    with pytest.raises(DoesNotFitError, match="no plan fits 210 MB: the smallest needs") as caught:
        make_plan(costs(), MACHINE, replace(REQUEST, budget_bytes=210 * MB))
    for part in ("runtime 200 MB", "weights", "gradients", "optimizer", "ema", "activations", "data"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 3


@given(MACHINES, REQUESTS)
def test_streaming_takes_at_most_its_share_of_a_visit(machine, request):
    """With automatic visits, loading and storing take 2 % of a visit at most, unless a visit is the whole run.

    Block bytes over the disk's speed and their checksums, on average over the blocks, of which some stay in memory,
    against the steps of the visit: computed here from the parts.
    """
    plan = plan_or_refusal(machine, replace(request, visit_steps=None))
    assume(not isinstance(plan, DoesNotFitError))
    chosen = plan.chosen
    streamed_bytes = len(chosen.tiers["disk"]) / chosen.blocks * chosen.block_bytes
    load_s = streamed_bytes / machine.disk_read_bytes_per_s + streamed_bytes * machine.checksum_s_per_byte
    store_s = chosen.block_bytes / machine.disk_write_bytes_per_s + chosen.block_bytes * machine.checksum_s_per_byte
    assert 1 <= chosen.visit_steps <= request.steps
    if chosen.visit_steps < request.steps:
        assert load_s + store_s <= STREAMING_SHARE * chosen.visit_steps * chosen.step_s * (1 + 1e-9)


def test_visits_leave_several_rounds_where_the_disk_is_fast():
    """When streaming costs nothing, a run has four rounds over all blocks or more, and a visit lasts minutes."""
    fast = replace(MACHINE, disk_read_bytes_per_s=1e15, disk_write_bytes_per_s=1e15)
    short = make_plan(costs(), fast, replace(REQUEST, steps=100)).chosen
    assert short.visit_steps == 25
    long = make_plan(costs(), fast, replace(REQUEST, steps=10**7)).chosen
    assert long.visit_steps * long.step_s == pytest.approx(USUAL_VISIT_S, rel=0.05)


@pytest.fixture(scope="module")
def less_and_less():
    """Plans, or refusals, from plenty of memory to little."""
    return [plan_or_refusal(MACHINE, replace(REQUEST, budget_bytes=size * MB)) for size in range(1500, 100, -5)]


def test_the_budget_sets_the_number_of_blocks(less_and_less):
    """From plenty to little: first the preferred blocks, then more, in the end one layer each, in the end a refusal."""
    blocks = [math.inf if isinstance(plan, DoesNotFitError) else plan.chosen.blocks for plan in less_and_less]
    assert blocks == sorted(blocks)
    assert set(blocks) >= {3, 4, 6, 12, math.inf}
    assert blocks[0] == 3


def test_fewer_than_four_layers_a_block_are_warned_about():
    """Below 4 layers a block the plan says what that costs; at 4 it does not, nor for a network of fewer layers."""
    warned = make_plan(costs(), MACHINE, replace(REQUEST, blocks=4))
    assert any("3 layers a block" in warning and "FID" in warning for warning in warned.warnings)
    assert make_plan(costs(), MACHINE, replace(REQUEST, blocks=3)).warnings == ()
    shallow = replace(costs(), num_layers=2)
    assert make_plan(shallow, MACHINE, replace(REQUEST, blocks=1)).warnings == ()


def test_more_blocks_than_preferred_are_warned_about(less_and_less):
    """When the budget, not the user, forces more blocks than the family prefers, the plan says so."""
    for plan in less_and_less:
        if isinstance(plan, DoesNotFitError):
            break
        said = any("instead of the preferred 3" in warning for warning in plan.warnings)
        assert said == (plan.chosen.blocks > 3)


def test_a_cut_that_saves_much_time_is_told():
    """Only where more blocks take at most three quarters of the time; followed, the advice saves what it says."""
    found = 0
    for budget_bytes in range(280 * MB, 600 * MB, 10 * MB):
        request = replace(REQUEST, preferred_blocks=1, budget_bytes=budget_bytes)
        plan = make_plan(costs(), MACHINE, request)
        told = [re.match(r"(\d+) blocks \(--blocks \1\) would take (\d+)% less time", note) for note in plan.warnings]
        for number, saved in (match.groups() for match in told if match):
            cut = make_plan(costs(), MACHINE, replace(request, blocks=int(number))).chosen
            share = cut.blocks * total_s(cut) / (plan.chosen.blocks * total_s(plan.chosen))
            assert share <= 0.75 and round(100 * (1 - share)) == int(saved)
            assert cut.layers_per_block >= 4
            found += 1
    assert 0 < found < 32


def test_a_batch_that_hides_moving_stages_is_told():
    """Where the disk is waited for the plan names a batch that hides it, and no word of it where all is in memory."""
    machine = replace(MACHINE, disk_read_bytes_per_s=2e8, disk_write_bytes_per_s=1e8)
    request = replace(REQUEST, method=EXACT, batch=8, blocks=6, tier="disk", budget_bytes=600 * MB)
    plan = make_plan(costs(), machine, request)
    told = re.search(r"--batch (\d+) hides most of it", " ".join(plan.warnings))
    assert told is not None and plan.stall_share > 0.25
    larger = make_plan(costs(), machine, replace(request, batch=int(told[1])))
    assert larger.stall_share < 0.2 and "waiting for the disk" not in " ".join(larger.warnings)
    at_ease = make_plan(costs(), machine, replace(request, tier="ram", budget_bytes=4000 * MB, visit_steps=1))
    assert at_ease.chosen.tier == "ram" and "waiting for the disk" not in " ".join(at_ease.warnings)


@pytest.mark.parametrize("blocks", [0, 13, -1])
def test_impossible_numbers_of_blocks_are_a_configuration_error(blocks):
    """A block needs a layer: the error states the network's layers."""
    with pytest.raises(ConfigError, match=f"--blocks {blocks} .*12 layers"):
        make_plan(costs(), MACHINE, replace(REQUEST, blocks=blocks))


def test_a_preference_for_more_blocks_than_layers_is_no_error():
    """A shallow network is cut into single layers."""
    plan = make_plan(replace(costs(), num_layers=2), MACHINE, REQUEST)
    assert plan.layers == (1, 1)


def test_the_parts_of_the_prediction_are_what_they_are_called():
    """Weights and EMA are 4 bytes a parameter and slot, gradients 4, 8-bit moments about 2.03 a slot."""
    plan = make_plan(costs(), MACHINE, replace(REQUEST, blocks=4, tier="disk"))
    chosen, parameters = plan.chosen, costs().parameters(3)
    assert chosen.slots == 2
    assert chosen.breakdown["weights"] == chosen.breakdown["ema"] == 2 * 4 * parameters
    assert chosen.breakdown["gradients"] == 4 * parameters
    moments = chosen.breakdown["optimizer"] - costs().workspace_bytes["adamw8bit"]
    assert 2.03 < moments / parameters / 2 < 2.1
    assert chosen.breakdown["runtime"] == MACHINE.runtime_bytes


def test_weights_in_bfloat16_save_where_blocks_wait_and_not_where_they_are_trained():
    """Of each slot and on disk 4 bytes a parameter; a float32 copy and a workspace more for the one that is trained."""

    def chosen(**fixed):
        return make_plan(
            costs(), MACHINE, replace(REQUEST, blocks=4, budget_bytes=10**11, micro_batch=8, **fixed)
        ).chosen

    parameters, workspace = costs().parameters(3), costs().workspace_bytes
    for slots, fixed in ((4, {"tier": "ram"}), (2, {"tier": "disk"})):
        wide, narrow = chosen(**fixed), chosen(master="bf16", **fixed)
        assert wide.slots == narrow.slots == slots
        saved = wide.predicted_peak_bytes - narrow.predicted_peak_bytes
        expected = (4 * slots - 4) * parameters - (workspace["rounded"] - workspace["adamw8bit"])
        assert saved == pytest.approx(1.01 * expected, abs=2)  # 1 % of what is predicted is slack
        assert wide.block_bytes - narrow.block_bytes == 4 * parameters
        assert wide.disk_bytes / narrow.disk_bytes == pytest.approx(10.05 / 6.05, rel=0.01)
        assert narrow.step_s > wide.step_s
        exact = [chosen(method=EXACT, trained=(3,), master=master, **fixed).disk_bytes for master in ("fp32", "bf16")]
        assert exact[0] > 1.5 * exact[1]


def test_streaming_and_checkpointing_save_what_they_promise():
    """Fewer slots, checkpointing, and smaller micro-batches each lower the predicted peak."""

    def peak(**fixed):
        return make_plan(costs(), MACHINE, replace(REQUEST, blocks=4, budget_bytes=10**11, **fixed)).chosen

    base = {"micro_batch": 64, "checkpointing": False, "tier": "ram"}
    most = peak(**base)
    assert most.tier == "ram"
    for change in ({"tier": "disk"}, {"checkpointing": True}, {"micro_batch": 16}):
        assert peak(**{**base, **change}).predicted_peak_bytes < most.predicted_peak_bytes


def test_running_layers_again_is_preferred_to_a_batch_in_small_parts():
    """Each part reads all weights and adds to all gradients, which few samples do not outweigh.

    11 layers of width 256 with 64 tokens a sample, batch 16, took 1.17 s at once with checkpointing and 1.51 s in parts
    of 4 without.
    """
    network = {"width": 256, "depth": 11, "heads": 4, "patch": 4}
    data = {"channels": 3, "height": 32, "width": 32, "num_classes": 0, "mean": 0.5, "scale": 2.0}
    shallow = trace_in_subprocess("dit", network, data, [1, 4, 16]).costs
    machine = replace(MACHINE, flops_per_s=2e11, memory_bytes_per_s=1e10)
    request = replace(REQUEST, batch=16, blocks=1, budget_bytes=510 * MB)
    chosen = make_plan(shallow, machine, request).chosen
    assert (chosen.micro_batch, chosen.checkpointing) == (16, True)
    in_parts = make_plan(shallow, machine, replace(request, micro_batch=4, checkpointing=False)).chosen
    assert 1.05 < in_parts.step_s / chosen.step_s < 1.6


def test_plan_json_has_what_readers_rely_on():
    """plan.json holds the keys of DESIGN section 8, is plain JSON, and its noise ranges are the partition's."""
    plan = make_plan(costs(), MACHINE, replace(REQUEST, budget_bytes=450 * MB))
    partition = partition_noise(NoiseDistribution(), num_blocks=plan.chosen.blocks, kind="uniform", overlap=0.05)
    content = json.loads(json.dumps(written_plan(plan, partition.ranges).to_json()))
    promised = """blocks layers_per_block noise_ranges micro_batch accumulation checkpointing optimizer precision
        master tiers visit_steps predicted_peak_bytes breakdown candidates"""
    assert set(promised.split()) <= set(content)
    assert set(content["breakdown"]) >= {"weights", "gradients", "optimizer", "ema", "activations", "data", "runtime"}
    assert sum(content["breakdown"].values()) == content["predicted_peak_bytes"] <= 450 * MB
    assert content["layers_per_block"] == list(plan.layers)
    assert content["noise_ranges"] == [asdict(noise_range) for noise_range in partition.ranges]
    assert all("predicted_peak_bytes" in candidate and "fits" in candidate for candidate in content["candidates"])
    assert content["tiers"]["ram"] + content["tiers"]["disk"] == list(range(content["blocks"]))


@given(MACHINES, REQUESTS)
def test_bytes_written_a_day_are_a_days_share(machine, request):
    """A run of less than a day writes what it writes; a longer one its bytes over its days."""
    plan = plan_or_refusal(machine, request)
    assume(not isinstance(plan, DoesNotFitError))
    days = plan.predicted_s / 86_400
    assert plan.predicted_s == pytest.approx(total_s(plan.chosen) * plan.chosen.blocks * request.steps)
    expected = plan.chosen.bytes_written if days <= 1 else plan.chosen.bytes_written / days
    assert plan.written_a_day_bytes == pytest.approx(expected)


@given(num_layers=st.integers(1, 100), blocks=st.integers(1, 100))
def test_layers_are_split_evenly(num_layers, blocks):
    """Every layer is in one block, sizes differ by at most one, and larger blocks come first."""
    assume(blocks <= num_layers)
    sizes = split_layers(num_layers, blocks)
    assert len(sizes) == blocks
    assert sum(sizes) == num_layers
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(st.integers(1, 5000))
def test_micro_batches_halve_down_to_one(batch):
    """Sizes begin with the batch and end with 1; each is half of the former, rounded up at most by one."""
    sizes = micro_batches(batch)
    assert sizes[0] == batch
    assert sizes[-1] == 1
    for accumulated, size in enumerate(sizes):
        assert size == math.ceil(batch / 2**accumulated)


@given(
    budget_bytes=BUDGETS,
    samples=st.integers(1, 300),
    held_bytes=st.integers(0, 50 * MB),
    master=st.sampled_from(["fp32", "bf16"]),
)
def test_the_chain_fits_its_budget(budget_bytes, samples, held_bytes, master):
    """The micro-batch of inference fits, twice as much would not or is not needed; a refusal names what would."""
    fixed = {"layers": (3, 3, 2), "samples": samples, "held_bytes": held_bytes, "master": master}
    try:
        size = inference_micro_batch(costs(), MACHINE, budget_bytes=budget_bytes, **fixed)
    except DoesNotFitError as error:
        assert error.smallest_bytes > budget_bytes
        assert inference_micro_batch(costs(), MACHINE, budget_bytes=error.smallest_bytes, **fixed) >= 1
        return

    def needed(samples):
        peak = layer_costs.at_samples(costs().forward, samples, lambda cost: cost.peak_bytes.at(3))
        return MACHINE.runtime_bytes + 4 * costs().parameters(3) + held_bytes + peak

    assert 1 <= size <= samples
    assert needed(size) <= budget_bytes
    assert (
        size == samples
        or needed(2 * size) * (1 + footprint.GAPS_SHARE["forward"]) + footprint.SLACK_BYTES > budget_bytes
    )


def test_what_texts_keep_while_they_are_written_is_foreseen():
    """Keys and values of the texts that are written at a time, as far as they are more than what a step takes."""
    request = replace(REQUEST, grid_samples=4, micro_batch=2)
    without = make_plan(costs(), MACHINE, request).chosen.breakdown
    few = make_plan(costs(), MACHINE, replace(request, sample_bytes=1 * MB)).chosen.breakdown
    many = make_plan(costs(), MACHINE, replace(request, sample_bytes=300 * MB)).chosen.breakdown
    assert without["evaluation"] == few["evaluation"] == 0
    room = without["activations"] + without["slack"] + without["data"]
    assert 600 * MB - room < many["evaluation"] < 600 * MB
