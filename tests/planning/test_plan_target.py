"""Plans for machines that are not here: `edgeblocks plan --target NAME`."""

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import edgeblocks
from edgeblocks.cli.main import app
from edgeblocks.errors import ConfigError
from edgeblocks.planning import plan_text
from edgeblocks.planning.planner import make_plan
from edgeblocks.planning.plans import UPDATE_S_PER_PARAMETER, Host, PlanRequest
from edgeblocks.profiling.trace import trace_in_subprocess
from edgeblocks.registry import build_profile, profile_names
from edgeblocks.units import format_bytes, parse_size

GB = 10**9
TINY = ["--steps", "20", "--set", "depth=3", "--set", "width=16"]


@pytest.fixture(scope="module")
def dit_s_costs():
    """A dit-s on 32x32x3 images."""
    network = {"width": 384, "depth": 12, "heads": 6, "patch": 2}
    data = {"channels": 3, "height": 32, "width": 32, "num_classes": 10, "mean": 0.5, "scale": 2.0}
    return trace_in_subprocess("dit", network, data, [1, 8, 64]).costs


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan_json(*arguments):
    result = invoke("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments, exit_code=2):
    result = invoke(*arguments)
    assert result.exit_code == exit_code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize("name", profile_names())
def test_every_machine_can_train_a_dit_s(name, dit_s_costs):
    """A dit-s has a plan in half of the memory, or nine tenths of a GPU's and half of the RAM, in the preferred blocks.

    A GPU's step takes less than a laptop's, and more than its arithmetic at the vendor's peak.
    """
    profile = build_profile(name)
    machine = profile.machine()
    request = PlanRequest(
        budget_bytes=profile.memory_bytes // 2, batch=64, steps=1000, optimizer="adamw8bit", preferred_blocks=3
    )
    chosen = make_plan(dit_s_costs, machine, request).chosen
    assert chosen.blocks == 3
    flops = 64 * 3 * dit_s_costs.forward_flops_per_sample(4)
    assert flops / machine.flops_per_s < chosen.step_s < 10 * flops / machine.flops_per_s
    assert (chosen.step_s < 2) == (profile.device == "cuda")


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_with_a_link_has_a_host(name):
    """The planner sees the host of a GPU, and the update's time of the device's memory; a laptop has neither."""
    profile = build_profile(name)
    machine = profile.machine()
    if profile.device == "cpu":
        assert machine.host is None
        assert machine.update_s_per_parameter == UPDATE_S_PER_PARAMETER
    else:
        assert machine.host == Host(
            runtime_bytes=profile.host_runtime_bytes,
            memory_bytes=profile.host_memory_bytes,
            link_bytes_per_s=profile.link_bytes_per_s,
        )
        assert 0.02 < machine.update_s_per_parameter / UPDATE_S_PER_PARAMETER < 0.2


def test_a_plan_for_a_gpu_says_what_lives_where_and_what_it_is():
    """Both peaks within their budgets, what lives where, the bound, disk and writes, and that no GPU was ever used."""
    network = ["--preset", "dit-s", "--set", "width=1152", "--mem-budget", "1500MB", "--ram-budget", "3GB"]
    result = invoke("plan", "--target", "rtx3050-4gb", *network)
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "machine: rtx3050-4gb, laptop with a GeForce RTX 3050 Laptop GPU (4 GB)" in text
    for memory, budget in (("device", "1.5 GB"), ("host", "3 GB")):
        found = re.search(rf"^{memory} memory: predicted peak (.*?) of {budget} \((.*)\)$", text, re.MULTILINE)
        assert found, text
        peak_bytes = parse_size(found[1])
        assert peak_bytes <= parse_size(budget)
        parts = [parse_size(part) for part in re.findall(r"[\d.e+]+ [KMG]?B", found[2])]
        assert sum(parts) == pytest.approx(peak_bytes, rel=0.01)
    assert re.search(r"at a time on the device.*between visits blocks? \S+ in RAM and blocks? \S+ on disk", text)
    assert re.search(r"time: at most about \S+ m?s a step, .* \(a bound from .*, not a measurement\)", text)
    assert re.search(r"^on disk: [\d.]+ GB .* about [\d.]+ [GT]B written a day", text, re.MULTILINE)
    assert "one kind of GPU only, an H100" in " ".join(text.split())
    assert re.search(r"->.*\n", text)
    assert {"on device", "in RAM", "host MB"} <= set(
        re.split(r"\s{2,}", text[text.index("    blocks") :].split("\n")[0])
    )


def test_a_plan_for_a_gpu_is_json_too():
    """plan.json, the profile with its sources, the host's parts, GB a day; budgets are the profile's by default."""
    content = plan_json("--target", "rtx4090-24gb", *TINY)
    profile = build_profile("rtx4090-24gb")
    assert content["target"]["name"] == "rtx4090-24gb"
    assert content["target"]["description"] == profile.description
    assert content["target"]["sources"] == list(profile.sources)
    assert content["budget_bytes"] == int(0.9 * profile.memory_bytes)
    assert content["ram_budget_bytes"] == profile.host_memory_bytes // 2
    assert (
        sum(content["host_breakdown"].values()) == content["predicted_host_peak_bytes"] <= content["ram_budget_bytes"]
    )
    assert content["tiers"] == {"device": [0, 1, 2], "ram": [], "disk": []}
    assert 0 < content["gb_written_a_day"] < 1
    assert any("one kind of GPU only, an H100" in warning for warning in content["warnings"])
    assert (
        plan_json("--target", "rtx4090-24gb", "--mem-budget", "50%", *TINY)["budget_bytes"] == profile.memory_bytes // 2
    )


def test_end_to_end_training_is_planned_for_a_gpu():
    """Stages on the device, in RAM and on disk, in words and as JSON; without a budget all of them fit the device."""
    content = plan_json("--target", "rtx3060-12gb", "--method", "exact", *TINY)
    assert content["method"] == "exact" and content["tiers"]["ram"] == content["tiers"]["disk"] == []
    settings = {"target": "rtx3060-12gb", "method": "exact", "width": 512, "depth": 12, "heads": 8, "blocks": 6}
    tight = edgeblocks.plan(**settings, tier="disk").plan.chosen
    host_bytes = sum(tight.host_breakdown.values()) + 2 * tight.block_bytes
    prepared = edgeblocks.plan(**settings, mem_budget=str(tight.predicted_peak_bytes), ram_budget=str(host_bytes))
    assert prepared.to_json()["tiers"] == {"device": [], "ram": [0, 1], "disk": [2, 3, 4, 5]}
    text = plan_text.banner(prepared)
    places = "2 of 6 stages at a time on the device (one trained, one on its way), between their uses stages 0-1 in RAM"
    assert f"{places} and stages 2-5 on disk" in text
    assert "device memory: predicted peak" in text and "host memory: predicted peak" in text
    assert "not yet run on a GPU" in text
    assert "moving stages" in text


def test_a_plan_for_a_laptop_is_a_processors():
    """Half of the laptop's memory, two tiers, no word of a GPU; the time is a bound there, too."""
    prepared = edgeblocks.plan(target="laptop-8gb", depth=3, width=16, steps=20)
    content = prepared.to_json()
    assert content["budget_bytes"] == build_profile("laptop-8gb").memory_bytes // 2
    assert content["tiers"].keys() == {"ram", "disk"}
    assert content["host_breakdown"] == {}
    assert content["target"]["name"] == "laptop-8gb" and "predicted_step_range_s" not in content
    text = plan_text.banner(prepared)
    assert "run on a GPU" not in text
    assert re.search(r"^memory: predicted peak", text, re.MULTILINE)
    assert "a bound from the profile's sustained speeds, not a measurement" in text


def test_a_plan_for_this_machine_has_the_disks_line():
    """Here, too, the plan says how much lies on disk and how much is written a day; its time is a range, no bound."""
    prepared = edgeblocks.plan(mem_budget="4GB", depth=3, width=16, steps=20)
    text = plan_text.banner(prepared)
    assert re.search(r"^on disk: [\d.]+ [KM]B .*about [\d.]+ [KM]B written a day \(in all", text, re.MULTILINE)
    assert re.search(r"^time: about .+ to .+ here for 20 steps of each block, ", text, re.MULTILINE)
    assert "bound" not in text
    content = prepared.to_json()
    least_s, most_s = content["predicted_range_s"]
    assert least_s < content["predicted_s"] < most_s
    assert "other programs" not in text
    machine = replace(prepared.machine, correction=replace(prepared.machine.correction, waited=0.784))
    busy = replace(prepared, plan=replace(prepared.plan, machine=machine))
    assert " because other programs had the processor for 78% of the measurement), " in plan_text.banner(busy)
    only_shown = {"gb_written_a_day", "predicted_s", "predicted_range_s", "why"}
    assert content.keys() - prepared.written_plan.to_json().keys() == only_shown


def test_the_interface_of_python_plans_for_other_machines_too(tmp_path):
    """`plan(target=.., ram_budget=..)`; a config file may name the machine, and a keyword goes over it."""
    small = {"depth": 3, "width": 16, "steps": 20}
    prepared = edgeblocks.plan(target="rtx3050-4gb", ram_budget="2GB", **small)
    assert prepared.profile.name == "rtx3050-4gb"
    assert prepared.plan.ram_budget_bytes == 2 * GB
    (tmp_path / "c.yaml").write_text("target: rtx2060-6gb\nmem_budget: 1GB\n")
    prepared = edgeblocks.plan(config=tmp_path / "c.yaml", **small)
    assert prepared.profile.name == "rtx2060-6gb"
    assert prepared.budget_bytes == GB
    prepared = edgeblocks.plan(config=tmp_path / "c.yaml", target="laptop-8gb", **small)
    assert prepared.profile.name == "laptop-8gb"


@pytest.mark.parametrize("more", [["--dry-run"], ["--out", "run"]])
def test_training_refuses_a_machine_that_is_not_here(more, tmp_path, monkeypatch):
    """`train --target rtx3060-12gb` says that plan is for that, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    text = refusal("train", "--target", "rtx3060-12gb", *TINY, *more)
    assert "show its plan with edgeblocks plan --target rtx3060-12gb" in text
    with pytest.raises(ConfigError, match="training runs on this one"):
        edgeblocks.train(out=tmp_path / "run", target="rtx3060-12gb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_an_unknown_target_lists_all_together_with_other_mistakes(verb, tmp_path):
    """The kinds of target and the machines by name, beside the other wrong settings."""
    text = refusal(verb, "--target", "tpu", "--steps", "0", "--out", tmp_path / "run")
    assert "there is no target 'tpu'; there are: auto, cpu, cuda; " in text
    assert all(name in text for name in profile_names())
    assert "steps=0" in text


def test_a_ram_budget_without_a_host_is_refused():
    """On a laptop and here the one memory is bounded by --mem-budget, as the message says."""
    for target in (["--target", "laptop-8gb"], []):
        text = refusal("plan", "--ram-budget", "4GB", *target)
        assert "--ram-budget 4GB bounds the host's memory when a GPU trains" in text
        assert "--mem-budget bounds it" in text
    assert "--ram-budget 4GB bounds" in refusal("train", "--set", "ram_budget=4GB")


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (["--mem-budget", "5GB"], r"--mem-budget 5GB is 5 GB, but the GPU of rtx3050-4gb has 3.95 GB; use at most"),
        (["--ram-budget", "9GB"], r"--ram-budget 9GB is 9 GB, but the host of rtx3050-4gb has 7.7 GB; use at most"),
        (["--ram-budget", "much"], r"ram_budget='much': 'much' is not a size"),
        (["--ram-budget", "9" * 400], r"ram_budget=.*a size of at most"),
        (["--ram-budget", ""], r"ram_budget='': "),
    ],
)
def test_budgets_beyond_the_machine_are_refused(budgets, message):
    """A budget larger than the profile's memory, or none at all, is refused with that memory."""
    assert re.search(message, refusal("plan", "--target", "rtx3050-4gb", *budgets))


def test_what_does_not_fit_names_the_memory(tmp_path):
    """Exit 3; the message names host or device, and the budget that it names works."""
    for flag, where in (("--mem-budget", "device"), ("--ram-budget", "host")):
        text = refusal("plan", "--target", "rtx3050-4gb", flag, "200MB", *TINY, exit_code=3)
        assert f"no plan fits {format_bytes(200e6)} on the {where}: " in text
        budget = re.search(rf"use {flag} (\d+MB) or more", text)[1]
        assert plan_json("--target", "rtx3050-4gb", flag, budget, *TINY)["blocks"] == 3
