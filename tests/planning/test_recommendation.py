"""Which method `edgeblocks plan` recommends."""

import json
from dataclasses import replace
from importlib import resources

import pytest
from support.commands import invoke

from edgeblocks import api
from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.planning.recommendation import Measured, Option, measured, option, recommendation
from edgeblocks.settings.presets import DEFAULT_PRESETS

BOTH = {"diffusion": Option(seconds=100.0), "exact": Option(seconds=140.0)}


def found(diffusion, exact, *, higher_is_better=True, error=0.01):
    return Measured(
        measure="top-1 accuracy",
        higher_is_better=higher_is_better,
        diffusion=diffusion,
        exact=exact,
        error=error,
        conditions="photos",
    )


@pytest.mark.parametrize(
    ("figures", "method"),
    [
        (found(0.80, 0.85), "exact"),
        (found(0.85, 0.80), "diffusion"),
        (found(0.80, 0.85, higher_is_better=False), "diffusion"),
        (found(0.80, 0.81), "diffusion"),  # a tie: the faster one
    ],
)
def test_the_better_method_is_recommended_and_else_the_faster_one(figures, method):
    """A difference counts where it is more than twice the error; the figures and their conditions are told."""
    advice = recommendation(figures, BOTH)
    assert advice is not None and advice.method == method
    for told in ("0.8", "own trainings on photos, not on your data", "docs/methods.md"):
        assert told in advice.line()


@pytest.mark.parametrize(
    ("diffusion_s", "exact_s", "method", "told"),
    [
        (100.0, 104.0, "diffusion", "about as fast, 1 min 40 s against 1 min 44 s"),
        (104.0, 100.0, "diffusion", "about as fast, 1 min 44 s against 1 min 40 s"),
        (100.0, 106.0, "diffusion", "faster, 1 min 40 s against 1 min 46 s"),
        (106.0, 100.0, "exact", "faster, 1 min 40 s against 1 min 46 s"),
    ],
)
def test_times_that_differ_by_no_more_than_their_noise_decide_nothing(diffusion_s, exact_s, method, told):
    """Predictions from measured speeds differ by some percent from call to call: within 5 % none is called faster."""
    advice = recommendation(
        found(0.80, 0.81), {"diffusion": Option(seconds=diffusion_s), "exact": Option(seconds=exact_s)}
    )
    assert advice is not None and advice.method == method
    assert f") and {told} (" in advice.reason


def test_fewer_layers_are_told_where_they_were_better_than_either_method():
    """A training too short for depth to be of use says so; a difference within the noise says nothing."""
    for value, told in ((0.90, True), (0.86, False), (0.70, False)):
        advice = recommendation(replace(found(0.80, 0.85), shallow=value, shallow_layers=3), BOTH)
        assert advice is not None and advice.method == "exact"
        assert ("fewer layers do better than any method: 3 with" in advice.reason) == told
    lower = replace(found(0.80, 0.85, higher_is_better=False), shallow=0.7, shallow_layers=3)
    assert lower.is_shallow_better and not replace(lower, shallow=0.9).is_shallow_better


def test_a_method_that_cannot_be_taken_is_not_recommended():
    """Why is told; where neither can be taken there is nothing to say."""
    options = {"diffusion": Option(seconds=100.0), "exact": Option(obstacle="it needs --mem-budget 3 GB")}
    advice = recommendation(found(0.8, 0.9), options)
    assert advice is not None and advice.method == "diffusion" and "3 GB" in advice.reason
    assert recommendation(None, {name: Option(obstacle="no") for name in BOTH}) is None


def test_nothing_is_recommended_where_nothing_was_measured():
    advice = recommendation(None, BOTH)
    assert advice is not None and advice.method is None and "edgeblocks compare" in advice.line()


def test_what_is_better_but_much_slower_here_is_said_to_be():
    """Moving stages can take most of the time under a small budget."""
    advice = recommendation(found(0.8, 0.9), {"diffusion": Option(seconds=10.0), "exact": Option(seconds=100.0)})
    assert advice is not None and advice.method == "exact" and "slow under this budget" in advice.reason


def test_obstacles_are_those_of_the_plan():
    """A budget that is too small, and what a family or a machine cannot do."""

    def refuse(error):
        raise error

    small = option(lambda: refuse(DoesNotFitError("no", 700_000_000)))
    assert small == Option(obstacle="it needs --mem-budget 700 MB")
    other = option(lambda: refuse(ConfigError("--method exact: there is none; use another")))
    assert other == Option(obstacle="there is none")


def test_the_tables_are_those_of_the_trainings():
    """What the package and docs/ hold is what the bench makes of docs/four_arms.jsonl."""
    import four_arms

    for path, content in four_arms.tables().items():
        assert path.read_text() == content, path
    content = json.loads((resources.files("edgeblocks") / "measured.json").read_text())
    assert set(content) - {"ar-sliding"} <= set(DEFAULT_PRESETS)
    for task in content:
        family, _, sliding = task.partition("-")
        assert measured(family, sliding_window=4 if sliding else 0) is not None
    assert measured("none of ours") is None
    assert measured("looped", sliding_window=4) is None


def test_plan_tells_a_method():
    """In one line, and in the JSON."""
    asked = ["vit", "--data", "digits", "--set", "depth=2", "--set", "width=32", "--mem-budget", "1GB"]
    done = invoke("plan", *asked)
    assert done.exit_code == 0, done.stderr
    assert sum(line.startswith("method: ") for line in done.stdout.splitlines()) == 1
    advice = json.loads(invoke("plan", *asked, "--json").stdout)["recommendation"]
    assert advice["method"] in ("diffusion", "exact", None)
    assert f"{advice['method'] or 'none'} is recommended" in done.stdout
    assert "own trainings on Fashion-MNIST, not on your data: 6 layers" in done.stdout
    assert done.stdout.count("\nwhy: no limit is felt: ") == 1 and " here for 1200 steps" in done.stdout
    content = json.loads(invoke("plan", *asked, "--json").stdout)
    assert content["why"].startswith("no limit is felt: ") and content["predicted_s"] > 0


@pytest.mark.usefixtures("measured_speeds")
def test_both_methods_are_planned_at_the_same_speeds():
    """A machine that is busy for a moment would make one of them slower; its memory is that of now."""
    asked = {"family": "vit", "depth": 2, "width": 32, "heads": 2, "mem_budget": "4GB"}
    first = api.plan(**asked)
    slow = replace(first, machine=replace(first.machine, flops_per_s=1e6, operator_s=1.0))
    beside = api.plan_beside(slow, **asked, method="exact")
    assert (beside.machine.flops_per_s, beside.machine.operator_s) == (1e6, 1.0)
    assert beside.plan.method.name == "exact" and beside.plan.predicted_s > 100 * first.plan.predicted_s
    assert beside.machine.runtime_bytes > 10**8


def test_growing_is_not_recommended_where_all_layers_fit_at_once():
    """It would be end-to-end training, and the figures of a network that grew say nothing of it."""
    asked = {"family": "vit", "depth": 4, "width": 32, "heads": 2, "mem_budget": "4GB", "method": "greedy"}
    assert "nothing would grow" in option(lambda: api.plan(**asked)).obstacle
    assert option(lambda: api.plan(**asked, window=2)).seconds > 0
