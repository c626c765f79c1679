"""Ordinary training as it is written without edgeblocks: the whole network, its gradients and its optimizer in memory.

What `edgeblocks compare` holds the other methods against. Same data, batches, schedule, clipping and mean of the
weights; no budget, and nothing is saved but figures.
"""

import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.noise import NoisePartition, partition_noise
from edgeblocks.errors import EdgeblocksError
from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.files.durable import write_atomically
from edgeblocks.files.own import append
from edgeblocks.inference.quality import network_quality
from edgeblocks.methods import Precision
from edgeblocks.offload.device import Target
from edgeblocks.optim.schedule import learning_rate_at
from edgeblocks.optim.update import BETA1, BETA2, EPS, ema_exponent
from edgeblocks.progress import Listener
from edgeblocks.seeds import generator_at
from edgeblocks.settings.fields import RunSettings, precision_of
from edgeblocks.training.batches import BatchThread, drawing
from edgeblocks.training.loop import METRICS_RECORDS


def train(
    family: Family,
    data: DataSet,
    run: RunSettings,
    *,
    device: str,
    eight_bit: bool,
    on_start: Callable[[], None],
    on_step: Callable[..., None],
) -> None:
    """The network of a family, end to end.

    Args:
        device: torch's name of where the network is.
        on_start: called before the first step.
        on_step: called after every step with the number of steps, the loss, and the mean of the weights.
    """
    network = family.block(num_layers=family.num_layers, checkpointing=run.checkpointing is True)
    network.reset_tables_()
    network.init_(generator_at(run.seed, "init", 0))
    network = network.to(device)
    average = averaged(network, run.ema_length)
    optimizer = adamw(list(network.parameters()), weight_decay=run.weight_decay, eight_bit=eight_bit)
    on_start()
    # The batches of `exact`, and the examples of `diffusion`'s block 0 in the same order.
    draw = drawing(family, data, whole_range(family).ranges[0], batch=run.batch, seed=run.seed, block=0)
    with closing(BatchThread(torch.device(device))) as thread:
        batches = thread.batches(draw, last=run.steps)
        for step in range(run.steps):
            batch = {name: tensor.to(device) for name, tensor in batches.of(step).items()}
            with computing_in(precision_of(run), device):
                loss = family.loss(network, batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), run.clip)
            for group in optimizer.param_groups:
                # Set from the step and not by a scheduler of torch, whose schedule would be another one.
                group["lr"] = learning_rate_at(step, steps=run.steps, warmup=run.warmup, peak=run.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(network)
            on_step(step + 1, loss.item(), average.module)


def averaged(network: nn.Module, ema_length: float) -> AveragedModel:
    """A copy that follows a network's weights as their average."""
    exponent = ema_exponent(ema_length) + 1
    # The average of `optim.update.follow_`: torch copies the weights after the first step, where its decay is 0, too.
    return AveragedModel(
        network, avg_fn=lambda mean, value, count: mean.lerp(value, 1 - float(1 - 1 / (count + 1)) ** exponent)
    )


def adamw(parameters: Sequence[nn.Parameter], *, weight_decay: float, eight_bit: bool) -> torch.optim.Optimizer:
    """AdamW with moments of 32 bits or 8."""
    # As `BlockLayout` has it: matrices decay, vectors do not.
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if not eight_bit:
        return torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS, fused=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels, which are not used
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=(BETA1, BETA2), eps=EPS)
    return optimizer


def whole_range(family: Family) -> NoisePartition:
    """All noise levels, as one block has them."""
    return partition_noise(family.noise, num_blocks=1, kind="equal-probability", overlap=0.0)


@dataclass(frozen=True, kw_only=True)
class PlainSummary:
    """summary.json of an ordinary training."""

    steps: int
    seconds: float
    """Of training, without the evaluations."""
    step_s: float
    peak_bytes: int
    runtime_bytes: int
    """Of the process before there was a network."""


@dataclass(frozen=True, kw_only=True)
class WholeNetwork:
    """A network in memory, where evaluation asks for blocks."""

    partition: NoisePartition
    whole: nn.Module
    micro_batch: int
    device: torch.device
    precision: Precision

    def network(self, block: int) -> nn.Module:
        return self.whole


class Recorder:
    """Writes figures of a training, and has its network evaluated now and then; that time is not counted."""

    def __init__(
        self, out: Path, family: Family, data: DataSet, run: RunSettings, target: Target, listener: Listener
    ) -> None:
        self.out, self.family, self.data, self.run = out, family, data, run
        self.target, self.listener = target, listener
        self.runtime_bytes = self.target.used_bytes()
        self.partition = whole_range(family)
        self.previews_s = self.started = 0.0
        self._first_s = 0.0
        """Of the first step, which loads libraries and takes memory from the system."""
        self._every = max(1, run.steps // METRICS_RECORDS)
        self._marks = {math.ceil(run.steps * (i + 1) / run.evaluations) for i in range(run.evaluations)}

    def start(self) -> None:
        """Time counts from now on."""
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Trained so far."""
        return time.perf_counter() - self.started - self.previews_s

    def note(self, step: int, loss: float, mean: nn.Module) -> None:
        """Hear of a step.

        Raises:
            EdgeblocksError: the loss is no longer finite.
        """
        if not math.isfinite(loss):
            raise EdgeblocksError(f"the loss is {loss} at step {step}; a smaller --set learning_rate=.. helps")
        seconds = self.seconds
        self._first_s = self._first_s or seconds
        self.listener.advance(step, self.run.steps, f"training, loss {loss:.3f}")
        if step % self._every == 0 or step == self.run.steps:
            used_bytes = self.target.used_bytes()
            self._append("metrics.jsonl", {"step": step, "loss": loss, "seconds": seconds, "used_bytes": used_bytes})
        if step in self._marks:
            started = time.perf_counter()
            micro_batch = min(self.run.batch, 64)
            device = torch.device(self.target.torch_device)
            whole = WholeNetwork(
                partition=self.partition,
                whole=mean.eval(),
                micro_batch=micro_batch,
                device=device,
                precision=precision_of(self.run),
            )
            # The average of the weights is looked at, as with the other methods.
            found = network_quality(self.family, whole, self.data, seed=self.run.seed)
            mean.train()
            self.previews_s += time.perf_counter() - started
            self._append("quality.jsonl", {"step": step, "seconds": seconds, **asdict(found)})

    def finish(self) -> None:
        """Write the summary, which marks the training as finished."""
        summary = PlainSummary(
            steps=self.run.steps,
            seconds=self.seconds,
            step_s=(self.seconds - self._first_s) / max(self.run.steps - 1, 1),
            peak_bytes=self.target.peak_bytes(),
            runtime_bytes=self.runtime_bytes,
        )
        write_atomically(self.out / "summary.json", [json.dumps(asdict(summary)).encode()])

    def _append(self, name: str, record: Mapping[str, object]) -> None:
        append(self.out / name, f"{json.dumps(record)}\n".encode())
