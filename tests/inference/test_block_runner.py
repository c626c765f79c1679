import math
from contextlib import contextmanager

import pytest
import torch

from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise, sampler_levels
from edgeblocks.diffusion.solver import integrate
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.dit import Dit, DitSettings
from edgeblocks.inference.block_runner import BlockRunner, class_labels, guided
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.offload.block_buffer import BlockBuffer, BlockLayout
from edgeblocks.offload.block_files import BlockStore
from edgeblocks.seeds import start_noise

LAYERS = (2, 1, 1)
NO_CLASS = 4
FAMILY = Dit(
    DitSettings(width=16, depth=4, heads=2, patch=2),
    ImageInfo(channels=1, height=4, width=4, num_classes=NO_CLASS, mean=0.5, scale=1.0),
)
PARTITION = partition_noise(NoiseDistribution(), num_blocks=3, kind="equal-probability", overlap=0.05)


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_label(z, sigma, labels):
    """A made-up conditional denoiser: each class has its value."""
    return z * 0 + (labels.view(-1, 1) + 1.0) * sigma


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0, 4.5])
def test_guidance_goes_beyond_the_class(guidance):
    """D = D_null + g (D_class - D_null), with the labels and with "no class" for all."""
    labels, z = torch.tensor([0, 2, 3]), normal(3, 2)
    denoised = guided(by_label, labels, guidance=guidance, no_class=NO_CLASS)(z, 0.5)
    null, conditional = by_label(z, 0.5, torch.full((3,), NO_CLASS)), by_label(z, 0.5, labels)
    torch.testing.assert_close(denoised, null + guidance * (conditional - null))


@pytest.mark.parametrize(("labels", "guidance", "runs"), [(None, 2.0, 1), ([1], 1.0, 1), ([1], 2.0, 2)])
def test_guidance_runs_the_network_only_as_often_as_it_must(labels, guidance, runs):
    """Without classes, or with guidance 1, once; else twice."""
    calls = []

    def count(z, sigma, labels):
        calls.append(labels)
        return torch.zeros_like(z)

    labels = None if labels is None else torch.tensor(labels)
    guided(count, labels, guidance=guidance, no_class=NO_CLASS)(normal(1, 2), 0.5)
    assert len(calls) == runs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three blocks of random weights, of different sizes."""
    layouts, networks = [], []
    for num_layers in LAYERS:
        with torch.device("meta"):
            networks.append(FAMILY.block(num_layers=num_layers, checkpointing=False))
        layouts.append(BlockLayout.of(networks[-1], "adamw8bit"))
    store = BlockStore(tmp_path_factory.mktemp("blocks"), layouts, "run")
    for block, layout in enumerate(layouts):
        buffer = BlockBuffer(layout)
        buffer.part_bytes("optimizer").zero_()
        buffer.flat("weights").fill_(math.nan)  # only the EMA may be used
        buffer.flat("ema").copy_(0.15 * normal(layout.num_parameters, seed=block))
        store.write(block, buffer, step=1)
    return store


def runner_of(store, micro_batch=8):
    return BlockRunner(FAMILY, LAYERS, PARTITION, EmaLoader(store), micro_batch=micro_batch)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("num_steps", [3, 4, 9, 18])
def test_every_block_is_loaded_once_and_in_order(store, solver, guidance, num_steps):
    """A chain makes each block resident exactly once, from high noise to low, with and without guidance."""
    runner = runner_of(store, micro_batch=2)
    noise = torch.from_numpy(start_noise((1, 4, 4), samples=range(3), seed=0))
    denoise = guided(runner.denoise, torch.tensor([0, 1, 2]), guidance=guidance, no_class=NO_CLASS)
    end = integrate(denoise, noise, sampler_levels(PARTITION, num_steps=num_steps), solver=solver)
    assert runner.loads == [0, 1, 2]
    assert end.isfinite().all()


def test_a_level_is_denoised_by_the_block_that_owns_it(store):
    """The runner's answer is that of the owning block's EMA weights, computed on a network of its own."""
    runner, z, labels = runner_of(store), normal(3, 1, 4, 4), torch.tensor([0, 1, 4])
    answers = []
    for block, sigma in ((0, 5.0), (1, 0.3), (2, 0.05)):
        network = FAMILY.block(num_layers=LAYERS[block], checkpointing=False)
        network.reset_tables_()
        buffer = BlockBuffer(store.layouts[block], ["ema"])
        store.read(block, buffer)
        network.load_state_dict(dict(buffer.tensors("ema")))
        with torch.no_grad():
            expected = network(z, torch.full((3,), sigma), labels)
        answers.append(runner.denoise(z, sigma, labels))
        torch.testing.assert_close(answers[-1], expected)
    assert runner.loads == [0, 1, 2]


def sampled(store, num_samples, micro_batch):
    runner = runner_of(store, micro_batch)
    noise = torch.from_numpy(start_noise((1, 4, 4), samples=range(num_samples), seed=5))
    labels = class_labels(num_samples, num_classes=NO_CLASS, chosen=None)
    denoise = guided(runner.denoise, labels, guidance=2.0, no_class=NO_CLASS)
    return integrate(denoise, noise, sampler_levels(PARTITION, num_steps=6), solver="heun")


@pytest.mark.parametrize(("num_samples", "micro_batch"), [(7, 1), (7, 3), (3, 8), (12, 5)])
def test_a_sample_depends_on_neither_the_number_nor_the_micro_batch(store, num_samples, micro_batch):
    """Sample i is the same, within rounding, whatever is sampled beside it and however it is batched."""
    expected = sampled(store, 12, 12)
    assert expected.std() > 0.01
    torch.testing.assert_close(sampled(store, num_samples, micro_batch), expected[:num_samples], rtol=1e-4, atol=1e-5)


def test_any_source_of_ema_weights_will_do(store):
    """The runner asks its source for the block and no other, and holds its weights until it needs the next."""
    asked = []

    class Source:
        @contextmanager
        def ema_weights(self, block):
            asked.append(block)
            buffer = BlockBuffer(store.layouts[block], ["ema"])
            store.read(block, buffer)
            yield buffer

    runner = BlockRunner(FAMILY, LAYERS, PARTITION, Source(), micro_batch=4)
    z = normal(2, 1, 4, 4)
    for sigma in (80.0, 5.0, 0.3, 0.05, 0.002):
        runner.denoise(z, sigma, torch.tensor([0, 1]))
    assert asked == [0, 1, 2] == runner.loads


def test_class_labels_are_a_tensor_or_nothing():
    """All classes in turn, or the chosen one for all; none for an unconditional network."""
    assert class_labels(5, num_classes=3, chosen=None).tolist() == [0, 1, 2, 0, 1]
    assert class_labels(3, num_classes=3, chosen=2).tolist() == [2, 2, 2]
    assert class_labels(3, num_classes=0, chosen=None) is None
