"""Image quality against a reference, and confidence intervals for shares.

Images are ``[N, H, W, 3]`` in 0..1: float32 numpy arrays as diffusers' ``output_type="np"`` gives them, torch tensors
of the same shape, or lists of PIL images. Every metric returns one value per image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import MeasureError, require

if TYPE_CHECKING:
    from PIL.Image import Image

METRIC_LIBRARIES = ("skimage.metrics", "flip_evaluator")
"""What `ssim` and `flip` import when they are called."""

SSIM_WINDOW = 11  # pixels: 3.5 standard deviations of 1.5 to either side


def as_images(images: Any) -> np.ndarray:
    """Bring ``images`` to a float32 array ``[N, H, W, 3]`` in 0..1.

    Args:
        images: array or tensor ``[N, H, W, 3]`` in 0..1, or a sequence of PIL images of one size.
    Raises:
        MeasureError: another shape, NaN or Inf, or values outside 0..1 (beyond rounding, 1e-3).
    """
    if isinstance(images, list | tuple) and images and hasattr(images[0], "convert"):
        images = list(images)
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise MeasureError(f"Images of different sizes {sizes} cannot be one batch; resize them first.")
        return np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images])
    if isinstance(images, torch.Tensor):
        images = images.detach().float().cpu().numpy()
    array = np.asarray(images, dtype=np.float32)
    if array.ndim != 4 or array.shape[-1] != 3:
        hint = (
            "; move the channels last: images.transpose(0, 2, 3, 1)" if array.ndim == 4 and array.shape[1] == 3 else ""
        )
        raise MeasureError(f"Images have shape {list(array.shape)}, expected [N, H, W, 3]{hint}.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=(1, 2, 3)).sum())
        raise MeasureError(f"{bad} of {len(array)} images contain NaN or Inf.")
    if array.size and (array.min() < -1e-3 or array.max() > 1 + 1e-3):
        raise MeasureError(f"Images span {array.min():.3g}..{array.max():.3g}, expected 0..1; scale them first.")
    return np.ascontiguousarray(array.clip(0, 1))


def as_pil(images: Any) -> list[Image]:
    """8-bit PIL images of a batch, rounded to the nearest level; accepts what `as_images` accepts."""
    from PIL import Image

    return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in as_images(images)]


def _pair(images: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    images, reference = as_images(images), as_images(reference)
    if images.shape != reference.shape:
        raise MeasureError(f"Images {list(images.shape)} and their reference {list(reference.shape)} differ in shape.")
    return images, reference


def psnr(images: Any, reference: Any) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, higher is closer: ``-10 log10(mean squared error)``, peak 1.

    Args:
        images, reference: ``[N, H, W, 3]`` in 0..1.
    Returns:
        float64 ``[N]``; ``inf`` for identical images. (Results files write that as ``null``: JSON has no infinity.)
    """
    images, reference = _pair(images, reference)
    error = np.square(images.astype(np.float64) - reference).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(images: Any, reference: Any) -> np.ndarray:
    """Structural similarity of Wang et al. 2004, -1..1, 1 for identical images.

    Gaussian window of 11 pixels (standard deviation 1.5), K1 = 0.01, K2 = 0.03, population covariance; computed per
    colour channel by scikit-image and averaged. About 5 ms per 128 x 128 image.

    Args:
        images, reference: ``[N, H, W, 3]`` in 0..1, ``H`` and ``W`` at least 11.
    Returns:
        float64 ``[N]``.
    """
    images, reference = _pair(images, reference)
    if min(images.shape[1:3]) < SSIM_WINDOW:
        raise MeasureError(f"SSIM needs images of at least 11 x 11 pixels, got {images.shape[1]} x {images.shape[2]}.")
    similarity = require("skimage.metrics").structural_similarity
    values = [
        similarity(
            one, other, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for one, other in zip(images, reference, strict=True)
    ]
    return np.asarray(values, dtype=np.float64)


def flip(images: Any, reference: Any) -> np.ndarray:
    """Mean LDR-FLIP (Andersson et al. 2020): the difference seen when flipping between two images, 0..1, 0 is none.

    NVIDIA's own implementation at its default 67 pixels per degree (a 4K monitor seen from 0.7 m); inputs are sRGB.
    About 20 ms per 128 x 128 image.

    Args:
        images, reference: ``[N, H, W, 3]`` in 0..1.
    Returns:
        float64 ``[N]``.
    """
    images, reference = _pair(images, reference)
    evaluate = require("flip_evaluator").evaluate
    # (error map, mean, parameters) = evaluate(reference, test, range, inputs are sRGB, apply magma, compute mean)
    values = [evaluate(other, one, "LDR", True, False, True)[1] for one, other in zip(images, reference, strict=True)]
    return np.asarray(values, dtype=np.float64)


def wilson_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for one proportion: where ``|successes/total - p| <= z sqrt(p (1 - p) / total)``.

    Sound at 0 and at 1, where the plain normal interval has zero width. ``total = 0`` gives (0, 1).

    Raises:
        MeasureError: not ``0 <= successes <= total``, or ``level`` outside 0..1.
    """
    z = quantile(level)
    if not 0 <= successes <= total:
        raise MeasureError(f"wilson_interval(successes={successes}, total={total}): need 0 <= successes <= total.")
    if total == 0:
        return 0.0, 1.0
    p, weight = successes / total, z * z / total
    centre = (p + weight / 2) / (1 + weight)
    half = z * math.sqrt(p * (1 - p) / total + weight / (4 * total)) / (1 + weight)
    lower = 0.0 if successes == 0 else max(0.0, centre - half)
    upper = 1.0 if successes == total else min(1.0, centre + half)
    return lower, upper


def paired_interval(a: Sequence[Any], b: Sequence[Any], level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval for ``mean(a) - mean(b)`` of paired 0/1 outcomes.

    The interval holds every difference ``d`` that the score test does not reject,
    ``|(x - y) - n d| <= z sqrt(n (2 q(d) + d (1 - d)))``, where ``x`` counts the pairs with only ``a`` true, ``y``
    those with only ``b`` true, and ``q(d)`` is the maximum-likelihood probability of the latter if the difference is
    ``d``. Holds its level for small ``n`` and few discordant pairs, where the normal interval fails; with no discordant
    pair at all it is ``± z² / (n + z²)`` and not a point.

    Args:
        a, b: outcomes of the same cases in the same order, each 0 or 1 (or bool), ``n >= 1`` of them.
        level: confidence level, between 0 and 1.
    Returns:
        (lower, upper), each in -1..1; always contains ``mean(a) - mean(b)``.
    Raises:
        MeasureError: lengths differ, nothing given, values other than 0 and 1, or ``level`` outside 0..1.
    Source: T. Tango, Statistics in Medicine 17 (1998) 891-908.
    """
    z = quantile(level)
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise MeasureError(
            f"paired_interval needs two lists of one length >= 1, got shapes {first.shape} and {second.shape}."
        )
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise MeasureError("paired_interval needs outcomes of 0 or 1.")
    only_a = int(((first == 1) & (second == 0)).sum())
    only_b = int(((first == 0) & (second == 1)).sum())
    return tango_interval(only_a, only_b, len(first), z)


def tango_interval(only_a: int, only_b: int, n: int, z: float) -> tuple[float, float]:
    """`paired_interval` from counts: pairs where only ``a`` (only ``b``) is true, of ``n``; ``z``: normal quantile."""
    estimate = (only_a - only_b) / n

    def statistic(d: float) -> float:
        # q maximises the likelihood of the discordant counts given the difference: 2n q^2 - B q - C = 0.
        linear = only_a + only_b - (2 * n - only_a + only_b) * d
        constant = only_b * d * (1 - d)
        q = (linear + math.sqrt(max(linear * linear + 8 * n * constant, 0.0))) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        distance = only_a - only_b - n * d
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    def boundary(outside: float, target: float) -> float:
        inside = estimate
        for _ in range(200):  # bisection: the statistic falls monotonically with d
            middle = (inside + outside) / 2
            if abs(statistic(middle)) < target:
                inside = middle
            else:
                outside = middle
        return inside

    lower = -1.0 if estimate == -1 else boundary(-1.0, z)
    upper = 1.0 if estimate == 1 else boundary(1.0, z)
    return lower, upper


def quantile(level: float) -> float:
    """Of the normal distribution: what lies within this many standard deviations has the share ``level``."""
    if not 0 < level < 1:
        raise MeasureError(f"level={level}: a confidence level lies between 0 and 1, for example 0.95.")
    return NormalDist().inv_cdf((1 + level) / 2)
