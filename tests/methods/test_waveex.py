"""WaveEx: the third-party code written out, its transforms, and the form of our own."""

import math

import numpy as np
import pytest
import torch
from forecasts import assert_same, walk, wavy
from trajectories import Slow, assert_close, start, steered

from cache4diffusion.predictors import WaveletExtrapolation
from cache4diffusion.predictors.wavelet import MOMENTS, analyse, low_pass, synthesise


@pytest.mark.parametrize("wavelet", MOMENTS)
def test_filters_are_orthonormal_with_their_vanishing_moments_and_invert(wavelet):
    taps = np.array(low_pass(wavelet))
    count = MOMENTS[wavelet]
    assert len(taps) == 2 * count
    assert taps.sum() == pytest.approx(math.sqrt(2))
    for shift in range(count):
        product = (taps[2 * shift :] * taps[: len(taps) - 2 * shift]).sum()
        assert product == pytest.approx(float(shift == 0), abs=1e-6)
    high = np.array([(-1) ** n * tap for n, tap in enumerate(reversed(taps))])
    for power in range(count):
        assert (high * (np.arange(len(taps)) / len(taps)) ** power).sum() == pytest.approx(0, abs=1e-4)
    window = np.random.default_rng(0).normal(size=16)
    assert synthesise(*analyse(window, taps), taps) == pytest.approx(window, abs=1e-6)


def test_the_shortest_daubechies_filters_are_the_known_ones():
    r = math.sqrt(3)
    assert sorted(low_pass("db2")) == pytest.approx(
        sorted(x / (4 * math.sqrt(2)) for x in (1 + r, 3 + r, 3 - r, 1 - r))
    )
    assert max(low_pass("db4")) == pytest.approx(0.714846570552915)


def slow_haar(window, order, high):
    """Third-party code on a list of latents, oldest first, with plain sums."""
    if len(window) < 4:
        x = window[::-1]
        d1 = x[0] - x[1] if len(x) > 1 else 0 * x[0]
        second = x[0] - 2 * x[1] + x[2] if len(x) > 2 else 0 * x[0]
        return x[0] + d1 + (second if order == 2 else 0)
    window = window[len(window) % 2 :]
    low = [(a + b) / math.sqrt(2) for a, b in zip(window[::2], window[1::2], strict=True)]
    detail = [(a - b) / math.sqrt(2) for a, b in zip(window[::2], window[1::2], strict=True)]

    def extended(band):
        if order == 2 and len(band) > 2:
            return 3 * band[-1] - 3 * band[-2] + band[-3]
        return 2 * band[-1] - band[-2]

    last = {"extrapolate": extended(detail), "freeze": detail[-1], "zero": 0 * detail[-1]}[high]
    return (extended(low) + last) / math.sqrt(2)


@pytest.mark.parametrize("high", ["extrapolate", "freeze", "zero"])
@pytest.mark.parametrize(("order", "history"), [(1, 2), (1, 4), (1, 5), (2, 6), (2, 3)])
def test_the_literal_form_is_the_third_party_code(order, history, high):
    predictor = WaveletExtrapolation(order, history, high, form="literal")
    strip, used = "FFFFFFFccccFcc", []
    for i, symbol in enumerate(strip):
        used.append(wavy(i) if symbol == "F" else slow_haar(used[-history:], order, high))
    assert_same(walk(predictor, wavy, strip), used, 1e-6)


def test_literal_haar_ignores_the_newest_latent_and_the_aligned_form_does_not():
    newest = [0.0, 2.0, 0.0, -1.0]
    literal = WaveletExtrapolation(1, 4, "extrapolate", form="literal").weights([3.0, 2.0, 1.0, 0.0], 4.0)
    assert literal == pytest.approx(newest)
    assert WaveletExtrapolation(2, 6, "extrapolate", form="literal").weights(
        [5.0, 4, 3, 2, 1, 0], 6.0
    ) == pytest.approx([0, 3, 0, -3, 0, 1])
    assert WaveletExtrapolation(1, 4, "extrapolate").weights([3.0, 2.0, 1.0, 0.0], 4.0) == pytest.approx([2, -1, 0, 0])
    assert WaveletExtrapolation(1, 4, "freeze").weights([3.0, 2.0, 1.0, 0.0], 4.0) == pytest.approx([1.5, 0, -0.5, 0])


@pytest.mark.parametrize("form", ["aligned", "literal"])
def test_constants_are_exact_and_lines_where_it_says_so(form):
    def line(i):
        return torch.tensor([[2.0 * i - 3]], dtype=torch.float64)

    strip = "FFFFFcccc"
    for high in ("extrapolate", "freeze"):
        constant = walk(WaveletExtrapolation(1, 4, high, form=form), lambda i: 0 * line(i) + 7, strip)
        assert_same(constant, [0 * line(i) + 7 for i in range(9)], 1e-9)
    exact = ["extrapolate", "freeze"] if form == "aligned" else ["extrapolate"]
    for high in exact:
        assert_same(walk(WaveletExtrapolation(1, 4, high, form=form), line, strip), [line(i) for i in range(9)], 1e-9)


def test_frozen_details_miss_a_parabola_by_a_constant():
    def parabola(i):
        return torch.tensor([[float(i * i)]], dtype=torch.float64)

    errors = []
    for now in (8, 12):
        predictor = WaveletExtrapolation(1, 4, "freeze", form="literal")
        found = walk(predictor, lambda i, now=now: parabola(i + now), "FFFFc")[-1]
        errors.append(float(found - parabola(now + 4)))
    assert errors[0] == pytest.approx(errors[1])
    assert errors[0] != 0


class Latents(Slow):
    """Cached steps extrapolate the latent; model and solver are both skipped."""

    def __init__(self, strip, order, history, high):
        super().__init__(len(strip))
        self.strip, self.rule, self.window = strip, (order, high), []
        self.history = history

    def run(self):
        x, latents = start()[0], []
        for i in range(self.steps):
            if self.strip[i] == "F":
                x = self.advance(i, x, self.compute(i, x))
            else:
                x = slow_haar(self.window[-self.history :], *self.rule)
            self.window.append(x)
            latents.append(x)
        return latents


def test_the_method_replaces_the_state():
    found, strip, handle = steered("waveex", 20, form="literal", history=4, high="freeze")
    assert [i for i, symbol in enumerate(strip) if symbol == "F"] == [0, 1, 2, 5, 10]
    assert_close(found, Latents(strip, 1, 4, "freeze").run(), 1e-4)
    assert len(handle.trace.of()) == 40, "two branches, every step once"


def test_all_steps_computed_is_the_plain_run():
    assert_close(steered("waveex", 6, full_steps=None)[0], Slow(6).run())
