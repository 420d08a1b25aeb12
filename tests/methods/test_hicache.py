"""HiCache: the card's reference numbers and oracles, and its pseudo-code step by step."""

import math

import pytest
import torch
from forecasts import assert_same, slow_hicache, walk, wavy
from hypothesis import given
from hypothesis import strategies as st

from cache4diffusion.predictors import Hermite, Reuse, Taylor
from cache4diffusion.predictors.hermite import hermite
from small_denoisers import accelerated, differences, flux, flux_inputs, sample

STRIP = "FFFcccccFccccccFcccc"


def test_weights_are_the_cards_reference_numbers():
    weights = Hermite(2, sigma=0.5).weights([14.0, 8.0, 2.0], 17.0)
    assert weights == pytest.approx([1.274306, -0.298611, 0.024306], abs=5e-7)


@given(st.floats(-3, 3))
def test_polynomials_are_the_physicists(x):
    assert hermite(3, x) == pytest.approx([1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x], abs=1e-9)


@pytest.mark.parametrize(("order", "sigma"), [(1, 0.5), (2, 0.5), (2, 0.71), (3, 0.6)])
def test_every_step_equals_the_cards_pseudo_code(order, sigma):
    found = walk(Hermite(order, sigma, first_difference_step=2), wavy, STRIP)
    assert_same(found, slow_hicache(wavy, STRIP, order, sigma, first_enhance=3))


def test_sigma_of_root_one_half_and_order_1_is_taylor():
    found = walk(Hermite(1, math.sqrt(0.5)), wavy, STRIP)
    assert_same(found, walk(Taylor(1), wavy, STRIP))


def test_order_0_is_plain_reuse():
    assert all(
        torch.equal(a, b) for a, b in zip(walk(Hermite(0), wavy, STRIP), walk(Reuse(), wavy, STRIP), strict=True)
    )


@given(st.floats(0.05, 0.7), st.integers(1, 10))
def test_on_a_line_a_small_sigma_lies_strictly_between_reuse_and_taylor(sigma, k):
    value = sum(w * t for w, t in zip(Hermite(1, sigma).weights([10.0, 6.0], 10.0 + k), [10.0, 6.0], strict=True))
    assert 10 < value < 10 + k, "forward: a mixed-up sign would lead below 10"


def test_a_constant_is_exact():
    found = walk(Hermite(3, 0.4), lambda i: torch.full((1, 2), 2.5, dtype=torch.float64), STRIP)
    assert_same(found, [torch.full((1, 2), 2.5, dtype=torch.float64)] * len(STRIP))


def test_the_method_is_this_predictor_on_taylorseers_schedule():
    model, inputs = flux(1, 1), flux_inputs(1)
    found, trace, _ = accelerated(model, inputs, 12, "hicache", interval=4, order=1, sigma=math.sqrt(0.5))
    taylor, _, _ = accelerated(model, inputs, 12, "taylorseer", interval=4, order=1)
    assert trace.strip() == "FFFcccFcccFc"
    assert max(differences(found, taylor)) <= 1e-6
    damped, _, _ = accelerated(model, inputs, 12, "hicache", interval=4)
    assert differences(damped, taylor)[-1] > 1e-4
    assert differences(accelerated(model, inputs, 4, "hicache", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4
