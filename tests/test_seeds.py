import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from edgeblocks.seeds import generator_at, seed_at, start_noise


def test_start_noise_is_the_same_for_more_samples():
    """Sample i's noise is decided by (seed, i): the same among 3 and among 10, another for another seed or sample."""
    few, many = (start_noise((2, 3, 3), samples=range(count), seed=1) for count in (3, 10))
    assert few.dtype == np.float32
    np.testing.assert_array_equal(few, many[:3])
    assert len({noise.tobytes() for noise in many}) == 10
    assert not np.array_equal(few, start_noise((2, 3, 3), samples=range(3), seed=2))


def test_start_noise_is_standard_normal():
    """Mean 0 and variance 1 over samples and components."""
    noise = start_noise((3, 8, 8), samples=range(100), seed=0)
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert noise.var() == pytest.approx(1, abs=0.05)


def test_different_positions_have_different_seeds():
    """(1, 23) and (12, 3) are not the same place, and every seed suits numpy and torch."""
    seeds = {seed_at(*position) for position in itertools.product((1, 12, "1"), (23, 3, "order"))}
    assert len(seeds) == len({"/".join(map(str, p)) for p in itertools.product((1, 12, "1"), (23, 3, "order"))})
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_is_decided_by_its_position():
    """The same position draws the same numbers, another one others, and the global generator is not touched."""
    before = torch.get_rng_state()
    one, same, other = (torch.randn(4, generator=generator_at(0, "train", block, 3)) for block in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_for_ever():
    """A seed is a fixed function of its position: runs of former versions can be resumed, samples drawn again."""
    assert seed_at(0, "train", 1, 2) == 7862477292193677372
    assert start_noise((1,), samples=range(1), seed=0)[0, 0] == pytest.approx(-1.3040189, abs=1e-6)


def test_noise_needs_no_torch():
    """The deployed chain draws its noise without torch."""
    program = "import sys, edgeblocks.seeds; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
