"""Fréchet distance between two sets of images, in a feature space that needs no download.

FID reads its features from an Inception network, 90 MB of weights from the internet. Here a small convolutional
network with fixed random weights takes its place. It must not be linear: in pixel or PCA space, Gaussian noise with
the mean and covariance of the images would be perfect. ReLU and pooling turn higher moments (edges, strokes, their
sharpness) into means that such noise does not share. Three choices came from measurements on digits and photographs:

- All but four first-layer filters have zero mean. Otherwise brightness drowns texture, and blurred photographs
  score no worse than sharp ones. The four others see brightness and colour.
- The first two layers are averaged over the whole image and enter as logarithms, so that fine texture, weak in
  absolute terms, counts as a ratio.
- The last layer is averaged in each quadrant, so that layout counts: mirrored digits are told from digits.

What the figure is not: FID. It compares only with figures of this same space, with the same number of images (few
images raise it), and is to be read beside the floor, the distance between training and test images at that number.
A random network knows texture, contrast, colour and coarse layout; it knows no objects, and a set that lacks one of
ten classes scores at most twice the floor.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edgeblocks.errors import DataError

FEATURES = 128
FEATURE_SPACE = "random-conv-128 v1 (fixed random ReLU network, images resized to 32x32 RGB; not Inception FID)"

_SEED = 0
_WIDTHS = (32, 32, 16)  # FEATURES = 32 + 32 + 16 per quadrant
_STRIDES = (1, 2, 2)
_ZERO_MEAN_FILTERS = 28
_LOG_FLOOR = 0.03  # activations are near 0.3: a blank image stands out, but does not decide the figure alone


def image_features(images: NDArray[np.uint8], *, batch: int = 16) -> NDArray[np.float64]:
    """Features [N, FEATURES] of uint8 images [N, H, W, C], C being 1 or 3, H and W at least 8.

    Working memory grows with `batch`, not with N: about 4 bytes x batch x (H x W x C + 100,000). The batch size
    changes results by float32 rounding only. 16 take some 7 MB, which the least budget that trains has room for.

    Raises:
        DataError: another dtype or shape.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", with another feature network.
    """
    _check_images(images)
    kernels = _random_kernels()
    features = np.empty((len(images), FEATURES))
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            features[start : start + batch] = _features_of_batch(images[start : start + batch], kernels).numpy()
    return features


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features [N, F] and [M, F]; 0 for equal sets.

    |mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Compare it only with figures of the same feature space, N and
    M, and read it together with the distance between training and test images: that floor is above 0 and falls with N.

    Raises:
        DataError: fewer than two images in a set, or features of different spaces.

    Source: Heusel et al. 2017, equation 6 (Dowson and Landau 1982).

    >>> round(frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]])), 9)
    9.0
    """
    _check_features(first, second)
    root1, root2 = _covariance_root(first), _covariance_root(second)
    shift = first.mean(axis=0) - second.mean(axis=0)
    # tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2). The eigenvalues of
    # S1^(1/2) S2 S1^(1/2) are their squares, and would lose half of the digits where N < F makes S singular.
    trace = np.square(root1).sum() + np.square(root2).sum() - 2 * np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    return max(0.0, float(shift @ shift + trace))


def _check_images(images: NDArray[np.uint8]) -> None:
    shape, dtype = tuple(images.shape), images.dtype
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape[1:3]) < 8:
        raise DataError(
            f"image features of an array {dtype} {list(shape)}: the Fréchet distance needs uint8 [N, H, W, C] with "
            "C 1 or 3 and at least 8x8 pixels; convert the images first"
        )


def _check_features(first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise DataError(
            f"Fréchet distance of features {list(first.shape)} and {list(second.shape)}: both sets must be [N, F] "
            "of one feature space; compute both with image_features"
        )
    if min(len(first), len(second)) < 2:
        raise DataError(
            f"Fréchet distance of {len(first)} against {len(second)} images: a covariance needs at least 2 in each "
            "set, and a useful figure a few hundred; use more images"
        )


def _covariance_root(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root [F, F] of the covariance of features [N, F]."""
    centred = features - features.mean(axis=0)
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / (len(features) - 1))
    # A singular covariance has eigenvalues of about -1e-16 by rounding.
    root: NDArray[np.float64] = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    return root


def _random_kernels() -> list[Tensor]:
    """The three kernels [out, in, 3, 3]: He-uniform, and the same bits on every platform."""
    # Only raw PCG64 integers enter: numpy may change how its Generator makes normal numbers from one version to the
    # next (NEP 19), but not the integers. Of each, 24 bits are used, so that every sum is exact in any order.
    source = np.random.PCG64(_SEED)
    kernels: list[Tensor] = []
    num_in = 3
    for num_out in _WIDTHS:
        fan_in = num_in * 9
        integers = (source.random_raw(num_out * fan_in) >> np.uint64(40)).reshape(num_out, num_in, 3, 3)
        kernel = integers * 2.0**-23 - 1  # uniform in [-1, 1)
        if not kernels:
            kernel[:_ZERO_MEAN_FILTERS] -= kernel[:_ZERO_MEAN_FILTERS].mean(axis=(2, 3), keepdims=True)
        bound = np.sqrt(6 / fan_in)  # He et al. 2015: variance 2 / fan_in
        kernels.append(torch.from_numpy((bound * kernel).astype(np.float32)))
        num_in = num_out
    return kernels


def _features_of_batch(images: NDArray[np.uint8], kernels: list[Tensor]) -> Tensor:
    """Features [n, FEATURES] of uint8 images [n, H, W, C]."""
    x = _as_network_input(images)
    pooled = []
    for kernel, stride in zip(kernels, _STRIDES, strict=True):
        # Borders are repeated: zeros around the image would be seen as a grey frame.
        x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, stride=stride))
        pooled.append(x)
    fine, middle, coarse = pooled
    scales = [(x.mean(dim=(2, 3)) + _LOG_FLOOR).log() for x in (fine, middle)]
    return torch.cat([*scales, F.adaptive_avg_pool2d(coarse, 2).flatten(1)], dim=1)


def _as_network_input(images: NDArray[np.uint8]) -> Tensor:
    """float32 [n, 3, 32, 32] between -1 and 1; anti-aliased, since plain subsampling would add texture of its own."""
    # ascontiguousarray: torch takes no negative strides, which mirrored numpy views have.
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(torch.float32)
    x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
    return x.expand(-1, 3, -1, -1) / 127.5 - 1
