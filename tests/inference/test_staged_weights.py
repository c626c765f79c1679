"""A network whose stages are loaded in turn: where its stem and readout lie meanwhile."""

import pytest
import torch
from support.random_run import make_run

from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.inference.staged_weights import StagedEma
from edgeblocks.planning.plans import stages_with_ends

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_copies_of_stem_and_readout_lie_in_spare_memory_as_far_as_they_fit(tmp_path, share):
    """Each tensor that fits what is left; the others have memory of their own. Values are the same in any case."""
    directory = make_run(tmp_path / "run", layers=(1, 1, 1), family="dit", method="exact", width=16, heads=2).directory
    family = directory.family()
    with torch.device("meta"):
        usual, network = (family.block(num_layers=3, checkpointing=False) for _ in range(2))
    own = [name for name, _ in network.named_parameters() if not name.startswith("layers.")]
    spare = torch.zeros(int(share * sum(network.get_parameter(name).numel() for name in own)))
    layers = directory.file_layers
    for block, memory in ((usual, None), (network, spare)):
        with StagedEma(EmaLoader(directory.store(), slots=2), layers, spare=memory).ema_weights(0) as weights:
            weights.bind_(block)
    inside = {
        name
        for name in own
        if network.get_parameter(name).untyped_storage().data_ptr() == spare.untyped_storage().data_ptr()
    }
    assert len(inside) == len(own) * share if share in (0.0, 1.0) else 0 < len(inside) < len(own)
    for name in own:
        assert torch.equal(usual.get_parameter(name), network.get_parameter(name)), name
    assert spare.count_nonzero() <= sum(network.get_parameter(name).numel() for name in inside)


def test_stages_that_may_be_the_largest():
    """The first and the last one, and of those between the one with the most layers."""
    assert stages_with_ends((2, 1)) == [(2, "first"), (1, "last")]
    assert stages_with_ends((2, 1, 3, 1)) == [(2, "first"), (3, "middle"), (1, "last")]
