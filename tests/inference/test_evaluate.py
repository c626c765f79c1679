"""What an evaluation gives a network: batches in the memory that the network is in."""

from contextlib import contextmanager

import torch
from support.random_run import make_text_run

from edgeblocks.families.looped import PlainLooped
from edgeblocks.inference.evaluate import Evaluation
from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.progress import Silent
from edgeblocks.registry import build_target
from edgeblocks.runs.open_data import open_run_data


class OnAnotherDevice:
    """The weights of a run's one block in the memory of a device that is not the processor: torch's meta device."""

    def __init__(self, directory):
        (layout,) = directory.store().layouts
        self._buffer = BlockBuffer(layout, ("ema",), allocate=lambda size: torch.empty(size, device="meta").byte())

    @contextmanager
    def ema_weights(self, block):
        yield self._buffer


def test_the_curve_of_iterations_is_computed_where_the_network_is(tmp_path, monkeypatch):
    """Each batch of the curve, and the iterations that it asks for, are moved to the network's device."""
    monkeypatch.setattr("edgeblocks.inference.evaluate.CURVE_TEXTS", 5)
    monkeypatch.setattr("edgeblocks.inference.evaluate.CURVE_STEPS", (1, 3))
    run = make_text_run(
        tmp_path / "run", layers=(4,), family="looped", method="exact", width=16, heads=2, length=16, hold_out=0.0005
    )
    runner = run.runner(OnAnotherDevice(run.directory), micro_batch=4)
    text = open_run_data(run.directory.settings, Silent(), budget_bytes=4 * 10**9, target=build_target("cpu"))
    devices, scores = set(), PlainLooped.scores

    def noticed(family, network, batch):
        devices.update(tensor.device.type for tensor in batch.values())
        found = scores(family, network, {name: tensor.to("meta") for name, tensor in batch.items()})
        return {name: torch.zeros(values.shape) for name, values in found.items()}  # meta tensors have no values

    monkeypatch.setattr(PlainLooped, "scores", noticed)
    evaluation = Evaluation(directory=run.directory, data_set=text, samples=2, steps=1, seed=0, listener=Silent())
    assert [row["steps"] for row in evaluation._iterations_curve(runner, text)] == [1, 3]
    assert devices == {"meta"}
