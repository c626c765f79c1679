import itertools
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from edgeblocks.chain import BlockRunner, class_labels, guided, sample_chain
from edgeblocks.families.base import ImageInfo
from edgeblocks.families.dit import Dit, DitSettings
from edgeblocks.noise import NoiseDistribution, partition_noise, sampler_levels
from edgeblocks.randomness import seed_at, start_noise
from edgeblocks.scheduler import EmaLoader
from edgeblocks.store import BlockBuffer, BlockLayout, BlockStore

LAYERS = (2, 1, 1)
NO_CLASS = 4
FAMILY = Dit(
    DitSettings(width=16, depth=4, heads=2, patch=2),
    ImageInfo(channels=1, height=4, width=4, num_classes=NO_CLASS, mean=0.5, scale=1.0),
)
PARTITION = partition_noise(NoiseDistribution(), num_blocks=3, kind="equal-probability", overlap=0.05)


def levels_of(num_steps):
    whole = partition_noise(NoiseDistribution(), num_blocks=1, kind="equal-probability", overlap=0.0)
    return sampler_levels(whole, num_steps=num_steps)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The data y ~ N(MU, SD^2): the best denoiser is linear, and the ODE dz/dsigma = (z - D)/sigma has the solution
# z(sigma) = MU + (z(sigma_max) - MU) sqrt((SD^2 + sigma^2) / (SD^2 + sigma_max^2)).
MU, SD = 0.3, 0.5


def gaussian_denoiser(z, sigma):
    return (SD**2 * z + sigma**2 * MU) / (SD**2 + sigma**2)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_a_point_mass_is_reached_exactly(solver, num_steps):
    """When D is always the one clean image y, the chain ends at y, in any number of steps."""
    y = normal(3, 2)
    end = sample_chain(lambda z, sigma: y.clone(), normal(3, 2, seed=1), levels_of(num_steps), solver=solver)
    torch.testing.assert_close(end, y, rtol=0, atol=1e-12)


def test_a_step_with_a_perfect_denoiser_keeps_the_noise():
    """EDM's sign: from y + sigma eps, a perfect D leads to exactly y + sigma_next eps (with the paper's it would grow)."""
    y, eps = normal(4, 3), normal(4, 3, seed=1)
    levels = levels_of(6)
    seen = []

    def perfect(z, sigma):
        seen.append((sigma, z.clone()))
        return y.clone()

    # The chain starts from sigma_max noise; choose it so that the start is y + sigma_max eps.
    sample_chain(perfect, y / levels[0] + eps, levels, solver="euler")
    assert [sigma for sigma, _ in seen] == list(levels)
    for sigma, z in seen:
        torch.testing.assert_close(z, y + sigma * eps, rtol=1e-9, atol=1e-9)


def test_the_chain_starts_at_sigma_max_times_the_noise_and_leaves_it_alone():
    """The first input is sigma_max eps; the caller's noise is unchanged."""
    noise = normal(2, 3)
    kept, seen = noise.clone(), []

    def listen(z, sigma):
        seen.append(z.clone())
        return torch.zeros_like(z)

    sample_chain(listen, noise, levels_of(3), solver="heun")
    torch.testing.assert_close(seen[0], 80.0 * kept)
    assert torch.equal(noise, kept)


def test_the_chain_ends_in_a_denoised_image():
    """After the last level comes sigma 0: the result is D at sigma_min, nothing of the noise left."""
    end = sample_chain(lambda z, sigma: torch.full_like(z, sigma), normal(2, 3), [5.0, 1.0, 0.25], solver="euler")
    torch.testing.assert_close(end, torch.full_like(end, 0.25))


def ode_error(solver, num_steps):
    """Distance from the exact solution for Gaussian data after `num_steps` steps even in log sigma, from 10 to 0.05."""
    levels = [10.0 * (0.05 / 10.0) ** (i / num_steps) for i in range(num_steps + 1)]
    arrived = []

    def denoise(z, sigma):
        if sigma == levels[-1]:
            arrived.append(z.clone())
        return gaussian_denoiser(z, sigma)

    noise = normal(64)
    sample_chain(denoise, noise, levels, solver=solver)
    z_start = noise * levels[0]
    exact = MU + (z_start - MU) * math.sqrt((SD**2 + levels[-1] ** 2) / (SD**2 + levels[0] ** 2))
    # Heun looks at the last level twice, at its prediction and then at its result.
    return (arrived[-1] - exact).abs().mean().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_order_of_the_solvers(solver, order):
    """Halving the steps' length divides the error by 2 (Euler) and by 4 (Heun), on Gaussian data with a known solution."""
    errors = [ode_error(solver, num_steps) for num_steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_samples_of_gaussian_data_have_its_mean_and_spread():
    """With the exact denoiser, 4,000 samples have mean MU and deviation SD within 5 %."""
    samples = sample_chain(gaussian_denoiser, normal(4000), levels_of(60), solver="heun")
    assert samples.mean().item() == pytest.approx(MU, abs=0.05)
    assert samples.std().item() == pytest.approx(SD, rel=0.05)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 6), ("heun", 11)])
