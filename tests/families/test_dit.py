import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from support.blocks import fresh_block, random_block, seeded
from torch import nn

from edgeblocks.diffusion.noise import loss_weight, partition_noise
from edgeblocks.errors import ConfigError
from edgeblocks.families.base import ImageInfo, Level
from edgeblocks.families.dit import SIGMA_DATA, Dit, DitSettings
from edgeblocks.families.settings import MOST
from edgeblocks.settings.presets import load_preset

SETTINGS = DitSettings(width=16, depth=3, heads=2, patch=2)
DATA = ImageInfo(channels=2, height=4, width=6, num_classes=5, mean=0.4, scale=1.7)
SIGMAS = torch.tensor([0.002, 0.3, 80.0])


pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count, seed=0, data=DATA):
    """uint8 images [N, H, W, C] and labels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, data.height, data.width, data.channels), dtype=np.uint8)
    return pixels, rng.integers(0, max(data.num_classes, 1), count)


def whole_range(family):
    return partition_noise(family.noise, num_blocks=1, kind="equal-probability", overlap=0.0).ranges[0]


def test_a_block_is_edms_denoiser_around_its_network():
    """forward equals c_skip z + c_out F(c_in z, ln(sigma)/4), computed image by image in Python floats."""
    block = random_block(Dit(SETTINGS, DATA))
    z, labels = torch.randn(3, 2, 4, 6, generator=seeded()), torch.tensor([0, 3, 5])
    with torch.no_grad():
        denoised = block(z, SIGMAS, labels)
        for i, sigma in enumerate(SIGMAS.tolist()):
            variance = sigma * sigma + SIGMA_DATA * SIGMA_DATA
            c_skip, c_out = SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / math.sqrt(variance)
            raw = block.raw(z[i : i + 1] / math.sqrt(variance), torch.tensor([math.log(sigma) / 4]), labels[i : i + 1])
            assert raw.abs().max() > 0.01
            torch.testing.assert_close(denoised[i], c_skip * z[i] + c_out * raw[0], rtol=1e-4, atol=1e-5)


def test_a_fresh_block_returns_its_skip_connection():
    """At initialisation the readout is zero, so D = c_skip z exactly."""
    block = fresh_block(Dit(SETTINGS, DATA))
    z = torch.randn(3, 2, 4, 6, generator=seeded())
    c_skip = (SIGMA_DATA**2 / (SIGMAS**2 + SIGMA_DATA**2)).view(-1, 1, 1, 1)
    assert torch.equal(block(z, SIGMAS, torch.tensor([0, 1, 2])), c_skip * z)


def test_the_output_depends_on_noise_level_class_and_position():
    """Another sigma, another class, and tokens in other places each change the network's answer."""
    block = random_block(Dit(SETTINGS, DATA))
    x, c_noise, labels = torch.randn(1, 2, 4, 6, generator=seeded()), torch.tensor([0.1]), torch.tensor([1])
    with torch.no_grad():
        raw = block.raw(x, c_noise, labels)
        for other in (block.raw(x, c_noise + 0.05, labels), block.raw(x, c_noise, labels + 1)):
            assert (other - raw).abs().max() > 1e-3
        swapped = block.raw(x.roll(2, dims=3), c_noise, labels).roll(-2, dims=3)
        assert (swapped - raw).abs().max() > 1e-3


