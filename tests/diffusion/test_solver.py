import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch

from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise, sampler_levels
from edgeblocks.diffusion.solver import check_request, class_number, classes_in_turn, guide, integrate
from edgeblocks.errors import ConfigError
from edgeblocks.planning.memory import SAMPLE_COPIES


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
    end = integrate(lambda z, sigma: y.clone(), normal(3, 2, seed=1), levels_of(num_steps), solver=solver)
    torch.testing.assert_close(end, y, rtol=0, atol=1e-12)


def test_a_step_with_a_perfect_denoiser_keeps_the_noise():
    """EDM's sign: from y + sigma eps a perfect D leads to y + sigma_next eps (with the paper's, noise would grow)."""
    y, eps = normal(4, 3), normal(4, 3, seed=1)
    levels = levels_of(6)
    seen = []

    def perfect(z, sigma):
        seen.append((sigma, z.clone()))
        return y.clone()

    # The chain starts from sigma_max noise; choose it so that the start is y + sigma_max eps.
    integrate(perfect, y / levels[0] + eps, levels, solver="euler")
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

    integrate(listen, noise, levels_of(3), solver="heun")
    torch.testing.assert_close(seen[0], 80.0 * kept)
    assert torch.equal(noise, kept)


def test_the_chain_ends_in_a_denoised_image():
    """After the last level comes sigma 0: the result is D at sigma_min, nothing of the noise left."""
    end = integrate(torch.full_like, normal(2, 3), [5.0, 1.0, 0.25], solver="euler")
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
    integrate(denoise, noise, levels, solver=solver)
    z_start = noise * levels[0]
    exact = MU + (z_start - MU) * math.sqrt((SD**2 + levels[-1] ** 2) / (SD**2 + levels[0] ** 2))
    # Heun looks at the last level twice, at its prediction and then at its result.
    return (arrived[-1] - exact).abs().mean().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_order_of_the_solvers(solver, order):
    """Halving the steps' length divides the error by 2 (Euler) and 4 (Heun), on Gaussian data of known solution."""
    errors = [ode_error(solver, num_steps) for num_steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_samples_of_gaussian_data_have_its_mean_and_spread():
    """With the exact denoiser, 4,000 samples have mean MU and deviation SD within 5 %."""
    samples = integrate(gaussian_denoiser, normal(4000), levels_of(60), solver="heun")
    assert samples.mean().item() == pytest.approx(MU, abs=0.05)
    assert samples.std().item() == pytest.approx(SD, rel=0.05)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 6), ("heun", 11)])
def test_evaluations_a_level(solver, evaluations):
    """Euler runs the network once a level, Heun twice except at the last; on_level counts the levels."""
    calls, done = [], []

    def denoise(z, sigma):
        calls.append(sigma)
        return torch.zeros_like(z)

    integrate(denoise, normal(2), levels_of(6), solver=solver, on_level=done.append)
    assert len(calls) == evaluations
    assert calls == sorted(calls, reverse=True)
    assert done == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_numpy_and_torch_integrate_to_the_same_bits(solver):
    """With the same denoiser, the deployed chain's arrays and the training chain's tensors end equal bit for bit."""
    noise = normal(5, 3, dtype=torch.float32)

    def denoise(z, sigma):
        return z * (SD**2 / (SD**2 + sigma**2)) + MU

    in_torch = integrate(denoise, noise, levels_of(18), solver=solver)
    in_numpy = integrate(denoise, noise.numpy(), levels_of(18), solver=solver)
    assert in_numpy.dtype == np.float32
    np.testing.assert_array_equal(in_torch.numpy(), in_numpy)


@pytest.mark.parametrize(("solver", "copies"), [("euler", 4), ("heun", 5)])
def test_the_solver_keeps_few_copies_of_the_samples(solver, copies):
    """As many as the plan of a grid counts, the denoiser's answer included."""
    size = 2**20

    def denoise(z, sigma):
        return z * 0.5

    tracemalloc.start()
    try:
        integrate(denoise, np.ones(size, np.float32), levels_of(4), solver=solver)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < (copies + 0.1) * 4 * size
    assert copies <= SAMPLE_COPIES


def test_guidance_goes_beyond_the_class():
    """D = D_null + g (D_class - D_null): g = 0 is no class, 1 the class, 2 as far again."""
    null, conditional = np.array([1.0, 2.0]), np.array([3.0, -1.0])
    np.testing.assert_allclose(guide(conditional, null, 0.0), null)
    np.testing.assert_allclose(guide(conditional, null, 1.0), conditional)
    np.testing.assert_allclose(guide(conditional, null, 2.0), [5.0, -4.0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n": 0}, ["--n 0"]),
        ({"steps": 0}, ["--steps 0"]),
        ({"guidance": -1.0}, ["--guidance -1.0"]),
        ({"guidance": math.nan}, ["--guidance nan"]),
        ({"conditional": False}, ["without"]),
        ({"n": -2, "steps": 0, "guidance": math.inf}, ["--n -2", "--steps 0", "--guidance inf"]),
    ],
)
def test_all_that_is_wrong_with_a_request_is_said(wrong, words):
    """Each impossible number is named with its flag, all in one error."""
    fine = {"n": 1, "steps": 1, "guidance": 2.0, "conditional": True}
    check_request(**fine)
    check_request(**{**fine, "guidance": 1.0, "conditional": False})
    with pytest.raises(ConfigError) as caught:
        check_request(**{**fine, **wrong})
    assert len(caught.value.problems) == len(words)
    assert all(word in str(caught.value) for word in words)


def test_a_class_is_found_by_name_before_number():
    """A class whose name is a number is found by its name; other numbers are places."""
    assert class_number("1", ("7", "1", "0")) == 1
    assert class_number(0, ("7", "1", "0")) == 2
    assert class_number("2", ("7", "1", "0")) == 2


@pytest.mark.parametrize("label", ["bird", 2, "-1", "1.0", "²", ""])
def test_a_class_that_does_not_exist_is_refused(label):
    """The error lists the classes there are."""
    with pytest.raises(ConfigError, match="dog, cat"):
        class_number(label, ("dog", "cat"))


def test_a_class_of_a_network_without_classes_is_refused():
    """There is nothing to choose from."""
    with pytest.raises(ConfigError, match="without classes"):
        class_number("dog", ())


@pytest.mark.parametrize(("typed", "kept"), [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_a_class_is_found_however_its_accents_are_written(typed, kept):
    """A Mac takes letters apart; what is typed is composed. The very name goes first."""
    assert class_number(typed, ("bar", kept)) == 1
    assert class_number(kept, (typed, kept)) == 1


def test_classes_that_look_the_same_are_told_apart():
    """A message must not show the very name that it says is not there."""
    with pytest.raises(ConfigError, match=r"the 2 classes are bar, 'cafe\\u0301'"):
        class_number("cafe", ("bar", "cafe\u0301"))
    both = ("caf\u00e9\u0323", "cafe\u0301\u0323")
    with pytest.raises(
        ConfigError, match=r"the classes 0 \('caf\\xe9\\u0323'\), 1 \('cafe\\u0301\\u0323'\) are written so"
    ):
        class_number("caf\u1eb9\u0301", both)


def test_classes_take_turns_unless_one_is_chosen():
    """All classes in turn, or the chosen one for all; none for an unconditional network."""
    assert classes_in_turn(5, num_classes=3, chosen=None).tolist() == [0, 1, 2, 0, 1]
    assert classes_in_turn(3, num_classes=3, chosen=2).tolist() == [2, 2, 2]
    assert classes_in_turn(3, num_classes=0, chosen=None) is None