def test_evaluations_a_level(solver, evaluations):
    """Euler runs the network once a level, Heun twice except at the last; on_level counts the levels."""
    calls, done = [], []

    def denoise(z, sigma):
        calls.append(sigma)
        return torch.zeros_like(z)

    sample_chain(denoise, normal(2), levels_of(6), solver=solver, on_level=done.append)
    assert len(calls) == evaluations
    assert calls == sorted(calls, reverse=True)
    assert done == [1, 2, 3, 4, 5, 6]


def by_label(z, sigma, labels):
    """A made-up conditional denoiser: each class has its value."""
    return z * 0 + (0 if labels is None else (labels.view(-1, 1) + 1.0) * sigma)


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
        buffer.flat("ema").copy_(0.15 * normal(layout.num_parameters, seed=block, dtype=torch.float32))
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
    noise = torch.from_numpy(start_noise((1, 4, 4), num_samples=3, seed=0))
    denoise = guided(runner.denoise, torch.tensor([0, 1, 2]), guidance=guidance, no_class=NO_CLASS)
    end = sample_chain(denoise, noise, sampler_levels(PARTITION, num_steps=num_steps), solver=solver)
    assert runner.loads == [0, 1, 2]
    assert end.isfinite().all()


def test_a_level_is_denoised_by_the_block_that_owns_it(store):
    """The runner's answer is that of the owning block's EMA weights, computed on a network of its own."""
    runner, z, labels = runner_of(store), normal(3, 1, 4, 4, dtype=torch.float32), torch.tensor([0, 1, 4])
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
    noise = torch.from_numpy(start_noise((1, 4, 4), num_samples=num_samples, seed=5))
    labels = class_labels(num_samples, num_classes=NO_CLASS, chosen=None)
    denoise = guided(runner.denoise, labels, guidance=2.0, no_class=NO_CLASS)
    return sample_chain(denoise, noise, sampler_levels(PARTITION, num_steps=6), solver="heun")


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
    z = normal(2, 1, 4, 4, dtype=torch.float32)
    for sigma in (80.0, 5.0, 0.3, 0.05, 0.002):
        runner.denoise(z, sigma, torch.tensor([0, 1]))
    assert asked == [0, 1, 2] == runner.loads


def test_start_noise_is_the_same_for_more_samples():
    """Sample i's noise is decided by (seed, i): the same among 3 and among 10, another for another seed or sample."""
    few, many = (start_noise((2, 3, 3), num_samples=count, seed=1) for count in (3, 10))
    assert few.dtype == np.float32
    np.testing.assert_array_equal(few, many[:3])
    assert len({noise.tobytes() for noise in many}) == 10
    assert not np.array_equal(few, start_noise((2, 3, 3), num_samples=3, seed=2))


def test_start_noise_is_standard_normal():
    """Mean 0 and variance 1 over samples and components."""
    noise = start_noise((3, 8, 8), num_samples=100, seed=0)
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert noise.var() == pytest.approx(1, abs=0.05)


def test_different_positions_have_different_seeds():
    """(1, 23) and (12, 3) are not the same place, and every seed suits numpy and torch."""
    seeds = {seed_at(*position) for position in itertools.product((1, 12, "1"), (23, 3, "order"))}
    assert len(seeds) == len({"/".join(map(str, p)) for p in itertools.product((1, 12, "1"), (23, 3, "order"))})
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_classes_take_turns_unless_one_is_chosen():
    """All classes in turn, or the chosen one for all; none for an unconditional network."""
    assert class_labels(5, num_classes=3, chosen=None).tolist() == [0, 1, 2, 0, 1]
    assert class_labels(3, num_classes=3, chosen=2).tolist() == [2, 2, 2]
    assert class_labels(3, num_classes=0, chosen=None) is None