def test_initialisation_is_dits():
    """Gates, readout and biases are zero, embeddings normal with 0.02, all other maps Xavier-uniform."""
    block = fresh_block(Dit(replace(SETTINGS, width=64), DATA))
    for name, parameter in block.named_parameters():
        if name.endswith("bias") or "modulation" in name or name.startswith("readout"):
            assert not parameter.any(), name
        elif name.startswith(("noise_", "label_")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max() <= bound * 1.0001, name


def test_initialisation_is_that_of_the_generator():
    """The same seed gives the same block to the last bit, another seed another one."""
    family = Dit(SETTINGS, DATA)
    blocks = [family.block(num_layers=2, checkpointing=False) for _ in range(3)]
    for block, seed in zip(blocks, (1, 1, 2), strict=True):
        block.init_(seeded(seed))
    one, same, other = ([parameter.detach() for parameter in block.parameters()] for block in blocks)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_tables_are_no_parameters():
    """Positions are made again by reset_tables_ and appear neither among parameters nor in the state."""
    block = fresh_block(Dit(SETTINGS, DATA))
    assert block.positions.shape == (6, 16)
    assert "positions" not in dict(block.named_parameters())
    assert "positions" not in block.state_dict()


def test_checkpointing_changes_no_bit_of_a_step():
    """A block's loss and all its gradients are bit-identical with and without activation checkpointing."""
    family = Dit(SETTINGS, DATA)
    batch = family.draw(*pictures(4), whole_range(family), seeded())
    results = []
    for checkpointing in (False, True):
        block = random_block(family, num_layers=3, checkpointing=checkpointing)
        loss = family.loss(block, batch)
        loss.sum().backward()
        results.append([loss.detach(), *(parameter.grad for parameter in block.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert plain.abs().sum() > 0
        assert torch.equal(plain, checkpointed)


def test_the_loss_is_the_weighted_error_of_each_sample():
    """Trap 2: loss[n] = w(sigma[n]) mean((D_n - y_n)^2), one number a sample.

    With weights of shape [N, 1] the loss would be [N, N], and its mean would average the weights away.
    """
    family = Dit(SETTINGS, DATA)
    block = random_block(family)
    batch = family.draw(*pictures(6), whole_range(family), seeded())
    batch["sigma"] = torch.tensor([0.01, 0.1, 0.5, 1.0, 10.0, 80.0])
    with torch.no_grad():
        loss = family.loss(block, batch)
        assert loss.shape == (6,)
        expected = []
        for n, sigma in enumerate(batch["sigma"]):
            z = batch["clean"][n] + sigma * batch["eps"][n]
            denoised = block(z[None], sigma[None], batch["labels"][n : n + 1])[0]
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            expected.append(weight * (denoised - batch["clean"][n]).square().mean())
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-3, atol=1e-6)
    weights, errors = loss_weight(batch["sigma"], SIGMA_DATA), loss / loss_weight(batch["sigma"], SIGMA_DATA)
    averaged = (errors[None, :] * weights[:, None]).mean()
    assert abs(averaged / loss.mean() - 1) > 0.5, "the case must tell the two apart"


def test_a_samples_loss_does_not_depend_on_its_neighbours():
    """The loss of a sample is the same alone and in a batch: micro-batches add up to the batch."""
    family = Dit(SETTINGS, DATA)
    block = random_block(family)
    batch = family.draw(*pictures(5), whole_range(family), seeded())
    with torch.no_grad():
        together = family.loss(block, batch)
        alone = [family.loss(block, {name: value[n : n + 1] for name, value in batch.items()}) for n in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_a_perfect_denoiser_has_no_loss():
    """Whatever the noise, D = clean gives exactly zero for every sample."""
    family = Dit(SETTINGS, DATA)
    batch = family.draw(*pictures(4), whole_range(family), seeded())

    class Perfect(nn.Module):
        def forward(self, z, sigma, labels):
            return batch["clean"].clone()

    assert torch.equal(family.loss(Perfect(), batch), torch.zeros(4))


def test_the_denoiser_sees_the_clean_image_plus_sigma_eps():
    """The block's input is z = clean + sigma eps with the batch's own levels and labels."""
    family = Dit(SETTINGS, DATA)
    batch = family.draw(*pictures(4), whole_range(family), seeded())
    seen = {}

    class Listener(nn.Module):
        def forward(self, z, sigma, labels):
            seen.update(z=z, sigma=sigma, labels=labels)
            return z

    family.loss(Listener(), batch)
    expected = batch["clean"] + batch["sigma"].view(-1, 1, 1, 1) * batch["eps"]
    torch.testing.assert_close(seen["z"], expected)
    assert torch.equal(seen["sigma"], batch["sigma"])
    assert torch.equal(seen["labels"], batch["labels"])


def test_pixels_become_zero_mean_with_the_datas_scale():
    """x = (pixel/255 - mean) scale, channels first and contiguous."""
    pixels, _ = pictures(2)
    images = DATA.to_model(pixels)
    assert images.is_contiguous()
    expected = (pixels.transpose(0, 3, 1, 2) / 255 - DATA.mean) * DATA.scale
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)


def test_a_draw_is_decided_by_its_generator():
    """The same generator state gives the same batch bit for bit, another one another noise."""
    family = Dit(replace(SETTINGS, flip=True), DATA)
    one, same, other = (family.draw(*pictures(8), whole_range(family), seeded(seed)) for seed in (3, 3, 4))
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
    assert not torch.equal(one["eps"], other["eps"])
    assert not torch.equal(one["sigma"], other["sigma"])


def test_a_draw_has_the_shapes_of_its_spec():
    """batch_spec names every tensor of a batch with its shape and dtype: the cost trace relies on it."""
    for data in (DATA, replace(DATA, num_classes=0)):
        family = Dit(SETTINGS, data)
        pixels, labels = pictures(7)
        batch = family.draw(pixels, labels if family.conditional else None, whole_range(family), seeded())
        drawn = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
        assert drawn == dict(family.batch_spec(7))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_training_levels_are_uniform_in_q_within_the_widened_range(block):
    """Of 4,000 draws none leaves [train_low, train_high], and q(sigma) is uniform by Kolmogorov-Smirnov at 0.1 %."""
    family = Dit(SETTINGS, replace(DATA, height=2, width=2))
    noise_range = partition_noise(family.noise, num_blocks=3, kind="equal-probability", overlap=0.05).ranges[block]
    count = 4000
    batch = family.draw(np.zeros((count, 2, 2, 2), np.uint8), np.zeros(count, np.int64), noise_range, seeded(block))
    sigma = batch["sigma"].double()
    assert sigma.min() >= noise_range.train_low * (1 - 1e-6)
    assert sigma.max() <= noise_range.train_high * (1 + 1e-6)
    low, high = family.noise.quantile(noise_range.train_low), family.noise.quantile(noise_range.train_high)
    shares = np.sort([(family.noise.quantile(s) - low) / (high - low) for s in sigma.tolist()])
    distance = max(
        np.abs(shares - np.arange(count) / count).max(), np.abs(shares - np.arange(1, count + 1) / count).max()
    )
    assert distance < 1.95 / math.sqrt(count)


def test_noise_is_standard_normal():
    """eps has mean 0, variance 1 and no correlation between samples' components."""
    family = Dit(SETTINGS, DATA)
    eps = family.draw(*pictures(500), whole_range(family), seeded())["eps"].flatten(1)
    assert abs(eps.mean()) < 4 / math.sqrt(eps.numel())
    assert abs(eps.var() - 1) < 0.05
    assert torch.corrcoef(eps.T).fill_diagonal_(0).abs().max() < 0.25


def test_a_tenth_of_the_labels_is_dropped_for_guidance():
    """Dropped labels become num_classes; their share is label_dropout within four standard deviations."""
    data = replace(DATA, height=2, width=2)
    pixels, labels = pictures(6000, data=data)
    for rate in (0.1, 0.0, 0.5):
        family = Dit(replace(SETTINGS, label_dropout=rate), data)
        drawn = family.draw(pixels, labels, whole_range(family), seeded())["labels"].numpy()
        dropped = drawn == data.num_classes
        assert abs(dropped.mean() - rate) <= 4 * math.sqrt(rate * (1 - rate) / 6000)
        np.testing.assert_array_equal(drawn[~dropped], labels[~dropped])


def test_flipping_mirrors_about_half_of_the_images():
    """With flip, each image is itself or its mirror image from left to right; without, always itself."""
    pixels, labels = pictures(400)
    plain = Dit(SETTINGS, DATA).draw(pixels, labels, whole_range(Dit(SETTINGS, DATA)), seeded())["clean"]
    family = Dit(replace(SETTINGS, flip=True), DATA)
    assert torch.equal(plain, family.data.to_model(pixels))
    clean = family.draw(pixels, labels, whole_range(family), seeded())["clean"]
    mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(clean, plain, strict=True)])
    assert 140 < mirrored.sum() < 260
    assert torch.equal(clean[mirrored], plain[mirrored].flip(-1))


def test_evaluation_uses_one_level_and_leaves_images_and_labels_alone():
    """at_level neither flips nor drops labels, and every sample has the level asked for."""
    family = Dit(replace(SETTINGS, flip=True, label_dropout=0.9), DATA)
    pixels, labels = pictures(50)
    batch = family.at_level(pixels, labels, Level.at(0.7), seeded())
    assert torch.equal(batch["clean"], family.data.to_model(pixels))
    np.testing.assert_array_equal(batch["labels"].numpy(), labels)
    assert torch.equal(batch["sigma"], torch.full((50,), 0.7))


def test_without_classes_the_network_is_unconditional():
    """num_classes = 0: no label embedding, no labels in a batch, and a step without them gives gradients."""
    family = Dit(SETTINGS, replace(DATA, num_classes=0))
    assert not family.conditional
    block = random_block(family)
    assert not [name for name, _ in block.named_parameters() if "label" in name]
    batch = family.draw(pictures(3)[0], None, whole_range(family), seeded())
    assert "labels" not in batch
    family.loss(block, batch).sum().backward()
    assert all(parameter.grad.any() for parameter in block.parameters())


def test_every_parameter_of_a_conditional_block_learns():
    """No parameter is left out of the loss."""
    family = Dit(SETTINGS, DATA)
    block = random_block(family)
    family.loss(block, family.draw(*pictures(16), whole_range(family), seeded())).sum().backward()
    assert [name for name, parameter in block.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 20, "heads": 3}, ["width=20", "heads=3"]),
        ({"width": 18, "heads": 3}, ["width=18", "divisible by 4"]),
        ({"heads": 0, "depth": 0}, ["heads=0", "depth=0"]),
        ({"patch": 3}, ["patch=3", "height 4"]),
        ({"patch": 4}, ["patch=4", "width 6", "image_size"]),
        ({"label_dropout": 1.0, "p_std": -1.0}, ["label_dropout=1.0", "p_std=-1.0"]),
        ({"sigma_min": 80.0}, ["sigma_min=80.0", "sigma_max=80.0"]),
        ({"sigma_min": 0.0, "sigma_max": -1e31}, ["sigma_min=0.0", "sigma_max=-1e+31"]),
        ({"width": 0, "heads": 3, "p_mean": 1e31}, ["width=0", "p_mean=1e+31"]),
    ],
)
def test_impossible_shapes_are_refused_with_all_their_reasons(changes, words):
    """A family that cannot be built says why, with the numbers."""
    with pytest.raises(ConfigError) as caught:
        Dit(replace(SETTINGS, **changes), DATA)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "published"), [("dit-s", 33e6), ("dit-b", 130e6), ("dit-l", 458e6), ("dit-xl", 675e6)]
)
def test_presets_have_the_published_number_of_parameters(preset, published):
    """On 4x32x32 latents with 1,000 classes, uncut, within 3 % of table 1 in arXiv 2212.09748; no memory is needed."""
    shape = {field.name for field in fields(DitSettings)}
    values = {key: value for key, value in load_preset(preset).items() if key in shape}
    data = ImageInfo(channels=4, height=32, width=32, num_classes=1000, mean=0.0, scale=1.0)
    family = Dit(DitSettings(**values), data)
    with torch.device("meta"):
        block = family.block(num_layers=family.num_layers, checkpointing=False)
    assert all(parameter.is_meta for parameter in block.parameters())
    assert sum(parameter.numel() for parameter in block.parameters()) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(("key", "most"), MOST.items())
def test_sizes_have_an_upper_bound(key, most):
    """What no machine holds is a problem with its numbers, before anything is made from it."""
    other = {"width": {"heads": 1}, "heads": {"width": most}}.get(key, {})
    assert DitSettings(**{key: most, **other}).problems() == []
    found = DitSettings(**{key: most + 1, **other}).problems()
    assert f"{key}={most + 1}: input should be less than or equal to {most}" in found


@pytest.mark.parametrize("values", [{"sigma_max": 1e300}, {"sigma_min": 1e-320}, {"p_mean": -1e308}, {"p_std": 1e31}])
def test_noise_levels_stay_where_their_powers_are_floats(values):
    """A sampler raises them to the seventh power's root and back."""
    (problem,) = DitSettings(**values).problems()
    assert next(iter(values)) in problem
