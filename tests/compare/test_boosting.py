"""BoostResNet beside our methods: the boosting loss, layers one after the other, as many layer evaluations."""

import numpy as np
import pytest
import torch

from edgeblocks.api import settings_for_here
from edgeblocks.compare import boosting
from edgeblocks.families.vit import PlainVit, VitSettings
from edgeblocks.runs.open_data import data_of

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 40


def test_the_loss_is_that_of_multi_class_boosting():
    """Its gradient by a class' answer is the weight that boosting gives to that class: the paper's cost function."""
    logits, labels = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 1, 1, 2])
    boosting.boosting_loss(logits, labels).sum().backward()
    answers = logits.detach().numpy()
    for row, right in enumerate(labels.tolist()):
        costs = np.exp(answers[row] - answers[row, right])
        costs[right] = -sum(costs[wrong] for wrong in range(4) if wrong != right)
        np.testing.assert_allclose(logits.grad[row], costs)


@pytest.fixture(scope="module")
def boosted():
    """Copies of the network at every step that is told of, and the data."""
    small = {"family": "vit", "data": "digits", "depth": 3, "width": 32, "heads": 2, "batch": 32}
    run = settings_for_here(**small, steps=STEPS, learning_rate=3e-3, warmup=5).run
    data = data_of(run, lambda *_: None)
    family = PlainVit(VitSettings(depth=3, width=32, heads=2), PlainVit.data_info(data))
    told = []

    def note(step, loss, network):
        told.append((step, loss, {name: value.clone() for name, value in network.state_dict().items()}))

    boosting.train(family, data, run, device="cpu", on_start=lambda: None, on_step=note)
    return told


def test_layers_are_trained_one_after_the_other(boosted):
    """What is below a layer no longer changes; each has its own classifier; steps are told of as an ordinary loop's."""
    assert [step for step, _, _ in boosted] == list(range(1, STEPS + 1))
    numbers = [sum(name.endswith("attention.qkv.weight") for name in weights) - 1 for *_, weights in boosted]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2}
    assert boosted[0][1] == pytest.approx(9, rel=0.2) and boosted[-1][1] < 6  # ten classes, all as likely at first
    first, last = boosted[numbers.index(1)][2], boosted[len(numbers) - numbers[::-1].index(1) - 1][2]
    for name in first:
        is_trained = name.startswith(("layers.1.", "readout"))
        assert (first[name] != last[name]).any() == (is_trained and first[name].dtype.is_floating_point), name
