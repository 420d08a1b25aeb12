"""FeMO: the reconstruction on its card, step by step; its search."""

import pytest
import torch
from forecasts import assert_same, slow_femo, walk, wavy

from cache4diffusion.predictors import AdaptedMomentum, Momentum, Taylor
from small_denoisers import accelerated, differences, flux, flux_inputs, sample

STRIP = "FFFccccFccccFcFcccc"  # 6 full steps


@pytest.mark.parametrize(("order", "beta"), [(1, 0.5), (1, 0.9), (2, 0.6)])
def test_with_all_full_steps_kept_every_step_equals_the_cards_pseudo_code(order, beta):
    found = walk(Momentum(order, beta, history=6, first_difference_step=2), wavy, STRIP)
    assert_same(found, slow_femo(wavy, STRIP, order, beta, first_enhance=3))


def test_what_lies_before_the_window_is_all_that_is_lost():
    short, slow = walk(Momentum(1, 0.2, history=5), wavy, STRIP), slow_femo(wavy, STRIP, 1, 0.2, None)
    assert_same(short, slow, 0.01)
    with pytest.raises(AssertionError):
        assert_same(short, slow, 1e-6)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_without_momentum_it_is_taylor(order):
    assert_same(walk(Momentum(order, 0.0, history=4), wavy, STRIP), walk(Taylor(order), wavy, STRIP))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.95])
def test_a_line_is_exact_thanks_to_the_bias_correction(beta):
    def feature(i):
        return torch.tensor([[2.0 * i - 1, 4.0]], dtype=torch.float64)

    found = walk(Momentum(1, beta), feature, STRIP)
    assert_same(found, [feature(i) for i in range(len(STRIP))])


def test_a_search_by_steps_of_0_is_the_fixed_form():
    fixed, adapted = Momentum(1, 0.4), AdaptedMomentum(1, 0.4, gamma=0.0)
    assert_same(walk(adapted, wavy, STRIP, rows=2), walk(fixed, wavy, STRIP))


def test_the_search_goes_where_the_error_was_smaller_row_by_row():
    """On a parabola the newest slope is the best (beta falls); on a line that zigzags the mean is (it rises)."""

    def feature(i):
        return torch.tensor([[float(i) ** 2] * 3, [float(i + 3 * ((i // 3) % 2))] * 3], dtype=torch.float64)

    predictor = AdaptedMomentum(1, 0.5, history=6)
    state = predictor.init(2)
    for i in range(0, 18, 3):
        predictor.update(state, [feature(i)], float(i))
    assert state.betas[0] == pytest.approx(0.0, abs=1e-9) or state.betas[0] < 0.3
    assert state.betas[1] > 0.5
    whole = predictor.predict(state, 16.0)[0]
    for row in range(2):
        alone, single = AdaptedMomentum(1, 0.5, history=6), None
        single = alone.init(1)
        for i in range(0, 18, 3):
            alone.update(single, [feature(i)[row : row + 1]], float(i))
        torch.testing.assert_close(whole[row : row + 1], alone.predict(single, 16.0)[0])


def test_the_search_stays_within_its_bounds():
    predictor = AdaptedMomentum(1, 0.5, gamma=0.4, lowest=0.3, highest=0.6)
    state = predictor.init(2)
    for i in range(0, 30, 3):
        predictor.update(state, [wavy(i)], float(i))
        assert all(0.3 <= beta <= 0.6 for beta in state.betas.values())
    assert state.betas


def test_the_method_composes_both_forms():
    model, inputs = flux(1, 1), flux_inputs(2)
    taylor, _, _ = accelerated(model, inputs, 12, "taylorseer", interval=3, order=1)
    none, trace, _ = accelerated(model, inputs, 12, "femo", interval=3, beta=0.0)
    assert trace.strip() == "FFFccFccFccF"
    assert max(differences(none, taylor)) <= 1e-6
    fixed, _, _ = accelerated(model, inputs, 12, "femo", interval=3)
    assert differences(fixed, taylor)[-1] > 1e-4
    adapted, _, _ = accelerated(model, inputs, 12, "femo", interval=3, adapted=True)
    assert differences(adapted, fixed)[-1] > 0
    still, _, _ = accelerated(model, inputs, 12, "femo", interval=3, adapted=True, gamma=0.0)
    assert max(differences(still, fixed)) <= 1e-6
    assert differences(accelerated(model, inputs, 4, "femo", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4
