"""BoostResNet: a residual network trained as boosting does, one layer after the other.

Layer t is trained alone on what the layers below it, which stay as they are, make of an example, with a linear
classifier o_t of its own. The weak classifier is the difference to the layer before: h_t = a_t o_t - a_(t-1) o_(t-1).
Boosting weighs each wrong class l of an example by exp(s_l - s_y), where s is the sum of the weak classifiers so far
and y the right class; the sum telescopes to s_t = a_t o_t. So what layer t and its classifier make small is
sum over l != y of exp(s_l - s_y), and the scale a_t is that of the classifier's weights. The last classifier is the
network's. Stem and first layer are trained together. All layers are trained, whatever their edge over chance is.

Source: Huang, Ash, Langford and Schapire 2018, arXiv 1706.04964, the multi-class algorithms.
"""

from collections.abc import Callable
from contextlib import closing

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from edgeblocks.compare.plain_training import adamw, averaged, whole_range
from edgeblocks.data.dataset import DataSet
from edgeblocks.families.family import Family
from edgeblocks.families.precision import computing_in
from edgeblocks.families.vit import PlainVitBlock
from edgeblocks.optim.schedule import learning_rate_at
from edgeblocks.seeds import generator_at
from edgeblocks.settings.fields import RunSettings, precision_of
from edgeblocks.training.batches import BatchThread, drawing


def steps_of_layers(layers: int, steps: int) -> int:
    """Steps of each layer, so that all of them make as many layer evaluations as `steps` of the whole network.

    A layer forward is one and its backward pass two; layers below are run forward alone.

    >>> steps_of_layers(6, 800)
    436
    """
    return max(1, steps * 3 * layers // sum(3 + below for below in range(layers)))


def boosting_loss(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The multi-class exponential loss: sum over wrong classes l of exp(s_l - s_y)."""
    margins = logits - logits.gather(1, labels.unsqueeze(1))
    return margins.exp().sum(1) - 1  # the right class' own term


def train(
    family: Family,
    data: DataSet,
    run: RunSettings,
    *,
    device: str,
    on_start: Callable[[], None],
    on_step: Callable[..., None],
) -> None:
    """A classifier's network, layer after layer; arguments as of `plain_training.train`.

    A step that is told of is one of as many layer evaluations as a step of the whole network.
    """
    layers = family.num_layers
    each, whole = steps_of_layers(layers, run.steps), 3 * layers
    network = family.block(num_layers=layers, checkpointing=False)
    assert isinstance(network, PlainVitBlock)
    network.reset_tables_()
    network.init_(generator_at(run.seed, "init", 0))
    network = network.to(device)
    all_layers = list(network.layers)
    draw = drawing(family, data, whole_range(family).ranges[0], batch=run.batch, seed=run.seed, block=0)
    evaluations = told = 0
    loss = torch.zeros(())
    mean: nn.Module = network
    on_start()
    with closing(BatchThread(torch.device(device))) as thread:
        batches = thread.batches(draw, last=layers * each)
        for number in range(layers):
            network.layers = nn.ModuleList(all_layers[: number + 1])
            trained = _begin(family, network, number, seed=run.seed)
            average = averaged(network, run.ema_length)
            optimizer = adamw(trained, weight_decay=run.weight_decay, eight_bit=False)
            for step in range(each):
                batch = {name: tensor.to(device) for name, tensor in batches.of(number * each + step).items()}
                with computing_in(precision_of(run), device):
                    loss = boosting_loss(network.logits(batch["images"]), batch["labels"]).mean()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(trained, run.clip)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, steps=each, warmup=run.warmup, peak=run.learning_rate)
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(network)
                mean, evaluations = average.module, evaluations + 3 + number
                while told < min(evaluations // whole, run.steps - 1):
                    told += 1
                    on_step(told, loss.item(), mean)
            network.load_state_dict(mean.state_dict())
    while told < run.steps:  # what rounding has left
        told += 1
        on_step(told, loss.item(), mean)


def _begin(family: Family, network: nn.Module, number: int, *, seed: int) -> list[nn.Parameter]:
    """Freeze what is below a layer, and give it a new classifier; gives what is trained now."""
    fresh = family.block(num_layers=1, checkpointing=False)
    fresh.reset_tables_()
    fresh.init_(generator_at(seed, "init", number))
    for name in fresh.readout_parts:
        network.get_submodule(name).load_state_dict(fresh.get_submodule(name).state_dict())
    names = (f"layers.{number}", *fresh.readout_parts, *(fresh.stem_parts if number == 0 else ()))
    network.requires_grad_(False)
    trained = [parameter for name in names for parameter in network.get_submodule(name).parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained
