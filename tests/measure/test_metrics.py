import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import minimize_scalar

from cache4diffusion.measure import (
    MeasureError,
    MissingExtraError,
    as_images,
    as_pil,
    flip,
    paired_interval,
    psnr,
    ssim,
    wilson_interval,
)

Z = 1.959963984540054


@pytest.fixture
def images():
    return np.random.default_rng(0).random((2, 24, 32, 3), dtype=np.float32)


def test_identical_images_are_infinitely_close(images):
    assert np.isposinf(psnr(images, images)).all()
    assert ssim(images, images) == pytest.approx([1, 1])
    assert flip(images, images) == pytest.approx([0, 0], abs=1e-6)


def test_psnr_of_a_constant_offset_is_minus_20_log10_of_it():
    dark = np.full((3, 16, 16, 3), 0.25, np.float32)
    assert psnr(dark + np.float32([0.1, 0.01, 0.5]).reshape(3, 1, 1, 1), dark) == pytest.approx(
        [20, 40, 6.0206], abs=1e-4
    )


def test_metrics_agree_with_independent_implementations(images):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    other = (images + np.random.default_rng(1).normal(0, 0.05, images.shape)).clip(0, 1).astype(np.float32)
    one, two = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (other, images))
    theirs = peak_signal_noise_ratio(one, two, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert psnr(other, images) == pytest.approx(theirs.numpy(), abs=1e-4)
    _, theirs = structural_similarity_index_measure(
        one.double(), two.double(), data_range=1.0, sigma=1.5, kernel_size=11, return_full_image=True
    )
    inside = theirs[..., 5:-5, 5:-5]  # windows that lie in the image, as in the paper; theirs go on by reflection
    assert ssim(other, images) == pytest.approx(inside.mean(dim=(1, 2, 3)).numpy(), abs=1e-5)


def test_flip_of_black_and_white_is_near_its_maximum_and_grows_with_the_difference():
    black = np.zeros((1, 32, 32, 3), np.float32)
    values = [flip(black + level, black)[0] for level in (0.1, 0.3, 1.0)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1, abs=0.05)


def test_arrays_tensors_and_pil_images_give_the_same(images):
    pictures = as_pil(images)
    assert pictures[0].size == (32, 24)
    array = as_images(pictures)
    assert np.abs(array - images).max() <= 0.5 / 255 + 1e-6
    assert psnr(torch.from_numpy(array), images) == pytest.approx(psnr(pictures, images))
    assert as_images(torch.from_numpy(array).to(torch.bfloat16)).dtype == np.float32


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((2, 3, 24, 32)), "channels last"),
        (np.zeros((24, 32, 3)), r"expected \[N, H, W, 3\]"),
        (np.full((1, 24, 32, 3), 200.0), "expected 0..1"),
        (np.full((1, 24, 32, 3), np.nan), "1 of 1 images contain NaN"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "different sizes"),
    ],
)
def test_unusable_images_are_refused_with_the_reason(bad, words):
    with pytest.raises(MeasureError, match=words):
        as_images(bad)


def test_shapes_must_agree_and_ssim_needs_11_pixels(images):
    with pytest.raises(MeasureError, match="differ in shape"):
        psnr(images, images[:1])
    with pytest.raises(MeasureError, match="11 x 11"):
        ssim(images[:, :8], images[:, :8])


def test_a_missing_library_is_named_with_the_command(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"cache4diffusion\[measure\]\""):
        flip(images, images)


# --- intervals --------------------------------------------------------------------------------------------------------


def outcomes(both, only_a, only_b, neither):
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return a, b


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Airway hyper-responsiveness before and after stem cell transplantation, in Fagerland et al. 2014, table V.
        ((1, 1, 7, 12), (-0.517, -0.026)),
        # Approval ratings of a prime minister, in Agresti, Categorical Data Analysis, 11.1: score interval.
        ((794, 150, 86, 570), (0.021, 0.059)),
    ],
)
def test_paired_interval_equals_published_examples(table, expected):
    assert paired_interval(*outcomes(*table)) == pytest.approx(expected, abs=6e-4)


def test_without_discordant_pairs_the_interval_is_still_wide():
    n = 480
    bound = Z**2 / (n + Z**2)
    assert paired_interval([1] * n, [1] * n) == pytest.approx((-bound, bound), abs=1e-9)


@pytest.mark.parametrize("counts", [(1, 7, 21), (0, 5, 60), (12, 3, 100), (20, 31, 480), (0, 9, 9), (9, 0, 9)])
def test_the_bounds_are_where_a_score_test_by_brute_force_rejects(counts):
    only_a, only_b, n = counts
    interval = paired_interval(*outcomes(n - only_a - only_b, only_a, only_b, 0))

    def score(d):  # constrained likelihood maximised numerically, no formula
        def loss(q):
            terms = ((only_b, q), (only_a, q + d), (n - only_a - only_b, 1 - 2 * q - d))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

        low, high = max(0.0, -d), (1 - d) / 2
        q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (only_a - only_b - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))

    for bound, sign in zip(interval, (1, -1), strict=True):
        if abs(bound) < 1:
            assert score(bound) == pytest.approx(sign * Z, abs=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_interval_holds_the_difference_and_turns_with_the_order(pairs):
    a, b = zip(*pairs, strict=True)
    low, high = paired_interval(a, b)
    assert -1 <= low <= np.mean(a) - np.mean(b) <= high <= 1
    assert paired_interval(b, a) == pytest.approx((-high, -low), abs=1e-9)
    wide = paired_interval(a, b, level=0.99)
    assert wide[0] <= low
    assert wide[1] >= high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        a = rng.random(60) < 0.85
        b = np.where(rng.random(60) < 0.1, ~a, a)
        hits += (lambda i: i[0] <= 0.85 - (0.85 * 0.9 + 0.15 * 0.1) <= i[1])(paired_interval(a, b))
    assert hits / 600 > 0.93


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, score method.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_equals_published_examples(successes, total, expected):
    assert wilson_interval(successes, total) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired_interval([1, 0], [1]), "one length"),
        (lambda: paired_interval([], []), "one length >= 1"),
        (lambda: paired_interval([2], [1]), "0 or 1"),
        (lambda: paired_interval([1], [1], level=95), "between 0 and 1"),
        (lambda: wilson_interval(3, 2), "0 <= successes <= total"),
    ],
)
def test_bad_arguments_of_intervals_are_refused(call, words):
    with pytest.raises(MeasureError, match=words):
        call()
