"""FoCa: the closed form against the recursion, and what both reproduce."""

import pytest
import torch
from forecasts import assert_same, slow_anchored, slow_foca, walk, wavy

from cache4diffusion.predictors import ForecastCalibrate, Taylor
from small_denoisers import accelerated, differences, flux, flux_inputs, sample

STRIPS = ["FFFccccFccccFFccFcccc", "FcccFccFcFFcccccccc", "FccccccccFccc"]


@pytest.mark.parametrize("strip", STRIPS)
def test_the_closed_form_is_the_recursion(strip):
    assert_same(walk(ForecastCalibrate(), wavy, strip), slow_foca(wavy, strip))


@pytest.mark.parametrize("strip", STRIPS)
def test_the_anchored_form_is_its_recursion(strip):
    assert_same(walk(ForecastCalibrate("anchored"), wavy, strip), slow_anchored(wavy, strip))


def test_without_calibration_the_local_slope_goes_on():
    found = walk(ForecastCalibrate("bdf2"), wavy, "FFccFccc")
    local = wavy(4) - found[3]
    assert_same(found[5:], [wavy(4) + k * local for k in (1, 2, 3)])


@pytest.mark.parametrize("form", ["paper", "anchored", "bdf2"])
@pytest.mark.parametrize("strip", STRIPS)
def test_a_line_is_exact_for_any_pattern_of_gaps(form, strip):
    def feature(i):
        return torch.tensor([[3.0 * i - 2, 1.0 - i]], dtype=torch.float64)

    second = [i for i, symbol in enumerate(strip) if symbol == "F"][1]
    found = walk(ForecastCalibrate(form), feature, strip)
    assert_same(found[second:], [feature(i) for i in range(second, len(strip))])


def test_after_two_adjacent_full_steps_it_is_taylor_of_order_1():
    strip = "FFcccccc"
    assert_same(walk(ForecastCalibrate(), wavy, strip), walk(Taylor(1), wavy, strip))


def test_the_slope_relaxes_to_that_between_full_steps():
    found = walk(ForecastCalibrate(), wavy, "FcccFcccFcc" + "c" * 40)
    slope = (wavy(8) - wavy(4)) / 4
    assert_same([found[-1] - found[-2]], [slope], 1e-9)


def test_rows_with_their_own_full_steps_are_as_if_alone():
    predictor, strips = ForecastCalibrate(), ["FFcccFccc", "FcFccccFc"]
    together, alone = predictor.init(2), [predictor.init(1) for _ in strips]
    for i in range(9):
        full = [row for row, strip in enumerate(strips) if strip[i] == "F"]
        rest = [row for row in range(2) if row not in full]
        if rest:
            (value,) = predictor.predict(together, float(i), rest)
            for place, row in enumerate(rest):
                torch.testing.assert_close(value[place : place + 1], predictor.predict(alone[row], float(i))[0])
        if full:
            predictor.update(together, [wavy(i)[full]], float(i), full)
        for row in full:
            predictor.update(alone[row], [wavy(i)[row : row + 1]], float(i))


def test_the_method_differs_from_taylorseer_and_is_off_at_1():
    model, inputs = flux(1, 1), flux_inputs(1)
    found, trace, _ = accelerated(model, inputs, 12, "foca", interval=4)
    taylor, _, _ = accelerated(model, inputs, 12, "taylorseer", interval=4, order=1)
    assert trace.strip() == "FFFcccFcccFc"
    assert max(differences(found, taylor)[:7]) <= 1e-6, "after the adjacent full steps of the warm-up they agree"
    assert differences(found, taylor)[7] > 1e-4
    assert differences(accelerated(model, inputs, 4, "foca", interval=1)[0], sample(model, inputs, 4)) == [0.0] * 4
