"""The EMA weights of a network that was trained in stages, as those of one network, of which some stages are in memory.

A pass through the network brings its stages one after the other; with as many in memory as there are, each comes once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor, nn

from edgeblocks.families.block import Block
from edgeblocks.inference.block_runner import EmaSource
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.methods import Frozen
from edgeblocks.offload.block_buffer import bind_parameters_
from edgeblocks.offload.device import Device
from edgeblocks.offload.float32_copy import Weights
from edgeblocks.offload.sections import whole_name
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.opening import check_whole
from edgeblocks.runs.quantized_blocks import quantized_store


class StageSource(Protocol):
    """Whatever can put one stage's EMA weights into memory: the training's slots, or a loader."""

    def ema_weights(self, block: int) -> AbstractContextManager[Weights]:
        """A buffer or a copy with them, until another stage needs its place."""
        ...


def loaded_ema(run: RunDirectory, *, slots: int, device: Device | None = None, frozen: Frozen = "none") -> EmaSource:
    """The EMA weights of a run's blocks, or of the one that its stages make up, as its files have them.

    Args:
        slots: blocks or stages that are in memory at a time.
        device: that they are put on; None: the processor.
        frozen: as what they wait in memory.

    Raises:
        RunError: a checkpoint was cut short while its files were put in place.
    """
    store = run.store()
    if run.method.one_network:
        check_whole(run, store)
    if frozen != "none":
        store = quantized_store(run, len(store.layouts), frozen)
    if not run.method.one_network:
        return EmaLoader(store, device=device, slots=slots)
    return StagedEma(EmaLoader(store, device=device, slots=slots), run.file_layers, tied=run.family().tied_parameters)


class StagedEma:
    """A source of the one block that all stages make up; see `block_runner.EmaSource`."""

    def __init__(
        self,
        stages: StageSource,
        layers: Sequence[int],
        *,
        spare: Tensor | None = None,
        tied: tuple[str, str] | None = None,
    ) -> None:
        """
        Args:
            layers: of each stage.
            spare: flat memory, float32, that nobody else needs while the weights are used.
            tied: names of a parameter of the first stage and of one of the last that are equal.
        """
        self._stages, self._layers, self._spare, self._tied = stages, tuple(layers), spare, tied

    @contextmanager
    def ema_weights(self, block: int) -> Iterator["StagedWeights"]:
        """There is one block, 0."""
        assert block == 0
        yield StagedWeights(self._stages, self._layers, spare=self._spare, tied=self._tied)


class StagedWeights:
    """What a whole network is bound to; see `block_runner.EmaWeights`."""

    def __init__(
        self, stages: StageSource, layers: Sequence[int], *, spare: Tensor | None, tied: tuple[str, str] | None
    ) -> None:
        self._stages, self._layers, self._spare, self._tied = stages, layers, spare, tied
        with stages.ema_weights(0) as buffer:
            self.device = buffer.device

    def bind_(self, network: Block) -> None:
        """Copies of the stem and the readout become parameters of the network; its layers come when they are run."""
        left, copies = self._spare, dict[str, Tensor]()
        first, other = self._tied or ("", "")
        for stage in sorted({0, len(self._layers) - 1}):
            with self._stages.ema_weights(stage) as buffer:
                # Copies, since every pass needs them and the buffers of their stages are taken by the stages between.
                for name, tensor in buffer.tensors("ema"):
                    if name.startswith("layers."):
                        continue
                    if name == other and first in copies:
                        copies[name] = copies[first].view(tensor.shape)
                    elif left is not None and tensor.numel() <= left.numel():
                        copies[name], left = left[: tensor.numel()].view(tensor.shape), left[tensor.numel() :]
                        copies[name].copy_(tensor)
                    else:
                        copies[name] = tensor.clone()
        bind_parameters_(network, copies.items())
        network.layers = _LayersOnUse(network.layers, self._layers, self._load)
        for _ in network.layers:  # an export takes the weights of all layers at once, from as many buffers as stages
            pass

    def _load(self, stage: int, layers: nn.ModuleList, bound: dict[int, int]) -> None:
        with self._stages.ema_weights(stage) as buffer:
            # Still views of the buffer that the stage lies in: what is loaded into it is what they see.
            if bound.get(stage) == id(buffer):
                return
            for name, tensor in buffer.tensors("ema"):
                if name.startswith("layers."):
                    bind_parameters_(layers, [(whole_name(name, self._layers, stage).removeprefix("layers."), tensor)])
            bound[stage] = id(buffer)


class _LayersOnUse(nn.ModuleList):
    """A network's layers. Taking one loads its stage's weights, which stay until a layer of another stage is taken."""

    def __init__(
        self,
        layers: nn.ModuleList,
        stages: Sequence[int],
        load: Callable[[int, nn.ModuleList, dict[int, int]], None],
    ) -> None:
        super().__init__(layers)
        self._stage_of = [stage for stage, count in enumerate(stages) for _ in range(count)]
        self._load = load
        self._bound: dict[int, int] = {}
        """By stage, the buffer that its layers' parameters are views of."""

    def __getitem__(self, number: int) -> nn.Module:  # type: ignore[override]  # layers come one at a time
        # When the network's own loop takes the layer, as the stages' buffers do not hold all layers at once.
        self._load(self._stage_of[number], self, self._bound)
        return super().__getitem__(number)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[number] for number in range(len(self)))
