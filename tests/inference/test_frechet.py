from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits

from edgeblocks.errors import DataError
from edgeblocks.inference.frechet import FEATURE_SPACE, FEATURES, _random_kernels, frechet_distance, image_features

HALF = 898


@pytest.fixture(scope="module")
def digits():
    """The two halves [898, 8, 8, 1] of sklearn's real digits, shuffled, and the labels of the second half."""
    bundle = load_digits()
    order = np.random.default_rng(0).permutation(len(bundle.images))
    images = np.rint(bundle.images[order] * (255 / 16)).astype(np.uint8)[..., None]
    return images[:HALF], images[HALF : 2 * HALF], bundle.target[order][HALF : 2 * HALF]


def enlarged(images):
    return images.repeat(2, axis=1).repeat(2, axis=2)


def distance(first, second):
    return frechet_distance(image_features(enlarged(first)), image_features(enlarged(second)))


@pytest.fixture(scope="module")
def from_real(digits):
    """The distance of images from the first half of the digits."""
    real = image_features(enlarged(digits[0]))
    return lambda images: frechet_distance(real, image_features(enlarged(images)))


@pytest.fixture(scope="module")
def floor(digits, from_real):
    return from_real(digits[1])


def blurred(images):
    padded = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return np.rint((rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16).astype(np.uint8)


def gaussian_like(images):
    flat = images.reshape(len(images), -1).astype(float)
    draws = np.random.default_rng(1).multivariate_normal(flat.mean(axis=0), np.cov(flat.T), size=len(images))
    return np.rint(draws.clip(0, 255)).astype(np.uint8).reshape(images.shape)


def noisy(images, sigma):
    noise = np.random.default_rng(2).normal(0, sigma, images.shape)
    return np.rint((images + noise).clip(0, 255)).astype(np.uint8)


def test_gaussian_pixels_of_equal_covariance_are_not_real(digits, from_real, floor):
    """Noise with the digits' own mean and covariance, perfect in pixel space, is far above the floor."""
    assert from_real(gaussian_like(digits[1])) > 50 * floor


def test_blurred_digits_are_not_real(digits, from_real, floor):
    """Blur, the look of a denoiser trained too little, is far above the floor."""
    assert from_real(blurred(digits[1])) > 500 * floor


def test_one_class_is_not_all_digits(digits, from_real):
    """A generator that draws threes only is told from real digits, compared at the same number of images."""
    _, second, labels = digits
    threes = second[labels == 3]
    assert from_real(threes) > 4 * from_real(second[: len(threes)])


def test_layout_counts(digits, from_real, floor):
    """Mirrored digits, whose texture is real, are told from digits."""
    assert from_real(digits[1][:, :, ::-1]) > 10 * floor


def test_a_few_hundred_images_suffice(digits):
    """With 200 images a set, blur and Gaussian pixels are still far above the floor of 200 images."""
    first, second, _ = (part[:200] for part in digits)
    floor = distance(first, second)
    assert distance(first, gaussian_like(digits[1])[:200]) > 10 * floor
    assert distance(first, blurred(second)) > 100 * floor


def test_more_noise_is_further_away(digits, from_real, floor):
    """The distance rises with added noise, from the first step on."""
    distances = [floor, *(from_real(noisy(digits[1], sigma)) for sigma in (4, 8, 16, 32, 64))]
    assert all(lower < higher for lower, higher in pairwise(distances)), distances


def test_colour_counts():
    """Swapped red and blue, and colours turned to grey, are told from the coloured originals."""
    rng = np.random.default_rng(0)
    tint = rng.uniform([0.6, 0.3, 0.1], [1.0, 0.6, 0.3], size=(400, 1, 1, 3))
    images = np.rint(rng.uniform(0, 255, size=(400, 12, 12, 1)) * tint).astype(np.uint8)
    first, second = images[:200], images[200:]
    grey = np.rint(second.mean(axis=3, keepdims=True)).astype(np.uint8)
    floor = distance(first, second)
    assert distance(first, second[..., ::-1]) > 10 * floor
    assert distance(first, grey) > 10 * floor


def test_equal_sets_have_no_distance(digits):
    """A set against itself is 0, for full and for singular covariances (fewer images than features)."""
    for images in (digits[0], digits[0][:40], digits[0][:2]):
        assert distance(images, images) == pytest.approx(0, abs=1e-10)


def test_symmetric(digits):
    """The order of the two sets does not matter, even for sets of different sizes."""
    first, second = image_features(digits[0]), image_features(blurred(digits[1])[:100])
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 12), offset=st.floats(-3, 3))
def test_equals_the_textbook_formula(seed, width, offset):
    """Oracle: the formula as FID's authors compute it, with scipy's general matrix square root."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(40, width)) @ rng.normal(size=(width, width))
    second = rng.normal(size=(50, width)) * rng.uniform(0.5, 2, size=width) + offset
    cov1, cov2 = np.atleast_2d(np.cov(first.T)), np.atleast_2d(np.cov(second.T))
    shift = first.mean(axis=0) - second.mean(axis=0)
    expected = shift @ shift + np.trace(cov1 + cov2 - 2 * np.real(sqrtm(cov1 @ cov2)))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(seed=st.integers(0, 2**32 - 1), num=st.integers(2, 6))
def test_never_negative(seed, num):
    """Few images, singular covariances and tiny scales give a finite figure of at least 0."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(num, 5)) * 1e-6
    figure = frechet_distance(first, first + 1e-9 * rng.normal(size=first.shape))
    assert 0 <= figure < 1e-9


