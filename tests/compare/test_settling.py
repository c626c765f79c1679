"""What is looked at before the first training of a comparison."""

import pickle

import pytest

from edgeblocks.compare.arms import arms_of
from edgeblocks.compare.settling import settled
from edgeblocks.compare.wanted import Asked
from edgeblocks.errors import DoesNotFitError, EdgeblocksError

SETTINGS = {"family": "dit", "data": "digits", "depth": 3, "width": 32, "heads": 2, "mem_budget": "4GB"}


def asked(*, settings=(), **more):
    usual = {"arms": arms_of("diffusion,exact,plain", print), "seeds": 1, "minutes": None, "config": None}
    return Asked(settings={**SETTINGS, **dict(settings)}, **{**usual, **more})


def test_every_seed_and_setting_is_known_afterwards():
    """In values that another process can be sent."""
    found = pickle.loads(pickle.dumps(settled(asked(seeds=2, settings={"seed": 5}))))
    assert found.seeds == (5, 6) and found.depth == found.settings["depth"] == 3 and found.task == "images"
    assert found.environment["packages"]["torch"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minutes": -1.0}, "a number above 0"),
        ({"seeds": 0}, "at least one"),
        ({"settings": {"method": "exact"}}, "name them with --arms"),
        ({"settings": {"train_blocks": "1"}}, "compare different things"),
        ({"settings": {"master": "bf16"}}, "ordinary training keeps float32 weights"),
        (
            {"settings": {"precision": "fp16"}},
            "ordinary training has no loss scaling here; use --arms diffusion,exact",
        ),
        ({"settings": {"clip_by": "network"}}, "what is trained is clipped by its own"),
        ({"settings": {"data": "nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, said):
    with pytest.raises(EdgeblocksError, match=said) as caught:
        settled(asked(**change))
    assert caught.value.exit_code == 2


def test_a_time_and_the_steps_of_a_file_are_refused(tmp_path):
    (tmp_path / "steps.yaml").write_text("steps: 3\n")
    with pytest.raises(EdgeblocksError, match="an arm trains for a time or for a number of steps"):
        settled(asked(minutes=1.0, config=tmp_path / "steps.yaml"))


def test_a_refusal_is_the_same_in_another_process():
    """Exit code and budgets included."""
    error = DoesNotFitError("too small", 10, 20, "--ram-budget")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.smallest_bytes, again.as_fixed_bytes, again.flag) == ("too small", 10, 20, "--ram-budget")