def test_batch_size_changes_rounding_only(digits):
    """Features do not depend on how the images were cut into batches, and repeat exactly for the same cut."""
    images = digits[0][:50]
    whole = image_features(images, batch=50)
    np.testing.assert_allclose(image_features(images, batch=7), whole, atol=1e-5)
    np.testing.assert_array_equal(image_features(images, batch=50), whole)


def test_grey_is_grey_rgb():
    """One channel and three equal channels have the same features, at any shape."""
    grey = np.random.default_rng(0).integers(0, 256, size=(3, 50, 9, 1), dtype=np.uint8)
    np.testing.assert_allclose(image_features(grey), image_features(grey.repeat(3, axis=3)), atol=1e-5)


def test_the_weights_never_change():
    """Published figures stay comparable: the weights and one image's features are these, on every machine."""
    kernels = _random_kernels()
    assert [tuple(kernel.shape) for kernel in kernels] == [(32, 3, 3, 3), (32, 32, 3, 3), (16, 32, 3, 3)]
    assert sha256(b"".join(kernel.numpy().astype("<f4").tobytes() for kernel in kernels)).hexdigest() == WEIGHTS_SHA256
    ramp = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) * 4
    np.testing.assert_allclose(image_features(ramp)[0, [0, 31, 40, 127]], RAMP_FEATURES, rtol=1e-3)


WEIGHTS_SHA256 = "b4dbc3c90af46d381f23d59b0d799c0d4daa4c409f3872adce3e74dd329005e3"
RAMP_FEATURES = (-2.00334, -2.11523, -3.3725, 0.0576628)


def test_features_are_float64_of_the_stated_width():
    """No images give an empty array; the space's name states the width."""
    features = image_features(np.zeros((0, 8, 8, 3), dtype=np.uint8))
    assert features.shape == (0, FEATURES)
    assert features.dtype == np.float64
    assert str(FEATURES) in FEATURE_SPACE
    assert "\n" not in FEATURE_SPACE


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 7, 8, 3), (2, 8, 8, 2)])
def test_other_shapes_are_refused(shape):
    """A wrong shape is named in the message."""
    with pytest.raises(DataError, match=str(shape[0])):
        image_features(np.zeros(shape, dtype=np.uint8))


def test_floats_are_refused():
    """Floats have no known range, so they are refused by name."""
    with pytest.raises((DataError, TypeError), match=r"float64|f64"):  # jaxtyping's check, on in tests, comes first
        image_features(np.zeros((2, 8, 8, 1)))


def test_one_image_is_refused():
    """A covariance needs two images; the message gives both numbers."""
    with pytest.raises(DataError, match="1 against 5 images"):
        frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))


def test_mixed_feature_spaces_are_refused():
    """Features of different widths are not compared."""
    with pytest.raises(DataError, match=r"\[3, 4\] and \[3, 5\]"):
        frechet_distance(np.zeros((3, 4)), np.zeros((3, 5)))
